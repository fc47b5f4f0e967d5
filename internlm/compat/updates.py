"""Updates of many parameters at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fused_adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    **numbers: Any,
) -> None:
    """Take one AdamW step for each weight, in place, with the kernel of `torch.optim.AdamW(fused=True)`.

    All are fp32 on one device; a step is a [], the number of this update from 1. Numbers are `lr`, `beta1`, `beta2`,
    `eps` and `weight_decay`.
    """
    torch._fused_adamw_(weights, grads, means, squares, [], steps, amsgrad=False, maximize=False, **numbers)
