"""From logits to a token: bias → grammar → penalties → temperature → top-k → top-p → min-p → one draw per request.

    history.bias(row), history.penalise(row)    # what depends on the tokens before: in place, a row at a time
    choose(logits, rules, draws)                # [B, V] and a number in [0, 1) per row → [B] ids

The order is Transformers' and vLLM's. A draw is inverted through the cumulated probabilities (in fp64), so a token
depends on the request's own random stream and logits alone: the same seed gives the same text in any batch, but where
a draw lies so near a border that the last bits of logits, which differ between batch sizes, move it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from internlm.infer.request import Chance, Request, Rules
from internlm.runtime import upload

NOT_FINITE = -1
"""What `choose` gives for a row whose logits are not finite."""
_WORD = 2**64 - 1
_STRETCH = 64
"""Divides the vocabulary of nearly every model."""
_PREFIX = 1024
"""Candidates sorted at first, in which a nucleus nearly always lies."""
_COLDEST, _WARMEST = 1e-30, 1e30
"""Temperatures beyond are the same, and would be 0 or infinite in fp32."""


class History:
    """What an answer's next logits are changed by: its request's bias, and penalties for the tokens there were."""

    def __init__(self, request: Request, vocab_size: int, device: torch.device) -> None:
        self._rules, self._seen, self._counts, self._bias = request, None, None, None
        if request.logit_bias:
            ids = torch.tensor(list(request.logit_bias), device=device)
            self._bias = ids, torch.tensor(list(request.logit_bias.values()), dtype=torch.float32, device=device)
        if request.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[list(request.tokens)] = True
        if request.presence_penalty or request.frequency_penalty:
            self._counts = torch.zeros(vocab_size, device=device)

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def bias(self, row: Tensor) -> None:
        """Add the bias to the logits [V], in place."""
        if self._bias is not None:
            row.index_add_(0, *self._bias)

    def penalise(self, row: Tensor) -> None:
        """Apply the penalties to the logits [V], in place."""
        rules = self._rules
        if self._seen is not None:
            worse = torch.where(row > 0, row / rules.repetition_penalty, row * rules.repetition_penalty)
            row.copy_(torch.where(self._seen, worse, row))
        if self._counts is not None:
            row -= rules.presence_penalty * (self._counts > 0) + rules.frequency_penalty * self._counts


def draw(seed: int, position: int) -> float:
    """Return a number in [0, 1) for a place of a random stream: a function of its two arguments, on any device.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014), twice, so that neighbouring seeds share nothing.
    """
    return (_mix(_mix(seed) + position) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def chances(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[Chance]:
    """Return how probable the token of each row of logits [R, V] was, before any rule, and the `top` most probable."""
    total = logits.logsumexp(-1, keepdim=True)
    own = (logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]) - total).squeeze(-1).tolist()
    most = min(max(top), logits.shape[-1])
    values, ids = logits.topk(most, -1)
    rows = zip(tokens, own, ids.tolist(), (values - total).tolist(), top, strict=True)
    return [
        Chance(token, logprob, tuple(zip(best[:count], their[:count], strict=True)))
        for token, logprob, best, their, count in rows
    ]


def choose(logits: Tensor, rules: Sequence[Rules], draws: Tensor) -> Tensor:
    """Return the next token of each row [B]; NOT_FINITE for a row whose logits are not, which leaves the others alone.

    Args:
        logits: [B, V] fp32.
        rules: of each row.
        draws: [B] fp64 in [0, 1); greedy rows ignore theirs.
    """
    top, chosen = _highest(logits)
    broken = ~top.isfinite()
    if not any(rule.temperature for rule in rules):  # else a step of greedy rows would take twice as long
        return chosen.masked_fill_(broken, NOT_FINITE)
    logits = logits - top[:, None]  # so that a tiny temperature gives −inf for the others, and never inf − inf
    if logits.is_cuda or broken.any():  # a GPU is not waited for
        logits = logits.masked_fill_(broken[:, None], 0.0)
    plain = [row for row, rule in enumerate(rules) if rule.temperature > 0 and not rule.is_filtered]
    if plain:
        rows = upload(plain, torch.int64, logits.device)
        chosen[rows] = _invert(_tempered(logits[rows], [rules[row] for row in plain]).softmax(-1), draws[rows])
    filtered = [row for row, rule in enumerate(rules) if rule.temperature > 0 and rule.is_filtered]
    if filtered:
        rows, picked = upload(filtered, torch.int64, logits.device), [rules[row] for row in filtered]
        chosen[rows] = _filtered(_tempered(logits[rows], picked), picked, draws[rows], _PREFIX)
    return chosen.masked_fill_(broken, NOT_FINITE)


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row [B] and its first index [B]."""
    if logits.is_cuda or logits.shape[-1] % _STRETCH:
        return logits.max(-1)
    # With an index a maximum takes ten times as long on a CPU: it is sought in the stretch that holds it alone.
    stretches = logits.unflatten(-1, (-1, _STRETCH))  # [B, V/S, S]
    top, stretch = stretches.amax(-1).max(-1)
    within = stretches[torch.arange(len(logits)), stretch].argmax(-1)
    return top, stretch * _STRETCH + within


