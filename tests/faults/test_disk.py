"""Disks that are full, or fail, while a run saves: it goes on, and ends well when there is room in the end."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm.checkpoint import listing, store
from internlm.checkpoint.saver import Saver
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from tests.conftest import recipe_over
from tests.faults.runs import Run, Trouble, assert_same, contents, write_recipe

Make = Callable[..., Recipe]
CHANGES: dict[str, Any] = {
    "train__tokens": 16 * 256,
    "train__trace_every_steps": None,
    "track__tensorboard": False,
    "checkpoint": {"every_steps": 4, "keep_last": 9},
}
SHARDED = {"parallel": {"shard": 2}}


def run(recipe: Make, folder: Path, name: str, trouble: Trouble | None, world: int = 1) -> tuple[list[int], str]:
    """Train; return exit codes and output."""
    layout = SHARDED if world == 2 else {}
    started = Run(
        write_recipe(folder / f"{name}.yaml", recipe(run=str(folder / name), **CHANGES | layout)), world, trouble
    )
    return started.wait(), started.output


@pytest.fixture(scope="module")
def wanted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """Return a function that gives the checkpoints of an undisturbed run of so many ranks."""

    @functools.cache
    def get(world: int) -> Any:
        folder = tmp_path_factory.mktemp("straight")
        codes, said = run(functools.partial(recipe_over, corpus, folder), folder, "straight", None, world)
        assert codes == [0] * world, said
        return contents(folder / "straight")

    return get


@pytest.mark.parametrize(
    ("world", "rank", "code"),
    [(1, 0, errno.ENOSPC), (2, 1, errno.EIO), pytest.param(2, 0, errno.ENOSPC, marks=pytest.mark.proof)],
)
def test_a_failing_disk_costs_one_checkpoint_and_the_run_goes_on(
    world: int, rank: int, code: int, recipe: Make, tmp_path: Path, wanted: Callable[[int], Any]
) -> None:
    """All operations on the second checkpoint fail, from its first byte on."""
    trouble = Trouble(2, rank, inside="/step-00000008.partial", code=code)  # its folder, and nothing in it
    codes, said = run(recipe, tmp_path, "run", trouble, world)
    assert codes == [0] * world, said
    assert "warning: step-00000008 could not be written, earlier ones stay" in said
    assert os.strerror(code) in said
    assert "Traceback" not in said, said
    Saver(tmp_path / "run" / "checkpoints")  # the next start removes what a disk that fails lets nobody remove
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000012", "step-00000016"]
    assert_same(tmp_path / "run", wanted(world))
    lines = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert lines == list(range(1, 17))


def test_the_last_save_is_tried_again(recipe: Make, tmp_path: Path, wanted: Callable[[int], Any]) -> None:
    trouble = Trouble(1, inside="/step-00000016.partial", code=errno.EIO, last=2)
    codes, said = run(recipe, tmp_path, "run", trouble)
    assert codes == [0], said
    assert said.count("warning: step-00000016 could not be written") in (1, 2)
    assert "trying again in" in said
    assert store.open_checkpoint(tmp_path / "run").step == 16
    assert_same(tmp_path / "run", wanted(1))


def test_a_run_whose_last_save_fails_again_and_again_fails_and_goes_on_later(
    recipe: Make, tmp_path: Path, wanted: Callable[[int], Any]
) -> None:
    trouble = Trouble(1, inside="/step-00000016.partial", code=errno.ENOSPC)
    codes, said = run(recipe, tmp_path, "run", trouble)
    assert codes == [1]
    assert said.count("trying again in") == 3
    last = said.strip().splitlines()[-1]
    assert last.startswith("internlm train: error: failed while writing")
    assert "free some space" in last
    assert "Traceback" not in said, said
    assert [path.name[-2:] for path in listing.listed(tmp_path / "run" / "checkpoints")] == ["04", "08", "12"]
    codes, said = run(recipe, tmp_path, "run", None)
    assert codes == [0], said
    assert_same(tmp_path / "run", wanted(1))
    assert store.open_checkpoint(tmp_path / "run").step == 16


def test_old_checkpoints_that_cannot_be_removed_are_no_reason_to_stop(recipe: Make, tmp_path: Path) -> None:
    few = CHANGES | {"checkpoint": {"every_steps": 4, "keep_last": 1}}
    path = write_recipe(tmp_path / "run.yaml", recipe(run=str(tmp_path / "run"), **few))
    # After the manifest is written, read and renamed away with its folder, nothing happens to it but its removal.
    started = Run(path, trouble=Trouble(1, inside="/step-00000004/manifest.json", code=errno.EIO))
    assert started.wait() == [0], started.output
    assert "Traceback" not in started.output
    assert store.open_checkpoint(tmp_path / "run").step == 16
