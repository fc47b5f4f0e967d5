"""Loss spikes: seen before the update, and answered as the recipe says."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm import recipe as recipes
from internlm.checkpoint import store
from internlm.data.batch import Batch
from internlm.optim.optimizer import Optimizer
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from internlm.train.trainer import Trainer
from internlm.train.watch.spikes import SpikeConfig, Spikes

Make = Callable[..., Recipe]


def falling(count: int, seed: int = 0) -> list[float]:
    """Losses of a run that goes well: falling, with noise."""
    generator = random.Random(seed)
    return [3 + 3 * 0.99**step + generator.gauss(0, 0.05) for step in range(count)]


def found(losses: list[float], **config: object) -> list[int]:
    spikes = Spikes(SpikeConfig(**config))  # type: ignore[arg-type]
    return [step for step, loss in enumerate(losses) if spikes.add(loss) is not None]


def test_a_run_that_goes_well_has_no_spikes() -> None:
    for seed in range(10):
        assert found(falling(1000, seed)) == [], seed


def test_a_jump_is_found_wherever_it_lies_after_the_first_steps() -> None:
    for step in (32, 100, 500, 999):
        losses = falling(1000)
        losses[step] += 1.5
        assert found(losses) == [step]


def test_nothing_is_judged_before_there_is_something_to_judge_by() -> None:
    losses = falling(200)
    losses[31] += 5
    assert found(losses) == []
    assert found(losses, least=31) == [31]


def test_a_level_that_has_moved_is_not_a_spike_for_ever() -> None:
    moved = falling(300)[:200] + [loss + 2 for loss in falling(500)[200:]]
    steps = found(moved)
    assert steps[0] == 200
    assert steps[-1] < 220, "an eighth of the window, and the median has followed"


def test_losses_that_hardly_move_have_no_spikes() -> None:
    assert found([2.0] * 100 + [2.05] * 20) == []
    assert found([2.0] * 100 + [3.0]) == [100]


def test_off_is_off() -> None:
    losses = falling(200)
    losses[150] += 9
    assert found(losses, policy="off") == []


STEPS = 44
POISONED = range(31 * 8, 33 * 8)
"""Rows of the run whose labels are noise: two steps."""


def trained(recipe: Make, run: Path, policy: str, rows: range = POISONED) -> Trainer:
    """Train with noise in these rows, wherever in the run they are drawn."""
    spikes = {"policy": policy, "least": 16, "window": 32}
    checkpoint = {"every_steps": 10, "keep_last": 20}
    changes = {"train__tokens": STEPS * 256, "checkpoint": checkpoint, "spikes": spikes, "optim__lr": 1e-2}
    trainer = recipes.prepare(recipe(run=str(run), **changes))
    draw = trainer.stepper.loader.next_batch

    def drawn(count: int) -> Batch:
        first = sum(trainer.stepper.loader.state_dict()["taken"].values())
        batch = draw(count)
        if first not in rows:
            return batch
        noise = torch.randint(280, batch.labels.shape, generator=torch.Generator().manual_seed(first))
        return dataclasses.replace(batch, labels=noise)

    trainer.stepper.loader.next_batch = drawn  # type: ignore[method-assign]
    trainer.fit()
    return trainer


def last_loss(run: Path) -> float:
    return [line["valid/loss/held"] for line in read_metrics(run / "metrics.jsonl") if "valid/loss/held" in line][-1]


def test_after_poisoned_data_the_run_goes_back_passes_over_it_and_ends_where_the_clean_run_ends(
    recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean = trained(recipe, tmp_path / "clean", "rollback", range(0))
    assert clean.progress.passed_over == []
    caplog.clear()
    trainer = trained(recipe, tmp_path / "run", "rollback")
    passed = trainer.progress.passed_over
    assert [sum(one["from"].values()) for one in passed] == [30 * 8, 30 * 8]
    assert [sum(one["to"].values()) for one in passed] == [32 * 8, 33 * 8]
    assert "spreads above the last" in caplog.text
    assert "back at step 30" in caplog.text
    checkpoint = store.open_checkpoint(tmp_path / "run")
    assert checkpoint.step == STEPS
    assert checkpoint.meta["passed_over"] == passed, "on record"
    assert sum(checkpoint.meta["loader"]["taken"].values()) == (STEPS + 3) * 8
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1)), "every step once"
    assert last_loss(tmp_path / "run") == pytest.approx(last_loss(tmp_path / "clean"), rel=0.05)


@pytest.mark.parametrize(("policy", "skipped"), [("warn", 0), ("skip_data", 2)])
def test_other_policies_go_on_with_or_without_the_update(
    recipe: Make, tmp_path: Path, policy: str, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[int] = []
    step = Optimizer.step

    def counted(self: Optimizer, share: float) -> None:
        updates.append(1)
        step(self, share)

    monkeypatch.setattr(Optimizer, "step", counted)
    trainer = trained(recipe, tmp_path / "run", policy)
    assert trainer.progress.spikes == 2
    assert len(updates) == STEPS - skipped
    assert trainer.progress.passed_over == []


def test_a_spike_before_the_first_checkpoint_is_a_warning(
    recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spikes = {"policy": "rollback", "least": 16}
    trainer = recipes.prepare(recipe(train__tokens=20 * 256, spikes=spikes))
    trainer.stepper.spikes.losses.extend([1.0, 1.01] * 10)
    trainer.fit()
    assert trainer.progress.step == 20
    assert "not going back: there is no checkpoint yet" in caplog.text


def test_a_run_does_not_go_back_for_ever(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spikes = {"policy": "rollback", "most_rollbacks": 2}
    trainer = recipes.prepare(recipe(checkpoint={"every_steps": 2}, spikes=spikes))
    monkeypatch.setattr(Spikes, "add", lambda self, loss: 9.9)
    updated: list[int] = []
    update = trainer.stepper.optimizer.step
    monkeypatch.setattr(
        trainer.stepper.optimizer, "step", lambda rate: (updated.append(trainer.progress.step), update(rate))
    )
    trainer.fit()
    assert trainer.progress.step == 20
    assert len(trainer.progress.passed_over) == 2
    assert "not going back: 2 times is enough" in caplog.text
    assert updated == [1, 2, *range(3, 21)], "a warning only: every step is made, but those that were gone back from"


def test_the_spike_that_a_run_went_back_from_is_none_of_the_losses_it_looks_back_on(recipe: Make) -> None:
    trainer = recipes.prepare(recipe(spikes={"policy": "rollback"}))
    trainer.stepper.step()
    trainer.save()
    trainer.stepper.step()
    losses = list(trainer.stepper.spikes.losses)
    trainer.stepper.spikes.add(99.0)
    trainer._roll_back(store.open_checkpoint(trainer.run), 99.0)
    assert list(trainer.stepper.spikes.losses) == losses
