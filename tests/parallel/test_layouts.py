"""Numbers do not depend on the layout: losses, gradient norms, gradients and weights against a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from internlm import config
from internlm.recipe import Recipe
from tests.parallel.conftest import of_proof
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]
STEPS = 3
SHAPE: dict[str, Any] = {
    "vocab_size": 280, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48,
    "qkv_bias": True, "output_bias": True,
}  # fmt: skip
FULL: dict[str, Any] = {"kind": "full"}
PART: dict[str, Any] = {"kind": "operators", "ratio": 0.5}
AWAY: dict[str, Any] = {"kind": "offload"}
# Ranks, layout, rows of a micro-batch (of 8 rows a step). The first are run always, the rest by the proof.
SLICE: list[tuple[int, dict[str, Any], int]] = [
    (2, {"replicate": 2}, 1),
    (2, {"shard": 2, "zero": "3", "recompute": FULL}, 2),
    (2, {"tensor": 2}, 4),
    (2, {"context": 2}, 2),
    (2, {"pipeline": 2}, 1),
    (4, {"replicate": 2, "shard": 2, "zero": "1"}, 1),
    (2, {"shard": 2, "zero": "2-gather", "recompute": PART}, 2),
    (4, {"shard": 2, "tensor": 2, "zero": "2"}, 2),
    (4, {"pipeline": 2, "shard": 2, "schedule": "interleaved", "stages_per_rank": 2}, 1),
]
PROOF: list[tuple[int, dict[str, Any], int]] = [
    (1, {"recompute": FULL}, 2),
    (1, {"recompute": PART}, 2),
    (1, {"recompute": AWAY}, 4),
    (1, {"offload": True}, 2),
    (2, {"replicate": 2}, 4),
    (2, {"replicate": 2, "recompute": FULL}, 2),
    *[(2, {"shard": 2, "zero": zero}, micro) for zero in ("1", "2", "2-gather", "3") for micro in (1, 2, 4)],
    (2, {"shard": 2, "offload": True}, 2),
    (2, {"shard": 2, "prefetch": 0}, 1),
    (2, {"shard": 2, "prefetch": 3, "zero": "3"}, 1),
    (2, {"tensor": 2, "sequence": False}, 2),
    (2, {"tensor": 2, "recompute": FULL}, 1),
    (2, {"tensor": 2, "recompute": PART}, 1),
    (2, {"context": 2, "recompute": PART}, 1),
    (2, {"pipeline": 2, "schedule": "gpipe"}, 2),
    (2, {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2}, 1),
    (2, {"pipeline": 2, "schedule": "zero-bubble"}, 1),
    (2, {"pipeline": 2, "schedule": "zero-bubble", "stages_per_rank": 2}, 1),
    (2, {"pipeline": 2, "schedule": "zbv", "stages_per_rank": 2}, 1),
    (2, {"pipeline": 2, "recompute": FULL}, 1),
    *[(4, {"replicate": 2, "shard": 2, "zero": zero}, 2) for zero in ("1", "2", "2-gather", "3")],
    (4, {"replicate": 2, "shard": 2, "zero": "2-gather", "recompute": PART}, 1),
    (4, {"shard": 2, "tensor": 2, "zero": "2"}, 1),
    (4, {"replicate": 4}, 1),
    (4, {"shard": 4}, 1),
    (4, {"context": 4}, 2),
    (4, {"shard": 2, "context": 2}, 1),
    (4, {"tensor": 2, "context": 2}, 2),
    (4, {"tensor": 2, "replicate": 2}, 2),
    (4, {"tensor": 2, "pipeline": 2}, 2),
    (4, {"tensor": 2, "pipeline": 2, "sequence": False}, 1),
    (4, {"context": 2, "pipeline": 2}, 2),
    (4, {"pipeline": 4}, 1),
    (4, {"pipeline": 2, "replicate": 2}, 1),
    (4, {"pipeline": 2, "shard": 2, "zero": "1"}, 1),
    (8, {"replicate": 2, "shard": 2, "tensor": 2}, 1),
    (8, {"replicate": 2, "shard": 2, "context": 2}, 1),
    (8, {"shard": 2, "tensor": 2, "context": 2}, 2),
    (8, {"pipeline": 2, "shard": 2, "tensor": 2}, 1),
    (8, {"pipeline": 2, "replicate": 2, "shard": 2}, 1),
    (8, {"pipeline": 2, "tensor": 2, "context": 2}, 2),
]


def tree(make: Make, micro: int = 1, layers: int = 4, **changes: Any) -> dict[str, Any]:
    optim = {"kind": "adamw", "lr": 1e-3, "eps": 1e-3}  # a larger eps: fp32 rounding is not magnified to steps of ±lr
    settings: dict[str, Any] = {"model": SHAPE, "optim": optim, **changes}
    settings["model"] = settings["model"] | {"num_layers": layers}
    return config.encode(make(**settings, train__micro_batch_rows=micro))


def depth(parallel: dict[str, Any]) -> int:
    """Return the layers that a layout needs: one a stage, and two at least. Each costs: torch plans every tensor."""
    return max(2, parallel.get("pipeline", 1) * parallel.get("stages_per_rank", 1))


@pytest.fixture(scope="module")
def alone() -> dict[int, Any]:
    return {}


def name_of(layout: tuple[int, dict[str, Any], int]) -> str:
    _, parallel, micro = layout
    words = [f"{k}-{v['kind'] if isinstance(v, dict) else v}" for k, v in parallel.items()]
    return "-".join([*words, f"micro-{micro}"])


def distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the relative L2 distance of all tensors together."""
    assert found.keys() == wanted.keys()
    off = sum(float(np.square(found[n].astype(np.float64) - wanted[n]).sum()) for n in wanted)
    return (off / sum(float(np.square(wanted[n].astype(np.float64)).sum()) for n in wanted)) ** 0.5


