"""The families of Transformers, one row each: its config.json, its weights, and what it cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.weights.families.names import FUSED_EXPERTS, INTERNLM2, LLAMA, MIXTRAL, QWEN3, QWEN3_MOE, Names

EVERY_SCALING = ("linear", "dynamic", "yarn", "llama3")


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
    """What differs between families. Every other field of a config.json is that of Llama."""

    architecture: str
    names: tuple[Names, ...] = (LLAMA,)
    """Tables of weight names: the first is written, all are read."""
    qkv_bias: str | bool = False
    """Field that says whether wq, wk and wv have biases; or whether they always do."""
    output_bias: str | bool = False
    """The same of wo. Where both are one field, there are all biases or none."""
    qk_norm: bool = False
    experts: ExpertFields | None = None
    own_head_dim: bool = True
    """Whether heads may be wider or narrower than hidden size / heads."""
    hidden_is_multiple: bool = False
    """Whether Transformers insists that heads divide the hidden size, whatever head_dim is."""
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
    """What is meant by fields that a config.json lacks, where it is not what Llama means."""


_LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
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
"""By `model_type`. Those of InternLM are loaded by Transformers with code of their authors' only; engines know them."""


def default_of(family: Family, name: str) -> Any:
    """Return what a config.json means that lacks a field."""
    return family.defaults.get(name, _LLAMA_DEFAULTS.get(name))


def fitting(config: ModelConfig) -> str:
    """Return the plainest family, of those that Transformers loads without further code, for a shape."""
    if config.experts is not None:
        return "qwen3_moe" if config.qk_norm else "mixtral"
    return "qwen3" if config.qk_norm else "llama"


def family_of(name: str) -> Family:
    """Return a family by its `model_type`.

    Raises:
        WeightsError: there is no such family.
    """
    if name not in FAMILIES:
        raise WeightsError("no such family", where="family", got=name, allowed=FAMILIES)
    return FAMILIES[name]


def check(config: ModelConfig, name: str) -> None:
    """Check that a family can express a shape.

    Raises:
        WeightsError: it cannot; says which part, and which families can.
    """
    problem = _problem(config, family_of(name))
    if problem is not None:
        others = [other for other, family in FAMILIES.items() if _problem(config, family) is None]
        advice = f"Families that can hold this model: {', '.join(others)}." if others else "No family can hold it."
        raise WeightsError(f"the family {name} {problem}", where="model", do=advice)


def _problem(config: ModelConfig, family: Family) -> str | None:
    """Return the first part of a shape that a family cannot express."""
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
