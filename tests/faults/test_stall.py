"""Runs that stand still, and ranks that fail: named, and ended everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm import config
from internlm import recipe as recipes
from internlm.errors import ConfigError
from internlm.recipe import Recipe
from internlm.train.stop import Reason, Stopped
from internlm.train.watch import goodput
from internlm.train.watch.monitor import Monitor
from internlm.train.watch.watchdog import EXIT_CODE, WatchConfig, Watchdog, path_of, read_beat
from tests.launch.conftest import hooked, slow, wait_for_step
from tests.processes import Fork, children, finish, gone, until

Make = Callable[..., Recipe]
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
LIMITS = {"stall_s": 0.6, "start_s": 60, "heartbeat_s": 0.1}


class Kennel:
    """Watchdogs whose bite is noted only."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.codes: list[int] = []
        self.reports: list[str] = []
        self.heard = 0
        self.bitten = threading.Event()

    def watchdog(self, rank: int = 0, world_size: int = 1, **limits: Any) -> Watchdog:
        return Watchdog(self.run, WatchConfig(**LIMITS | limits), rank, world_size, told=self._hear, end=self._bite)

    def _hear(self, report: str | None) -> None:
        self.heard += 1
        self.reports += [] if report is None else [report]

    def _bite(self, code: int) -> None:
        self.codes.append(code)
        self.bitten.set()


@pytest.fixture
def kennel(tmp_path: Path) -> Kennel:
    return Kennel(tmp_path)


def pretend(run: Path, rank: int, ago_s: float = 0.0, **changes: Any) -> None:
    """Write a sign of life of another rank."""
    fact = {"time": time.time() - ago_s, "step": 3, "phase": "train", "host": "node7", "pid": 77, "count": 1}
    path_of(run, rank).parent.mkdir(exist_ok=True)
    path_of(run, rank).write_text(json.dumps(fact | changes))


def waits_for_something_named(event: threading.Event) -> None:
    event.wait(20)


def test_a_step_that_takes_too_long_ends_the_process_with_the_stacks_of_its_threads(kennel: Kennel) -> None:
    with kennel.watchdog() as watch:
        watch.advance(3)
        begun = time.monotonic()
        waits_for_something_named(kennel.bitten)
    assert 0.6 < time.monotonic() - begun < 10
    assert kennel.codes == [EXIT_CODE]
    stacks = (kennel.run / "stacks" / "rank-00000.txt").read_text()
    assert "waits_for_something_named" in stacks
    assert (kennel.run / "stacks" / "report.txt").read_text().strip() == kennel.reports[0]
    assert re.match(r"the run stands still: nothing in 1s after step 3 \(train\); every rank lives", kennel.reports[0])


def test_what_is_no_training_has_no_limit_and_neither_have_slow_starts(tmp_path: Path) -> None:
    phases = ("start", "evaluate", "save", "load")
    kennels = {phase: Kennel(tmp_path / phase) for phase in phases}
    with contextlib.ExitStack() as stack:
        for phase, kennel in kennels.items():
            watch = stack.enter_context(kennel.watchdog())
            if phase != "start":
                watch.advance(1)
                stack.enter_context(watch.phase(phase))
        time.sleep(1.0)  # twice the limit, nearly: of all of them at once
        beats = [read_beat(kennel.run, 0) for kennel in kennels.values()]
    assert [beat and beat.phase for beat in beats] == list(phases)
    assert not [phase for phase, kennel in kennels.items() if kennel.bitten.is_set()]


def test_each_step_and_the_start_have_a_limit_of_their_own(kennel: Kennel) -> None:
    with kennel.watchdog() as watch:
        for step in range(1, 11):
            watch.advance(step)
            time.sleep(0.1)
    assert not kennel.bitten.is_set()
    with kennel.watchdog(start_s=0.1):
        assert kennel.bitten.wait(20), "a start has a limit too"


def test_a_run_without_a_limit_is_not_ended(kennel: Kennel) -> None:
    with kennel.watchdog(stall_s=None) as watch:
        watch.advance(1)
        time.sleep(1.0)
    assert not kennel.bitten.is_set()


