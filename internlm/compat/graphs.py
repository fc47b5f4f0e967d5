"""Autocast, compiled graphs, and calls of modules."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

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
    """Return whether calls of a module go to a compiled graph. A private name."""
    return module._compiled_call_impl is not None


def wrap_call(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Let `around(call, *arguments)` run for every call, as hooks of compiled ones cannot; return what ends that."""
    before = module._compiled_call_impl
    module._compiled_call_impl = functools.partial(around, before or module._call_impl)
    return lambda: setattr(module, "_compiled_call_impl", before)
