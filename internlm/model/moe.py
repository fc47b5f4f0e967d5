"""A mixture of experts: each token goes through a few of many feed-forwards.

    p = softmax(router · x)          y = Σ over the k largest p:  p · w_down(silu(w_gate x) · w_up x)

Dropless: every token reaches the experts it chose (Gale et al. 2022). Tokens are sorted by expert, and each of three
products is one grouped product, whose shapes do not depend on who chose whom. The router works in fp32: a rounding
there changes which expert is chosen.

Two side losses keep the router healthy, both means over the tokens that are not padding:

    balance     E · Σ over experts of f · p̄     f: share of the row's choices that fell on it; p̄: its mean probability
                                                in the row. 1 where all are chosen alike, E / k at worst
    z           logsumexp(router logits)²

A balance per row does not depend on how a step is cut over micro-batches or ranks. Both are tied to the layer's output,
so that their gradient starts where its does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm import compat
from internlm.compat import kernels
from internlm.model.attention import Documents
from internlm.model.config import ExpertsConfig, ModelConfig

Dispatch = Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor]
"""Rows sorted by expert [R, D], where each expert's end [E], and what computes them → the results [R, D]."""


class Router(nn.Linear):
    """Token → a logit per expert, in fp32."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig) -> None:
        super().__init__(config.hidden_size, experts.count, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return fp32 logits [..., E] from x [..., D]."""
        return F.linear(x.float(), self.table().float())

    def table(self) -> Tensor:
        """Return the weight that products are made with."""
        return self.weight