BLAMED: dict[str, tuple[list[dict[str, Any] | None], str]] = {
    "silent": (
        [{}, {"ago_s": 7300}],
        "rank 2 on node7 (process 77) was last heard of 2h01m ago, in train after step 3;",
    ),
    "behind": ([{"step": 2}, {}], "rank 1 on node7 (process 77) lives and is behind, in train after step 2;"),
    "done": ([{}, {"phase": "done"}], "rank 2 on node7 (process 77) lives and is done;"),
    "absent": ([{}, None], "rank 2 was never heard of;"),
    "none": ([{}, {}], "every rank lives and is as far: their stacks say what they wait for;"),
}


def test_the_ranks_to_blame_are_named(tmp_path: Path) -> None:
    kennels = {name: Kennel(tmp_path / name) for name in BLAMED}
    with contextlib.ExitStack() as stack:
        for name, (others, _) in BLAMED.items():
            watch = stack.enter_context(kennels[name].watchdog(0, 3, stall_s=0.2))
            for rank, changes in enumerate(others, 1):
                if changes is not None:
                    pretend(kennels[name].run, rank, **changes)
            watch.advance(3)
        for name, kennel in kennels.items():
            assert kennel.bitten.wait(20), name
    for name, (_, said) in BLAMED.items():
        (report,) = kennels[name].reports
        assert said in report, name
        assert report.count("rank ") <= 1 or "every rank" in report, name


def test_of_many_silent_ranks_some_are_named(kennel: Kennel) -> None:
    with kennel.watchdog(0, 200, stall_s=0.2) as watch:
        watch.advance(3)
        assert kennel.bitten.wait(20)
    assert kennel.reports[0].count("was never heard of") == 8
    assert "and 191 more" in kennel.reports[0]


def test_one_rank_speaks_and_all_write_their_stacks(kennel: Kennel) -> None:
    with kennel.watchdog(0, 2) as first, kennel.watchdog(1, 2) as second:
        first.advance(5)
        second.advance(5)
        assert until(lambda: len(kennel.codes) == 2)
    assert len(kennel.reports) == 1
    assert kennel.heard == 2, "each keeps what it knows"
    assert {path.name for path in (kennel.run / "stacks").glob("rank-*")} == {"rank-00000.txt", "rank-00001.txt"}


def test_a_neighbour_that_falls_silent_during_a_validation_is_found(kennel: Kennel) -> None:
    pretend(kennel.run, 1)
    with kennel.watchdog(0, 2, stall_s=0.2) as watch:
        watch.advance(3)
        with watch.phase("evaluate"):
            assert kennel.bitten.wait(20)
    kennel.bitten.clear()
    with kennel.watchdog(0, 2) as watch, kennel.watchdog(1, 2), watch.phase("evaluate"):
        assert not kennel.bitten.wait(1.2), "one that gives signs is waited for"


def test_a_process_that_was_stopped_itself_gets_its_time_back(kennel: Kennel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic
    shift = 0.0
    monkeypatch.setattr("internlm.train.watch.watchdog.time.monotonic", lambda: now() + shift)
    with kennel.watchdog() as watch:
        watch.advance(1)
        time.sleep(0.3)
        shift = 100.0  # as a suspended laptop sees it
        assert not kennel.bitten.wait(0.4)
        assert kennel.bitten.wait(20), "the limit begins anew"


def test_a_full_disk_ends_no_run(kennel: Kennel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("internlm.train.watch.watchdog.os.replace", full)
    with kennel.watchdog(0, 2) as watch:
        for step in range(4):
            watch.advance(step)
            time.sleep(0.1)
        with watch.phase("save"):
            time.sleep(1.0)
    assert not kennel.bitten.is_set()


def test_what_earlier_processes_left_is_removed(kennel: Kennel) -> None:
    pretend(kennel.run, 5)
    (kennel.run / "stacks").mkdir()
    (kennel.run / "stacks" / "report.txt").write_text("of yesterday")
    with kennel.watchdog(0, 2):
        assert not path_of(kennel.run, 5).exists()
        assert not (kennel.run / "stacks" / "report.txt").exists()


@pytest.mark.parametrize(
    ("raised", "phase"), [(None, "done"), (Stopped(Reason.PREEMPTED), "stopped"), (ValueError(), "failed")]
)
def test_the_last_sign_says_how_it_ended(kennel: Kennel, raised: Exception | None, phase: str) -> None:
    try:
        with kennel.watchdog() as watch:
            watch.advance(9)
            if raised is not None:
                raise raised
    except (Stopped, ValueError):
        pass
    beat = read_beat(kennel.run, 0)
    assert beat is not None
    assert (beat.phase, beat.step, beat.pid, beat.is_over) == (phase, 9, os.getpid(), True)


def test_a_training_gives_signs_of_its_steps_and_phases(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__tokens=6 * 256, evaluate={"every_steps": 3}, checkpoint={"every_steps": 2}))
    seen: list[tuple[int, str]] = []
    evaluate, save = trainer.evaluator.evaluate, trainer.save

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((trainer.watch.step, trainer.watch.doing))
            return work(*arguments, **options)

        return call

    trainer.evaluator.evaluate, trainer.save = noted(evaluate), noted(save)  # type: ignore[method-assign]
    trainer.fit()
    assert seen == [(2, "save"), (3, "evaluate"), (4, "save"), (6, "evaluate"), (6, "save")]
    beat = read_beat(tmp_path / "run", 0)
    assert beat is not None
    assert (beat.step, beat.phase) == (6, "done")


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"watch\.stall_s: must be above 0 \(got 0\)"):
        WatchConfig(stall_s=0)


