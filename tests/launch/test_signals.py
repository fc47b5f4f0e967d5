"""Several ranks that are asked to end: one checkpoint, and an exit code that says whether to come again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internlm.checkpoint import listing, store
from tests.launch.conftest import LAUNCH, ROOT, slow, wait_for_step
from tests.processes import Fork, children, finish, gone, start

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "-m", "internlm"]


def begun(path: Path, words: list[str], seconds: float = 0.3) -> tuple[subprocess.Popen[str] | Fork, list[int]]:
    """Start a long run of slow steps; return its launcher, and its ranks when they have taken a step."""
    command = [*words, "train", str(path), "train.tokens=1e9", "train.trace_every_steps=null"]
    process = (start if words is TORCHRUN else Fork)(*command, cwd=ROOT, **slow(path.parent, seconds))
    wait_for_step(path.parent / "run", 1, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    return process, ranks


def saved(path: Path) -> list[str]:
    folder = path.parent / "run" / "checkpoints"
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("words", "whom", "name", "code"),
    [
        (LAUNCH, "launcher", "SIGTERM", 75),
        (LAUNCH, "rank", "SIGUSR1", 75),
        pytest.param(LAUNCH, "launcher", "SIGUSR1", 75, marks=pytest.mark.proof),
        pytest.param(LAUNCH, "terminal", "SIGINT", 130, marks=pytest.mark.proof),
        pytest.param(LAUNCH, "launcher", "SIGHUP", 75, marks=pytest.mark.proof),
        pytest.param(TORCHRUN, "launcher", "SIGTERM", 1, marks=pytest.mark.proof),
        pytest.param(TORCHRUN, "launcher", "SIGUSR1", 1, marks=pytest.mark.proof),
        pytest.param(TORCHRUN, "rank", "SIGUSR1", 1, marks=pytest.mark.proof),
    ],
)
def test_a_signal_to_any_of_them_makes_one_checkpoint_and_ends_all(
    words: list[str], whom: str, name: str, code: int, path: Path
) -> None:
    """torchrun's own exit code is 1, whatever its ranks said."""
    process, ranks = begun(path, words)
    try:
        target = ranks[1] if whom == "rank" else process.pid
        number = getattr(signal, name)
        # Ctrl-C goes to the process group of the terminal, in which the ranks are not.
        os.kill(target, number)
        found, output = finish(process, timeout_s=60)
    finally:
        process.kill()
    assert gone(ranks), "a rank was left behind"
    assert found == code, output
    (only,) = saved(path)
    step = store.open_checkpoint(path.parent / "run" / "checkpoints" / only).step
    assert f"stopped at step {step}; the same command goes on from there" in output
    if words is LAUNCH:
        assert "Traceback" not in output
        assert "error" not in output


@pytest.mark.parametrize(
    ("patience", "seconds", "code"),
    [
        pytest.param("1", 4, 137, id="too-short"),
        pytest.param("60", 33, 75, id="longer-than-torchs", marks=pytest.mark.proof),
    ],
)
def test_ranks_have_as_long_as_the_launcher_is_told_to_finish_the_step_and_save(
    patience: str, seconds: float, code: int, path: Path
) -> None:
    """torch's launcher kills after 30 seconds."""
    process, ranks = begun(path, [*LAUNCH, "--patience", patience], seconds)
    try:
        os.kill(process.pid, signal.SIGUSR1)
        found, output = finish(process, timeout_s=80)
    finally:
        process.kill()
    assert gone(ranks)
    assert found == code, output
    assert len(listing.listed(path.parent / "run" / "checkpoints")) == (code == 75)


@pytest.mark.proof
def test_a_second_signal_ends_all_at_once_and_nothing_is_started_again(path: Path) -> None:
    process, ranks = begun(path, [*LAUNCH, "--max-restarts", "3"], seconds=6)
    try:
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        asked = time.monotonic()
        code, output = finish(process, timeout_s=60)
    finally:
        process.kill()
    assert time.monotonic() - asked < 5
    assert gone(ranks)
    assert code == 75, output
    assert "start again" not in output
    assert listing.listed(path.parent / "run" / "checkpoints") == []
