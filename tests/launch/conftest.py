"""Commands that start ranks, and what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm import config
from internlm import recipe as recipes
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics

INTERNLM = [sys.executable, "-m", "internlm"]
ROOT = Path(__file__).parents[2]
STEPS = 2
SIZE = {"train__tokens": STEPS * 256}
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "PET_", "TORCHELASTIC_")


def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in an environment that knows of no ranks; its two streams are one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environment |= {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def hooked(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which every rank runs some code before it starts."""
    place = folder / "hook"
    place.mkdir(exist_ok=True)
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    (place / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n{body}")
    return {"PYTHONPATH": str(place)}


def slow(folder: Path, seconds: float) -> dict[str, str]:
    """Return the environment in which every step takes longer."""
    return hooked(
        folder,
        f"""
import time
from internlm.train.step import Stepper
step = Stepper.step
def slowly(self):
    time.sleep({seconds})
    return step(self)
Stepper.step = slowly
""",
    )


def run(words: list[str], **options: Any) -> tuple[int, str]:
    """Return exit code and output of a command."""
    return finish(start(words, **options))


def finish(process: subprocess.Popen[str], timeout_s: float = 200) -> tuple[int, str]:
    """Return exit code and output of a process, which is killed when it takes too long."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def gone(pids: list[int], within_s: float = 5) -> bool:
    """Return whether processes have ended."""
    deadline = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has taken so many steps."""
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or max(steps(run), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the step does not come"
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    """Return the steps that a run has noted."""
    return [line["step"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]


def losses(run: str | Path) -> list[float]:
    """Return the training losses of a run, by step."""
    return [line["train/loss"] for line in read_metrics(Path(run) / "metrics.jsonl") if "train/loss" in line]


@pytest.fixture
def path(recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """Return the file of a recipe of two steps."""
    path = tmp_path / "r.yaml"
    path.write_text(config.dump(recipe(**SIZE)))
    return path


@pytest.fixture
def alone(recipe: Callable[..., Recipe], tmp_path: Path) -> list[float]:
    """Return the losses of one process."""
    recipes.prepare(recipe(run=str(tmp_path / "alone"), **SIZE)).fit()
    return losses(tmp_path / "alone")
