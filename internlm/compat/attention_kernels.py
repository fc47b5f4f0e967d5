"""Attention over documents in a row, and its denominators."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor


@functools.cache
def has_varlen_attention() -> bool:
    """Return whether torch ships variable-length flash attention (from 2.10 on; CUDA, bf16 and fp16 only)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _varlen_options() -> dict[str, Any]:
    """Return the keyword that makes varlen_attn causal: `is_causal` up to 2.11, `window_size` from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    return options


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int) -> Tensor:
    """Causal attention over documents laid end to end.

    Args:
        q: [N, H, E]; k, v: [N, K, E].
        starts: int32 offsets of the documents, the last N.
        max_length: length of the longest document, or any bound on it.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = dict(_varlen_options())
    if q.shape[1] != k.shape[1] and "enable_gqa" not in options:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    elif q.shape[1] == k.shape[1]:
        options.pop("enable_gqa", None)
    out = varlen_attn(q, k, v, starts, starts, max_length, max_length, **options)
    return out[0] if isinstance(out, tuple) else out


def document_block_mask(ids: Tensor) -> Any:
    """Return FlexAttention's block mask: causal, inside a document. ids: [B, T]."""
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document_and_earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[batch, query] == ids[batch, key])

    batch, length = ids.shape
    return create_block_mask(same_document_and_earlier, batch, None, length, length, device=ids.device.type)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """FlexAttention over [B, heads, T, E], compiled on CUDA (eager FlexAttention holds all scores)."""
    return _flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _flex(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex) if device_type == "cuda" else flex


def attention_and_mass(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return attention without a mask [B, H, Q, E] and the log of its denominators [B, H, Q], where torch tells them.

    The operator of scaled_dot_product_attention on CPUs, which throws the second away (2.11 to 2.13).

    Args:
        q: [B, H, Q, E].
        k, v: [B, H, T, E].
    """
    if q.device.type != "cpu" or not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return None
    out, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, mass
