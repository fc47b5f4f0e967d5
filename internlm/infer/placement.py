"""Where a model answers, and in which form.

place = Placement.here()        # a GPU in bf16 where there is one, else the CPU with exact packed products
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from internlm import runtime
from internlm.errors import UsageError
from internlm.model.quant import Kind


@dataclass(frozen=True)
class Placement:
    """A device and what lies on it."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    """Of the weights; None: as stored."""
    pack: Kind | None = None
    """Form of the products (`model.quant`), on a CPU."""

    @classmethod
    def here(
        cls, device: str | None = None, pack: Kind | Literal["none"] | None = None, *, alone: bool = False
    ) -> Placement:
        """Return where a model goes on this machine.

        Args:
            device: cpu, cuda or cuda:N; None: a GPU where there is one.
            pack: None: the exact form of a CPU; "none": as the weights are.
            alone: whether it will write one text at a time: exact products of one row are then faster unpacked.

        Raises:
            UsageError: there is no such device here, or packed products are asked for on a GPU.
        """
        device = runtime.choose_device(device or "auto", "--device", UsageError)
        if device != "cpu":
            if pack not in (None, "none"):
                do = "Leave it out, or give --device cpu."
                raise UsageError("packed products are for CPUs", where="--pack", got=pack, do=do)
            return cls(device, torch.bfloat16)
        # fp32 also for bf16 products: all else is several times slower in bf16 on most CPUs.
        if pack in (None, "fp32"):
            pack = "split" if alone else "fp32"
        return cls(device, torch.float32, None if pack == "none" else pack)
