"""Kill -9 at any moment, start again: the run ends as if nothing had happened."""

from __future__ import annotations

import itertools
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm import config
from internlm.checkpoint import listing, store
from internlm.cli import main
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from tests.faults.runs import Run, Trouble, assert_same, contents, write_recipe
from tests.processes import internlm

Make = Callable[..., Recipe]
STEPS = 36
"""Of a whole run; the slice that always runs has half as many."""
CHANGES: dict[str, Any] = {
    "train__trace_every_steps": None,
    "track__tensorboard": False,
    "checkpoint": {"every_steps": 3, "keep_last": 2},
}
SLOW_S = 0.002
"""For each of about a hundred tensors: a save takes longer than the three steps between two."""
OPERATIONS = 420
"""File operations on checkpoints in a whole run, about: 35 for each save, with the removal of an old one."""


def straight(recipe: Make, folder: Path, world: int, steps: int, **changes: Any) -> dict[int, Any]:
    """Return the checkpoints of a run that nobody disturbs, by step."""
    every = {"checkpoint": CHANGES["checkpoint"] | {"keep_last": steps}}
    path = write_recipe(folder / "straight.yaml", recipe(run=str(folder / "straight"), **CHANGES | changes | every))
    run = Run(path, world)
    assert run.wait() == [0] * world, run.output
    found = contents(folder / "straight")
    assert len(found) == steps // 3
    return found


def disturb(run: Run, killed: tuple[int, ...], delay_s: float) -> list[int]:
    """Kill ranks after some time, if they still run; return how all ended. Those that are left end by themselves."""
    time.sleep(delay_s)
    if all(process.is_alive() for process in run.ranks):
        run.kill(*killed)
    return run.wait()


def check(run: Path, wanted: dict[int, Any], before: int, said: str) -> int:
    """Check what a killed run has left; return the step of its newest checkpoint.

    Args:
        run: its folder.
        wanted: checkpoints of a run that nobody disturbed.
        before: step of the newest checkpoint before this start.
        said: its output.
    """
    newest = listing.newest(run / "checkpoints")
    step = 0 if newest is None else store.open_checkpoint(newest).step
    told = [int(found) for found in re.findall(r"checkpoint \S*step-(\d+) \|", said)]
    assert step >= max([before, *told]), "what was there, or was said to be, is there"
    assert_same(run, wanted)
    return step


def prove(recipe: Make, folder: Path, kills: int, world: int, steps: int, **changes: Any) -> dict[str, int]:
    """Kill runs so often, at random moments and at random file operations of saves; return how often and where."""
    changes |= {"train__tokens": steps * 256}
    wanted = straight(recipe, folder, world, steps, **changes)
    generator = random.Random(world)
    counts = {"kills": 0, "at an operation": 0, "with a draft": 0, "runs": 0}
    while counts["kills"] < kills:
        name = f"run{counts['runs']}"
        path = write_recipe(folder / f"{name}.yaml", recipe(run=str(folder / name), **CHANGES | changes))
        step = 0
        for attempt in itertools.count():
            assert attempt < 100, "it does not get on"
            trouble, victims = None, tuple(sorted(generator.sample(range(world), generator.randint(1, world))))
            if generator.random() < 0.5:
                left = OPERATIONS * (steps - step) // STEPS
                trouble = Trouble(generator.randint(1, max(40, left // 3)), rank=victims[0])
            delay_s = generator.uniform(0.3, 2.0 * steps / STEPS)
            run = Run(path, world, trouble if counts["kills"] < kills else None, SLOW_S)
            calm = counts["kills"] >= kills or trouble is not None
            codes = run.wait() if calm else disturb(run, victims, delay_s)
            step = check(folder / name, wanted, step, run.output)
            if set(codes) == {0}:
                break
            assert -signal.SIGKILL in codes, run.output
            assert set(codes) <= {-signal.SIGKILL, 1}, run.output
            counts["kills"] += 1
            counts["at an operation"] += trouble is not None
            counts["with a draft"] += any((folder / name / "checkpoints").glob("*.partial-*"))
        assert step == steps
        lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "train/loss" in line]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        left = sorted(path.name for path in (folder / name / "checkpoints").iterdir())
        assert left[-2:] == [f"step-{steps - 3:08d}", f"step-{steps:08d}"]
        # Of a kill in the last removal of all, what was to go: a finished run is not begun again.
        assert left[:-2] in ([], [f"step-{steps - 6:08d}"]), "nothing else is left"
        counts["runs"] += 1
    return counts


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("world", "few", "many"), [(1, 3, 200), (2, 2, 40)])
def test_killed_runs_go_on_from_a_complete_checkpoint_and_end_bitwise_equal(
    world: int, few: int, many: int, recipe: Make, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """After every kill, each complete checkpoint is that of the undisturbed run, and none is lost.

    Of two ranks one is killed, or both. The proof kills two hundred times, and 40 times of two ranks.
    """
    kills, steps = (many, STEPS) if request.config.getoption("--proof") else (few, STEPS // 2)
    layout = {"parallel": {"shard": 2}} if world == 2 else {}
    counts = prove(recipe, tmp_path, kills, world, steps, **layout)
    print(f"{world} ranks: {counts}")
    assert counts["kills"] >= kills
    if kills >= 40:
        assert counts["with a draft"] >= kills / 4, "many die inside a save"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "gone.yaml"], 1, "gone.yaml: no such recipe"),
        (["train", "r.yaml", "optim.lrr=1"], 1, "unknown key 'lrr'. Did you mean 'lr'?"),
        (["train", "r.yaml", "train.tokens=many"], 1, "train.tokens (command line): input should be a valid integer"),
        (["train", "r.yaml", "data.train.a.path=nowhere"], 1, "nowhere: no such folder"),
        (["data", "tokenize", "gone.txt", "--tokenizer", "t", "--out", "o"], 1, "no such"),
        (["chat", "nowhere", "-p", "hi"], 1, "nowhere"),
        (["convert", "nowhere", "out"], 1, "nowhere"),
        (["trian", "r.yaml"], 2, "Did you mean 'train'?"),
        ([], 2, "usage"),
        (["data"], 2, "usage"),
    ],
)
def test_bad_input_is_one_clear_line_and_the_right_exit_code(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    words: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yaml").write_text(config.dump(recipe()))
    monkeypatch.chdir(tmp_path)
    try:
        found = main(words)
    except SystemExit as left:  # argparse leaves so
        found = left.code
    assert found == code
    said = capsys.readouterr()
    assert message in said.err + said.out
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_the_exit_code_and_the_line_are_those_of_the_process(tmp_path: Path) -> None:
    done = internlm("monitor", "gone", cwd=tmp_path)  # it need not import torch
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["internlm monitor: error: gone: no such folder"]
