"""Muon: momentum whose matrix is replaced by the nearest orthogonal one (Jordan 2024).

    m ← μ m + g        u = orthogonal(μ m + g)        w ← w − lr (0.2 sqrt(max(rows, columns)) u + λ w)

The factor gives the update the root mean square of a typical AdamW update, so that one learning rate and one weight
decay serve both (Liu et al. 2025, Muon is Scalable, eq. 4). Only for matrices inside blocks: embeddings, heads, norms
and biases go to AdamW. The orthogonal factor comes from five Newton-Schulz steps in matrix products alone: singular
values end between 0.7 and 1.2, which is near enough. Matrices of one shape go through them in one batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

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
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    placed = parameter.placements if isinstance(parameter, DTensor) else ()
                    alike[parameter.shape, placed].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, weights = (_local([p.grad for p in parameters if p.grad is not None]), _local(parameters))
        momenta = _local([self.state[p]["momentum"] for p in parameters])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(grads, momenta, alpha=group["momentum"])  # Nesterov
        rows, columns = parameters[0].shape
        updates = _orthogonal_parts(list(ahead), parameters[0])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _orthogonal_parts(parts: list[Tensor], like: Tensor) -> list[Tensor]:
    """Return this rank's parts of the orthogonal factors of matrices.

    Args:
        parts: what this rank holds of each matrix.
        like: a parameter of the matrices' shape, placed as they are.
    """
    stacked = torch.stack(parts)
    if not isinstance(like, DTensor):
        return list(orthogonalise(stacked).unbind())
    axes = [axis for axis, placement in enumerate(like.placements) if not placement.is_replicate()]
    return list(_by_turns(stacked, like, axes).unbind())


def _by_turns(parts: Tensor, like: DTensor, axes: list[int]) -> Tensor:
    """Return parts [N, r, c] of orthogonal factors: each rank of an axis gets every S-th matrix, and gives it back.

    Axis by axis, so that in the end no product is made twice; per axis two all-to-alls of what the rank holds. Parts of
    unequal size are padded with zeros, which stay zeros; the order in which rows or columns are joined does not matter,
    as it only permutes the factor's.

    Args:
        parts: what this rank holds of each matrix.
        like: a parameter of the matrices' shape, placed as they are.
        axes: of its mesh, which cut the matrices; of those that cut one dim the last cuts first.
    """
    if not axes:
        return orthogonalise(parts)
    axis, *later = axes
    cut = {a: like.placements[a].dim for a in axes}  # type: ignore[attr-defined]
    dim, size, group = cut[axis] + 1, like.device_mesh.size(axis), like.device_mesh.get_group(axis)
    evenly = math.prod(like.device_mesh.size(a) for a in later if cut[a] == cut[axis])
    most = -(-(like.shape[cut[axis]] // evenly) // size)
    count, own = parts.shape[0], parts.shape[dim]
    turns = -(-count // size)
    shape = [turns * size, *parts.shape[1:]]
    shape[dim] = most
    sent = parts.new_zeros(shape)
    sent.narrow(dim, 0, own)[:count] = parts
    got = _exchange(sent.unflatten(0, (turns, size)).transpose(0, 1), group)  # [rank, turn, r, c]
    made = _by_turns(got.movedim(0, dim).flatten(dim, dim + 1), like, later)
    back = _exchange(made.unflatten(dim, (size, most)).movedim(dim, 0), group)  # [owner, turn, r, c]
    return back.transpose(0, 1).flatten(0, 1)[:count].narrow(dim, 0, own)


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send x[r] to rank r; return what came, by rank."""
    sent = x.contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got
