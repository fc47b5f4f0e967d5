"""The parts of a block: linear layers, RMSNorm, grouped-query attention, SwiGLU (or a mixture of them).

x ← x + attention(norm(x))        x ← x + feed_forward(norm(x))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm.compat import kernels
from internlm.model import attention
from internlm.model.attention import Documents
from internlm.model.config import ModelConfig
from internlm.model.moe import Mixture
from internlm.model.rope import Rotation, rotate

Attend = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square and multiply by a weight; statistics in fp32 (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x [..., D] in the dtype of x."""
        return self.normalise(x, self.weight)

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the normalised x [..., D], multiplied by `weight`."""
        if x.dtype == weight.dtype and not torch.is_grad_enabled():  # decoding, where the number of kernels counts
            if x.is_cuda:  # one instead of four, with fp32 inside
                return F.rms_norm(x, self.normalized_shape, weight, self.eps)
            if x.dtype == torch.float32:  # 14 µs instead of 34 for 16 rows of 768
                length = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
                return (x * length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()).mul_(weight)
        return F.rms_norm(x.float(), self.normalized_shape, weight.float(), self.eps).to(x.dtype)


class Linear(nn.Linear):
    """x · weight transposed + bias, through the fastest product that the device has."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.onednn = kernels.has_onednn_linear()  # asked once, outside of compiled graphs

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        return self.product(x, self.weight, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x [..., in] · weight [out, in] transposed + bias."""
        if self.onednn and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
            return _CpuLinear.apply(x, weight, bias)
        return F.linear(x, weight, bias)


class _CpuLinear(torch.autograd.Function):
    """All through oneDNN but the gradient of the weight, for which MKL is faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return kernels.onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = kernels.onednn_linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = torch.mm(flat.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    `attend` is a seam, replaced by what spreads a sequence over devices or keeps the keys and values of earlier tokens.
    `wqkv` is another: where it is set, it stands for wq, wk and wv.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.wq = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.wk = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.wv = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.wo = Linear(width, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.attend: Attend = attention.attend
        self.wqkv: nn.Module | None = None

    def forward(self, x: Tensor, rotation: Rotation, documents: Documents) -> Tensor:
        """Return [B, T, D] from the normalised stream x [B, T, D]."""
        out = self.attend(*self._heads(x, rotation), documents)
        return self.wo(out.flatten(-2))

    def _heads(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, H, E], keys and values [B, T, K, E], of which the first two are turned."""
        if self.wqkv is None:
            q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.wq, self.wk, self.wv))
        else:
            together = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
            q, k, v = together.split(self.heads, -2)
            if self.q_norm is None:
                q, k = rotate(together[..., : sum(self.heads[:2]), :], rotation).split(self.heads[:2], -2)
                return q, k, v
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotation), rotate(k, rotation), v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w_down(silu(w_gate x) · w_up x).

    `w_gate_up` is a seam: where it is set, it stands for w_gate and w_up.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate = Linear(config.hidden_size, config.ffn_size, bias=False)
        self.w_up = Linear(config.hidden_size, config.ffn_size, bias=False)
        self.w_down = Linear(config.ffn_size, config.hidden_size, bias=False)
        self.w_gate_up: nn.Module | None = None

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        """Return [B, T, D] from the normalised stream x [B, T, D]; where documents lie makes no difference."""
        gate, up = (self.w_gate(x), self.w_up(x)) if self.w_gate_up is None else self.w_gate_up(x).chunk(2, -1)
        return self.w_down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config) if config.experts is None else Mixture(config, config.experts)

    def forward(self, x: Tensor, rotation: Rotation, documents: Documents) -> Tensor:
        """Return the stream [B, T, D] after this layer."""
        x = x + self.attention(self.attention_norm(x), rotation, documents)
        return x + self.feed_forward(self.feed_forward_norm(x), documents)
