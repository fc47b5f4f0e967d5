"""Attention of one token of each text over keys and values that lie in blocks.

    out = attend(q, stored, tables, lengths, block)        # [B, H, E]

    text 0   table 7 2 9      length 70        its token i lies in slot table[i // block] · block + i % block
    text 1   table 4          length 3

On a GPU it is a Triton kernel: a program for each text, key head and part of the text (flash-decoding, Dao et al.
2023), whose results are merged by their denominators, so that one long text keeps all of the GPU at work. The queries
that share a key head are one product. Elsewhere, and where Triton is missing, it is plain torch, which reads as many
slots as the table is wide: the reference.

Sums are in fp32. Nothing is asked of the GPU by the host: all of it can be a part of a CUDA graph.
"""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from internlm.log import warn_once

logger = logging.getLogger(__name__)

_TILE = 64
"""Keys that a program looks at together."""
_MOST_SPLITS = 64
_PROCESSORS = 132
"""Of a GPU that does not say."""
_INT8_MAX = 127


class Stored(NamedTuple):
    """A layer's keys and values, or those of some of its slots."""

    keys: Tensor
    """[K, slots, E]; int8 where there are scales."""
    values: Tensor
    key_scales: Tensor | None = None
    """[K, slots] fp32: what a token's key is multiplied by."""
    value_scales: Tensor | None = None


def attend(q: Tensor, stored: Stored, tables: Tensor, lengths: Tensor, block: int) -> Tensor:
    """Return the attention output [B, H, E], scaled by 1/√E, in the dtype of q; zeros for a text of length 0.

    Args:
        q: [B, H, E], of the last token of each text; H is a multiple of K.
        stored: keys and values of all slots.
        tables: [B, M] int32, the blocks of each text. What stands behind its last block is not looked at, but has to
            be the number of a block.
        lengths: [B] int32, tokens of each text, M · block at most.
        block: slots of a block.
    """
    if has_triton() and (q.is_cuda or is_interpreted()):
        return attend_by_kernel(q, stored, tables, lengths, block)
    return attend_plainly(q, stored, tables, lengths, block)


def attend_plainly(q: Tensor, stored: Stored, tables: Tensor, lengths: Tensor, block: int) -> Tensor:
    """Return what `attend` does, by plain operators."""
    kv_heads = stored.keys.shape[0]
    slots = (tables.long()[:, :, None] * block + torch.arange(block, device=q.device)).flatten(1)  # [B, L]
    outside = torch.arange(slots.shape[1], device=q.device) >= lengths[:, None]
    keys, values = stored.keys[:, slots].float(), stored.values[:, slots].float()  # [K, B, L, E]
    if stored.key_scales is not None and stored.value_scales is not None:
        keys, values = keys * stored.key_scales[:, slots, None], values * stored.value_scales[:, slots, None]
    # Slots that were never written hold anything: 0 · NaN would be NaN.
    values = values.masked_fill(outside[None, :, :, None], 0.0)
    groups = q.unflatten(1, (kv_heads, -1)).float()  # [B, K, G, E]
    scores = torch.einsum("bkge,kble->bkgl", groups, keys) * q.shape[-1] ** -0.5
    p = scores.masked_fill(outside[:, None, None], float("-inf")).softmax(-1)
    p = p.masked_fill(outside[:, None, None], 0.0)  # a text of length 0 has no softmax
    return torch.einsum("bkgl,kble->bkge", p, values).flatten(1, 2).to(q.dtype)


def attend_by_kernel(
    q: Tensor, stored: Stored, tables: Tensor, lengths: Tensor, block: int, splits: int | None = None
) -> Tensor:
    """Return what `attend` does, by the Triton kernel.

    Args:
        q, stored, tables, lengths, block: as of `attend`.
        splits: parts of each text; None: as many as keep the GPU at work.
    """
    import triton.language as tl

    from internlm.infer import kernels

    (batch, heads, width), kv_heads = q.shape, stored.keys.shape[0]
    group = heads // kv_heads
    if splits is None:
        splits = _splits(batch * kv_heads, tables.shape[1] * block, q.device)
    parts = torch.empty((batch, heads, splits, width), dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    mass = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    exact = is_interpreted() or q.dtype == torch.float32  # the interpreter's products know no bf16
    dot = tl.float32 if exact else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]
    scales = mass if stored.key_scales is None else stored.key_scales  # not read, but something has to be given
    kernels.attend_split[(batch, kv_heads, splits)](
        q, stored.keys, stored.values, scales, scales if stored.value_scales is None else stored.value_scales,
        tables, lengths, parts, mass,
        width**-0.5, q.stride(0), q.stride(1), stored.keys.stride(0), stored.keys.stride(1), scales.stride(0),
        tables.stride(0),
        GROUP=group, BLOCK=block, SPLITS=splits, TILE=_TILE, WIDTH=width,
        ROWS=max(16, _power(group)), COLUMNS=max(16, _power(width)),
        ROUNDED=stored.key_scales is not None, DOT=dot,
    )  # fmt: skip
    if splits == 1:
        return parts[:, :, 0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kernels.merge[(batch * heads,)](
        parts, mass, out, SPLITS=splits, SPREAD=_power(splits), WIDTH=width, COLUMNS=_power(width)
    )
    return out


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [..., E] as int8, and the scales [...] in fp32 that give it back: its largest number is ±127."""
    x = x.float()
    scales = x.abs().amax(-1).clamp(min=1e-12) / _INT8_MAX
    return (x / scales[..., None]).round().to(torch.int8), scales


@functools.cache
def works_on(device: torch.device) -> bool:
    """Return whether the kernel runs on a device. Where a GPU should run it and cannot, that is said once."""
    if device.type != "cuda":
        return False
    try:
        numbers = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        attend_by_kernel(numbers[None, :1], Stored(numbers[None], numbers[None]), table, table[0] + 1, 16)
        torch.cuda.synchronize(device)
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know
        problem = f"there is no paged attention here ({type(error).__name__}: {error})"
        warn_once(logger, f"{problem}: texts are attended one by one, which takes many times as long")
        return False
    return True


@functools.cache
def has_triton() -> bool:
    """Return whether Triton can be imported; asked without doing so, which takes a while."""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton's kernels run on a CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _splits(programs: int, longest: int, device: torch.device) -> int:
    """Return into how many parts texts are cut: two programs for each processor, and no part less than two tiles."""
    wanted = -(-2 * _processors(device) // programs)
    return max(1, min(wanted, -(-longest // (2 * _TILE)), _MOST_SPLITS))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _PROCESSORS


def _power(count: int) -> int:
    """Return the next power of two."""
    return 1 << (count - 1).bit_length()
