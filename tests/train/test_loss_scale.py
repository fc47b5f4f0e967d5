"""float16 with a dynamic loss scale: found, saved, and without effect on anything but range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from internlm import recipe as recipes
from internlm.recipe import Recipe
from internlm.train.step import FIRST_SCALE, GROWTH_STEPS, LEAST_SCALE, LossScale

Make = Callable[..., Recipe]


def test_the_scale_is_halved_by_overflow_and_doubled_by_many_good_steps() -> None:
    scale = LossScale.of(torch.float16)
    assert scale.update(False)
    assert scale.value == FIRST_SCALE / 2
    for _ in range(GROWTH_STEPS):
        assert not scale.update(True)
    assert (scale.value, scale.good_steps) == (FIRST_SCALE, 0)
    scale.value = LEAST_SCALE
    assert not scale.update(False), "nothing is left to lower: the step itself is bad"


def test_an_overflow_starts_the_count_of_good_steps_anew() -> None:
    scale = LossScale.of(torch.float16)
    assert not scale.update(True)
    assert scale.update(False)
    assert (scale.value, scale.good_steps) == (FIRST_SCALE / 2, 0)


def test_other_dtypes_have_no_scale() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale.of(dtype)
        assert not scale.update(False)
        assert scale.value == 1


def test_a_scale_changes_neither_loss_nor_norm_nor_update(recipe: Make, tmp_path: Path) -> None:
    """Bit by bit: it is a power of two, and nothing here comes near the ends of fp32's range."""
    found = []
    for value in (1.0, 1024.0):
        trainer = recipes.prepare(recipe(run=str(tmp_path / str(value))))
        trainer.stepper.scale.value = value
        start = {name: p.detach().clone() for name, p in trainer.parallel.named_parameters()}
        steps = [trainer.stepper.step() for _ in range(3)]
        numbers = [(step["train/step_loss"], step["optim/grad_norm"]) for step in steps]
        weights = {name: p.detach() for name, p in trainer.parallel.named_parameters()}
        assert not any(torch.equal(weights[name], start[name]) for name in start)
        found.append((numbers, weights | trainer.stepper.optimizer.named_state()))
    (numbers, state), (scaled_numbers, scaled_state) = found
    assert numbers == scaled_numbers
    assert state.keys() == scaled_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, scaled_state[name]), name


def test_float16_trains_lowers_its_scale_on_overflow_and_resumes_with_it(recipe: Make, tmp_path: Path) -> None:
    value = recipe(runtime={"device": "cpu", "dtype": "float16"}, train__tokens=12 * 256)
    trainer = recipes.prepare(value)
    trainer.stepper.scale.value = 2.0**21  # overflows: gradients of about 1 are over 65,504
    before = trainer.model.head.weight.detach().clone()
    trainer.stepper.step()
    assert torch.equal(trainer.model.head.weight, before)
    assert trainer.progress.skipped_steps == 0
    assert trainer.stepper.scale.value == 2.0**20
    while trainer.progress.step < 12:
        metrics = trainer.stepper.step()
    assert metrics["train/step_loss"] < 5.5
    assert trainer.stepper.scale.value < 2.0**20
    trainer.save()
    again = recipes.prepare(value)
    assert vars(again.stepper.scale) == vars(trainer.stepper.scale)
