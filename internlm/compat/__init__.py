"""The only place that touches private or version-dependent names of torch (2.11 to 2.13): a function for each.

`kernels`: what a device computes; `groups`: what ranks do together; here: autocast, compiled graphs, the profiler.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.profiler import ProfilerActivity, profile

_P = ParamSpec("_P")
_R = TypeVar("_R")


def as_products(x: Tensor) -> Tensor:
    """Return x in the dtype in which autocast makes products here; x itself without it. On meta torch cannot say."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def without_autocast(x: Tensor) -> Any:
    """Return a context in which products with x are made in its own dtype; meta has none, nor a need."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the function as one that compiled graphs call and do not look into.

    `torch.compiler.disable` imports the compiler at once, more than a second for who never compiles; torch's own lazy
    form (2.11 to 2.13) at the first call, compiled or not.
    """
    hidden = _disable_dynamo(function)

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Whoever makes graphs has imported the compiler.
        return (hidden if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return called


@functools.cache
def expensive_operators() -> frozenset[Any]:
    """Return the operators whose results selective recomputation keeps: matrix products and attention."""
    names = [
        "aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.linear.default",
        "aten._scaled_mm.default",
        "aten._scaled_dot_product_flash_attention.default", "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "torch_attn._varlen_attn.default", "internlm.onednn_linear.default", "internlm.grouped_product.default",
        "mkldnn._linear_pointwise.default",
    ]  # fmt: skip
    found = []
    for name in names:
        with contextlib.suppress(AttributeError, RuntimeError):  # this build has no such kernel
            found.append(functools.reduce(getattr, name.split("."), torch.ops))
    return frozenset(found)


def is_compiled(module: Any) -> bool:
    """Return whether calls of a module go to a compiled graph."""
    return module._compiled_call_impl is not None


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute of a name, for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def wrapped_call(module: Any, around: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Let `around(call, *arguments)` run for every call inside the block, as hooks of compiled ones cannot."""
    call = module._compiled_call_impl or module._call_impl
    return replaced(module, "_compiled_call_impl", functools.partial(around, call))


def start_profiler(device: torch.device, *, cpu_too: bool = False) -> Any:
    """Return a running profiler of this device, and of the CPU where that is the device or wanted too."""
    is_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] * is_gpu + [ProfilerActivity.CPU] * (cpu_too or not is_gpu)
    profiler = profile(activities=kinds)
    with _quiet():
        profiler.start()
    return profiler


class Event(NamedTuple):
    """Something that ran; times in nanoseconds."""

    name: str
    begin: int
    end: int
    on_device: bool
    """Whether on a GPU."""
    thread: int
    """On which it was called."""


def stop_profiler(profiler: Any) -> list[Event]:
    """Return what ran.

    The public `events()` builds a tree of objects first, which takes a minute for a large step.
    """
    with _quiet():
        profiler.stop()
    found = profiler.profiler.kineto_results.events()
    return [
        Event(e.name(), e.start_ns(), e.end_ns(), e.device_type().name != "CPU", e.start_thread_id()) for e in found
    ]


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
