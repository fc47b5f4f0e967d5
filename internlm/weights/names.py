"""Names of a model's weights here and in other formats, as tables.

    to_transformers("blocks.3.attention.wq.weight")                     # 'model.layers.3.self_attn.q_proj.weight'
    from_transformers("model.layers.3.self_attn.q_proj.weight")         # 'blocks.3.attention.wq.weight'

`{i}` in a row is the layer, `{e}` the expert: what is one stacked weight here is one per expert there. Only names
change: both sides keep rotary pairs in the half layout, so no matrix is permuted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from internlm.errors import WeightsError, did_you_mean

TRANSFORMERS: dict[str, str] = {
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
    "blocks.{i}.feed_forward.w_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks.{i}.feed_forward.w_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blocks.{i}.feed_forward.w_down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "blocks.{i}.feed_forward.router.weight": "model.layers.{i}.block_sparse_moe.gate.weight",
    "blocks.{i}.feed_forward.experts.w_gate.weight": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
    "blocks.{i}.feed_forward.experts.w_up.weight": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    "blocks.{i}.feed_forward.experts.w_down.weight": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Ours → `LlamaForCausalLM` (also Mistral and Qwen2, which use the same names) and `MixtralForCausalLM`."""

_BACK = {theirs: ours for ours, theirs in TRANSFORMERS.items()}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_stacked(name: str) -> bool:
    """Return whether one of our weights holds a matrix of every expert."""
    return ".experts." in name


def to_transformers(name: str, expert: int | None = None) -> str:
    """Return the Transformers name of one of our weights, or of one expert's part of it.

    Raises:
        WeightsError: the model has no such weight.
    """
    found = _translate(name, TRANSFORMERS)
    return found if expert is None else found.replace("{e}", str(expert))


def from_transformers(name: str) -> str:
    """Return our name of a Transformers weight.

    Raises:
        WeightsError: the table has no such weight.
    """
    return _translate(name, _BACK)


def expert_of(name: str) -> int | None:
    """Return which expert a Transformers weight is of, None for what belongs to none."""
    numbers = _NUMBER.findall(name)
    return int(numbers[1]) if len(numbers) > 1 else None


def _translate(name: str, table: Mapping[str, str]) -> str:
    numbers = _NUMBER.findall(name)
    pattern = _NUMBER.sub("{i}", name, count=1)
    pattern = _NUMBER.sub("{e}", pattern, count=1)
    if pattern not in table:
        number = numbers[0] if numbers else "0"
        close = did_you_mean(name, [row.replace("{i}", number).replace("{e}", "0") for row in table])
        raise WeightsError("no such weight", where=name, do=close)
    return table[pattern].replace("{i}", numbers[0]) if numbers else table[pattern]
