"""The language head: what the model thinks of each label, without ever holding [B, T, V].

With a vocabulary of 103,168 the logits of 16k tokens are 6.8 GB in fp32 and their gradient as much again: the head
walks over the tokens in chunks of a fixed number of logits. Two ways back, both exact:

- The caller says beforehand what each token's log-probability will be multiplied by (`coefficients`, known for every
  loss that is linear in log-probabilities: −weight / count for language modelling). Then the gradients are made while a
  chunk's probabilities are at hand: three matrix products per chunk, as with full logits.
- Otherwise the logits of a chunk are computed again in backward: one product more.

Probabilities, sums and the gradient of the weight are in fp32 whatever the dtype of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm import compat
from internlm.compat import kernels

CHUNK_LOGITS = 1 << 22
"""Logits per chunk (16 MiB in fp32): on the CPU it stays in cache between product, softmax and gradient."""


class TokenOutputs(NamedTuple):
    """What the model thinks of each label; every field [B, T] but `weighted`. A tuple: hooks find its tensors."""

    logp: Tensor
    """Log-probability of the label, in nats, fp32."""
    logz: Tensor
    """Log of the sum of exp(logits), fp32."""
    correct: Tensor
    """Whether the label is the most probable token, bool."""
    weighted: Tensor | None = None
    """Σ coefficients · logp, a scalar: set when coefficients were given, and then the only field with a gradient."""


@dataclass(frozen=True)
class Slice:
    """The ids that a head has logits for, when others hold the rest of the vocabulary."""

    first: int
    """Its first id."""
    reduce: Callable[[Tensor, Literal["max", "sum"]], Tensor]
    """Combines a tensor over all holders."""


class LanguageHead(nn.Module):
    """Hidden states and labels → TokenOutputs. Its weight [V, D] may be the embedding's.

    Two seams: `part` is set where the vocabulary is spread over devices; `packed` stands for the weight, in `logits`
    only.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.part: Slice | None = None
        self.packed: nn.Module | None = None

    def table(self) -> Tensor:
        """Return the weight that products are made with."""
        return self.weight

    def forward(self, hidden: Tensor, labels: Tensor, coefficients: Tensor | None = None) -> TokenOutputs:
        """Score the labels.

        Args:
            hidden: [B, T, D], normalised.
            labels: [B, T] token ids.
            coefficients: [B, T] fp32, what each log-probability is multiplied by in the loss; on the CPU tokens with 0
                are not computed, and their outputs are 0.
        """
        assert self.packed is None, "a packed head gives logits only"
        # Autocast reaches some of the products in the functions below and not others: cast here, once.
        hidden = compat.as_products(hidden)
        with compat.without_autocast(hidden):
            return self._score(hidden, labels, coefficients)

    def _score(self, hidden: Tensor, labels: Tensor, coefficients: Tensor | None) -> TokenOutputs:
        shape = labels.shape
        flat = hidden.reshape(-1, hidden.shape[-1])
        if coefficients is None:
            return TokenOutputs(*_Recomputed.apply(flat, self.table(), labels, self.part))
        labels = labels.reshape(-1)
        coefficients = coefficients.reshape(-1)
        chosen = None
        if hidden.device.type == "cpu" and not coefficients.all():
            chosen = coefficients.nonzero().squeeze(1)
            flat, labels, coefficients = flat[chosen], labels[chosen], coefficients[chosen]
        weighted, logp, logz, correct = _Foreseen.apply(flat, self.table(), labels, coefficients, self.part)
        if chosen is not None:
            size = shape.numel()
            logp, logz, correct = (x.new_zeros(size).index_copy_(0, chosen, x) for x in (logp, logz, correct))
        return TokenOutputs(logp.view(shape), logz.view(shape), correct.view(shape), weighted)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] in fp32, for decoding: only ever asked for a few tokens."""
        if self.packed is not None:
            return self.packed(hidden)
        product = F.linear if torch.is_grad_enabled() else _product(hidden, self.weight)
        return product(hidden, self.weight).float()


def _product(hidden: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the fastest function (x [C, K], w [N, K]) → x · w transposed."""
    if hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.float32 and kernels.has_onednn_linear():
        return kernels.onednn_linear
    return F.linear