@pytest.mark.parametrize("layout", [*SLICE, *of_proof((layout,) for layout in PROOF)], ids=name_of)
def test_numbers_do_not_depend_on_the_layout(
    layout: tuple[int, dict[str, Any], int],
    ranks: Ranks,
    recipe: Make,
    alone: dict[int, Any],
) -> None:
    assert_as_alone(layout, ranks, recipe, alone)


def assert_as_alone(
    layout: tuple[int, dict[str, Any], int], ranks: Ranks, recipe: Make, alone: dict[int, Any], **changes: Any
) -> list[dict[str, Any]]:
    """Train in a layout, and once in one process, whose results are kept in `alone`, by depth.

    Returns:
        What the ranks say, and last what the one process says.
    """
    world, parallel, micro = layout
    layers = depth(parallel)
    if layers not in alone:
        made = tree(recipe, layers=layers, run=str(recipe().run) + "-alone", **changes)
        alone[layers] = ranks.run(1, "train", made, STEPS)[0]
    results = ranks.run(world, "train", tree(recipe, micro, layers, parallel=parallel, **changes), STEPS)
    assert_equal(results, alone[layers])
    return [*results, alone[layers]]


def assert_equal(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for key in ("gradients", "weights"):
        merged: dict[str, np.ndarray] = {}
        for result in results:
            merged |= result[key]
        assert distance(merged, alone[key]) < 1e-5, key
    for result in results:
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert result["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert result["meter"]["train/loss"] == pytest.approx(alone["meter"]["train/loss"], rel=1e-5)
        assert result["meter"]["train/accuracy"] == pytest.approx(alone["meter"]["train/accuracy"], abs=1e-3)
        assert result["valid"] == pytest.approx(alone["valid"], rel=1e-5)


HEADS = {"model": SHAPE | {"qk_norm": True}}
HEAD_SLICE: list[tuple[int, dict[str, Any], int]] = [(2, {"tensor": 2, "sequence": False}, 4), (2, {"tensor": 2}, 2)]
HEAD_PROOF: list[tuple[int, dict[str, Any], int]] = [
    (2, {"tensor": 2, "recompute": FULL}, 1),
    (2, {"shard": 2, "zero": "3"}, 1),
    (2, {"context": 2}, 2),
    (2, {"pipeline": 2}, 1),
    (4, {"shard": 2, "tensor": 2, "zero": "1"}, 1),
    (4, {"tensor": 2, "pipeline": 2, "sequence": False}, 1),
    (4, {"tensor": 2, "context": 2}, 2),
    (4, {"tensor": 2, "replicate": 2, "recompute": PART}, 1),
]


@pytest.fixture(scope="module")
def alone_with_head_norms() -> dict[int, Any]:
    return {}


@pytest.mark.parametrize("layout", [*HEAD_SLICE, *of_proof((layout,) for layout in HEAD_PROOF)], ids=name_of)
def test_norms_of_heads_do_not_depend_on_the_layout(
    layout: tuple[int, dict[str, Any], int],
    ranks: Ranks,
    recipe: Make,
    alone_with_head_norms: dict[int, Any],
) -> None:
    assert_as_alone(layout, ranks, recipe, alone_with_head_norms, **HEADS)


def test_key_heads_that_are_repeated_for_context_ranks_stay_with_their_queries(ranks: Ranks, recipe: Make) -> None:
    """Two ranks cannot part three key heads: each is there twice."""
    shape = SHAPE | {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 3}
    assert_as_alone((2, {"context": 2}, 2), ranks, recipe, {}, model=shape)


@pytest.mark.parametrize(
    ("broken", "world", "parallel", "changes"),
    [
        ("norms_of_parts", 2, {"tensor": 2}, {}),
        ("averaged_head_norms", 2, {"tensor": 2}, HEADS),
        ("means_of_micro_batches", 2, {"shard": 2}, {"data__pack": "whole"}),
        ("same_rows", 2, {"replicate": 2}, {}),
        ("gathered_gradients", 2, {"context": 2}, {"objective": {"kind": "lm", "z_loss": 1e-4}}),
        *of_proof([("averaged_head_norms", 2, {"tensor": 2, "sequence": False}, HEADS)]),
    ],
)
def test_the_comparison_notices_mistakes(
    broken: str, world: int, parallel: dict[str, Any], changes: dict[str, Any], ranks: Ranks, recipe: Make
) -> None:
    wanted = ranks.run(1, "train", tree(recipe, 2, layers=2, run=str(recipe().run) + "-alone", **changes), 1)[0]
    made = tree(recipe, 2, layers=2, parallel=parallel, **changes)
    found = ranks.run(world, "each", ("train", made, 1), ("train", made, 1, broken))
    assert_equal([right for right, _ in found], wanted)
    with pytest.raises(AssertionError):
        assert_equal([wrong for _, wrong in found], wanted)


@pytest.mark.parametrize(
    "parallel",
    [{"replicate": 2}, {"tensor": 2}, {"pipeline": 2, "context": 2}, *of_proof([({"shard": 2, "tensor": 2},)])],
    ids=str,
)
def test_the_same_layout_gives_the_same_bits(parallel: dict[str, Any], ranks: Ranks, recipe: Make) -> None:
    world = int(np.prod(list(parallel.values())))
    made = tree(recipe, 4, depth(parallel), parallel=parallel)
    for a, b in ranks.run(world, "each", ("train", made, 2), ("train", made, 2)):
        assert (a["loss"], a["norm"], a["valid"]) == (b["loss"], b["norm"], b["valid"])
        assert all(np.array_equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
