"""A run goes on in any layout: the same losses, the same data in the same order."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm import config
from internlm.checkpoint import pieces
from internlm.recipe import Recipe
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]
BEFORE, AFTER = 2, 3
SHAPE: dict[str, Any] = {
    "vocab_size": 280, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48,
    "qkv_bias": True, "output_bias": True,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "replicate": (2, {"replicate": 2}),
    "shard": (2, {"shard": 2}),
    "tensor": (2, {"tensor": 2}),
    "context": (2, {"context": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "states": (2, {"replicate": 2, "optimizer": "all"}),
    "hybrid": (4, {"replicate": 2, "shard": 2, "zero": "1", "optimizer": "all"}),
    "tensor-shard": (4, {"tensor": 2, "shard": 2, "zero": "3"}),
    "pipeline-shard": (4, {"pipeline": 2, "shard": 2}),
    "context-replicate": (4, {"context": 2, "replicate": 2}),
    "eight": (8, {"pipeline": 2, "shard": 2, "tensor": 2}),
    "eight-states": (8, {"replicate": 2, "shard": 2, "context": 2, "optimizer": "all"}),
}
PAIRS = [
    ("shard", "alone"),
    ("alone", "tensor"),
    ("pipeline", "states"),
    ("states", "shard"),
    ("alone", "eight"),
    ("eight", "alone"),
    ("tensor", "pipeline"),
    ("context", "tensor-shard"),
    ("tensor-shard", "context"),
    ("pipeline-shard", "hybrid"),
    ("hybrid", "pipeline-shard"),
    ("replicate", "eight-states"),
    ("eight-states", "replicate"),
    ("eight", "eight-states"),
    ("context-replicate", "pipeline"),
    ("hybrid", "context-replicate"),
]
SLICE = [(kind, *pair) for kind, pair in zip(("adamw", "muon") * 2, PAIRS, strict=False)]


def made(recipe: Make, kind: str, layout: str, run: Path) -> dict[str, Any]:
    """Return a recipe; a larger eps, so that fp32 rounding is not magnified to steps of ±lr."""
    optim = {"kind": kind, "lr": 1e-3, "eps": 1e-3}
    return config.encode(
        recipe(
            model=SHAPE,
            optim=optim,
            run=str(run),
            parallel=LAYOUTS[layout][1],
            train__micro_batch_rows=2,
            checkpoint={"keep_last": 9},
        )
    )


def data(results: list[dict[str, Any]]) -> list[list[Any]]:
    """Return the rows that all ranks drew in each step, once each, sorted; the sources' positions come last."""
    steps = zip(*(result["rows"] for result in results), strict=True)
    return [[*sorted(set().union(*rows)), results[0]["position"]] for rows in steps]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """Return a function that gives a layout's run folder after some steps, and its uninterrupted continuation."""
    known: dict[tuple[str, str], tuple[Path, list[dict[str, Any]]]] = {}

    def get(ranks: Ranks, recipe: Make, kind: str, layout: str) -> tuple[Path, list[dict[str, Any]]]:
        if (kind, layout) not in known:
            run = tmp_path_factory.mktemp(f"{kind}-{layout}") / "run"
            world, _ = LAYOUTS[layout]
            calls = ("save_and_go_on", made(recipe, kind, layout, run), BEFORE, AFTER)
            known[kind, layout] = run, ranks.run(world, *calls, timeout_s=300)
        return known[kind, layout]

    return get


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        pytest.param(*case, id="{}-{}-to-{}".format(*case), marks=[pytest.mark.proof] * (case not in SLICE))
        for case in [(kind, *pair) for kind in ("adamw", "muon") for pair in PAIRS]
    ],
)
def test_a_run_goes_on_in_another_layout(kind: str, old: str, new: str, begun: Any, ranks: Ranks, recipe: Make) -> None:
    run, wanted = begun(ranks, recipe, kind, old)
    again = run.with_name(f"to-{new}")
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("lock"))
    found = ranks.run(LAYOUTS[new][0], "go_on", made(recipe, kind, new, again), AFTER, timeout_s=300)
    for result in found:
        assert result["step"] == BEFORE
        assert result["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-5)
    assert data(found) == data(wanted)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.proof] * (name not in ("shard", "pipeline"))) for name in LAYOUTS]
)
def test_a_run_goes_on_in_the_same_layout_bit_by_bit(layout: str, begun: Any, ranks: Ranks, recipe: Make) -> None:
    run, wanted = begun(ranks, recipe, "muon" if layout == "pipeline" else "adamw", layout)
    again = run.with_name("again")
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("lock"))
    kind = "muon" if layout == "pipeline" else "adamw"
    found = ranks.run(LAYOUTS[layout][0], "go_on", made(recipe, kind, layout, again), AFTER, timeout_s=300)
    for result, known in zip(found, wanted, strict=True):
        assert (result["loss"], result["rows"]) == (known["loss"], known["rows"])
        assert all(np.array_equal(value, known["weights"][name]) for name, value in result["weights"].items())


def test_after_a_validation_each_rank_still_writes_its_part_only(ranks: Ranks, recipe: Make, tmp_path: Path) -> None:
    """A forward without a backward leaves weights gathered: the ranks would write, and hold copies of, all of them."""
    tree = made(recipe, "adamw", "shard", tmp_path / "run")
    first, second = (Path(folder) for folder in ranks.run(2, "save_around_a_validation", tree)[0])
    for name in ("model.", "optim."):
        sizes = [[(folder / pieces.file_of(name, r)).stat().st_size for r in range(2)] for folder in (first, second)]
        assert sizes[0] == sizes[1]
        assert max(sizes[0]) < 1.2 * min(sizes[0])


def test_ranks_that_see_other_checkpoints_go_on_from_that_of_rank_0_or_not_at_all(ranks: Ranks, recipe: Make) -> None:
    """The listing of a network folder may be older on one machine than on another; or the folder is not shared."""
    value = recipe(train__tokens=2 * 256, parallel={"replicate": 2}, checkpoint={"every_steps": 1})
    found = ranks.run(2, "newest_seen", config.encode(value))
    for steps, gone, other in found:
        assert steps == 2, "what rank 1 lists does not matter"
        assert re.search(r"step-00000002: rank 0 sees a checkpoint here, this rank does not\. Let all ranks", gone)
        assert re.search(r"step-00000002: rank 1 sees another checkpoint here than rank 0", other)
