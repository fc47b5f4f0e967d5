"""Where the time of profiled steps went: by family of kernels or operators, and by name.

On a GPU its kernels count, of all streams: where they overlap, the shares and the time in which nothing runs add up to
more than a step. On a CPU the operators count, each without those that it calls, thread by thread; what runs beside
the thread of the step, as gloo's exchanges do, is named too. Families are told by name: the longest names are listed,
by which a reader can check them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from internlm.compat import Event

Spans = list[tuple[int, int]]
"""(begin, end), in nanoseconds."""

RANGE = "internlm/"
"""How the names of our ranges in a trace begin: a step, and its phases."""
STEP = f"{RANGE}step"
FAMILIES = (
    ("communication", r"nccl|gloo|c10d|all_?gather|all_?reduce|reduce_?scatter|all_?to_?all"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn_generated_fort_native|_attn"),
    (
        "matmul",
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|matmul|scaled_mm|addmm|\bbmm\b|\bmm\b|linear|triton_tem|mkldnn",
    ),
    ("optimizer", r"multi_tensor_apply|adam|lerp|_foreach_"),
    ("norms and elementwise", r"triton_(poi|red|per)"),  # fused with the casts beside them
    ("copies and casts", r"copy|memcpy|memset|::fill_|::zero_|_to_copy|FillFunctor|CatArray|::cat$|::clone$"),
    ("compiled", r"CompiledFxGraph|CompiledFunction"),
    ("norms and elementwise", r"elementwise|reduce|norm|softmax|silu|mul|add|sub|div|sum|exp|pow|sqrt"),
)
OTHER, IDLE = "other", "nothing runs"
_PATTERNS = [(family, re.compile(pattern, re.IGNORECASE)) for family, pattern in FAMILIES]
_LONGEST = 25
"""Names that are listed."""


def family(name: str) -> str:
    """Return the family of a kernel or an operator."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), OTHER)


def table(events: Iterable[Event], title: str) -> str:
    """Return the text that says where the time of the steps in a trace went: what lies inside ranges called STEP."""
    events = list(events)
    steps = sorted({(e.begin, e.end) for e in events if e.name == STEP and not e.on_device})
    if not steps:
        return f"{title}: nothing was noted\n"
    ranges = {e.name for e in events if not e.on_device}  # the profiler repeats ranges on the device's side
    inside = [e for e in events if any(begin <= e.begin < end for begin, end in steps)]
    kernels = [e for e in inside if e.on_device and e.name not in ranges]
    total = length(steps)
    operators = self_times(e for e in inside if not e.on_device)  # of a range: Python between operators
    counted = [(e.name, e.end - e.begin) for e in kernels] or operators
    by_family: dict[str, int] = defaultdict(int)
    for name, spent in counted:
        if not name.startswith(RANGE):
            by_family[family(name)] += spent
    busy: Spans = [(e.begin, e.end) for e in kernels or inside if not e.name.startswith(RANGE)]
    by_family[IDLE] = outside(steps, busy)
    what = "kernels" if kernels else "operators of the CPU"
    lines = [f"{title}: {len(steps)} × {total / len(steps) / 1e6:.1f} ms, by {what}", ""]
    lines += _lines("family", [(name, 0, spent) for name, spent in by_family.items()], total, len(steps))
    if kernels:
        lines += ["", *_lines("kernel", _summed(counted), total, len(steps))]
    lines += ["", *_lines("operator, on the CPU, without what it calls", _summed(operators), total, len(steps))]
    return "\n".join(lines) + "\n"


def self_times(events: Iterable[Event]) -> list[tuple[str, int]]:
    """Return the name of each event and its time without that of the events inside it, thread by thread."""
    threads: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    found = []
    for thread in threads.values():
        ordered = sorted(thread, key=lambda e: (e.begin, -e.end))
        own = [e.end - e.begin for e in ordered]
        around: list[int] = []  # numbers of the events that have not ended yet, the innermost last
        for number, event in enumerate(ordered):
            while around and ordered[around[-1]].end <= event.begin:
                around.pop()
            if around:
                own[around[-1]] -= event.end - event.begin
            around.append(number)
        found += [(event.name, max(0, spent)) for event, spent in zip(ordered, own, strict=True)]
    return found


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


def _summed(counted: Iterable[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Return each name once, how often it came, and its time."""
    found: dict[str, list[int]] = defaultdict(list)
    for name, spent in counted:
        found[name].append(spent)
    return [(name, len(times), sum(times)) for name, times in found.items()]


def _lines(head: str, rows: list[tuple[str, int, int]], total: int, steps: int) -> list[str]:
    """Return the longest rows of name, calls and nanoseconds, as a table; calls of 0 are left empty."""
    lines = [f"{head:<72} {'calls/step':>10} {'ms/step':>10} {'share':>7}"]
    for name, calls, spent in sorted(rows, key=lambda row: -row[2])[:_LONGEST]:
        shown = name if len(name) <= 72 else name[:71] + "…"
        often = f"{calls / steps:.0f}" if calls else ""
        lines.append(f"{shown:<72} {often:>10} {spent / steps / 1e6:>10.3f} {spent / total:>7.1%}")
    return lines
