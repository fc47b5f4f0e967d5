"""A mixture of experts in any layout: the same numbers as in one process, side losses included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from internlm.recipe import Recipe
from tests.parallel.conftest import of_proof
from tests.parallel.ranks import Ranks
from tests.parallel.test_layouts import FULL, PART, SHAPE, assert_as_alone, distance, name_of, tree

Make = Callable[..., Recipe]
# Large side losses, so that a mistake in them cannot hide.
MIXED: dict[str, Any] = SHAPE | {"ffn_size": 16, "experts": {"count": 4, "balance_loss": 0.3, "z_loss": 0.1}}
# Rows that are not full: padding is in no side loss.
PADDED: dict[str, Any] = {"model": MIXED, "data__pack": "whole"}
SLICE: list[tuple[int, dict[str, Any], int]] = [
    (2, {"shard": 2, "expert": 2}, 2),
    (2, {"tensor": 2}, 4),
    (2, {"context": 2, "expert": 2}, 2),
]
PROOF: list[tuple[int, dict[str, Any], int]] = [
    (4, {"pipeline": 2, "shard": 2, "expert": 2}, 1),
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
def alone() -> dict[int, Any]:
    return {}


@pytest.mark.parametrize("layout", [*SLICE, *of_proof((layout,) for layout in PROOF)], ids=name_of)
def test_numbers_do_not_depend_on_where_experts_are(
    layout: tuple[int, dict[str, Any], int],
    ranks: Ranks,
    recipe: Make,
    alone: dict[int, Any],
) -> None:
    *results, wanted = assert_as_alone(layout, ranks, recipe, alone, **PADDED)
    for result in results:
        for name in ("moe/balance", "moe/z", "moe/busiest_expert"):
            if layout[1].get("schedule") == "zero-bubble":  # some layers are not counted
                assert math.isfinite(result["meter"][name])
                continue
            assert result["meter"][name] == pytest.approx(wanted["meter"][name], rel=1e-5)


def test_side_losses_know_the_loss_scale(ranks: Ranks, recipe: Make) -> None:
    """Without it they would be lost in the rest: the router's gradient would point elsewhere."""
    router = "blocks.1.feed_forward.router.weight"
    directions = []
    for dtype in ("float32", "float16"):
        low = {"device": "cpu", "dtype": dtype}
        made = tree(recipe, 2, run=f"{recipe().run}-{dtype}", runtime=low, **PADDED)
        gradient = ranks.run(1, "train", made, 1)[0]["gradients"][router]
        directions.append({router: gradient / np.linalg.norm(gradient)})
    assert distance(*directions) < 0.05


@pytest.mark.parametrize("expert", [0, 3])
def test_ranks_whose_experts_nobody_chose_take_part(expert: int, ranks: Ranks) -> None:
    results = ranks.run(2, "everybody_chooses", expert)
    for out, grad, weight_grad, wanted in results:
        np.testing.assert_allclose(out, wanted[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grad, wanted[1], rtol=1e-5, atol=1e-5)
        assert np.isfinite(weight_grad).all()
    assert [bool(np.any(result[2])) for result in results] == [expert < 2, expert >= 2]
