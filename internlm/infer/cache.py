"""Keys and values of the tokens so far, and attention over them.

All layers' are one tensor [2·layers, 1, K, slots, E]; a slot is a token's place, and `Blocks` says whose it is. A step
runs a flat batch of pieces: one new token of each text that is being continued, or a stretch of a prompt, in any
mixture. The linear layers see all of it as one matrix; attention goes piece by piece, over slices of the cache: one for
a text that lies in one stretch, and parts that are put together for one that lies in several. Copies are made only
where a chunk of a prompt, or a text in many pieces, needs its past.

    tokens     a₉ │ b₄ │ c₀ c₁ c₂ c₃ …            one row [N] for all
    attention  a₀…a₉ ┘   └ c₀…c₃ before them      one call for each piece

Keys are stored rotated. With dynamic NTK the base depends on the length of the text, so a text's is fixed when it is
admitted, from its prompt and the most it may still write; older keys then never need another rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm import compat
from internlm.model import attention
from internlm.model.attention import Documents
from internlm.model.layers import Block
from internlm.model.rope import Rotation, frequencies
from internlm.model.transformer import Transformer

_CAUSAL = Documents(None, "dense")
_MOST_MERGED = 8
"""Runs that are read where they lie; more are gathered."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a text that a step computes."""

    tokens: Sequence[int]
    """Its ids."""
    past: int
    """Tokens of the text before it, whose keys and values are in the cache."""
    runs: list[tuple[int, int]]
    """Where the text lies up to the end of this stretch: (first slot, last slot + 1) of each run."""
    turns: Tensor
    """Angle per position of every pair, [E/2]."""

    @property
    def slots(self) -> list[int]:
        """The slots of the new tokens."""
        slots: list[int] = []
        seen = 0
        for first, last in self.runs:
            slots.extend(range(first + max(self.past - seen, 0), last))
            seen += last - first
        return slots


