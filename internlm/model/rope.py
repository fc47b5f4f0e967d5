"""Rotary positions (Su et al. 2021), half layout, with the four ways to read longer texts than trained.

A head of width E is E/2 pairs (x[i], x[i + E/2]); pair i at position p is turned by the angle p · f[i]:

    f[i] = base^(-2i/E)          scaled by linear, dynamic-NTK, YaRN or llama3 rules

Angles are computed in fp32 whatever the model's dtype: at position 8,192 a bf16 angle is off by whole turns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from internlm.model.config import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


class Rotation(NamedTuple):
    """What `rotate` multiplies a head and its swapped halves by, each [B, T, 1, E], in the dtype of activations."""

    cos: Tensor
    """Of every pair's angle, twice."""
    sin: Tensor
    """The same, negative for the first of a pair."""

    @classmethod
    def of(cls, angles: Tensor, factor: float, dtype: torch.dtype) -> Rotation:
        """Return the rotation by angles [B, T, 1, E/2] in fp32, times a factor."""
        cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return cls(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def frequencies(config: RopeConfig, head_dim: int, length: int = 0) -> tuple[Tensor, float]:
    """Return each pair's angle per position [E/2] in fp32, and the factor on cos and sin.

    `head_dim`: E; `length`: of the longest text, which only dynamic scaling looks at.
    """
    scaling, base = config.scaling, config.base
    if isinstance(scaling, DynamicScaling) and length > scaling.original_length:
        # bloc97 2023; the same formula as InternLM v0.2: base · (s·n/P − (s−1))^(E/(E−2))
        stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        base = base * stretch ** (head_dim / (head_dim - 2))
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor, 1.0
    if isinstance(scaling, YarnScaling):
        return _yarn(plain, scaling, base, head_dim)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling), 1.0
    return plain, 1.0


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's scale on cos and sin (Peng et al. 2023, section 3.4), with DeepSeek's weight `mscale` on it."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(plain: Tensor, scaling: YarnScaling, base: float, head_dim: int) -> tuple[Tensor, float]:
    """Peng et al. 2023, eq. 17–25: a ramp between interpolated (slow) and kept (fast) pairs."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    factor = yarn_attention(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor
    return plain / scaling.factor * (1 - keep) + plain * keep, factor


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1: kept below one wavelength, divided above another, blended between."""
    wavelength = 2 * math.pi / plain
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = ((scaling.original_length / wavelength - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - keep) + plain * keep


class Rope(nn.Module):
    """Turns positions into rotations."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.config, self.head_dim = config, head_dim
        self._cached: tuple[Tensor, float] | None = None

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the rotation of each position [B, T]; `dtype`: of the activations."""
        if isinstance(self.config.scaling, DynamicScaling):
            # InternLM's own rule: one base per call, of the longest text in the batch.
            turns, factor = frequencies(self.config, self.head_dim, int(positions.max()) + 1)
            turns = turns.to(positions.device)
        else:
            if self._cached is None or self._cached[0].device != positions.device:
                turns, factor = frequencies(self.config, self.head_dim)
                self._cached = turns.to(positions.device), factor
            turns, factor = self._cached
        angles = positions[:, :, None, None].float() * turns  # [B, T, 1, E/2]
        return Rotation.of(angles, factor, dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return x [B, T, H, E] with each pair turned by its angle."""
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, -1), rotation.sin)
