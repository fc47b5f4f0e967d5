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
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

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
        grads, weights = (_local([p.grad for p in parameters if p.grad is not None]), _local(parameters))
        momenta = _local([self.state[p]["momentum"] for p in parameters])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(grads, momenta, alpha=group["momentum"])  # Nesterov
        rows, columns = parameters[0].shape
        updates = _orthogonal_parts(list(ahead), parameters)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _orthogonal_parts(parts: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Return this rank's parts of the orthogonal factors of matrices.

    Args:
        parts: what this rank holds of each matrix.
        like: parameters of one shape that are placed as the matrices are.
    """
    first = like[0]
    if not isinstance(first, DTensor):
        return list(orthogonalise(torch.stack(parts)).unbind())
    axes = [axis for axis, placement in enumerate(first.placements) if not placement.is_replicate()]
    if len(axes) == 1 and first.placements[axes[0]] == Shard(0):
        return _orthogonal_by_turns(parts, first.shape[0], first.device_mesh.get_group(axes[0]))
    # Cut over two axes: every rank gathers all matrices and computes all of them.
    whole = [
        DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
        for part, p in zip(parts, like, strict=True)
        if isinstance(p, DTensor)
    ]
    made = orthogonalise(torch.stack(whole)).unbind()
    cut = [distribute_tensor(x, first.device_mesh, first.placements, src_data_rank=None) for x in made]
    return _local(list(cut))


def _orthogonal_by_turns(parts: list[Tensor], rows: int, group: dist.ProcessGroup) -> list[Tensor]:
    """As above for matrices cut by rows: each rank gets every S-th matrix whole, computes it, and gives it back.

    Two all-to-alls, each of what the rank holds; no product is made twice.
    """
    size, count = dist.get_world_size(group), len(parts)
    most, width = -(-rows // size), parts[0].shape[1]
    own = parts[0].shape[0]
    sent = parts[0].new_zeros(-(-count // size), size, most, width)  # [turn, owner, rows of this rank, C]
    for number, part in enumerate(parts):
        sent[number // size, number % size, :own] = part
    got = torch.empty_like(sent.transpose(0, 1).contiguous())  # [rank, turn, its rows, C]
    dist.all_to_all_single(got, sent.transpose(0, 1).contiguous(), group=group)
    whole = got.transpose(0, 1).flatten(1, 2)  # [turn, S · most, C]; a rank's rows end before the next one's begin
    made = whole.new_zeros(whole.shape)
    made[:, :rows] = orthogonalise(whole[:, :rows])
    back = torch.empty_like(got)
    dist.all_to_all_single(back, made.unflatten(1, (size, most)).transpose(0, 1).contiguous(), group=group)
    return [back[number % size, number // size, :own] for number in range(count)]
