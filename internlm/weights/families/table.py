"""The families of Transformers, one row each: names of weights, config.json, and what it cannot hold.

    to_transformers("blocks.3.attention.wq.weight")                     # 'model.layers.3.self_attn.q_proj.weight'
    from_transformers("model.layers.3.self_attn.q_proj.weight")         # (['blocks.3.attention.wq.weight'], None)

`{i}` in a name is the layer, `{e}` the expert: one stacked weight here is one per expert there. Where several rows name
the same weight there, it holds them all (see `translate`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from internlm.errors import WeightsError, did_you_mean
from internlm.model.config import ModelConfig

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
"""Experts as Transformers 5 has them in memory, and may save them."""
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
"""Those of `fitting`, but for Qwen3's experts."""

EVERY_SCALING = ("linear", "dynamic", "yarn", "llama3")

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class ExpertFields:
    """Where a config.json says how experts are."""

    count: str
    """Field of their number."""
    size: str = "intermediate_size"
    """Field of the inner width of one."""
    normalize: str | None = None
    """Field that says whether the weights of a token's experts sum to 1; None: they do."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between families; all else is as Llama has it."""

    architecture: str
    names: tuple[Names, ...] = (LLAMA,)
    """Of weights: the first is written, all are read."""
    qkv_bias: str | bool = False
    """Field that says whether wq, wk and wv have biases; or whether they always do."""
    output_bias: str | bool = False
    """The same of wo. Where both are one field, there are all biases or none."""
    qk_norm: bool = False
    experts: ExpertFields | None = None
    own_head_dim: bool = True
    """Whether heads may be wider or narrower than hidden size / heads."""
    hidden_is_multiple: bool = False
    """Whether heads must divide the hidden size, whatever head_dim is."""
    scalings: tuple[str, ...] = EVERY_SCALING
    """Rotary scalings that can be written."""
    rope: Literal["transformers", "typed", "rotary"] = "transformers"
    """How rotary fields are written: all that Transformers reads; `rope_scaling` of type and factor; also `rotary`."""
    window: Literal["never", "always", "asked", "layers"] = "never"
    """Where `sliding_window` counts: nowhere; in all layers; in all if `use_sliding_window`; then in those that
    `layer_types` or `max_window_layers` say."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that have one value that this decoder knows."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What is meant by fields that a config.json lacks."""


LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_MISTRAL_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        hidden_is_multiple=True,
        fixed={"mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        window="always",
        defaults=_MISTRAL_DEFAULTS | {"sliding_window": 4096},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        own_head_dim=False,
        window="layers",
        defaults=_QWEN_DEFAULTS | {"num_key_value_heads": 32},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        names=(MIXTRAL, FUSED_EXPERTS),
        experts=ExpertFields("num_local_experts"),
        window="always",
        defaults=_MISTRAL_DEFAULTS | {"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        names=(QWEN3,),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        window="layers",
        defaults=_QWEN_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        names=(QWEN3_MOE, FUSED_EXPERTS),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        experts=ExpertFields("num_experts", "moe_intermediate_size", "norm_topk_prob"),
        window="asked",
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
        defaults=_QWEN_DEFAULTS | {"num_key_value_heads": 4, "norm_topk_prob": False},
    ),
    "internlm": Family(
        architecture="InternLMForCausalLM",
        qkv_bias="bias",
        output_bias="bias",
        own_head_dim=False,
        scalings=("dynamic",),
        rope="rotary",
        defaults={
            "vocab_size": 103168,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "bias": True,
        },
    ),
    "internlm2": Family(
        architecture="InternLM2ForCausalLM",
        names=(INTERNLM2,),
        qkv_bias="bias",
        output_bias="bias",
        own_head_dim=False,
        scalings=("linear", "dynamic"),
        rope="typed",
        defaults={"bias": True},
    ),
    "internlm3": Family(
        architecture="InternLM3ForCausalLM",
        qkv_bias="qkv_bias",
        fixed={"bias": False},  # it puts biases on wo, and on the feed-forward too
        defaults={"max_position_embeddings": 32768},
    ),
}
"""By `model_type`. Those of InternLM are loaded by Transformers with code of their authors' only."""


