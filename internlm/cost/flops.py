"""How much useful arithmetic a step is, and how a pipeline shares it out: training, planning, docs count with this.

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


def stage_layers(shape: ModelConfig, stages: int, seq_len: int) -> list[int]:
    """Return the number of blocks of each pipeline stage, first to last, so that the slowest is as fast as can be.

    Each has at least one, and the model at least as many as there are stages. The head costs as much as several blocks
    of a small model: the last stage gets fewer. `seq_len`: tokens per row, all of one document: the cost of attention.
    """
    weights = shape.matmul_parameters - shape.embedding_parameters
    attention = 4 * shape.num_heads * shape.head_dim * causal_pairs(seq_len) / seq_len
    block = 2 * weights / shape.num_layers + attention
    extra = [0.0] * (stages - 1) + [2 * shape.embedding_parameters / block]  # in blocks
    counts = [1] * stages
    for _ in range(shape.num_layers - stages):
        # The next block goes where it makes the longest stage shortest; of equals, to the earliest after the first.
        place = min(range(stages), key=lambda i: (counts[i] + 1 + extra[i], i == 0, i))
        counts[place] += 1
    return counts
