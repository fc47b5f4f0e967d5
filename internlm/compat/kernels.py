"""Matrix products of linear layers, attention over documents in a row, and updates of many parameters at once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _works(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Return whether a product x · weight transposed can be made here, and is right."""
    x, weight = torch.ones(2, 4, device="cpu"), torch.ones(3, 4, device="cpu")  # also when models are built on meta
    try:
        return torch.equal(product(x, weight), x @ weight.t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


@functools.cache
def has_onednn_linear() -> bool:
    """Return whether torch's oneDNN product for fp32 linear layers can be called here (x86 and Arm CPU builds)."""
    return torch.backends.mkldnn.is_available() and _works(onednn_linear)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., K] · weight [N, K] transposed + bias [N], through oneDNN instead of MKL; fp32, CPU, no gradient.

    torch sends fp32 products to MKL, which does not use AVX-512 on AMD: 122-194 GFLOP/s there against 193-217 from
    oneDNN (2 threads of a Zen 4, the shapes of `benchmarks/train_cpu.py`). The op is the one inductor calls; it takes
    plain strided weights.
    """
    if torch.compiler.is_compiling():
        # inductor takes this op for frozen weights only; behind an op of our own it leaves it alone
        return _opaque_linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("internlm::onednn_linear", mutates_args=())
def _opaque_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@functools.cache
def has_packed_onednn_linear() -> bool:
    """Return whether oneDNN takes fp32 weights in an order of its own here."""
    return has_onednn_linear() and _works(lambda x, weight: onednn_linear(x, pack_onednn_linear(weight)))


def pack_onednn_linear(weight: Tensor) -> Tensor:
    """Return a copy of a weight [N, K], fp32, in the order that suits oneDNN; only `onednn_linear` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


@functools.cache
def has_fp16_linear() -> bool:
    """Return whether fbgemm multiplies fp32 rows by packed fp16 weights here (x86 builds)."""
    return _works(lambda x, weight: fp16_linear(x, pack_fp16_linear(weight, None)))


def pack_fp16_linear(weight: Tensor, bias: Tensor | None) -> Any:
    """Return a weight [N, K] and a bias [N], both fp32, packed for `fp16_linear`; the weight is rounded to fp16."""
    return torch.ops.quantized.linear_prepack_fp16(weight, bias)


def fp16_linear(x: Tensor, packed: Any) -> Tensor:
    """Return x [..., K], fp32, times a packed weight + bias; products and sums are in fp32."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


@functools.cache
def has_bf16_linear() -> bool:
    """Return whether oneDNN multiplies bf16 rows by bf16 weights here, and the processor has instructions for it.

    Without them (AVX512-BF16 or AMX) such products are converted to fp32 one by one, and nine times slower than that.
    """
    is_fast = _cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported")
    return is_fast and _works(lambda x, weight: bf16_linear(x, pack_bf16_linear(weight)))


def pack_bf16_linear(weight: Tensor) -> Tensor:
    """Return a copy of a weight [N, K] in bf16, in the order that suits oneDNN; only `bf16_linear` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), None)


def bf16_linear(x: Tensor, packed: Tensor) -> Tensor:
    """Return x [..., K] times a packed weight, fp32; x and what comes out are rounded to bf16, sums are in fp32."""
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, None, "none", [], "").float()


def _cpu_has(question: str) -> bool:
    """Return what a private function of torch says of the processor; no where it is missing."""
    return bool(getattr(torch.cpu, question, bool)())


@functools.cache
def has_int8_linear() -> bool:
    """Return whether oneDNN multiplies 7-bit rows by 8-bit weights here, and without an error at the largest values.

    Instructions before VNNI add pairs of products in 16 bits: 255 · 127 · 2 does not fit there, 127 · 127 · 2 does.
    """
    x = torch.full((3, 64), 127, dtype=torch.uint8, device="cpu")
    x[1:] = 0
    w = torch.full((5, 64), 127, dtype=torch.int8, device="cpu")
    w[1:] = -127
    try:
        out = int8_linear(x, pack_int8_linear(w), torch.ones(5, device="cpu"))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(out.double(), (x.double() - 64) @ w.double().t())


def pack_int8_linear(weight: Tensor) -> Tensor:
    """Return a copy of a weight [N, K], int8, in the order that suits oneDNN."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def int8_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Return (x − 64) [M, K] times a packed weight, each column times its scale [N], fp32.

    Sums are made in 32-bit integers: a row's result does not depend on the others, nor on the order.

    Args:
        x: uint8, at most 127.
        packed: of `pack_int8_linear`, all within ±127.
        scales: fp32.
    """
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 64, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def has_grouped_product(*factors: Tensor) -> bool:
    """Return whether one kernel multiplies groups of rows by a matrix each.

    On GPUs from the A100 on, in bf16, with rows of multiples of 16 bytes, and if there are rows at all.
    """
    first = factors[0]
    fits = all(x.dtype == torch.bfloat16 and x.numel() and all(n % 8 == 0 for n in x.shape[1:]) for x in factors)
    return first.is_cuda and fits and torch.cuda.get_device_capability(first.device) >= (8, 0)


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return the products of groups: rows of a [R, K] by b [E, K, N], or columns of a [M, R] by rows of b [R, N].

    Rows after the last end are not computed.
    """
    return torch.nn.functional.grouped_mm(a, b, offs=ends)


def scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a [M, K] · b [K, N] of 8-bit floats times both scales, in `dtype`.

    `torch._scaled_mm` is private, and `F.scaled_mm` exists from 2.13 on only. A device without such products, and fp32
    results, which it does not give, get plain ones of the same rounded numbers.
    """
    capable = a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9)
    if capable and dtype in (torch.bfloat16, torch.float16):
        return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=False)
    return (a.float() @ b.float() * (a_scale * b_scale)).to(dtype)


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
    """Causal flash attention over documents laid end to end; CUDA, bf16 and fp16 only.

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


def fused_adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    **numbers: Any,
) -> None:
    """Take one AdamW step for each weight, in place, with the kernel of `torch.optim.AdamW(fused=True)`.

    All are fp32 on one device; a step is a [], the number of this update from 1. Numbers are `lr`, `beta1`, `beta2`,
    `eps` and `weight_decay`.
    """
    torch._fused_adamw_(weights, grads, means, squares, [], steps, amsgrad=False, maximize=False, **numbers)
