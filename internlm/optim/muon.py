"""Muon: momentum whose matrix is replaced by the nearest orthogonal one (Jordan 2024).

    m ← μ m + g        u = orthogonal(μ m + g)        w ← w − lr (0.2 sqrt(max(rows, columns)) u + λ w)

The factor gives the update the root mean square of a typical AdamW update, so that one learning rate and one weight
decay serve both (Liu et al. 2025, Muon is Scalable, eq. 4). Only for matrices inside blocks: embeddings, heads, norms
and biases go to AdamW. The orthogonal factor comes from five Newton-Schulz steps in matrix products alone: singular
values end between 0.7 and 1.2, which is near enough. Matrices of one shape go through them in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan 2024: steepest at 0, bounded on [0, 1]


@torch.no_grad()
def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return the approximately orthogonal factor of each matrix [N, R, C].

    In bf16 on GPUs (the iteration forgives it), in the given dtype on CPUs, where bf16 is slower than fp32.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over matrices; each parameter group has `lr`, `momentum`, `weight_decay`."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(grads, momenta, alpha=group["momentum"])  # Nesterov
        updates = orthogonalise(torch.stack(list(ahead)))
        rows, columns = parameters[0].shape
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
