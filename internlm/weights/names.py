"""Names of a model's weights here and in other formats, as tables.

    to_transformers("blocks.3.attention.wq.weight")                     # 'model.layers.3.self_attn.q_proj.weight'
    from_transformers("model.layers.3.self_attn.q_proj.weight")         # 'blocks.3.attention.wq.weight'

`{i}` in a row is the layer. Only names change: both sides keep rotary pairs in the half layout, so no matrix is
permuted.
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
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Ours → `LlamaForCausalLM` (also Mistral and Qwen2, which use the same names)."""

_BACK = {theirs: ours for ours, theirs in TRANSFORMERS.items()}
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def to_transformers(name: str) -> str:
    """Return the Transformers name of one of our weights.

    Raises:
        WeightsError: the model has no such weight.
    """
    return _translate(name, TRANSFORMERS)


def from_transformers(name: str) -> str:
    """Return our name of a Transformers weight.

    Raises:
        WeightsError: the table has no such weight.
    """
    return _translate(name, _BACK)


def _translate(name: str, table: Mapping[str, str]) -> str:
    layer = _LAYER.search(name)
    pattern = name if layer is None else f"{name[: layer.start()]}{{i}}{name[layer.end() :]}"
    if pattern not in table:
        number = layer[0] if layer else "0"
        close = did_you_mean(name, [row.replace("{i}", number) for row in table])
        raise WeightsError("no such weight", where=name, do=close)
    return table[pattern] if layer is None else table[pattern].replace("{i}", layer[0])
