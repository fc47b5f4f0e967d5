"""What communication costs a step, from intervals."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm.train.profile import Trace, length, outside, spans

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ends: (min(ends), max(ends))))


@given(INTERVALS, INTERVALS)
def test_lengths_are_those_of_counting_every_moment(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    def moments(intervals: list[tuple[int, int]]) -> set[int]:
        return {moment for begin, end in intervals for moment in range(begin, end)}

    assert length(first) == len(moments(first))
    assert outside(first, second) == len(moments(first) - moments(second))


def test_what_was_not_noted_is_unknown() -> None:
    with Trace(torch.device("cpu")) as trace:
        torch.ones(3).sum()
    assert math.isnan(trace.waiting_s)  # nothing was exchanged here


def test_operators_count_on_a_cpu_and_kernels_on_a_gpu() -> None:
    events = [
        ("aten::mm", 0, 4, False),
        ("gloo:all_reduce", 3, 9, False),
        ("c10d::allreduce_", 3, 9, False),  # the call that waits for it
        ("autograd::engine::evaluate_function: MmBackward0", 0, 20, False),
        ("ncclDevKernel_AllGather_RING_LL", 10, 16, True),
        ("nvjet_tst_256x128", 12, 14, True),
    ]
    assert spans(events, False) == ([(3, 9)], [(0, 4)])
    assert spans(events, True) == ([(10, 16)], [(12, 14)])