LAUNCH = ["launch", "--nproc"]


@linux
@pytest.mark.timeout(600)
def test_a_stopped_rank_is_named_and_the_job_ends_everywhere(recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        config.dump(recipe(train__tokens=10**8, train__trace_every_steps=None, watch=LIMITS | {"stall_s": 3}))
    )
    begun = time.monotonic()
    process = Fork(*LAUNCH, "2", "train", str(path), **slow(tmp_path, 0.1))
    try:
        wait_for_step(tmp_path / "run", 2, process)
        ranks = children(process.pid)
        victim = next(pid for pid in ranks if read_pid(tmp_path / "run", 1) == pid)
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        code, output = finish(process, timeout_s=60)
    finally:
        process.kill()
    assert time.monotonic() - stopped < 20
    assert gone(ranks), "a rank was left behind"
    assert code == EXIT_CODE, output
    assert len(re.findall(r"the run stands still", output)) == 1
    assert re.search(rf"rank 1 on \S+ \(process {victim}\) was last heard of \d+s ago, in train after step \d+", output)
    spent = goodput.read(tmp_path / "run" / goodput.FILE)
    assert spent is not None
    assert 2.5 < spent["seconds"]["stalled"] < 15
    assert spent["seconds"]["useful"] < stopped - begun
    assert time.time() - spent["until"] < 15, "nothing is left that would count as down"
    seen = Monitor(tmp_path / "run")
    seen.look()
    assert seen.facts()["state"] == "stalled"
    stacks = {file.name: file.read_text() for file in (tmp_path / "run" / "stacks").glob("rank-*")}
    assert (tmp_path / "run" / "stacks" / "trace-00000").stat().st_size > 0  # torch records gloo's exchanges, too
    assert list(stacks) == ["rank-00000.txt"]
    assert "in step" in stacks["rank-00000.txt"]


def read_pid(run: Path, rank: int) -> int:
    beat = read_beat(run, rank)
    assert beat is not None
    return beat.pid


@linux
@pytest.mark.timeout(600)
def test_an_exception_on_one_rank_of_four_ends_all_within_seconds_and_is_said_once(
    recipe: Make, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(config.dump(recipe(train__tokens=10**8, train__trace_every_steps=None)))
    hook = """
import time
from internlm.errors import TrainingError
from internlm.train.step import Stepper
step = Stepper.step
def failing(self):
    if self.progress.step == 3 and self.parallel.rank == 3:
        print("raised at", time.monotonic(), flush=True)
        raise TrainingError("the coffee is cold")
    return step(self)
Stepper.step = failing
"""
    process = Fork(*LAUNCH, "4", "train", str(path), **hooked(tmp_path, hook))
    try:
        wait_for_step(tmp_path / "run", 1, process)
        code, output = finish(process, timeout_s=60)
        ended = time.monotonic()
    finally:
        process.kill()
    raised = float(re.findall(r"raised at ([\d.]+)", output)[0])
    assert ended - raised < 10
    assert code == 1, output
    assert output.count("the coffee is cold") == 1
    assert "[rank 3] internlm train: error: the coffee is cold" in output
    assert set(re.findall(r"rank (\d) \(process \d+\) ended with exit code 1", output)) == set("0123")
    assert "Traceback" not in output