@dataclass(frozen=True)
class _Span:
    """A piece as attention sees it."""

    start: int
    stop: int
    """Its rows of the batch."""
    past: int
    stretches: list[tuple[Tensor, ...]]
    """Each run of its text in the cache: the keys [1, K, L, E] of the first layer, its values, the second's keys, …"""

    def keys_and_values(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return a layer's, run by run."""
        return [x[2 * layer] for x in self.stretches], [x[2 * layer + 1] for x in self.stretches]


@dataclass
class _Step:
    """What attention needs to know of a step."""

    spans: list[_Span]
    slots: Tensor
    masks: dict[int, Tensor]


class Cache:
    """The cache of one model, whose attention it takes over.

    Args:
        model: the engine's own; its `attend` seams are set.
        slots: tokens that it can hold.
    """

    def __init__(self, model: Transformer, slots: int) -> None:
        config = model.config
        self.model, self.config, self.slots = model, config, slots
        weight = model.embedding.weight
        self.dtype, self.device = weight.dtype, weight.device
        # Never read before it is written, so it need not be filled: the system gives memory when it is touched.
        shape = (2 * config.num_layers, 1, config.num_kv_heads, slots, config.head_dim)
        self._stored = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._factor = frequencies(config.rope, config.head_dim)[1]
        self._step: _Step | None = None
        for layer, block in enumerate(model.blocks.values()):
            assert isinstance(block, Block), "a decoder is made of blocks"
            block.attention.attend = partial(self._attend, layer)

    @staticmethod
    def bytes_per_token(model: Transformer) -> int:
        """Return the memory that a token takes."""
        config = model.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.embedding.weight.element_size()

    def turns(self, length: int) -> Tensor:
        """Return the turns [E/2] of a text of at most so many tokens."""
        return frequencies(self.config.rope, self.config.head_dim, length)[0].to(self.device)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the hidden states [N, D] of all new tokens, piece after piece, and store their keys and values."""
        spans, start = [], 0
        for piece in pieces:
            # All layers' views at once: made one by one in every layer, they take a tenth of a step of 16 texts.
            runs = piece.runs if piece.past else []
            stretches = [self._stored[..., first:last, :].unbind() for first, last in runs]
            spans.append(_Span(start, start + len(piece.tokens), piece.past, stretches))
            start += len(piece.tokens)
        # One upload each, however many pieces there are.
        tokens = torch.tensor([token for piece in pieces for token in piece.tokens], device=self.device)
        slots = torch.tensor([slot for piece in pieces for slot in piece.slots], device=self.device)
        places = [piece.past + i for piece in pieces for i in range(len(piece.tokens))]
        owner = torch.tensor([i for i, piece in enumerate(pieces) for _ in piece.tokens], device=self.device)
        turns = torch.stack([piece.turns for piece in pieces])[owner]  # [N, E/2]
        angles = torch.tensor(places, dtype=torch.float32, device=self.device)[:, None] * turns
        angles = angles[None, :, None]  # [1, N, 1, E/2]
        rotation = Rotation((angles.cos() * self._factor).to(self.dtype), (angles.sin() * self._factor).to(self.dtype))
        self._step = _Step(spans, slots, {})
        try:
            x = F.embedding(tokens, self.model.embedding.weight)[None]
            for block in self.model.blocks.values():
                x = block(x, rotation, _CAUSAL)
            return self.model.norm(x)[0]
        finally:
            self._step = None

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Return the attention output [1, N, H, E] of a step."""
        step = self._step
        assert step is not None, "attention at decode time belongs to a step"
        self._stored[2 * layer, 0].index_copy_(1, step.slots, k[0].transpose(0, 1))
        self._stored[2 * layer + 1, 0].index_copy_(1, step.slots, v[0].transpose(0, 1))
        rows: list[Tensor] = []
        for index, span in enumerate(step.spans):
            here = slice(span.start, span.stop)
            if not span.past:
                rows.append(attention.attend(q[:, here], k[:, here], v[:, here], documents)[0])
                continue
            keys, values = span.keys_and_values(layer)
            if span.stop - span.start == 1:
                # The queries that share a key head stand in for query positions: no key is repeated.
                one = q[:, span.start].unflatten(1, (k.shape[2], -1))  # [1, K, H/K, E]
                rows.append(_over_runs(one, keys, values).flatten(1, 2))
                continue
            mask = step.masks.get(index)
            if mask is None:
                shape = (span.stop - span.start, span.past + span.stop - span.start)
                mask = step.masks[index] = torch.ones(shape, dtype=torch.bool, device=self.device).tril(span.past)
            old_keys, old_values = (_joined(runs).transpose(1, 2) for runs in (keys, values))  # [1, L, K, E]
            rows.append(attention.sdpa(q[:, here], old_keys, old_values, mask)[0])
        return torch.cat(rows)[None]


def _over_runs(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Return the attention output [1, K, G, E] of queries [1, K, G, E] over keys and values in runs [1, K, L, E].

    A text that shares its beginning lies in two runs. Attention over each, weighed by its part of the denominator, is
    attention over both: copying them together in every step takes ten times as long (512 + 128 tokens: 1.5 ms a layer).
    """
    if 1 < len(keys) <= _MOST_MERGED:
        parts = [compat.attention_and_mass(q, *run) for run in zip(keys, values, strict=True)]
        told = [part for part in parts if part is not None]
        if len(told) == len(keys):
            shares = torch.stack([mass for _, mass in told]).softmax(0)[..., None]  # [runs, 1, K, G, 1]
            return (torch.stack([out for out, _ in told]) * shares.to(q.dtype)).sum(0)
    return F.scaled_dot_product_attention(q, _joined(keys), _joined(values))


def _joined(runs: list[Tensor]) -> Tensor:
    """Return runs [1, K, L, E] as one."""
    return runs[0] if len(runs) == 1 else torch.cat(runs, 2)
