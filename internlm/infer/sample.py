"""From logits to a token: bias → grammar → penalties → temperature → top-k → top-p → min-p → one draw per request.

    History.edit(row)                           # what depends on the tokens before: in place, a row at a time
    choose(logits, rules, draws)                # [B, V] and a number in [0, 1) per row → [B] ids

The order is Transformers' and vLLM's. A draw is inverted through the cumulated probabilities (in fp64), so a token
depends on the request's own random stream and logits alone: the same seed gives the same text in any batch. The one
caveat is rounding: the logits of a row may differ in their last bits between batch sizes, which moves a token only
where the draw lies within that of a border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.errors import EngineError
from internlm.infer.request import Chance

NOT_FINITE = -1
"""What `choose` gives for a row whose logits are not finite."""
_WORD = 2**64 - 1
_PREFIX = 1024
"""Candidates sorted at first. A nucleus nearly always lies inside; a row whose does not is sorted whole."""


@dataclass(frozen=True)
class Rules:
    """How one request's next token is chosen."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """The smallest set of most probable tokens with this probability together stays; 1 keeps all."""
    top_k: int = 0
    """So many most probable tokens stay; 0 keeps all."""
    min_p: float = 0.0
    """Tokens under this share of the most probable one's probability go."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens of prompt and answer, multiplies the negative (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens of the answer."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens of the answer, once for each time they are there."""

    @property
    def is_filtered(self) -> bool:
        """Whether anything beside the temperature narrows the choice."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def check(self) -> None:
        """Check the ranges.

        Raises:
            EngineError: naming the first value outside.
        """
        for name, good, allowed in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0, up to 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "over 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
        ):
            if not good:
                raise EngineError("is out of range", where=name, got=getattr(self, name), allowed=[allowed])


class History:
    """What an answer's next logits are changed by: what it may not be, and which tokens there were.

    Args:
        rules: the penalties are read.
        prompt: its tokens.
        vocab_size: of the model.
        device: of the logits.
        bias: added to the logits of these ids.
    """

    def __init__(
        self,
        rules: Rules,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
        bias: Mapping[int, float] | None = None,
    ) -> None:
        self._rules, self._seen, self._counts, self._bias = rules, None, None, None
        if bias:
            ids = torch.tensor(list(bias), device=device)
            self._bias = ids, torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        if rules.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[list(prompt)] = True
        if rules.presence_penalty or rules.frequency_penalty:
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
    """Return how probable each token was, before any rule.

    Args:
        logits: [R, V] fp32.
        tokens: one for each row.
        top: how many of the most probable tokens to tell, for each row.
    """
    total = logits.logsumexp(-1, keepdim=True)
    own = (logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]) - total).squeeze(-1).tolist()
    most = min(max(top), logits.shape[-1])
    values, ids = (logits.topk(most, -1)) if most else (logits[:, :0], logits[:, :0].long())
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
        draws: [B] fp64 in [0, 1), from the request's own stream; greedy rows ignore theirs.
    """
    top, chosen = logits.max(-1)
    logits = logits - top[:, None]  # so that a tiny temperature gives −inf for the others, and never inf − inf
    broken = ~top.isfinite()
    if broken.any():
        logits = logits.masked_fill_(broken[:, None], 0.0)
    plain = [row for row, rule in enumerate(rules) if rule.temperature > 0 and not rule.is_filtered]
    if plain:
        warm = torch.tensor([rules[row].temperature for row in plain], device=logits.device)
        chosen[plain] = _invert((logits[plain] / warm[:, None]).softmax(-1), draws[plain])
    filtered = [row for row, rule in enumerate(rules) if rule.temperature > 0 and rule.is_filtered]
    if filtered:
        warm = torch.tensor([rules[row].temperature for row in filtered], device=logits.device)
        picked = [rules[row] for row in filtered]
        chosen[filtered] = _filtered(logits[filtered] / warm[:, None], picked, draws[filtered], _PREFIX)
    return chosen.masked_fill_(broken, NOT_FINITE)


def _filtered(logits: Tensor, rules: Sequence[Rules], draws: Tensor, width: int) -> Tensor:
    """Return a token per row from the `width` best candidates; rows that need more are done again with all.

    Args:
        logits: [R, V], divided by the temperature.
        rules, draws: of each row.
        width: candidates to sort.
    """
    vocab, device = logits.shape[-1], logits.device
    width = min(width, vocab)
    values, ids = logits.topk(width, -1) if width < vocab else torch.sort(logits, dim=-1, descending=True, stable=True)
    top_k = torch.tensor([rule.top_k or vocab for rule in rules], device=device)[:, None]
    top_p = torch.tensor([rule.top_p for rule in rules], device=device, dtype=torch.float64)[:, None]
    min_p = torch.tensor([rule.min_p for rule in rules], device=device, dtype=torch.float64)[:, None]
    inside = torch.arange(width, device=device) < top_k  # [R, width]
    limited = values.masked_fill(~inside, float("-inf")).logsumexp(-1, keepdim=True)
    total = torch.where(top_k < vocab, limited, logits.logsumexp(-1, keepdim=True))
    p = torch.where(inside, (values - total).exp(), 0.0).double()
    reached = p.cumsum(-1)
    keep = (reached - p < top_p) & (p >= min_p * p[:, :1])
    chosen = ids.gather(-1, _invert(p * keep, draws)[:, None]).squeeze(-1)
    if width == vocab:
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
