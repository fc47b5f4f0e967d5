"""Commands that start ranks, and what one process gives."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm import config
from internlm import recipe as recipes
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from tests.processes import Fork, wait_for

LAUNCH = ["launch", "--nproc", "2"]
ROOT = Path(__file__).parents[2]
STEPS = 2
SIZE = {"train__tokens": STEPS * 256, "track__tensorboard": False}


def hooked(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which every rank runs some code before it starts."""
    place = folder / "hook"
    place.mkdir(exist_ok=True)
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    (place / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n{body}")
    return {"PYTHONPATH": str(place)}


def slow(folder: Path, seconds: float) -> dict[str, str]:
    """Return the environment in which every step but the first takes longer."""
    return hooked(
        folder,
        f"""
import time
from internlm.train.step import Stepper
step = Stepper.step
def slowly(self):
    time.sleep({seconds} if self.progress.step else 0)
    return step(self)
Stepper.step = slowly
""",
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str] | Fork) -> None:
    """Wait until a run has taken so many steps."""
    wait_for(process, lambda: (run / "metrics.jsonl").exists() and max(steps(run), default=0) >= step)


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