def fitting(config: ModelConfig) -> str:
    """Return the plainest family, of those that Transformers loads without further code, for a shape."""
    if config.experts is not None:
        return "qwen3_moe" if config.qk_norm else "mixtral"
    return "qwen3" if config.qk_norm else "llama"


def family_of(name: str) -> Family:
    """Return a family by its `model_type`; raise WeightsError where there is none."""
    if name not in FAMILIES:
        raise WeightsError("no such family", where="family", got=name, allowed=FAMILIES)
    return FAMILIES[name]


def check(config: ModelConfig, name: str) -> None:
    """Raise WeightsError where a family cannot express a shape: which part, and which families can."""
    problem = _problem(config, family_of(name))
    if problem is not None:
        others = [other for other, family in FAMILIES.items() if _problem(config, family) is None]
        advice = f"Families that can hold this model: {', '.join(others)}." if others else "No family can hold it."
        raise WeightsError(f"the family {name} {problem}", where="model", do=advice)


def _problem(config: ModelConfig, family: Family) -> str | None:
    scaling, experts, fields = config.rope.scaling, config.experts, family.experts
    shares = experts is not None and not experts.normalize and fields is not None and fields.normalize is None
    narrow = config.head_dim * config.num_heads != config.hidden_size and not family.own_head_dim
    odd = config.hidden_size % config.num_heads != 0 and family.hidden_is_multiple
    problems = {
        "has no biases on wq, wk and wv (qkv_bias)": config.qkv_bias and family.qkv_bias is False,
        "has no bias on wo (output_bias)": config.output_bias and family.output_bias is False,
        "has no norms of queries and keys (qk_norm)": config.qk_norm and not family.qk_norm,
        "always has norms of queries and keys (qk_norm)": family.qk_norm and not config.qk_norm,
        "has no experts (experts)": experts is not None and fields is None,
        "always has experts (experts)": experts is None and fields is not None,
        "lets the weights of a token's experts sum to 1 (experts.normalize)": shares,
        f"has heads of hidden_size / num_heads only (head_dim {config.head_dim})": narrow,
        f"is loaded only where hidden_size {config.hidden_size} is a multiple of num_heads {config.num_heads}": odd,
        f"has no such rotary scaling (rope.scaling {scaling and scaling.kind})": scaling is not None
        and scaling.kind not in family.scalings,
    }
    return next((problem for problem, is_there in problems.items() if is_there), None)


def is_stacked(name: str) -> bool:
    """Return whether one of our weights holds a matrix of every expert."""
    return ".experts." in name


def to_transformers(name: str, names: Names = TRANSFORMERS, where: object = None) -> str:
    """Return the name there of one of our weights; of a stacked one with `{e}` in it.

    Raises:
        WeightsError: the table has no such weight; `where` is the file that it is in.
    """
    pattern, numbers = _pattern(name)
    if pattern not in names:
        raise _unknown(name, names, numbers, where)
    return _filled(names[pattern], numbers)


def from_transformers(name: str, *tables: Names) -> tuple[list[str], int | None]:
    """Return our names of a weight there, several where it holds several of ours, and the expert that it is of.

    Raises:
        WeightsError: none of the tables (none: `TRANSFORMERS`) has such a weight.
    """
    tables = tables or (TRANSFORMERS,)
    pattern, numbers = _pattern(name)
    for table in tables:
        if found := [ours for ours, theirs in table.items() if theirs == pattern]:
            return [_filled(ours, numbers[:1]) for ours in found], int(numbers[1]) if len(numbers) > 1 else None
    raise _unknown(name, [theirs for table in tables for theirs in table.values()], numbers)


def _pattern(name: str) -> tuple[str, list[str]]:
    """Return a name with {i} and {e} for its first numbers, and the numbers."""
    pattern = _NUMBER.sub("{i}", name, count=1)
    return _NUMBER.sub("{e}", pattern, count=1), _NUMBER.findall(name)


def _filled(pattern: str, numbers: list[str]) -> str:
    for hole, number in zip(("{i}", "{e}"), numbers, strict=False):
        pattern = pattern.replace(hole, number)
    return pattern


def _unknown(name: str, known: Iterable[str], numbers: list[str], where: object = None) -> WeightsError:
    close = did_you_mean(name, [_filled(row, [*numbers, "0", "0"][:2]) for row in known])
    return WeightsError("no such weight", where=name if where is None else f"{where}: {name}", do=close)
