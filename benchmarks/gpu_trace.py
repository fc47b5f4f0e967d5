"""Where the time of a step goes: the device's kernels by family, and the time in which it runs none.

Read from the trace of torch's profiler. On a GPU a kernel counts; those launched inside `torch.optim` or ours, marked
by a range called OPTIMIZER, are the optimizer's whatever their names are. Without a GPU the operators of the CPU
count, each without what it calls, so that the same lines run everywhere. Families are told by name, as in the tables of
a profiled run: `top` in the result holds the longest kernels, by which a reader can check them.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from internlm.train.profile.operators import family

OPTIMIZER, STEP = "benchmark/optimizer", "benchmark/step"
IDLE = "idle"
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}


def profile(step: Callable[[], Any], device: Any, steps: int = 2) -> dict[str, Any]:
    """Take some steps under the profiler; return `breakdown` of them."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return breakdown(events)


def breakdown(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return milliseconds per step by family, the share of each, and the longest kernels.

    `idle` is the time inside the steps in which nothing ran. Kernels of several streams may overlap: then families
    and idle add up to more than a step.
    """
    events = [event for event in events if event.get("ph") == "X"]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == STEP and _is_range(e))
    updates = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == OPTIMIZER and _is_range(e))
    on_device = [e for e in events if e.get("cat") in _DEVICE]
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in _LAUNCHES and _correlated(e)}
    if on_device:
        pieces = [(e, float(e["dur"]), launched.get(e.get("args", {}).get("correlation"), e["ts"])) for e in on_device]
    else:
        pieces = [(e, own, e["ts"]) for e, own in _own_times(e for e in events if e.get("cat") == "cpu_op")]
    times: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for event, duration, begun in pieces:
        if _inside(begun, spans):
            found = "optimizer" if _inside(begun, updates) else family(event["name"])
            times[found] += duration
            kernels[event["name"]] += duration
    busy = _covered([(e["ts"], e["ts"] + e["dur"]) for e, *_ in pieces], spans)
    total = sum(stop - start for start, stop in spans)
    times[IDLE] = max(0.0, total - busy)
    count = max(1, len(spans))
    top = sorted(kernels.items(), key=lambda item: -item[1])[:20]
    return {
        "of": "kernels" if on_device else "CPU operators",
        "profiled_steps": len(spans),
        "step_ms": round(total / count / 1e3, 3),
        "ms": {name: round(time / count / 1e3, 3) for name, time in sorted(times.items(), key=lambda item: -item[1])},
        "share": {name: round(time / total, 4) for name, time in times.items()} if total else {},
        "top": [{"name": name[:160], "family": family(name), "ms": round(ms / count / 1e3, 3)} for name, ms in top],
    }


def _is_range(event: dict[str, Any]) -> bool:
    """Return whether an event is a range as the CPU saw it; the profiler repeats ranges on the device's side."""
    return event.get("cat") in ("user_annotation", "cpu_op")


def _correlated(event: dict[str, Any]) -> bool:
    return "correlation" in event.get("args", {})


def _inside(time: float, spans: list[tuple[float, float]]) -> bool:
    """Return whether a time lies in one of the spans, which are sorted and do not overlap."""
    place = bisect_right(spans, (time, float("inf"))) - 1
    return place >= 0 and time <= spans[place][1]


def _covered(intervals: list[tuple[float, float]], spans: list[tuple[float, float]]) -> float:
    """Return how long at least one interval runs inside the spans."""
    covered = 0.0
    for first, last in spans:
        until = first
        for start, stop in sorted(intervals):
            start, stop = max(start, until), min(stop, last)
            if stop > start:
                covered += stop - start
                until = stop
    return covered


def _own_times(events: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Return each operator with its time less that of the operators it calls; they nest, thread by thread."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["name"] not in (STEP, OPTIMIZER):
            threads[event.get("tid")].append(event)
    found = []
    for thread in threads.values():
        own: dict[int, float] = {}
        open_events: list[tuple[int, float]] = []
        ordered = sorted(thread, key=lambda e: (e["ts"], -e["dur"]))
        for number, event in enumerate(ordered):
            while open_events and open_events[-1][1] <= event["ts"]:
                open_events.pop()
            own[number] = event["dur"]
            if open_events:
                own[open_events[-1][0]] -= event["dur"]
            open_events.append((number, event["ts"] + event["dur"]))
        found += [(event, max(0.0, own[number])) for number, event in enumerate(ordered)]
    return found
