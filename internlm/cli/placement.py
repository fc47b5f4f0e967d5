"""Where a model answers, and in which form: shared by the verbs that answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internlm.errors import UsageError

if TYPE_CHECKING:
    import torch

    from internlm.model.quant import Kind

_UNPACKED = "none"


@dataclass(frozen=True)
class Placement:
    """A device and what lies on it."""

    device: str
    dtype: torch.dtype
    """Of the weights."""
    pack: Kind | None
    """Form of the products (`model.quant`)."""


def add_arguments(add: Callable[..., Any]) -> None:
    """Declare the options with a parser's `add_argument`."""
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add(
        "--pack",
        choices=["fp32", "fp16", "bf16", "int8", _UNPACKED],
        metavar="KIND",
        help="on a CPU: fp32 (default, exact), fp16, bf16, int8, none",
    )


def placement(arguments: argparse.Namespace, *, alone: bool = False) -> Placement:
    """Return where the model goes.

    Args:
        arguments: the options.
        alone: whether it will write one text at a time: exact products of one row are then faster unpacked.

    Raises:
        UsageError: there is no such device here, or packed products are asked for on a GPU.
    """
    import torch

    device = arguments.device or "auto"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = ["auto", "cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    elif device.startswith("cuda"):
        raise UsageError("no CUDA device here", where="--device", got=device, do="Leave it out, or give --device cpu.")
    if device not in here:
        raise UsageError("no such device here", where="--device", got=device, allowed=here)
    if device != "cpu":
        if arguments.pack not in (None, _UNPACKED):
            do = "Leave it out, or give --device cpu."
            raise UsageError("packed products are for CPUs", where="--pack", got=arguments.pack, do=do)
        return Placement(device, torch.bfloat16, None)
    # fp32 also for bf16 products: all else is several times slower in bf16 on most CPUs.
    pack: Kind | None = None if arguments.pack == _UNPACKED else arguments.pack or "fp32"
    if alone and pack == "fp32":
        pack = "split"
    return Placement(device, torch.float32, pack)
