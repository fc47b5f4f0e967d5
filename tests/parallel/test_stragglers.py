"""A rank that is slower than the others is found, though all take a step in the same time."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from internlm import config
from internlm.recipe import Recipe
from tests.parallel.conftest import of_proof
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("world_size", "layout", "where"),
    [
        (4, {"replicate": 2, "shard": 2, "zero": "3"}, "forward"),
        (2, {"replicate": 2}, "data"),
        *of_proof([(4, {"replicate": 4}, "forward"), (2, {"shard": 2, "zero": "3"}, "forward")]),
    ],
)
def test_the_rank_that_sleeps_is_named_and_nobody_else(
    recipe: Make, ranks: Ranks, world_size: int, layout: dict[str, Any], where: str
) -> None:
    slow = world_size - 1
    value = recipe(
        parallel=layout, train__tokens=9 * 256, train__trace_every_steps=2, train__log_every_steps=100,
        track={"tensorboard": False}, data__validation={},
    )  # fmt: skip
    found = ranks.run(world_size, "with_a_slow_rank", config.encode(value), slow, where, 0.6)
    looks = [line for line in found[0]["metrics"] if "ranks/slowest_rank" in line]
    assert len(looks) == 4
    assert all(look["ranks/slowest_rank"] == slow and look["ranks/slowest_ratio"] > 1.5 for look in looks)
    (warning,) = [text for text in found[0]["warnings"] if "the median of its peers" in text]
    assert f"rank {slow} on {socket.gethostname()}" in warning
    assert {line["mem/peak_gib"] for line in looks} == {world_size}, "the largest of all ranks"
    assert not any("the median" in text for other in found[1:] for text in other["warnings"]), "rank 0 says it"


def test_a_look_costs_one_sum_in_its_own_step_and_none_in_others(recipe: Make, ranks: Ranks) -> None:
    counts = {}
    for every in (None, 4):
        value = recipe(
            parallel={"replicate": 2}, train__tokens=10 * 256, train__trace_every_steps=every,
            train__log_every_steps=1, track={"tensorboard": False}, data__validation={}, run=f"{recipe().run}-{every}",
        )  # fmt: skip
        counts[every] = ranks.run(2, "with_a_slow_rank", config.encode(value), 9, "forward", 0.0)[1]["counts"]
    more = [traced - plain for traced, plain in zip(counts[4], counts[None], strict=True)]
    assert more == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
