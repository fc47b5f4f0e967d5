"""Experts over ranks: each rank of an expert group holds some, and rows travel to them and back.

    rank 0   rows sorted by expert  e0 e0 e1 e2 e3 e3      experts e0 e1 live here, e2 e3 on rank 1
             → all-to-all →         e0 e0 e1 | e0 e1 e1    from rank 0 | from rank 1
             sort by expert, compute, sort back, → all-to-all → the order they had

The group's ranks are neighbours of the shard axis: they see different rows, and share what is not an expert as ever.
How many rows go where is known after the router only: an exchange of counts, and a wait for the device, come before
each layer's rows. Nothing is dropped: a rank whose experts are popular needs more memory than others.

A stacked weight [E, out, in] is cut along E over the expert group, along `out` or `in` over the tensor axis as other
matrices are, and what is left by `fully_shard` over the ranks that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard, distribute_tensor

from internlm.model.moe import Rows, StackedLinear, mixtures, rearrange
from internlm.model.transformer import Transformer
from internlm.parallel import collectives
from internlm.parallel.context import own_tokens
from internlm.parallel.mesh import Mesh
from internlm.parallel.tensor import own

COLUMNS, ROWS = 1, 2
"""Dims of a stacked weight that the tensor axis cuts: outputs, or inputs."""


class PartLinear(StackedLinear):
    """Some of the experts' matrices, or a part of each."""

    def table(self) -> Tensor:
        """Return this rank's part of the weight."""
        return own(self.weight)


class Dispatch:
    """Sends rows to the ranks of a group, which hold all experts together, in order, and back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.is_even = False
        """Take for granted that every rank sends every other as much: in a dry run counts have no values."""

    def __call__(self, x: Tensor, ends: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the results for rows x [R, D] that are sorted by expert; ends [E]: where each expert's rows end."""
        counts = ends.diff(prepend=ends.new_zeros(1)).view(self.size, -1)  # to whom × which of its experts
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)  # from whom × which of ours
        sent, got = self._sizes(counts, arriving, x.shape[0])
        x = collectives.exchange_rows(x, self.group, got, sent)
        if self.is_even:
            experts = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        else:
            numbers = torch.arange(arriving.shape[1], device=x.device).expand_as(arriving)
            experts = numbers.flatten().repeat_interleave(arriving.flatten(), output_size=x.shape[0])
        order = experts.argsort(stable=True)
        back = order.argsort()
        out = compute(rearrange(x, order, back), arriving.sum(0).cumsum(0).int())
        return collectives.exchange_rows(rearrange(out, back, order), self.group, sent, got)

    def _sizes(self, counts: Tensor, arriving: Tensor, rows: int) -> list[list[int]]:
        """Return how many rows go to each rank and come from each; waits for the device."""
        if self.is_even:
            some = rows // self.size
            return [[some] * (self.size - 1) + [rows - some * (self.size - 1)]] * 2
        return torch.stack([counts.sum(1), arriving.sum(1)]).tolist()


class Stretches(Rows):
    """Rows whose tokens are parted over a context group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def own(self, ids: Tensor) -> Tensor:
        """Return this rank's part of [B, T]."""
        return own_tokens(ids, dist.get_rank(self.group), dist.get_world_size(self.group))

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over the group."""
        return collectives.total(x, self.group)


def spread(model: Transformer, mesh: Mesh) -> None:
    """Give each rank its experts, and its part of them, in place; the model may be on the meta device."""
    for mixture in mixtures(model).values():
        if mesh.experts is not None:
            mixture.dispatch = Dispatch(mesh.experts.get_group("expert"))
        if mesh.layout.context > 1:
            mixture.rows = Stretches(mesh.group("context"))
        cuts = {"w_gate": COLUMNS, "w_up": COLUMNS, "w_down": ROWS}
        for name, dim in cuts.items():
            _cut(mixture.experts.get_submodule(name), dim, mesh)


def assume_even(model: nn.Module) -> None:
    """Take for granted that every expert is chosen as often: for a dry run."""
    for mixture in mixtures(model).values():
        if isinstance(mixture.dispatch, Dispatch):
            mixture.dispatch.is_even = True


def _cut(module: nn.Module, dim: int, mesh: Mesh) -> None:
    placements: list[Placement]
    if mesh.experts is not None:
        axes = mesh.experts["expert", "tensor"] if mesh.layout.tensor > 1 else mesh.experts["expert"]
        placements = [Shard(0), *[Shard(dim)] * (axes.ndim - 1)]
    elif mesh.layout.tensor > 1:
        axes, placements = mesh.world["tensor"], [Shard(dim)]
    else:
        return
    module.__class__ = PartLinear
    weight = module.get_parameter("weight")
    spread_weight = distribute_tensor(weight.detach(), axes, placements, src_data_rank=None)
    module.weight = nn.Parameter(spread_weight, requires_grad=weight.requires_grad)
