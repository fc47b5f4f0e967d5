"""Numbers do not depend on the layout: losses, gradient norms, gradients and weights against a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from internlm import config
from internlm.recipe import Recipe
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]
STEPS = 5
SHAPE: dict[str, Any] = {
    "vocab_size": 280, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48,
    "qkv_bias": True, "output_bias": True,
}  # fmt: skip
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"replicate": 2}),
    (2, {"shard": 2, "zero": "3"}),
    (2, {"shard": 2, "zero": "2"}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": False}),
    (2, {"context": 2}),
    (2, {"pipeline": 2}),
    (4, {"replicate": 2, "shard": 2, "zero": "1"}),
    (4, {"replicate": 2, "shard": 2, "zero": "2-gather"}),
    (4, {"shard": 2, "tensor": 2}),
    (4, {"pipeline": 2, "shard": 2}),
]


def tree(make: Make, **changes: Any) -> dict[str, Any]:
    value = make(model=SHAPE, train__micro_batch_rows=1, optim={"kind": "adamw", "lr": 1e-3, "eps": 1e-3}, **changes)
    return config.encode(value)


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict[str, Any]:
    return {}


def name_of(layout: tuple[int, dict[str, Any]]) -> str:
    return "-".join(f"{key}{value}" for key, value in layout[1].items())


def distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the relative L2 distance of all tensors together."""
    assert found.keys() == wanted.keys()
    off = sum(float(np.square(found[n].astype(np.float64) - wanted[n]).sum()) for n in wanted)
    return (off / sum(float(np.square(wanted[n].astype(np.float64)).sum()) for n in wanted)) ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_numbers_do_not_depend_on_the_layout(
    layout: tuple[int, dict[str, Any]], ranks: Ranks, recipe: Make, alone: dict[str, Any]
) -> None:
    world, parallel = layout
    if not alone:
        alone.update(ranks.run(1, "train", tree(recipe, run=str(recipe().run) + "-alone"), STEPS)[0])
    results = ranks.run(world, "train", tree(recipe, parallel=parallel), STEPS)
    for key in ("gradients", "weights"):
        merged: dict[str, np.ndarray] = {}
        for result in results:
            merged |= result[key]
        assert distance(merged, alone[key]) < 1e-5, key
    for result in results:
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert result["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert result["meter"]["train/loss"] == pytest.approx(alone["meter"]["train/loss"], rel=1e-5)
        assert result["valid"] == pytest.approx(alone["valid"], rel=1e-5)
