"""Collectives with a gradient. Each is the transpose of another.

forward               backward
gather(x, dim)        sum over ranks, keep the own part      tokens meet before a split matrix
scatter(x, dim)       gather                                 tokens part after one, partial sums added
copy(x)               sum over ranks                         the same two without parting tokens
total(x)              copy
exchange(x, a, b)     exchange(x, b, a)                      all-to-all: cut along a, joined along b
exchange_rows(x, …)   the same, back                         all-to-all of rows, not as many to each rank
collect(x, dim)       keep the own part                      values everybody then goes on with alike
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.compat import groups

Group = dist.ProcessGroup


def gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return the ranks' parts joined along `dim`; each rank goes on with it in its own way, so gradients are summed."""
    return _Linear.apply(x, group, (_all_gather, dim), (_reduce_scatter, dim))


def scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return this rank's part along `dim` of the sum over ranks."""
    return _Linear.apply(x, group, (_reduce_scatter, dim), (_all_gather, dim))


def copy(x: Tensor, group: Group) -> Tensor:
    """Return `x`, which is equal on all ranks and goes on differently on each."""
    return _Linear.apply(x, group, (_same,), (_all_reduce,))


def total(x: Tensor, group: Group) -> Tensor:
    """Return the sum of `x` over ranks."""
    return _Linear.apply(x, group, (_all_reduce,), (_same,))


def exchange(x: Tensor, group: Group, cut: int, join: int) -> Tensor:
    """Cut `x` along one dim, send part r to rank r, and join what comes along another."""
    return _Linear.apply(x, group, (_all_to_all, cut, join), (_all_to_all, join, cut))


def exchange_rows(x: Tensor, group: Group, got: list[int], sent: list[int]) -> Tensor:
    """Send rows of `x`, the first sent[0] to rank 0 and so on, and return those that come, got[r] from rank r."""
    return _Linear.apply(x, group, (_exchange_rows, got, sent), (_exchange_rows, sent, got))


def collect(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return the ranks' parts joined along `dim`, with which every rank does the same: the gradient is the own part."""
    return _Linear.apply(x, group, (_all_gather, dim), (_own_part, dim))


class _Linear(torch.autograd.Function):
    """A linear function of what the ranks hold, and its transpose: each with what it takes beside x and the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: tuple[Any, ...], back: tuple[Any, ...]) -> Tensor:
        ctx.group, ctx.back = group, back
        function, *arguments = there
        return function(x, group, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        function, *arguments = ctx.back
        return function(grads[0], ctx.group, *arguments), None, None, None


def _all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    if torch.compiler.is_compiling():
        return groups.traced_gather(x, group, dim)
    size = dist.get_world_size(group)
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    groups.all_gather(out, x.contiguous(), group)
    return out if dim == 0 else torch.cat(out.chunk(size), dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    if torch.compiler.is_compiling():
        return groups.traced_scatter(x, group, dim)
    size = dist.get_world_size(group)
    parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim))
    out = parts.new_empty((parts.shape[0] // size, *parts.shape[1:]))
    groups.reduce_scatter(out, parts, group)
    return out


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _all_to_all(x: Tensor, group: Group, cut: int, join: int) -> Tensor:
    size = dist.get_world_size(group)
    sent = torch.stack(x.chunk(size, cut))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return torch.cat(got.unbind(), join)


def _exchange_rows(x: Tensor, group: Group, got: list[int], sent: list[int]) -> Tensor:
    out = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), got, sent, group=group)
    return out


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _own_part(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
