"""Long rows over several ranks: a row's tokens are cut in equal stretches, one per rank.

For attention, which alone looks at more than one token, the ranks trade tokens for heads (Jacobs et al. 2023, DeepSpeed
Ulysses): each gets all tokens of its share of the heads, runs the plain attention of one device, and trades back. Four
all-to-alls a block, each of 1 / C of the activations.

    rank 0   tokens 0-3, heads 0-3      ⇄      tokens 0-7, heads 0-1
    rank 1   tokens 4-7, heads 0-3      ⇄      tokens 0-7, heads 2-3

Where the ranks do not divide the heads, keys and values of all tokens come to every rank instead, and each answers its
own queries under a mask. Fewer key heads than ranks are repeated as often as needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from internlm.model import attention
from internlm.model.attention import Documents
from internlm.model.layers import Attention, Block
from internlm.model.transformer import Transformer
from internlm.parallel import collectives

TOKENS, HEADS = 1, 2


def spread(model: Transformer, group: dist.ProcessGroup) -> None:
    """Make attention see the tokens of all ranks of a group.

    The model is then called with this rank's tokens and positions, and with the documents of all.
    """
    for block in model.blocks.values():
        assert isinstance(block, Block), "a decoder is made of blocks"
        block.attention.attend = attend_over(group, block.attention)


def attend_over(group: dist.ProcessGroup, module: Attention) -> Callable[[Tensor, Tensor, Tensor, Documents], Tensor]:
    """Return attention over a group; q [B, T / C, H, E] and k, v [B, T / C, K, E] are this rank's tokens."""
    size, inner = dist.get_world_size(group), module.attend

    def by_heads(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        repeats = math.lcm(k.shape[HEADS], size) // k.shape[HEADS]
        if repeats > 1:  # a rank's queries find their keys: repeating keeps the groups in order
            k, v = (x.repeat_interleave(repeats, HEADS) for x in (k, v))
        q, k, v = (collectives.exchange(x, group, HEADS, TOKENS) for x in (q, k, v))  # [B, T, H / C, E]
        return collectives.exchange(inner(q, k, v, documents), group, TOKENS, HEADS)

    def by_queries(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        k, v = (collectives.gather(x, group, TOKENS) for x in (k, v))
        first = dist.get_rank(group) * q.shape[TOKENS]
        return attention.attend_from(q, k, v, documents, first)

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        divides = q.shape[HEADS] % size == 0 and q.shape[HEADS] % math.lcm(k.shape[HEADS], size) == 0
        return (by_heads if divides else by_queries)(q, k, v, documents)

    return attend


def own_tokens(x: Tensor, rank: int, size: int) -> Tensor:
    """Return the stretch of [B, T] that a rank holds, [B, T / size]."""
    length = x.shape[TOKENS] // size
    return x.narrow(TOKENS, rank * length, length)
