"""A mixture of experts in any layout: the same numbers as in one process, side losses included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from internlm.recipe import Recipe
from tests.parallel.ranks import Ranks
from tests.parallel.test_layouts import FULL, PART, SHAPE, STEPS, assert_equal, name_of, tree

Make = Callable[..., Recipe]
# Large side losses, so that a mistake in them cannot hide.
MIXED: dict[str, Any] = SHAPE | {"ffn_size": 16, "experts": {"count": 4, "balance_loss": 0.3, "z_loss": 0.1}}
SLICE: list[tuple[int, dict[str, Any], int]] = [
    (2, {"shard": 2, "expert": 2}, 2),
    (2, {"tensor": 2}, 4),
    (2, {"context": 2, "expert": 2}, 2),
    (4, {"pipeline": 2, "shard": 2, "expert": 2}, 1),
]
PROOF: list[tuple[int, dict[str, Any], int]] = [
    (4, {"shard": 4, "expert": 2, "zero": "3", "recompute": FULL}, 1),
    (1, {"recompute": PART}, 2),
    (2, {"replicate": 2}, 1),
    (2, {"shard": 2}, 1),
    (2, {"context": 2}, 2),
    (2, {"tensor": 2, "sequence": False}, 2),
    (2, {"pipeline": 2, "schedule": "zero-bubble"}, 1),
    *[(2, {"shard": 2, "expert": 2, "zero": zero}, 2) for zero in ("1", "2-gather", "3")],
    (2, {"shard": 2, "expert": 2, "recompute": PART}, 2),
    (4, {"shard": 4}, 1),
    (4, {"shard": 4, "expert": 4}, 1),
    (4, {"replicate": 2, "shard": 2, "expert": 2}, 1),
    (4, {"tensor": 2, "shard": 2, "expert": 2}, 1),
    (4, {"shard": 2, "context": 2, "expert": 4}, 1),
    (8, {"replicate": 2, "shard": 4, "expert": 2}, 1),
    (8, {"shard": 4, "expert": 2, "tensor": 2}, 1),
    (8, {"shard": 8, "expert": 2}, 1),
]


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("layout", SLICE + PROOF, ids=name_of)
def test_numbers_do_not_depend_on_where_experts_are(
    layout: tuple[int, dict[str, Any], int],
    ranks: Ranks,
    recipe: Make,
    alone: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    if layout not in SLICE and not request.config.getoption("--proof"):
        pytest.skip("a layout of the proof")
    world, parallel, micro = layout
    if not alone:
        alone.update(ranks.run(1, "train", tree(recipe, model=MIXED, run=str(recipe().run) + "-alone"), STEPS)[0])
    assert_equal(ranks.run(world, "train", tree(recipe, micro, model=MIXED, parallel=parallel), STEPS), alone)
