"""What communication costs a step: one step is traced now and then, and the trace is asked what ran when.

    with Trace(device) as trace:
        trainer.step()
    trace.communication_s, trace.waiting_s

Communication overlaps computation where it can. What slows a step down is the part in which nothing is computed:

    computation      ████████████      ████████
    communication        ██████████████
    waiting                      ██████

On a GPU the kernels count, of all streams; on a CPU the operators of the rank, and gloo's exchanges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from internlm import compat

Spans = list[tuple[int, int]]
"""(begin, end), in nanoseconds."""


class Trace:
    """A context in which everything that runs is noted; what it cost stands in the fields afterwards.

    Args:
        device: of the rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.communication_s = self.waiting_s = math.nan
        """How long something was exchanged; how long of it nothing was computed. Unknown where nothing was noted, as
        when another tool has the GPU's profiler."""

    def __enter__(self) -> Trace:
        self._profiler = compat.start_profiler(self.device)
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if self.device.type == "cuda" and kind is None:
            torch.cuda.synchronize(self.device)
        events = compat.stop_profiler(self._profiler)
        communication, computation = spans(events, self.device.type != "cpu")
        if communication and computation:
            self.communication_s, self.waiting_s = (
                length(communication) / 1e9,
                outside(communication, computation) / 1e9,
            )


def spans(events: Iterable[tuple[str, int, int, bool]], is_device: bool) -> tuple[Spans, Spans]:
    """Return when something was exchanged, and when something was computed.

    Args:
        events: name, begin, end, whether it ran on the GPU.
        is_device: whether what runs on the GPU counts, or what runs on the CPU.
    """
    communication: Spans = []
    computation: Spans = []
    for name, begin, end, on_device in events:
        if on_device != is_device:
            continue
        if name.startswith(("nccl", "gloo:")):
            communication.append((begin, end))
        elif is_device or name.startswith(("aten::", "internlm::", "mkldnn::", "## Call CompiledFxGraph")):
            computation.append((begin, end))
    return communication, computation


def length(intervals: Spans) -> int:
    """Return how long at least one of the intervals lasts."""
    return sum(end - begin for begin, end in _merged(intervals))


def outside(intervals: Spans, others: Spans) -> int:
    """Return how long at least one of the intervals lasts and none of the others does."""
    return length(intervals + others) - length(others)


def _merged(intervals: Spans) -> Spans:
    """Return the same stretches of time as intervals that do not touch, in order."""
    found: Spans = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found
