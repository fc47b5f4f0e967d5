"""What became of the time of a run: every second in one phase, restarts included; and which rank is slow."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import config
from internlm import recipe as recipes
from internlm.checkpoint import store
from internlm.parallel.mesh import Layout
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from internlm.train.trainer import Trainer
from internlm.train.watch import goodput as module
from internlm.train.watch.goodput import FILE, Goodput, read, sentence
from internlm.train.watch.stragglers import LOOKS, Stragglers
from tests.processes import forked

Make = Callable[..., Recipe]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def spend(self, goodput: Goodput, phase: Any, seconds: float) -> None:
        with goodput.within(phase):
            self.now += seconds


def spent(goodput: Goodput) -> dict[str, float]:
    return {name: seconds for name, seconds in goodput.seconds.items() if seconds}


def test_every_second_since_the_first_start_is_in_one_phase(tmp_path: Path) -> None:
    clock = Clock()
    goodput = Goodput(tmp_path, clock, born=990.0)
    with goodput.kept():
        for phase, seconds in (("data", 1), ("useful", 60), ("evaluate", 5), ("checkpoint", 2), ("useful", 20)):
            clock.spend(goodput, phase, seconds)
        clock.now += 2
    assert spent(goodput) == {"startup": 10, "data": 1, "useful": 80, "evaluate": 5, "checkpoint": 2, "other": 2}
    shares = goodput.shares()
    assert shares["goodput/wall_s"] == 100
    assert shares["goodput/useful"] == 0.8
    assert sum(v for k, v in shares.items() if k not in ("goodput/wall_s", "goodput/starts")) == pytest.approx(1)
    assert (
        str(goodput) == "goodput 80.0% of 1m40s | startup 10.0%, evaluate 5.0%, other 2.0%, checkpoint 2.0%, data 1.0%"
    )


def test_a_step_that_turns_out_to_be_skipped_is_not_useful(tmp_path: Path) -> None:
    clock = Clock()
    goodput = Goodput(None, clock, born=1000.0)
    goodput.enter("useful")
    clock.now += 3
    goodput.enter("other", was="skipped")
    assert spent(goodput) == {"skipped": 3}


def test_a_run_that_stands_still_keeps_its_time_and_its_hang_is_no_useful_step(tmp_path: Path) -> None:
    clock = Clock()
    goodput = Goodput(tmp_path, clock, born=1000.0)
    clock.spend(goodput, "useful", 30)
    saved = goodput.seconds["useful"]
    goodput.enter("useful")
    clock.now += 1200
    goodput.stall()
    found = read(tmp_path / FILE)
    assert found is not None
    assert {name: seconds for name, seconds in found["seconds"].items() if seconds} == {"useful": 30, "stalled": 1200}
    assert found["until"] == clock.now
    clock.now += 10
    again = Goodput(tmp_path, clock, born=clock.now)
    again.go_back(saved)
    assert spent(again) == {"useful": 30, "stalled": 1200, "down": 10}


def test_a_restart_adds_up_and_knows_what_was_lost_and_how_long_nothing_ran(tmp_path: Path) -> None:
    clock = Clock()
    first = Goodput(tmp_path, clock, born=1000.0)
    clock.spend(first, "useful", 30)
    saved = first.seconds["useful"]
    clock.spend(first, "useful", 12)
    first.write(at_once=True)
    clock.now += 50  # killed
    second = Goodput(tmp_path, clock, born=clock.now - 8)
    second.go_back(saved)
    second.enter("other")
    assert spent(second) == {"useful": 30, "lost": 12, "down": 42, "startup": 8}
    assert second.starts == 2
    clock.spend(second, "useful", 12)
    second.go_back(30)  # a rollback to the same checkpoint
    assert spent(second) == {"useful": 30, "lost": 24, "down": 42, "startup": 8}
    assert second.shares()["goodput/wall_s"] == clock.now - 1000


def test_a_checkpoint_that_knows_more_than_the_file_is_believed(tmp_path: Path) -> None:
    clock = Clock()
    first = Goodput(tmp_path, clock, born=1000.0)
    clock.spend(first, "useful", 30)
    first.write(at_once=True)
    clock.spend(first, "useful", 5)
    saved = first.seconds["useful"]  # in a checkpoint; killed before the file was written
    clock.now += 20
    second = Goodput(tmp_path, clock, born=clock.now)
    second.go_back(saved)
    assert spent(second) == {"useful": 35, "down": 20}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"seconds": {"useful": "x"}}', '{"seconds": {"useful": NaN}, "starts": 1, "until": 1}']
)
def test_a_damaged_file_is_a_new_beginning(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert read(tmp_path / FILE) is None
    assert Goodput(tmp_path, Clock(), born=1000.0).starts == 1


def test_a_clock_that_is_set_back_counts_nothing(tmp_path: Path) -> None:
    clock = Clock()
    goodput = Goodput(tmp_path, clock, born=1000.0)
    clock.now = 900.0
    goodput.enter("useful")
    clock.now = 910.0
    goodput.enter("other")
    assert spent(goodput) == {"useful": 10}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "internlm")
    (tmp_path / "file").touch()
    goodput = Goodput(tmp_path / "file", Clock(), born=1000.0)
    goodput.write(at_once=True)
    goodput.write(at_once=True)
    assert len(caplog.records) == 1


def test_the_file_is_written_now_and_then_only(tmp_path: Path) -> None:
    clock = Clock()
    goodput = Goodput(tmp_path, clock, born=1000.0)
    goodput.write()
    clock.spend(goodput, "useful", 1)
    goodput.write()
    found = read(tmp_path / FILE)
    assert found is not None
    assert found["seconds"]["useful"] == 0
    clock.spend(goodput, "useful", 10)
    goodput.write()
    found = read(tmp_path / FILE)
    assert found is not None
    assert found["seconds"]["useful"] == 11


def test_small_shares_are_not_said() -> None:
    assert sentence({"useful": 0.9995, "data": 0.0005}, 7200) == "goodput 100.0% of 2h00m"


def test_the_trainer_says_in_which_phase_it_is(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = recipes.prepare(recipe(train__tokens=10 * 256, evaluate={"every_steps": 5}))
    clock = Clock()
    trainer.stepper.goodput = Goodput(tmp_path / "run", clock, born=clock.now)
    sums = trainer.stepper._sums

    def spoilt(loss: torch.Tensor) -> Any:
        return [value * (math.nan if trainer.progress.step == 2 else 1) for value in sums(loss)]  # of step 3

    monkeypatch.setattr(trainer.stepper, "_sums", spoilt)

    def takes(seconds: float, thing: Any, name: str) -> None:
        call = getattr(thing, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            clock.now += seconds
            return call(*arguments, **named)

        monkeypatch.setattr(thing, name, slow)

    takes(1, trainer.parallel.run, "train")
    takes(2, trainer.stepper.loader, "next_batch")
    takes(10, trainer.evaluator, "evaluate")
    takes(5, trainer, "save")
    trainer.fit()
    found = read(tmp_path / "run" / FILE)
    assert found is not None
    assert {name: seconds for name, seconds in found["seconds"].items() if seconds} == {
        "useful": 9, "skipped": 1, "data": 20, "evaluate": 20, "checkpoint": 5,
    }  # fmt: skip
    last = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "goodput/useful" in line][-1]
    assert (last["goodput/wall_s"], last["goodput/useful"]) == (40, 9 / 40), "before the second evaluation"


def test_the_time_is_kept_between_two_lines_of_the_log_too(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm.train.watch.goodput.WRITE_EVERY_S", 0.0)
    trainer = recipes.prepare(recipe(train__tokens=4 * 256, train__log_every_steps=100))
    step, seen = trainer.stepper.step, []

    def looked() -> Any:
        found = read(tmp_path / "run" / FILE)
        seen.append(found["seconds"]["useful"] if found else 0.0)
        return step()

    trainer.stepper.step = looked  # type: ignore[method-assign]
    trainer.fit()
    assert len(set(seen)) == 4, "each step finds what the one before it took"


def test_a_rollback_loses_the_steps_since_the_checkpoint(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(
        recipe(train__tokens=8 * 256, checkpoint={"every_steps": 3}, spikes={"policy": "rollback"})
    )
    spikes = iter([None] * 5 + [20.0] + [None] * 10)  # step 6
    trainer.stepper.spikes.add = lambda _: next(spikes)  # type: ignore[method-assign]
    trainer.save = _counted(trainer)  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.progress.passed_over
    seconds = trainer.goodput.seconds
    assert seconds["lost"] > 0
    assert seconds["skipped"] > 0
    assert store.open_checkpoint(tmp_path / "run").meta["useful_s"] == pytest.approx(seconds["useful"])


def _counted(trainer: Trainer) -> Callable[..., Path]:
    save = trainer.save

    def saved(*, wait: bool = True) -> Path:
        return save(wait=True)  # the checkpoint is there when the spike comes

    return saved


def slow_steps_and_a_kill(at: int | None) -> None:
    """Let the trainer of this process take longer, and be killed in a step."""
    prepare = recipes.prepare

    def prepared(*arguments: Any) -> Trainer:
        trainer = prepare(*arguments)
        forward = trainer.parallel.run.train

        def slow(*given: Any) -> Any:
            time.sleep(0.05)
            if trainer.progress.step + 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(*given)

        trainer.parallel.run.train = slow  # type: ignore[method-assign]
        return trainer

    recipes.prepare = prepared
    module.WRITE_EVERY_S = 0.0


def test_a_killed_run_that_goes_on_counts_lost_steps_and_the_time_between(recipe: Make, tmp_path: Path) -> None:
    value = recipe(train__tokens=16 * 256, checkpoint={"every_steps": 8, "background": False})
    (tmp_path / "r.yaml").write_text(config.dump(value))
    begun = time.time()
    assert forked("train", str(tmp_path / "r.yaml"), hook=partial(slow_steps_and_a_kill, 14)).returncode == -9
    before = read(tmp_path / "run" / FILE)
    checkpoint = store.open_checkpoint(tmp_path / "run")
    assert before is not None
    assert checkpoint.step == 8
    time.sleep(0.5)
    again = time.time()
    done = forked("train", str(tmp_path / "r.yaml"), hook=partial(slow_steps_and_a_kill, None))
    assert done.returncode == 0, done.stderr
    after = read(tmp_path / "run" / FILE)
    assert after is not None
    seconds = after["seconds"]
    assert after["starts"] == 2
    assert seconds["lost"] == pytest.approx(before["seconds"]["useful"] - checkpoint.meta["useful_s"])
    assert seconds["lost"] >= 5 * 0.05
    assert seconds["useful"] >= 16 * 0.05
    born = before["until"] - sum(before["seconds"].values())
    assert born >= begun - 0.05  # the system tells it in hundredths
    assert sum(seconds.values()) == pytest.approx(after["until"] - born, abs=0.01)
    assert again - 0.05 <= before["until"] + seconds["down"] <= again + 3
    assert f"goodput {seconds['useful'] / sum(seconds.values()):.1%} of " in done.stderr


def table(own: list[float], data: list[float] | None = None) -> torch.Tensor:
    rows = [[0.1, 0.05, spent + 0.05, wait] for spent, wait in zip(own, data or [0.0] * len(own), strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def watcher(monkeypatch: pytest.MonkeyPatch, **layout: int) -> Stragglers:
    monkeypatch.setattr("internlm.ranks.gather", lambda value: [f"node{rank}" for rank in range(8)])
    return Stragglers(Layout(**layout))


def test_a_rank_that_stays_slow_is_named_once_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watcher(monkeypatch, replicate=4)
    warnings = []
    for _ in range(LOOKS + 3):
        metrics, warning = watch.look(table([1.0, 1.0, 2.0, 1.1]))
        warnings.append(warning)
        assert metrics["ranks/slowest_rank"] == 2
        assert metrics["ranks/slowest_ratio"] == pytest.approx(2)
    assert [warning is not None for warning in warnings] == [False] * (LOOKS - 1) + [True] + [False] * 3
    assert "rank 2 on node2 takes 2.0 × the median" in str(warnings[LOOKS - 1])
    watch.look(table([1.0, 1.0, 1.0, 1.1]))
    found = [watch.look(table([1.0, 1.0, 2.0, 1.1]))[1] for _ in range(LOOKS)]
    assert found[-1] is not None, "slow again after it was fast"


def test_a_rank_that_is_slow_now_and_then_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watcher(monkeypatch, replicate=2)
    for _ in range(2 * LOOKS):
        assert watch.look(table([1.0, 2.0]))[1] is None
        assert watch.look(table([1.0, 1.4]))[1] is None


def test_waiting_for_data_counts_and_stages_are_compared_with_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watcher(monkeypatch, replicate=4)
    assert watch.look(table([1.0] * 4, [0, 3.0, 0, 0]))[0]["ranks/slowest_rank"] == 1
    staged = watcher(monkeypatch, pipeline=2, replicate=2)
    own = [1.0, 1.0, 5.0, 5.0] if staged.stages == [0, 0, 1, 1] else [1.0, 5.0, 1.0, 5.0]
    assert staged.look(table(own))[0]["ranks/slowest_ratio"] == pytest.approx(1)


def test_a_step_that_could_not_be_traced_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table([1.0, 9.0])
    rows[1, :2] = float("nan")
    metrics, warning = watcher(monkeypatch, replicate=2).look(rows)
    assert "ranks/slowest_rank" not in metrics
    assert warning is None
