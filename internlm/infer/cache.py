"""Keys and values of the tokens so far, and attention over them.

All layers' are one tensor [2·layers, 1, K, slots, E]; a slot is a token's place, and `Blocks` says whose it is. A step
runs a flat batch of pieces: one new token of each text that is being continued, or a stretch of a prompt, in any
mixture. The linear layers see all of it as one matrix; attention goes piece by piece, over slices of the cache: one for
a text that lies in one stretch, and parts that are put together for one that lies in several. Copies are made only
where a chunk of a prompt, or a text in many pieces, needs its past.

    tokens     a₉ │ b₄ │ c₀ c₁ c₂ c₃ …            one row [N] for all
    attention  a₀…a₉ ┘   └ c₀…c₃ before them      one call for each piece

On a GPU, where each call has its price, the pieces of one token that begin a step are one call (`paged`), and a step of
nothing else is one graph (`decode`).

Keys are stored rotated. With dynamic NTK the base depends on the length of the text, so a text's is fixed when it is
admitted, from its prompt and the most it may still write; older keys then never need another rotation.

With `rounded`, keys and values are 8 bits with a scale for each token and head, which halves what a token takes. Texts
are then attended as rounded from their second piece on: another cut into chunks moves the last digits of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.compat import kernels
from internlm.errors import EngineError, first_line
from internlm.infer import paged
from internlm.infer.blocks import Blocks
from internlm.infer.paged import Stored
from internlm.model import attention
from internlm.model.attention import Documents
from internlm.model.config import DynamicScaling
from internlm.model.layers import Block
from internlm.model.rope import Rotation, frequencies
from internlm.model.transformer import Transformer
from internlm.runtime import upload

_CAUSAL = Documents(None, "dense")
_MOST_MERGED = 8
"""Runs that are read where they lie; more are gathered."""
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Piece:
    """A stretch of a text that a step computes."""

    tokens: Sequence[int]
    """Its ids."""
    past: int
    """Tokens of the text before it, whose keys and values are in the cache."""
    table: list[int]
    """The text's blocks."""
    blocks: Blocks
    turns: Tensor
    """Angle per position of every pair, [E/2]."""

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Where the text lies up to the end of this stretch: (first slot, last slot + 1) of each run."""
        return self.blocks.runs(self.table, self.past + len(self.tokens))

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
class Paged:
    """Where the texts of the pieces of one token lie, for all of them to be one call."""

    tables: Tensor
    """Their blocks, [ones, M] int32."""
    lengths: Tensor
    """With the new token, [ones] int32."""


@dataclass(frozen=True)
class Held:
    """Keys and values of a text in the cache."""

    stretches: list[tuple[Tensor, ...]]
    """Each run of its text: the keys [1, K, L, E] of the first layer, its values, the second's keys, …"""
    scales: list[tuple[Tensor, ...]]
    """Theirs [1, K, L], where they are rounded; else nothing."""

    def of(self, layer: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Return a layer's keys and values, run by run."""
        return self._runs(2 * layer, dtype), self._runs(2 * layer + 1, dtype)

    def _runs(self, index: int, dtype: torch.dtype) -> list[Tensor]:
        runs = [stretch[index] for stretch in self.stretches]
        if not self.scales:
            return runs
        scales = [stretch[index] for stretch in self.scales]
        return [_unrounded(codes, scale, dtype) for codes, scale in zip(runs, scales, strict=True)]


@dataclass
class Span:
    """A piece of several tokens as attention sees it."""

    start: int
    stop: int
    """Its rows of the batch."""
    past: int
    held: Held
    mask: Tensor | None = None
    """Which of the text's tokens each of its own sees; made when it is needed first."""


@dataclass(frozen=True)
class Step:
    """What attention needs to know of a step."""

    slots: Tensor
    """Of the new tokens, [N] int64."""
    ones: int
    """Pieces of one token, which come first."""
    paged: Paged | None
    """Where they lie, in one of two ways: for one call, …"""
    held: list[Held]
    """… or for a call each."""
    spans: list[Span]
    """The other pieces."""


class Cache:
    """The cache of one model, whose attention it takes over.

    Args:
        model: the engine's own; its `attend` seams are set.
        blocks: whose the slots are.
        paged: whether pieces of one token that begin a step are one call.
        rounded: whether keys and values are kept in 8 bits.

    Raises:
        EngineError: there is no memory for them.
    """

    def __init__(self, model: Transformer, blocks: Blocks, *, paged: bool = False, rounded: bool = False) -> None:
        config = model.config
        self.model, self.config, self.blocks, self.paged = model, config, blocks, paged
        weight = model.embedding.weight
        self.dtype, self.device = weight.dtype, weight.device
        # One block more than there are texts for: rows that only fill a batch write there. Never read before it is
        # written, so it need not be filled: the system gives memory when it is touched.
        shape = (2 * config.num_layers, 1, config.num_kv_heads, (blocks.count + 1) * blocks.size, config.head_dim)
        try:
            self._stored = torch.empty(shape, dtype=torch.int8 if rounded else self.dtype, device=self.device)
            self._scales = torch.empty(shape[:-1], dtype=torch.float32, device=self.device) if rounded else None
        except (RuntimeError, MemoryError) as error:  # torch has no type of its own for a CPU without memory
            needed = shape[3] * self.bytes_per_token(model, rounded=rounded)
            what = f"the {needed / 2**30:.1f} GiB for keys and values cannot be had: {first_line(error)}"
            raise EngineError(what, do="Give it less (cache_tokens), or free memory.") from error
        self._plain, self._factor = frequencies(config.rope, config.head_dim)
        self._plain = self._plain.to(self.device)
        self._step: Step | None = None
        # A layer's keys are rows of E numbers, head after head.
        self._first_rows = torch.arange(0, config.num_kv_heads * shape[3], shape[3], device=self.device)
        self._rows = self._first_rows
        """Those of the step's tokens, [N, K]."""
        for layer, block in enumerate(model.blocks.values()):
            assert isinstance(block, Block), "a decoder is made of blocks"
            block.attention.attend = partial(self._attend, layer)

    @staticmethod
    def bytes_per_token(model: Transformer, *, rounded: bool = False) -> int:
        """Return the memory that a token takes."""
        config = model.config
        width = config.head_dim
        bytes_per_head = width + _SCALE_BYTES if rounded else width * model.embedding.weight.element_size()
        return 2 * config.num_layers * config.num_kv_heads * bytes_per_head

    def turns(self, length: int) -> Tensor:
        """Return the turns [E/2] of a text of at most so many tokens: the same tensor for all that turn alike."""
        scaling = self.config.rope.scaling
        if not isinstance(scaling, DynamicScaling) or length <= scaling.original_length:
            return self._plain
        return frequencies(self.config.rope, self.config.head_dim, length)[0].to(self.device)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the hidden states [N, D] of all new tokens, piece after piece, and store their keys and values."""
        ones = next((i for i, piece in enumerate(pieces) if len(piece.tokens) > 1), len(pieces))
        spans, start = [], ones
        for piece in pieces[ones:]:
            spans.append(Span(start, start + len(piece.tokens), piece.past, self._held(piece)))
            start += len(piece.tokens)
        # One upload, however many pieces there are.
        columns = [
            [token for piece in pieces for token in piece.tokens],
            [slot for piece in pieces for slot in piece.slots],
            [piece.past + i for piece in pieces for i in range(len(piece.tokens))],
            [i for i, piece in enumerate(pieces) for _ in piece.tokens],
        ]
        tokens, slots, places, owners = upload(columns, torch.int64, self.device).unbind()
        if all(piece.turns is self._plain for piece in pieces):
            turns = self._plain
        else:
            turns = torch.stack([piece.turns for piece in pieces])[owners]  # [N, E/2]
        where = self._paged(pieces[:ones]) if self.paged and ones else None
        held = [] if self.paged else [self._held(piece) for piece in pieces[:ones]]
        return self.compute(tokens, places, turns, Step(slots, ones, where, held, spans))

    def compute(self, tokens: Tensor, places: Tensor, turns: Tensor, step: Step) -> Tensor:
        """Return the hidden states [N, D] of a step, without a word between host and device.

        Args:
            tokens: [N] ids.
            places: [N], each token's place in its text.
            turns: of the texts of each token, [N, E/2], or of all [E/2].
            step: where they lie.
        """
        angles = places[:, None].float() * turns
        angles = angles[None, :, None]  # [1, N, 1, E/2]
        rotation = Rotation.of(angles, self._factor, self.dtype)
        self._step, self._rows = step, step.slots[:, None] + self._first_rows
        try:
            x = F.embedding(tokens, self.model.embedding.weight)[None]
            for block in self.model.blocks.values():
                x = block(x, rotation, _CAUSAL)
            return self.model.norm(x)[0]
        finally:
            self._step = None

    def _held(self, piece: Piece) -> Held:
        """Return where the text of a piece lies; nothing for its first one, which needs no more than itself."""
        # All layers' views at once: made one by one in every layer, they take a tenth of a step of 16 texts.
        runs = piece.runs if piece.past or len(piece.tokens) == 1 else []
        stretches = [self._stored[..., first:last, :].unbind() for first, last in runs]
        scales = [] if self._scales is None else [self._scales[..., first:last].unbind() for first, last in runs]
        return Held(stretches, scales)

    def _paged(self, pieces: Sequence[Piece]) -> Paged:
        """Return pieces of one token as one."""
        longest = max(self.blocks.needed(piece.past + 1) for piece in pieces)
        rows = [[piece.past + 1, *piece.table[:longest]] for piece in pieces]
        numbers = upload([row + [0] * (longest + 1 - len(row)) for row in rows], torch.int32, self.device)
        return Paged(numbers[:, 1:], numbers[:, 0].contiguous())

    def _layer(self, layer: int) -> Stored:
        """Return a layer's keys and values."""
        keys, values = self._stored[2 * layer, 0], self._stored[2 * layer + 1, 0]
        if self._scales is None:
            return Stored(keys, values)
        return Stored(keys, values, self._scales[2 * layer, 0], self._scales[2 * layer + 1, 0])

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the keys and values [N, K, E] of the step's tokens."""
        for index, x in ((2 * layer, k), (2 * layer + 1, v)):
            if self._scales is not None:
                x, scales = paged.round_rows(x)
                self._scales[index].view(-1).index_put_((self._rows,), scales)
            self._stored[index].view(-1, x.shape[-1]).index_put_((self._rows,), x)

    def _as_read(self, x: Tensor) -> Tensor:
        """Return keys or values [1, N, K, E] as the cache gives them back.

        What a text begins with is attended as it is found later, by its own next piece or by another text: else the
        same request and seed would give another answer once its beginning is in the cache.
        """
        if self._scales is None:
            return x
        codes, scales = paged.round_rows(x)
        return _unrounded(codes, scales, x.dtype)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Return the attention output [1, N, H, E] of a step."""
        step = self._step
        assert step is not None, "attention at decode time belongs to a step"
        self._write(layer, k[0], v[0])
        rows: list[Tensor] = []
        if step.ones:
            rows.append(self._attend_ones(layer, q[0, : step.ones], step))
        for span in step.spans:
            here = slice(span.start, span.stop)
            if not span.past:
                keys, values = (self._as_read(x[:, here]) for x in (k, v))
                rows.append(attention.attend(q[:, here], keys, values, documents)[0])
                continue
            if span.mask is None:
                shape = (span.stop - span.start, span.past + span.stop - span.start)
                span.mask = torch.ones(shape, dtype=torch.bool, device=self.device).tril(span.past)
            keys, values = (_joined(runs).transpose(1, 2) for runs in span.held.of(layer, self.dtype))  # [1, L, K, E]
            rows.append(attention.sdpa(q[:, here], keys, values, span.mask)[0])
        return (rows[0] if len(rows) == 1 else torch.cat(rows))[None]

    def _attend_ones(self, layer: int, q: Tensor, step: Step) -> Tensor:
        """Return the attention output [ones, H, E] of the pieces of one token, from their queries."""
        if step.paged is not None:
            return paged.attend(q, self._layer(layer), step.paged.tables, step.paged.lengths, self.blocks.size)
        # The queries that share a key head stand in for query positions: no key is repeated.
        queries = q.unflatten(1, (self.config.num_kv_heads, -1))[:, None].unbind()  # each [1, K, H/K, E]
        rows = [_over_runs(q, *held.of(layer, self.dtype)) for q, held in zip(queries, step.held, strict=True)]
        return torch.cat(rows).flatten(1, 2)


def _over_runs(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Return the attention output [1, K, G, E] of queries [1, K, G, E] over keys and values in runs [1, K, L, E].

    A text that shares its beginning lies in two runs. Attention over each, weighed by its part of the denominator, is
    attention over both: copying them together in every step takes ten times as long (512 + 128 tokens: 1.5 ms a layer).
    """
    if 1 < len(keys) <= _MOST_MERGED:
        parts = [kernels.attention_and_mass(q, *run) for run in zip(keys, values, strict=True)]
        told = [part for part in parts if part is not None]
        if len(told) == len(keys):
            shares = torch.stack([mass for _, mass in told]).softmax(0)[..., None]  # [runs, 1, K, G, 1]
            return (torch.stack([out for out, _ in told]) * shares.to(q.dtype)).sum(0)
    return F.scaled_dot_product_attention(q, _joined(keys), _joined(values))


def _unrounded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about what `paged.round_rows` was given."""
    return (codes * scales[..., None]).to(dtype)


def _joined(runs: list[Tensor]) -> Tensor:
    """Return runs [1, K, L, E] as one."""
    return runs[0] if len(runs) == 1 else torch.cat(runs, 2)
