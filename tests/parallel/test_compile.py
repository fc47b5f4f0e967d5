"""Compiled blocks give the same numbers in every layout (to what fusion rounds otherwise). Part of the long proofs."""

from __future__ import annotations

from typing import Any

import pytest

from internlm import runtime
from tests.parallel.ranks import Ranks
from tests.parallel.test_experts import MIXED
from tests.parallel.test_layouts import FULL, PART, SHAPE, Make, assert_equal, tree

DENSE: list[dict[str, Any]] = [
    {"shard": 2, "zero": "3"}, {"replicate": 2}, {"tensor": 2}, {"context": 2}, {"shard": 2, "recompute": FULL},
    {"shard": 2, "recompute": PART}, {"pipeline": 2},
]  # fmt: skip


@pytest.mark.proof  # compiling takes minutes
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        *[(parallel, SHAPE) for parallel in DENSE],
        ({"shard": 2}, MIXED),
        ({"shard": 2, "expert": 2, "recompute": FULL}, MIXED),
    ],
    ids=lambda value: ("experts" if "experts" in value else "dense") if "vocab_size" in value else str(value),
)
def test_compiled_blocks_give_the_same_numbers(
    parallel: dict[str, Any], model: dict[str, Any], ranks: Ranks, recipe: Make
) -> None:
    if runtime.cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    wanted = ranks.run(1, "train", tree(recipe, model=model, run=str(recipe().run) + "-alone"), 3)[0]
    made = tree(recipe, 2, model=model, parallel=parallel, runtime={"device": "cpu", "compile": True})
    assert_equal(ranks.run(2, "train", made, 3, timeout_s=500), wanted)
