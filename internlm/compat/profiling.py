"""The profiler and the record of a GPU's memory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def start_profiler(device: torch.device, *, cpu_too: bool = False) -> Any:
    """Return a running profiler of this device, and of the CPU where that is the device or wanted too."""
    is_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] * is_gpu + [ProfilerActivity.CPU] * (cpu_too or not is_gpu)
    profiler = profile(activities=kinds)
    with _quiet():
        profiler.start()
    return profiler


def stop_profiler(profiler: Any) -> list[tuple[str, int, int, bool, int]]:
    """Return what ran: name, begin and end in nanoseconds, whether on a GPU, number of the thread that called it.

    The public `events()` builds a tree of objects first, which takes a minute for a large step.
    """
    with _quiet():
        profiler.stop()
    found = profiler.profiler.kineto_results.events()
    return [(e.name(), e.start_ns(), e.end_ns(), e.device_type().name != "CPU", e.start_thread_id()) for e in found]


def record_memory(entries: int) -> None:
    """Note from now on who allocates on the GPU, with stacks, and keep the last entries; 0: no more."""
    torch.cuda.memory._record_memory_history("all" if entries else None, stacks="python", max_entries=entries or 1)


def dump_memory(path: str) -> None:
    """Write what lies in the GPU's memory, and what was noted about it, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what is written to stderr: 2.13's profiler tells there, whatever its settings, that it starts."""
    if sys.stderr is None:  # closed
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
