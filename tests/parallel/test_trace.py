"""A run on several ranks says what communication costs it."""

from __future__ import annotations

from collections.abc import Callable

from internlm import config
from internlm.recipe import Recipe
from tests.parallel.ranks import Ranks


def test_the_second_step_and_every_so_many_after_are_traced(ranks: Ranks, recipe: Callable[..., Recipe]) -> None:
    made = recipe(
        parallel={"shard": 2},
        train={"tokens": 5 * 256, "batch_tokens": 256, "log_every_steps": 5, "trace_every_steps": 3},
    )
    lines = {line["step"]: line for line in ranks.run(2, "fit", config.encode(made))[0] if "train/loss" in line}
    assert [step for step, line in lines.items() if "perf/comm_s" in line] == [2, 5]
    for step in (2, 5):
        assert 0 < lines[step]["perf/comm_wait_s"] <= lines[step]["perf/comm_s"]
    assert lines[2]["perf/comm_s"] < lines[2]["perf/step_s"]  # the window of step 2 is that step alone


def test_a_run_alone_is_never_traced(ranks: Ranks, recipe: Callable[..., Recipe]) -> None:
    made = recipe(train={"tokens": 3 * 256, "batch_tokens": 256, "trace_every_steps": 1})
    assert not [line for line in ranks.run(1, "fit", config.encode(made))[0] if "perf/comm_s" in line]
