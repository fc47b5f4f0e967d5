"""Causal attention inside documents: one function, equal results on every device.

A row of a batch holds one or more documents; a token sees the earlier tokens of its own document and nothing else.
`Documents` says where they lie, prepared once per batch; `attend` picks the path:

    CPU     dense    every row is one document: one causal SDPA call
            blocks   one causal SDPA call per document: the cost grows with Σ len², not with (Σ len)²
    CUDA    dense    as above
            varlen   torch's variable-length flash attention (bf16, fp16)
            flex     compiled FlexAttention with a document mask, where varlen is missing or the dtype is fp32
    any     masked   SDPA with a [T, T] mask: the plain reference the others are tested against
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm import compat
from internlm.compat import kernels
from internlm.runtime import AttentionPath


@dataclass
class Documents:
    """Where the documents of a batch lie."""

    ids: Tensor | None
    """[B, T], equal inside a document; they never return after another document began."""
    path: AttentionPath
    """Not "auto"."""
    spans: tuple[tuple[int, int, int, int], ...] = ()
    """For "blocks": (first row, last row + 1, start, stop) of rectangles that are one document per row."""
    starts: Tensor | None = None
    """For "varlen": offsets of all documents in the flattened batch, int32, padded with B·T."""
    mask: Any = None
    """For "flex": the block mask; for "masked": [B, 1, T, T] booleans."""


def arrange(ids: Tensor | None, device: torch.device, dtype: torch.dtype, path: AttentionPath = "auto") -> Documents:
    """Prepare the documents of a batch for `attend`.

    Args:
        ids: [B, T] document ids, or None when each row is one document.
        device, dtype: of the activations.
        path: "auto" takes the fastest that the device has.
    """
    if ids is None or path == "dense":
        return Documents(ids, "dense")
    if path == "auto":
        path = "blocks" if device.type == "cpu" else "masked"
        if device.type == "cuda":
            path = "varlen" if dtype in (torch.bfloat16, torch.float16) else "flex"
    if path == "blocks":
        spans = _spans(ids)
        if all(start == 0 and stop == ids.shape[1] for _, _, start, stop in spans):
            return Documents(ids, "dense")
        return Documents(ids, path, spans=spans)
    if path == "varlen":
        return Documents(ids, path, starts=_starts(ids))
    if path == "flex":
        return Documents(ids, path, mask=kernels.document_block_mask(ids))
    same = ids[:, None, :, None] == ids[:, None, None, :]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return Documents(ids, "masked", mask=same & causal)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Return the attention output [B, T, H, E], causal inside each document, scaled by 1/sqrt(E).

    q [B, T, H, E]; k, v [B, T, K, E], where H is a multiple of K.
    """
    if documents.path == "dense":
        return sdpa(q, k, v)
    if documents.path == "blocks":
        return _attend_blocks(q, k, v, documents)
    if documents.path == "varlen":
        assert documents.starts is not None, "arrange sets the offsets that varlen reads"
        batch, length = q.shape[:2]
        q, k, v = (x.reshape(batch * length, *x.shape[2:]) for x in (q, k, v))
        return kernels.varlen_attention(q, k, v, documents.starts, length).unflatten(0, (batch, length))
    if documents.path == "flex":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return kernels.flex_attention(q, k, v, documents.mask).transpose(1, 2)
    return sdpa(q, k, v, documents.mask)


def attend_from(q: Tensor, k: Tensor, v: Tensor, documents: Documents, first: int) -> Tensor:
    """Return the attention output of queries [B, Q, H, E], the tokens from `first` on; all else is of all T tokens."""
    place = torch.arange(k.shape[1], device=q.device)
    queries = slice(first, first + q.shape[1])
    mask = place[queries, None] >= place  # [Q, T]
    if documents.ids is not None:
        mask = mask & (documents.ids[:, None, queries, None] == documents.ids[:, None, None, :])  # [B, 1, Q, T]
    return sdpa(q, k, v, mask)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the attention output [B, Q, H, E] where the mask says which keys each query sees; causal without one.

    q [B, Q, H, E]; k, v [B, T, K, E], where H is a multiple of K. The mask is of booleans that broadcast to
    [B, H, Q, T].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cpu":
        # The CPU's flash kernel knows no groups: enable_gqa falls back to the kernel that holds all scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


@compat.outside_graphs
def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Outside of compiled graphs: the spans change with every batch."""
    rows: dict[int, list[Tensor]] = {}
    for first, last, start, stop in documents.spans:
        out = sdpa(q[first:last, start:stop], k[first:last, start:stop], v[first:last, start:stop])
        rows.setdefault(first, []).append(out)
    return torch.cat([parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in rows.values()])


def _spans(ids: Tensor) -> tuple[tuple[int, int, int, int], ...]:
    """Cut a batch into rectangles of one document per row; neighbouring rows with equal cuts share rectangles."""
    length = ids.shape[1]
    changes = ids[:, 1:] != ids[:, :-1]
    cuts_of = [(0, *(row.nonzero().flatten() + 1).tolist(), length) for row in changes.cpu()]
    spans: list[tuple[int, int, int, int]] = []
    first = 0
    for cuts, alike in itertools.groupby(cuts_of):
        last = first + len(list(alike))
        spans += [(first, last, start, stop) for start, stop in itertools.pairwise(cuts)]
        first = last
    return tuple(spans)


def _starts(ids: Tensor) -> Tensor:
    """Return the offsets of all documents of the flattened batch, int32 [B·T + 1], padded with B·T.

    The size is fixed so that no compiled graph depends on how many documents there are, and nothing waits for the GPU.
    """
    batch, length = ids.shape
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    flat = begins.flatten()
    offsets = torch.arange(batch * length, device=ids.device, dtype=torch.int32)
    rank = flat.cumsum(0) - 1
    starts = torch.full((batch * length + 1,), batch * length, device=ids.device, dtype=torch.int32)
    # Tokens inside a document all write their document's slot; the smallest offset is its start.
    return starts.scatter_reduce_(0, rank, offsets, reduce="amin", include_self=True)
