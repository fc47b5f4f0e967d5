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
    return _Gather.apply(x, group, dim)


def scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return this rank's part along `dim` of the sum over ranks."""
    return _Scatter.apply(x, group, dim)


def copy(x: Tensor, group: Group) -> Tensor:
    """Return `x`, which is equal on all ranks and goes on differently on each."""
    return _Copy.apply(x, group)


def total(x: Tensor, group: Group) -> Tensor:
    """Return the sum of `x` over ranks."""
    return _Total.apply(x, group)


def exchange(x: Tensor, group: Group, cut: int, join: int) -> Tensor:
    """Cut `x` along one dim, send part r to rank r, and join what comes along another."""
    return _Exchange.apply(x, group, cut, join)


def exchange_rows(x: Tensor, group: Group, got: list[int], sent: list[int]) -> Tensor:
    """Send rows of `x`, the first sent[0] to rank 0 and so on, and return those that come, got[r] from rank r."""
    return _ExchangeRows.apply(x, group, got, sent)


def collect(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return the ranks' parts joined along `dim`, with which every rank does the same: the gradient is the own part."""
    return _Collect.apply(x, group, dim)


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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], ctx.group, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grads[0], ctx.group, ctx.dim), None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, cut: int, join: int) -> Tensor:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        return _all_to_all(x, group, cut, join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.group, ctx.join, ctx.cut), None, None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, got: list[int], sent: list[int]) -> Tensor:
        ctx.group, ctx.got, ctx.sent = group, got, sent
        return _exchange_rows(x, group, got, sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(grads[0], ctx.group, ctx.sent, ctx.got), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.place, ctx.dim, ctx.length = dist.get_rank(group), dim, x.shape[dim]
        return _all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].narrow(ctx.dim, ctx.place * ctx.length, ctx.length), None, None
