"""Bytes that training a model keeps on a rank. Activations, and what comes and goes, are not counted."""

from __future__ import annotations

from dataclasses import dataclass

from internlm.model.config import ModelConfig

WEIGHT_AND_GRADIENT = 8
"""Bytes of a parameter and its gradient, both in float32."""


@dataclass(frozen=True)
class Kept:
    """Bytes on one rank."""

    states: float
    """Its part of weights, gradients and the optimizer's moments; on the CPU where they are offloaded."""
    gathered: float
    """All weights of its stage in the dtype of products, where parts of them are put together and kept."""


def kept(shape: ModelConfig, *, parts: int, cut: int, experts: int, moment_bytes: float, gathered_bytes: float) -> Kept:
    """Return what a rank keeps.

    Args:
        shape: of the model.
        parts: ranks that hold other weights: pipeline × tensor.
        cut: ranks over which a part's states are spread: shard × context.
        experts: ranks over which the experts of a part are spread.
        moment_bytes: of the optimizer's moments, per parameter on one rank.
        gathered_bytes: of a weight that is put together and kept; 0: none is.
    """
    own = shape.num_parameters / parts
    of_experts = shape.num_layers * (shape.feed_forward_parameters if shape.experts else 0) / parts
    return Kept(
        own * (WEIGHT_AND_GRADIENT + moment_bytes) / cut,
        (own - of_experts + of_experts / experts) * gathered_bytes,
    )
