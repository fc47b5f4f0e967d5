"""How many blocks each pipeline stage gets, so that the slowest stage is as fast as can be.

The head costs as much as 2·V·D operations per token, several blocks of a small model: the last stage gets fewer.
"""

from __future__ import annotations

from internlm.cost.flops import causal_pairs
from internlm.model.config import ModelConfig


def stage_layers(shape: ModelConfig, stages: int, seq_len: int) -> list[int]:
    """Return the number of blocks of each stage, first to last; each has at least one.

    The model has at least as many; `seq_len`: tokens per row, all of one document: the cost of attention.
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
