"""Commands that start ranks, and what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
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


def run(words: list[str], **options: Any) -> tuple[int, str]:
    """Return exit code and output of a command."""
    return finish(start(words, **options))


def finish(process: subprocess.Popen[str], timeout_s: float = 100) -> tuple[int, str]:
    """Return exit code and output of a process, which is killed when it takes too long."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


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
