"""Keys and values of the tokens so far, and attention over them.

Each layer has two tensors [slots, K, length, E]; a running request owns a slot, and the running ones are always the
first slots, so that a decode step reads them as a slice, without gathering:

    slot 0   ■■■■■■■■····        lengths differ: a mask [B, 1, 1, longest] hides what lies behind each row's end
    slot 1   ■■■·········        request 1 leaves: the last slot moves into its place
    slot 2   ■■■■■■······

Keys are stored rotated. With dynamic NTK the base depends on the length of the text, so a request's is fixed when it is
admitted, from its prompt and the most it may still write; older keys then never need another rotation.

Limits: memory grows with slots × the longest request (doubling); nothing is shared between requests.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.model import attention
from internlm.model.attention import Documents
from internlm.model.layers import Block
from internlm.model.rope import Rotation, frequencies
from internlm.model.transformer import Transformer

_FIRST_LENGTH = 256
"""Tokens per slot at first."""
_CAUSAL = Documents(None, "dense")


class Cache:
    """The cache of one model, whose attention it takes over.

    Args:
        model: the engine's own; its `attend` seams are set.
        max_slots: most requests at once.
        max_length: most tokens of one request.
    """

    def __init__(self, model: Transformer, max_slots: int, max_length: int) -> None:
        config = model.config
        self.model, self.config = model, config
        self.max_slots, self.max_length = max_slots, max_length
        self.slots = self.length = 0
        weight = model.embedding.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.keys = [self._new(0, 0) for _ in range(config.num_layers)]
        self.values = [self._new(0, 0) for _ in range(config.num_layers)]
        self._turns = torch.empty(0, config.head_dim // 2, device=self.device)
        """Angle per position of every pair, [slots, E/2]."""
        self._factor = frequencies(config.rope, config.head_dim)[1]
        self._slot: int | None = None
        self._positions: Tensor | None = None
        self._mask: Tensor | None = None
        self._longest = 0
        for layer, block in enumerate(model.blocks.values()):
            assert isinstance(block, Block), "a decoder is made of blocks"
            block.attention.attend = partial(self._attend, layer)

    def admit(self, slot: int, length: int) -> None:
        """Make room for a text of at most `length` tokens in a slot, and fix its rotation."""
        if slot >= self.slots or length > self.length:
            self._grow(max(self.slots, slot + 1), length)
        self._turns[slot] = frequencies(self.config.rope, self.config.head_dim, length)[0].to(self.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot into another."""
        for stored in (*self.keys, *self.values):
            stored[target, :, :length] = stored[source, :, :length]
        self._turns[target] = self._turns[source]

    def prefill(self, slot: int, tokens: Tensor) -> Tensor:
        """Return the hidden states [1, T, D] of a prompt [1, T] and store its keys and values."""
        self._slot = slot
        return self._forward(tokens, self._rotation(self._turns[slot : slot + 1], tokens.shape[1]))

    def score(self, tokens: Tensor) -> Tensor:
        """Return the hidden states [1, T, D] of a text [1, T]; nothing is stored."""
        turns = frequencies(self.config.rope, self.config.head_dim, tokens.shape[1])[0].to(self.device)
        self._slot = self._positions = None
        return self._forward(tokens, self._rotation(turns[None], tokens.shape[1]))

    def decode(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Return the hidden states [B, 1, D] of one new token for each of the first B slots, and store them.

        Args:
            tokens: [B].
            lengths: tokens that each slot holds already.
        """
        self._slot, self._longest = None, max(lengths) + 1
        self._positions = positions = torch.tensor(lengths, device=self.device)
        self._mask = None
        if min(lengths) + 1 < self._longest:
            visible = torch.arange(self._longest, device=self.device) <= positions[:, None]
            self._mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
            self._mask = self._mask.masked_fill_(~visible, float("-inf"))[:, None, None]  # [B, 1, 1, longest]
        angles = positions[:, None].float() * self._turns[: len(lengths)]
        return self._forward(tokens[:, None], self._turn(angles[:, None, None]))

    def _forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:
        """Run the model with a rotation of its own for each row."""
        x = F.embedding(tokens, self.model.embedding.weight)
        for block in self.model.blocks.values():
            x = block(x, rotation, _CAUSAL)
        return self.model.norm(x)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Return the attention output [B, T, H, E]: over the text itself, or over what the slots hold."""
        if self._slot is not None:
            self.keys[layer][self._slot, :, : k.shape[1]] = k[0].transpose(0, 1)
            self.values[layer][self._slot, :, : v.shape[1]] = v[0].transpose(0, 1)
        if self._slot is not None or self._positions is None:
            return attention.attend(q, k, v, documents)
        batch, _, heads, width = q.shape
        keys, values = self.keys[layer][:batch], self.values[layer][:batch]
        rows = torch.arange(batch, device=self.device)
        keys[rows, :, self._positions] = k[:, 0]
        values[rows, :, self._positions] = v[:, 0]
        # The queries that share a key head stand in for query positions: no key is repeated.
        grouped = q.view(batch, k.shape[2], heads // k.shape[2], width)
        keys, values = keys[:, :, : self._longest], values[:, :, : self._longest]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)  # [B, K, H/K, E]
        return out.reshape(batch, 1, heads, width)

    def _rotation(self, turns: Tensor, length: int) -> Rotation:
        """Return the rotation of positions 0 … length−1 with these turns [1, E/2]."""
        angles = torch.arange(length, device=self.device, dtype=torch.float32)[:, None] * turns  # [T, E/2]
        return self._turn(angles[None, :, None])

    def _turn(self, angles: Tensor) -> Rotation:
        """Return cos and sin of angles [B, T, 1, E/2]."""
        return Rotation((angles.cos() * self._factor).to(self.dtype), (angles.sin() * self._factor).to(self.dtype))

    def _grow(self, slots: int, length: int) -> None:
        """Make room for so many slots of so many tokens, each at least doubled, and keep what is stored."""
        old_slots, old_length = self.slots, self.length
        if slots > old_slots:
            slots = min(max(slots, 2 * old_slots), self.max_slots)
        if length > old_length:
            length = min(max(length, 2 * old_length, _FIRST_LENGTH), self.max_length)
        slots, length = max(slots, old_slots), max(length, old_length)
        grown = []
        for old in (*self.keys, *self.values):
            new = self._new(slots, length)
            new[:old_slots, :, :old_length] = old
            grown.append(new)
        turns = torch.zeros(slots, self.config.head_dim // 2, device=self.device)
        turns[:old_slots] = self._turns
        # Only now: an allocation that fails leaves the cache as it was.
        self.keys[:], self.values[:] = grown[: len(self.keys)], grown[len(self.keys) :]
        self._turns, self.slots, self.length = turns, slots, length

    def clear(self) -> None:
        """Forget everything stored: a NaN that stays would reach later requests through masked positions."""
        for slot in range(self.slots):
            self.wipe(slot)

    @torch.inference_mode()
    def wipe(self, slot: int) -> None:
        """Forget what a slot holds."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()

    def _new(self, slots: int, length: int) -> Tensor:
        # Zeros, not empty: a masked position is multiplied by 0, and 0 · NaN is NaN.
        shape = (slots, self.config.num_kv_heads, length, self.config.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)
