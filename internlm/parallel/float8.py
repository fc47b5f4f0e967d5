"""Linear layers whose three products are made in 8-bit floating point, with one scale per tensor.

    forward         y  = x₈ · w₈ᵀ          x, w in e4m3 (3 bits of mantissa, up to 448)
    backward        dx = g₈ · w₈           g in e5m2 (2 bits, up to 57,344: gradients need range more than precision)
                    dw = g₈ᵀ · x₈

Each tensor is divided by its own largest magnitude just before the product ("dynamic tensorwise", Micikevicius et al.
2022), so there is no history to keep or to save. Weights, sums, norms, attention, embedding and head stay as they are.
It pays once the casts are fused: compile the blocks. Results differ from bf16 by about 2⁻⁴ per element of a product;
losses of a run by a few thousandths.

On devices without 8-bit products the same rounding is done and the products are made in the dtype of x: slower, for
tests.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from internlm import compat
from internlm.compat import kernels
from internlm.model.layers import Linear
from internlm.model.transformer import Transformer

MULTIPLE = 16
"""The products' dims must be multiples of this (cuBLAS)."""


def convert(model: Transformer) -> None:
    """Make the linear layers of all blocks compute in 8 bits, in place; the stacked matrices of experts stay.

    Their dims must be multiples of `MULTIPLE`: `Layout.check` sees to it.
    """
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            module.product = functools.partial(product)  # type: ignore[method-assign]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [..., in] · weight [out, in] transposed + bias, in the dtype of x (under autocast: in its)."""
    x = compat.as_products(x)
    out = _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = _rounded(x, torch.float8_e4m3fn)
        w8, w_scale = _rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return kernels.scaled_product(x8, w8.t(), x_scale, w_scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        g8, g_scale = _rounded(grads[0], torch.float8_e5m2)
        # The right factor of a product must lie column by column, hence the copies.
        grad_x = kernels.scaled_product(g8, w8.t().contiguous().t(), g_scale, w_scale, x_dtype)
        grad_w = kernels.scaled_product(g8.t().contiguous(), x8.t().contiguous().t(), g_scale, x_scale, w_dtype)
        return grad_x, grad_w


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x / scale in 8 bits and the scale, which brings the largest magnitude to the largest number there is."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale
