"""float16 with a dynamic loss scale: found, saved, and without effect on anything but range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm import recipe as recipes
from internlm.recipe import Recipe
from internlm.train.loss_scale import FIRST, GROWTH_STEPS, LEAST, LossScale

Make = Callable[..., Recipe]


def test_the_scale_is_halved_by_overflow_and_doubled_by_many_good_steps() -> None:
    scale = LossScale.of(torch.float16)
    assert scale.update(False)
    assert scale.value == FIRST / 2
    for _ in range(GROWTH_STEPS):
        assert not scale.update(True)
    assert (scale.value, scale.good_steps) == (FIRST, 0)
    scale.value = LEAST
    assert not scale.update(False), "nothing is left to lower: the step itself is bad"


def test_other_dtypes_have_no_scale() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale.of(dtype)
        assert not scale.update(False)
        assert scale.value == 1


def test_a_scale_changes_neither_loss_nor_norm_nor_update(recipe: Make, tmp_path: Path) -> None:
    found = []
    for value in (1.0, 1024.0):
        trainer = recipes.prepare(recipe(run=str(tmp_path / str(value))))
        trainer.scale.value = value
        found.append([trainer.step() for _ in range(3)][-1])
        weight = trainer.model.head.weight.detach()
    assert found[0]["train/step_loss"] == pytest.approx(found[1]["train/step_loss"], rel=1e-6)
    assert found[0]["optim/grad_norm"] == pytest.approx(found[1]["optim/grad_norm"], rel=1e-6)
    assert weight.isfinite().all()


def test_float16_trains_lowers_its_scale_on_overflow_and_resumes_with_it(recipe: Make, tmp_path: Path) -> None:
    value = recipe(runtime={"device": "cpu", "dtype": "float16"}, train__tokens=12 * 256)
    trainer = recipes.prepare(value)
    trainer.scale.value = 2.0**21  # overflows: gradients of about 1 are over 65,504
    before = trainer.model.head.weight.detach().clone()
    trainer.step()
    assert torch.equal(trainer.model.head.weight, before)
    assert trainer.progress.skipped_steps == 0
    assert trainer.scale.value == 2.0**20
    while trainer.progress.step < 12:
        metrics = trainer.step()
    assert metrics["train/step_loss"] < 5.5
    assert trainer.scale.value < 2.0**20
    trainer.save()
    again = recipes.prepare(value)
    assert vars(again.scale) == vars(trainer.scale)
