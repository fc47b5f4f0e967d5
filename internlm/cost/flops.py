"""How much useful arithmetic a step is. The one place: training, planning and docs all count with these lines.

Counted: matrix products and attention, two operations per multiply-add, backward twice the forward. Not counted: norms,
activations, the optimizer, and anything computed again (recompute is not useful work). Attention is causal inside
documents: a document of n tokens has n (n + 1) / 2 pairs of query and key, each costing 2·H·E for the score and 2·H·E
for the value.

    6 · matmul_parameters · tokens + 12 · L · H · E · pairs            (forward and backward)
"""

from __future__ import annotations

from internlm.model.config import ModelConfig


def causal_pairs(length: int) -> int:
    """Return the number of (query, key) pairs of one causal document of `length` tokens."""
    return length * (length + 1) // 2


def forward_flops(shape: ModelConfig, tokens: float, pairs: float) -> float:
    """Return the floating-point operations of a forward pass; `pairs`: `causal_pairs` of all documents."""
    return 2 * shape.matmul_parameters * tokens + 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs


def training_flops(shape: ModelConfig, tokens: float, pairs: float) -> float:
    """Return the floating-point operations of forward and backward."""
    return 3 * forward_flops(shape, tokens, pairs)


def recomputed_flops(shape: ModelConfig, tokens: float, pairs: float, share: float) -> float:
    """Return the operations of running the forward of a share of the blocks again."""
    head = 2 * shape.embedding_parameters * tokens
    return share * (forward_flops(shape, tokens, pairs) - head)
