"""Muon: momentum whose matrix is replaced by the nearest orthogonal one (Jordan 2024).

    m ← μ m + g        u = orthogonal(μ m + g)        w ← w − lr (0.2 sqrt(max(rows, columns)) u + λ w)

The factor gives the update the root mean square of a typical AdamW update, so that one learning rate and one weight
decay serve both (Liu et al. 2025, Muon is Scalable, eq. 4). Only for matrices inside blocks: the rest goes to AdamW. A
stack [E, R, C] is E matrices, each with its own factor: the experts of a mixture. The factor comes from five
Newton-Schulz steps in matrix products alone: singular values end between 0.7 and 1.2, which is near enough.

    a matrix cut over S ranks     every rank makes the factor of each S-th matrix: two all-to-alls of what it holds
    whole experts on each rank    makes the factors of its own: nothing is sent
    copies                        every copy makes the same factors; `parallel.optimizer` all parts them
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.compat.groups import is_parted, local
from internlm.optim import Group, Updater
from internlm.parallel import collectives

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan 2024: steepest at 0, bounded on [0, 1]
STEPS = 5
BATCH = 1 << 27
"""Elements of whole matrices that a rank works on at once: some 2 GiB besides weights and states, and at least one
matrix. All 64 gates and ups of a 7B model on one GPU would be 2.9e9."""


@torch.no_grad()
def orthogonalise(matrices: Tensor) -> Tensor:
    """Return the approximately orthogonal factor of each matrix [N, R, C]; of zeros it is zeros.

    In bf16 on GPUs (the iteration forgives it), in the given dtype on CPUs, where bf16 is slower than fp32.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(Updater):
    """Muon over matrices [R, C] and stacks of them [E, R, C].

    A parameter's state is `momentum`, of its shape, dtype and placement.
    """

    def __init__(self, groups: list[Group], momentum: float = 0.95) -> None:
        super().__init__(groups)
        self.momentum = momentum

    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        assert parameter.ndim in (2, 3), "only matrices and stacks of them have orthogonal factors"
        return {"momentum": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, rate: float = 1.0) -> None:
        """Update every parameter that has a gradient. All ranks that share one must call it."""
        for group in self.groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group.parameters:
                if parameter.grad is not None:
                    placed = (parameter.device_mesh, parameter.placements) if is_parted(parameter) else ()
                    alike[parameter.shape, placed].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group.lr * rate, group.weight_decay)

    def _update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        like = parameters[0]
        rows, columns = like.shape[-2:]
        cuts = _cuts(like) if is_parted(like) else []
        # What a rank holds of a matrix may be on the CPU; products are made where the ranks talk.
        device = torch.device(like.device_mesh.device_type) if is_parted(like) else like.device
        at_once = max(1, BATCH // (rows * columns)) * math.prod(cut.ranks for cut in cuts)
        weights, grads = _matrices(parameters), _matrices([p.grad for p in parameters if p.grad is not None])
        momenta = _matrices([self.state[p]["momentum"] for p in parameters])
        for start in range(0, len(weights), at_once):
            own = slice(start, start + at_once)
            torch._foreach_mul_(momenta[own], self.momentum)
            torch._foreach_add_(momenta[own], grads[own])
            ahead = torch._foreach_add(grads[own], momenta[own], alpha=self.momentum)  # Nesterov
            parts = torch.stack(list(ahead)).to(device, torch.bfloat16 if device.type == "cuda" else None)
            del ahead
            updates = _by_turns(parts, cuts).to(weights[start])
            torch._foreach_mul_(weights[own], 1 - lr * weight_decay)
            torch._foreach_add_(weights[own], updates.unbind(), alpha=-lr * 0.2 * max(rows, columns) ** 0.5)


@dataclass(frozen=True)
class Cut:
    """How the ranks of a mesh axis share matrices [N, R, C]."""

    dim: int
    """1: each holds some of the rows, 2: of the columns."""
    most: int
    """Rows or columns of the largest part."""
    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        """How many share a matrix."""
        return dist.get_world_size(self.group)


def _cuts(like: DTensor) -> list[Cut]:
    """Return the axes that cut the matrices of a parameter; those that part whole matrices, or nothing, are not there.

    Of axes that cut one dim the last cuts first, and all but the first cut evenly: as `fully_shard` and
    `optimizer_shard` place what the tensor axis has cut.
    """
    mesh, last = like.device_mesh, like.ndim
    dims = {
        axis: placement.dim  # type: ignore[attr-defined]
        for axis, placement in enumerate(like.placements)
        if not placement.is_replicate() and mesh.size(axis) > 1
    }
    cuts = []
    for axis, dim in dims.items():
        if dim >= last - 2:
            inner = math.prod(mesh.size(other) for other in dims if other > axis and dims[other] == dim)
            most = -(-(like.shape[dim] // inner) // mesh.size(axis))
            cuts.append(Cut(dim - last + 3, most, mesh.get_group(axis)))
    return cuts


def _matrices(tensors: list[Tensor]) -> list[Tensor]:
    """Return this rank's parts [r, c] of all matrices in tensors [R, C] or [E, R, C]; they share memory with them."""
    parts = map(local, tensors)
    return [matrix for part in parts for matrix in (part.unbind() if part.ndim == 3 else [part])]


def _by_turns(parts: Tensor, cuts: list[Cut]) -> Tensor:
    """Return parts [N, r, c] of orthogonal factors: each of S ranks gets N / S whole matrices, and gives them back.

    Axis by axis, so that in the end no product is made twice; per axis two all-to-alls of what the rank holds. Parts of
    unequal size are padded with zeros, which stay zeros and add up from axis to axis; the order in which rows or
    columns are joined does not matter, as it only permutes the factor's.
    """
    if not cuts:
        return orthogonalise(parts)
    cut, *later = cuts
    count, own = parts.shape[0], parts.shape[cut.dim]
    shape = list(parts.shape)
    shape[0], shape[cut.dim] = -(-count // cut.ranks) * cut.ranks, max(cut.most, own)
    sent = parts.new_zeros(shape)
    sent[:count].narrow(cut.dim, 0, own).copy_(parts)
    joined = collectives.exchange(sent, cut.group, 0, cut.dim)
    back = collectives.exchange(_by_turns(joined, later), cut.group, cut.dim, 0)
    return back[:count].narrow(cut.dim, 0, own)
