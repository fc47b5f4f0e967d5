"""Runs that are asked to end: at the end of a step, with a checkpoint, and with an exit code that says why."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from internlm import config
from internlm import recipe as recipes
from internlm.checkpoint import listing, store
from internlm.recipe import Recipe
from internlm.train.metrics import Metrics, MetricsFile, read_metrics
from internlm.train.step import Stepper
from internlm.train.stop import EXIT_CODES, FILE, Reason, Stop, Stopped
from internlm.train.trainer import Trainer
from internlm.weights.weight import tensors
from tests.conftest import recipe_over
from tests.processes import Fork, finish, wait_for

Make = Callable[..., Recipe]


def asked_at(trainer: Trainer, step: int, ask: Callable[[], None]) -> None:
    """Call `ask` at the end of a step."""
    take = trainer.stepper.step

    def stepped() -> dict[str, float]:
        metrics = take()
        if trainer.progress.step == step:
            ask()
        return metrics

    trainer.stepper.step = stepped  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the checkpoint of a run of twelve steps holds that nobody asks to end."""
    torch.manual_seed(0)  # as before each test
    run = tmp_path_factory.mktemp("straight")
    recipes.prepare(recipe_over(corpus, run, train__tokens=12 * 256)).fit()
    return dict(tensors(store.open_checkpoint(run).weights("")))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_at_the_end_of_the_next_step_and_the_run_goes_on_bitwise(
    recipe: Make, tmp_path: Path, straight: dict[str, torch.Tensor], name: str
) -> None:
    value = recipe(train__tokens=12 * 256)
    trainer = recipes.prepare(value)
    asked_at(trainer, 6, lambda: signal.raise_signal(getattr(signal, name)))
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Stopped) as stopped:
        trainer.fit()
    assert stopped.value.reason is (Reason.INTERRUPTED if name == "SIGINT" else Reason.PREEMPTED)
    assert signal.getsignal(getattr(signal, name)) == before, "handlers are given back"
    assert store.open_checkpoint(tmp_path / "run").step == 7
    recipes.prepare(value).fit()
    found = dict(tensors(store.open_checkpoint(tmp_path / "run").weights("")))
    assert found.keys() == straight.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, straight[key]), key
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, 13))


def test_a_stop_file_ends_the_run_and_is_removed(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("internlm.train.stop._LOOK_EVERY_S", 0.0)
    trainer = recipes.prepare(recipe())
    asked_at(trainer, 4, (tmp_path / "run" / FILE).touch)
    with pytest.raises(Stopped) as stopped:
        trainer.fit()
    assert stopped.value.reason is Reason.FILE
    assert not (tmp_path / "run" / FILE).exists()
    assert f"{tmp_path / 'run' / FILE} is there: the run saves" in caplog.text
    assert store.open_checkpoint(tmp_path / "run").step == 5


def test_a_signal_in_the_last_step_is_the_end_anyway(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__tokens=5 * 256))
    asked_at(trainer, 4, lambda: signal.raise_signal(signal.SIGTERM))
    trainer.fit()
    assert store.open_checkpoint(tmp_path / "run").step == 5


def test_the_heaviest_wish_of_all_ranks_counts() -> None:
    weight = {reason: float(reason.value) for reason in Reason}
    assert Stop.reason(0.0) is None
    assert Stop.reason(weight[Reason.FILE]) is Reason.FILE
    assert Stop.reason(1024 * weight[Reason.PREEMPTED] + weight[Reason.FILE]) is Reason.PREEMPTED
    assert Stop.reason(1024 * weight[Reason.PREEMPTED] + weight[Reason.INTERRUPTED]) is Reason.INTERRUPTED


def test_handlers_of_others_are_left_alone() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Stop(None) as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert stop.wish() == 0
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def slow_steps(seconds: float) -> None:
    """Let every step but the first take longer."""
    step = Stepper.step

    def slow(stepper: Stepper) -> Metrics:
        time.sleep(seconds if stepper.progress.step else 0)
        return step(stepper)

    Stepper.step = slow  # type: ignore[method-assign]


def started(recipe: Make, tmp_path: Path, seconds: float) -> Fork:
    """Start a run of slow steps in a process, and return it when it has taken one."""
    path, metrics = tmp_path / "r.yaml", tmp_path / "run" / "metrics.jsonl"
    path.write_text(config.dump(recipe()))
    process = Fork("train", str(path), hook=partial(slow_steps, seconds))
    wait_for(process, lambda: metrics.exists() and metrics.read_text())
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_the_exit_code_says_why(recipe: Make, tmp_path: Path, name: str, code: int) -> None:
    process = started(recipe, tmp_path, 0.2)
    os.kill(process.pid, getattr(signal, name))
    found, said = finish(process)
    assert found == code
    assert f"{name}: the run saves at the end of this step" in said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert listing.newest(tmp_path / "run" / "checkpoints") is not None
    assert set(EXIT_CODES.values()) == {0, 75, 130}


def test_a_second_signal_ends_at_once(recipe: Make, tmp_path: Path) -> None:
    process = started(recipe, tmp_path, 60)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process)[0] == -signal.SIGTERM
    assert time.monotonic() - begun < 30
    assert listing.newest(tmp_path / "run" / "checkpoints") is None


def test_a_signal_while_the_run_is_opened_counts(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are rewritten before the first step; a rank that the signal ended there would be a failure of all."""
    trainer = recipes.prepare(recipe())
    monkeypatch.setattr(
        "internlm.train.trainer.MetricsFile",
        lambda *given: (signal.raise_signal(signal.SIGTERM), MetricsFile(*given))[1],
    )
    with pytest.raises(Stopped) as stopped:
        trainer.fit()
    assert stopped.value.reason is Reason.PREEMPTED
    assert store.open_checkpoint(tmp_path / "run").step == 1


def test_a_rank_whose_launcher_is_gone_ends_alone_where_others_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for an end of all is for who was asked to end: of several machines the others do without a lost one."""
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    for parent, local, expected in ((os.getppid(), "1", []), (1 << 30, "2", []), (1 << 30, "1", [signal.SIGTERM])):
        monkeypatch.setenv("INTERNLM_LAUNCHER", str(parent))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        with Stop(None) as stop:
            stop._hear(signal.SIGTERM, None)
        assert ended == expected