def _tempered(logits: Tensor, rules: Sequence[Rules]) -> Tensor:
    """Return logits [R, V] divided by the temperatures."""
    warm = [min(max(rule.temperature, _COLDEST), _WARMEST) for rule in rules]
    return logits / upload(warm, torch.float32, logits.device)[:, None]


def _filtered(logits: Tensor, rules: Sequence[Rules], draws: Tensor, width: int) -> Tensor:
    """Return a token per row of logits [R, V] from the `width` best; rows that need more are done again with all."""
    vocab, device = logits.shape[-1], logits.device
    width = min(width, vocab)
    values, ids = logits.topk(width, -1) if width < vocab else torch.sort(logits, dim=-1, descending=True, stable=True)
    top_k = upload([min(rule.top_k or vocab, vocab) for rule in rules], torch.int64, device)[:, None]
    top_p = upload([rule.top_p for rule in rules], torch.float64, device)[:, None]
    min_p = upload([rule.min_p for rule in rules], torch.float64, device)[:, None]
    inside = torch.arange(width, device=device) < top_k  # [R, width]
    limited = values.masked_fill(~inside, float("-inf")).logsumexp(-1, keepdim=True)
    total = torch.where(top_k < vocab, limited, logits.logsumexp(-1, keepdim=True))
    p = torch.where(inside, (values - total).exp(), 0.0).double()
    reached = p.cumsum(-1)
    keep = ((reached - p < top_p) | (top_p >= 1)) & (p >= min_p * p[:, :1])  # rounded, the sum may pass 1 too soon
    chosen = ids.gather(-1, _invert(p * keep, draws)[:, None]).squeeze(-1)
    if width == vocab or all(0 < rule.top_k <= width for rule in rules):
        return chosen
    cut = ((reached[:, -1:] >= top_p) & (top_p < 1)) | (p[:, -1:] < min_p * p[:, :1])
    wider = (~torch.where(top_k < vocab, top_k <= width, cut)).squeeze(-1).nonzero().squeeze(-1).tolist()
    if wider:
        chosen[wider] = _filtered(logits[wider], [rules[row] for row in wider], draws[wider], vocab)
    return chosen


def _invert(p: Tensor, draws: Tensor) -> Tensor:
    """Return the first index [R] at which the cumulated p [R, N] exceeds the draw's share of its sum."""
    reached = p.cumsum(-1, dtype=torch.float64)
    total = reached[:, -1]
    # A draw just under 1 may round up to the sum, which nothing exceeds.
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, target[:, None], right=True).squeeze(-1)