def _chunks(tokens: int, vocab: int) -> list[slice]:
    rows = max(1, CHUNK_LOGITS // vocab)
    return [slice(i, min(i + rows, tokens)) for i in range(0, tokens, rows)]


def _score(logits: Tensor, labels: Tensor, held: Slice | None, out: tuple[Tensor, Tensor, Tensor], rows: slice) -> None:
    """Write logp, logz and correct of one chunk [C, V] into `out`; the logits become probabilities."""
    logp, logz, correct = out
    at, inside = _locate(labels, logits.shape[1], held)
    label_logit = logits.gather(1, at[:, None]).squeeze(1)
    top = logits.amax(1)
    if held is not None:
        top = held.reduce(top, "max")
    logits.sub_(top[:, None]).exp_()
    total = logits.sum(1)
    if held is not None:
        total, label_logit = held.reduce(torch.stack([total, label_logit * inside]), "sum").unbind()
    correct[rows] = label_logit == top
    logits.div_(total[:, None])
    logz[rows] = total.log().add_(top)
    logp[rows] = label_logit - logz[rows]


def _locate(labels: Tensor, vocab: int, held: Slice | None) -> tuple[Tensor, Tensor | float]:
    """Return the column of each label, and 1 where it is held here, else 0."""
    if held is None:
        return labels, 1.0
    at = labels - held.first
    inside = (at >= 0) & (at < vocab)
    return at.clamp(0, vocab - 1), inside.float()


def _add_at_labels(grad: Tensor, labels: Tensor, values: Tensor, held: Slice | None) -> None:
    at, inside = _locate(labels, grad.shape[1], held)
    grad.scatter_add_(1, at[:, None], (values * inside)[:, None])


class _Foreseen(torch.autograd.Function):
    """Σ c·logp with the gradients made in forward: backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, coefficients: Tensor, held: Slice | None
    ) -> tuple[Tensor, ...]:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        logp, logz = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
        correct = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        product = _product(hidden, weight)
        for part in _chunks(tokens, vocab):
            h, c = hidden[part], coefficients[part]
            logits = product(h, weight).float()
            _score(logits, labels[part], held, (logp, logz, correct), part)
            if grad_hidden is None or grad_weight is None:
                continue
            # d(c·logp)/d logits = c (onehot − p)
            logits.mul_(-c[:, None])
            _add_at_labels(logits, labels[part], c, held)
            grad = logits.to(hidden.dtype)
            grad_hidden[part] = product(grad, weight.t())
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), h)
            else:
                grad_weight.add_(torch.mm(grad.t(), h))
        # No saved tensors: each of two backwards scales them in place, where a pipeline parts the gradients of weights
        # and input.
        ctx.grads, ctx.scaled_by = (grad_hidden, grad_weight), None
        ctx.mark_non_differentiable(logp, logz, correct)
        return (coefficients * logp).sum(), logp, logz, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.grads
        scale = grads[0]
        factor = scale if ctx.scaled_by is None else scale / ctx.scaled_by
        ctx.scaled_by = scale
        return grad_hidden.mul_(factor), grad_weight.mul_(factor).to(ctx.weight_dtype), None, None, None


class _Recomputed(torch.autograd.Function):
    """logp and logz with any gradient: backward computes the logits of each chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, held: Slice | None) -> tuple[Tensor, ...]:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        logp, logz = (torch.empty(labels.shape, dtype=torch.float32, device=hidden.device) for _ in range(2))
        correct = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
        labels, out = labels.reshape(-1), (logp.view(-1), logz.view(-1), correct.view(-1))
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        product = _product(hidden, weight)
        for part in _chunks(tokens, vocab):
            logits = product(hidden[part], weight).float()
            _score(logits, labels[part], held, out, part)
        ctx.held = held
        ctx.save_for_backward(hidden, weight, labels, logz)
        ctx.mark_non_differentiable(correct)
        return logp, logz, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logp, grad_logz = (grad.reshape(-1) for grad in grads[:2])
        hidden, weight, labels, logz = ctx.saved_tensors
        logz = logz.view(-1)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        product = _product(hidden, weight)
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            h = hidden[part]
            p = product(h, weight).float().sub_(logz[part][:, None]).exp_()
            # d logp = onehot − p, d logz = p
            p.mul_((grad_logz[part] - grad_logp[part])[:, None])
            _add_at_labels(p, labels[part], grad_logp[part], ctx.held)
            grad = p.to(hidden.dtype)
            grad_hidden[part] = product(grad, weight.t())
            grad_weight += torch.mm(grad.t(), h)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), None, None