class StackedLinear(nn.Module):
    """One matrix per expert, [E, out, in], without a bias."""

    def __init__(self, experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return [R, out] from rows x [R, in] sorted by expert; ends [E] int32: where each expert's rows end."""
        return grouped_product(x, self.table(), ends)

    def table(self) -> Tensor:
        """Return the weight that products are made with."""
        return self.weight


class Experts(nn.Module):
    """The SwiGLU of every expert."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.w_gate = StackedLinear(experts.count, config.hidden_size, config.ffn_size)
        self.w_up = StackedLinear(experts.count, config.hidden_size, config.ffn_size)
        self.w_down = StackedLinear(experts.count, config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return [R, D] from rows x [R, D] sorted by expert; ends [E] int32: where each expert's rows end."""
        return self.w_down(F.silu(self.w_gate(x, ends)) * self.w_up(x, ends), ends)


class Rows:
    """The rows whose balance is looked at: all their tokens are here. Replaced where they are not."""

    def own(self, ids: Tensor) -> Tensor:
        """Return the document ids of the tokens that are here, from those of all [B, T]."""
        return ids

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x [B, …] over all that hold a stretch of the rows."""
        return x


class SideLosses:
    """What a mixture adds to the loss, and what it counts.

    Counts come as the gradient of a tensor: once in each backward, however often forward runs, compiled or not.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self.share = torch.zeros((), device=device)
        """What a token's side losses are multiplied by: 1 / tokens of the step, times any loss scale."""
        self.counter = torch.zeros(experts + 3, device=device, requires_grad=True)

    @property
    def counts(self) -> Tensor:
        """How often each expert was chosen since the last `clear`; Σ balance, Σ z, and the tokens of both sums."""
        return torch.zeros_like(self.counter) if self.counter.grad is None else self.counter.grad

    def clear(self) -> None:
        """Start counting again."""
        self.counter.grad = None


class Mixture(nn.Module):
    """Router and experts in place of a feed-forward.

    `dispatch`, `rows` and `sides` are seams: all experts and tokens are here, and nothing is added to a loss.
    """

    def __init__(self, config: ModelConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.config = experts
        self.router = Router(config, experts)
        self.experts = Experts(config, experts)
        self.dispatch: Dispatch = lambda x, ends, compute: compute(x, ends)
        self.rows = Rows()
        self.sides: SideLosses | None = None

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        """Return [B, T, D] from the normalised stream x [B, T, D]; padding (document −1) is in no side loss."""
        with compat.without_autocast(x):
            logits = self.router(x)
        p = logits.softmax(-1)  # [B, T, E]
        gates, chosen = p.topk(self.config.per_token)  # [B, T, k]
        if self.config.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        out = self._mix(x.flatten(0, 1), gates.flatten(0, 1), chosen.flatten()).view_as(x)
        if self.sides is None or not torch.is_grad_enabled():
            return out
        side, counts = self._side_losses(logits, p, chosen, documents)
        return _Tied.apply(out, side, self.sides.share, self.sides.counter, counts)

    def _mix(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Return [N, D] from tokens x [N, D], their gates [N, k] and experts [N · k]."""
        per_token = self.config.per_token
        experts, order = chosen.sort(stable=True)
        back = order.argsort()
        numbers = torch.arange(self.config.count, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True).int()  # [E]
        rows = rearrange(x, order, back, per_token)
        rows = rearrange(self.dispatch(rows, ends, self.experts), back, order)
        return (rows.unflatten(0, (-1, per_token)) * gates[..., None].to(rows.dtype)).sum(1).to(x.dtype)

    def _side_losses(self, logits: Tensor, p: Tensor, chosen: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """Return the sum over tokens of what the side losses add, a scalar with a gradient, and what is counted."""
        experts, per_token = self.config.count, self.config.per_token
        here = p.new_ones(p.shape[:2]) if documents.ids is None else (self.rows.own(documents.ids) >= 0).float()
        ones = here[..., None].expand_as(chosen).flatten(1)
        counts = p.new_zeros(p.shape[0], experts).scatter_add_(1, chosen.flatten(1), ones)  # whole numbers: exact
        counts, tokens = self.rows.total(torch.cat([counts, here.sum(1, keepdim=True)], 1)).split([experts, 1], 1)
        shares = counts / (per_token * tokens).clamp(min=1)  # f [B, E]
        balance = experts * (shares[:, None] * p * here[..., None]).sum()
        z = (logits.logsumexp(-1).square() * here).sum()
        side = self.config.balance_loss * balance + self.config.z_loss * z
        return side, torch.cat([counts.sum(0), torch.stack([balance, z, here.sum()])]).detach()


def mixtures(model: nn.Module) -> dict[int, Mixture]:
    """Return the mixtures of a model, or of its part, by layer."""
    return {int(name.split(".")[1]): part for name, part in model.named_modules() if isinstance(part, Mixture)}


def rearrange(x: Tensor, order: Tensor, back: Tensor, repeats: int = 1) -> Tensor:
    """Return rows [R, …] of x [R / repeats, …], each repeated, in an order [R]; `back` is the order that undoes it."""
    return _Rearranged.apply(x, order, back, repeats)


class _Rearranged(torch.autograd.Function):
    """x[order // k] for an order of its rows, each repeated k times. Both ways only reads rows: no atomic sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.repeats = repeats
        return x.index_select(0, order if repeats == 1 else order // repeats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grads[0].index_select(0, back)
        return grad if ctx.repeats == 1 else grad.unflatten(0, (-1, ctx.repeats)).sum(1), None, None, None


class _Tied(torch.autograd.Function):
    """x, and with it two tensors whose gradients are `share` and `counts`, whatever the gradient of x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, side: Tensor, share: Tensor, counter: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(share, counts)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None]:
        share, counts = ctx.saved_tensors
        return grads[0], share.clone(), None, counts.clone(), None


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return [R, out]: rows x [R, in] times the transposed matrix of their group, weight [E, out, in].

    Rows are sorted by group; `ends` [E] int32: where each group's end. Autocast casts x, and the weight follows x.
    """
    x = compat.as_products(x)
    return _Grouped.apply(x, weight.to(x.dtype), ends)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, weight, ends, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = _product(grad, weight, ends, False) if ctx.needs_input_grad[0] else None
        grad_weight = _outer(grad, x, ends) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


@torch.library.custom_op("internlm::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """Return x [R, K] times the matrix of each row's group, which is weight [E, N, K] transposed, or weight [E, K, N].

    Operators of our own: the loop over groups looks at numbers, which neither compiling nor a dry run can do.
    """
    if kernels.has_grouped_product(x, weight):
        return kernels.grouped_product(x, weight.mT if transposed else weight, ends)
    out = x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])
    onednn = x.device.type == "cpu" and x.dtype == torch.float32 and kernels.has_onednn_linear()
    for rows, matrix in zip(_groups(x, ends), weight, strict=True):
        if onednn:
            out[rows] = kernels.onednn_linear(x[rows], matrix if transposed else matrix.t())
        else:
            torch.mm(x[rows], matrix.t() if transposed else matrix, out=out[rows])
    return out


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@torch.library.custom_op("internlm::grouped_outer", mutates_args=())
def _outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return the gradients [E, N, K] of the groups' matrices, from those of the results [R, N] and from x [R, K]."""
    if kernels.has_grouped_product(x, grad):
        is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        # The kernel of some GPUs leaves what it finds in the result of an empty group.
        return kernels.grouped_product(grad.t(), x, ends).masked_fill_(is_empty[:, None, None], 0)
    out = x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    for group, rows in enumerate(_groups(x, ends)):
        torch.mm(grad[rows].t(), x[rows], out=out[group])
    return out


@_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _groups(x: Tensor, ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    assert stops[-1] == x.shape[0], "every row has a group"
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
