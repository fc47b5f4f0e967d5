"""Names of a model's weights here and in Transformers' families, as tables.

    to_transformers("blocks.3.attention.wq.weight")                     # 'model.layers.3.self_attn.q_proj.weight'
    from_transformers("model.layers.3.self_attn.q_proj.weight")         # (['blocks.3.attention.wq.weight'], None)

`{i}` in a row is the layer, `{e}` the expert: what is one stacked weight here is one per expert there. Where several
rows name the same weight there, it holds them all (see `fused.py`). Both sides keep rotary pairs in the half layout, so
no matrix is permuted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from internlm.errors import WeightsError, did_you_mean

Names = dict[str, str]
"""Ours → theirs."""

_ATTENTION: Names = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.attention.wq.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blocks.{i}.attention.wq.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "blocks.{i}.attention.wk.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blocks.{i}.attention.wk.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "blocks.{i}.attention.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blocks.{i}.attention.wv.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "blocks.{i}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks.{i}.attention.wo.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "blocks.{i}.feed_forward_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_HEAD_NORMS: Names = {
    "blocks.{i}.attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
}
LLAMA: Names = _ATTENTION | {
    "blocks.{i}.feed_forward.w_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks.{i}.feed_forward.w_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blocks.{i}.feed_forward.w_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}
"""Also Mistral's, Qwen2's, InternLM's and InternLM3's."""
QWEN3: Names = LLAMA | _HEAD_NORMS
MIXTRAL: Names = _ATTENTION | {
    "blocks.{i}.feed_forward.router.weight": "model.layers.{i}.block_sparse_moe.gate.weight",
    "blocks.{i}.feed_forward.experts.w_gate.weight": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
    "blocks.{i}.feed_forward.experts.w_up.weight": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    "blocks.{i}.feed_forward.experts.w_down.weight": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
}
QWEN3_MOE: Names = (
    _ATTENTION
    | _HEAD_NORMS
    | {
        "blocks.{i}.feed_forward.router.weight": "model.layers.{i}.mlp.gate.weight",
        "blocks.{i}.feed_forward.experts.w_gate.weight": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
        "blocks.{i}.feed_forward.experts.w_up.weight": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
        "blocks.{i}.feed_forward.experts.w_down.weight": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
    }
)
FUSED_EXPERTS: Names = {
    "blocks.{i}.feed_forward.router.weight": "model.layers.{i}.mlp.gate.weight",
    "blocks.{i}.feed_forward.experts.w_gate.weight": "model.layers.{i}.mlp.experts.gate_up_proj",
    "blocks.{i}.feed_forward.experts.w_up.weight": "model.layers.{i}.mlp.experts.gate_up_proj",
    "blocks.{i}.feed_forward.experts.w_down.weight": "model.layers.{i}.mlp.experts.down_proj",
}
"""Experts as Transformers 5 has them in memory, and saves them where it is told to."""
INTERNLM2: Names = {
    "embedding.weight": "model.tok_embeddings.weight",
    "blocks.{i}.attention_norm.weight": "model.layers.{i}.attention_norm.weight",
    "blocks.{i}.attention.wq.weight": "model.layers.{i}.attention.wqkv.weight",
    "blocks.{i}.attention.wk.weight": "model.layers.{i}.attention.wqkv.weight",
    "blocks.{i}.attention.wv.weight": "model.layers.{i}.attention.wqkv.weight",
    "blocks.{i}.attention.wq.bias": "model.layers.{i}.attention.wqkv.bias",
    "blocks.{i}.attention.wk.bias": "model.layers.{i}.attention.wqkv.bias",
    "blocks.{i}.attention.wv.bias": "model.layers.{i}.attention.wqkv.bias",
    "blocks.{i}.attention.wo.weight": "model.layers.{i}.attention.wo.weight",
    "blocks.{i}.attention.wo.bias": "model.layers.{i}.attention.wo.bias",
    "blocks.{i}.feed_forward_norm.weight": "model.layers.{i}.ffn_norm.weight",
    "blocks.{i}.feed_forward.w_gate.weight": "model.layers.{i}.feed_forward.w1.weight",
    "blocks.{i}.feed_forward.w_up.weight": "model.layers.{i}.feed_forward.w3.weight",
    "blocks.{i}.feed_forward.w_down.weight": "model.layers.{i}.feed_forward.w2.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "output.weight",
}
TRANSFORMERS: Names = LLAMA | MIXTRAL | QWEN3
"""Those that what is written by default has, but for Qwen3's experts."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_stacked(name: str) -> bool:
    """Return whether one of our weights holds a matrix of every expert."""
    return ".experts." in name


def to_transformers(name: str, expert: int | None = None, names: Names = TRANSFORMERS) -> str:
    """Return the name there of one of our weights, or of one expert's part of it.

    Raises:
        WeightsError: the table has no such weight.
    """
    pattern, numbers = _pattern(name)
    if pattern not in names:
        raise _unknown(name, names, numbers)
    return _filled(names[pattern], [*numbers, *([] if expert is None else [str(expert)])])


def from_transformers(name: str, *tables: Names) -> tuple[list[str], int | None]:
    """Return our names of a weight there, several where it holds several of ours, and the expert that it is of.

    Args:
        name: theirs.
        tables: in any of which it may be; none: `TRANSFORMERS`.

    Raises:
        WeightsError: no table has such a weight.
    """
    tables = tables or (TRANSFORMERS,)
    pattern, numbers = _pattern(name)
    for table in tables:
        if found := [ours for ours, theirs in table.items() if theirs == pattern]:
            return [_filled(ours, numbers[:1]) for ours in found], int(numbers[1]) if len(numbers) > 1 else None
    raise _unknown(name, [theirs for table in tables for theirs in table.values()], numbers)


def _pattern(name: str) -> tuple[str, list[str]]:
    """Return a name with its first numbers replaced by {i} and {e}, and the numbers."""
    pattern = _NUMBER.sub("{i}", name, count=1)
    return _NUMBER.sub("{e}", pattern, count=1), _NUMBER.findall(name)


def _filled(pattern: str, numbers: list[str]) -> str:
    for hole, number in zip(("{i}", "{e}"), numbers, strict=False):
        pattern = pattern.replace(hole, number)
    return pattern


def _unknown(name: str, known: Iterable[str], numbers: list[str]) -> WeightsError:
    close = did_you_mean(name, [_filled(row, [*numbers, "0", "0"][:2]) for row in known])
    return WeightsError("no such weight", where=name, do=close)
