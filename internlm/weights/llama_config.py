"""A model's shape as the config.json of Transformers' Llama, or with experts of its Mixtral, both ways.

The rotary fields are written in two forms: `rope_theta` and `rope_scaling` for Transformers 4, `rope_parameters` as
Transformers 5 writes them. All forms are read, and those of Mistral and Qwen2, which are Llamas with other switches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internlm.config import decode
from internlm.errors import ConfigError, WeightsError
from internlm.model.config import DynamicScaling, ExpertsConfig, Llama3Scaling, ModelConfig, Scaling, YarnScaling

FAMILIES = ("llama", "mistral", "qwen2", "mixtral")
"""`model_type` of the configs that can be read."""


def to_llama(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a LlamaConfig, or of a MixtralConfig, without token ids and dtype.

    Raises:
        WeightsError: Transformers refuses the shape.
    """
    if config.hidden_size % config.num_heads:
        raise WeightsError(
            f"Transformers loads no Llama whose hidden size {config.hidden_size} is not a multiple of its "
            f"{config.num_heads} heads",
            where="model",
        )
    scaling = config.rope.scaling
    positions = scaling.original_length if isinstance(scaling, DynamicScaling) else config.context_length
    rope = _rope_fields(scaling)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias or config.output_bias,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.base,
        "rope_scaling": rope,
        "rope_parameters": {**(rope or {"rope_type": "default"}), "rope_theta": config.rope.base},
        "use_cache": True,
    }
    if config.experts is not None:
        fields |= _expert_fields(config, config.experts)
    if positions != config.context_length:
        fields["internlm_context_length"] = config.context_length
    return fields


def _expert_fields(config: ModelConfig, experts: ExpertsConfig) -> dict[str, Any]:
    """Return what makes a Mixtral of a Llama.

    Raises:
        WeightsError: Mixtral has no such mixture.
    """
    missing = {
        "qkv_bias": config.qkv_bias,
        "output_bias": config.output_bias,
        "experts.normalize": not experts.normalize,
    }
    for name in (name for name, is_missing in missing.items() if is_missing):
        raise WeightsError(
            "experts are written as Transformers' Mixtral, which has them without attention biases and with weights "
            "that sum to 1",
            where=f"model.{name}",
        )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        # Theirs is k times ours when even, and a mean over layers where ours is a sum.
        "router_aux_loss_coef": experts.balance_loss * config.num_layers / experts.per_token,
        "internlm_balance_loss": experts.balance_loss,
        "internlm_router_z_loss": experts.z_loss,
        "output_router_logits": False,
        "sliding_window": None,
    }


def from_llama(fields: Any, path: Path) -> ModelConfig:
    """Return the shape that a config.json describes.

    Args:
        fields: its content.
        path: of the file, for errors.

    Raises:
        WeightsError: it is of another family, or has a part that this decoder has not.
    """
    if not isinstance(fields, dict):
        raise WeightsError("is no JSON object", where=path)
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise WeightsError("this model_type cannot be read", where=path, got=family, allowed=FAMILIES)
    sliding = fields.get("sliding_window") and fields.get("use_sliding_window", family in ("mistral", "mixtral"))
    unknown = {
        "hidden_act": fields.get("hidden_act", "silu") not in ("silu", "swish"),
        "mlp_bias": bool(fields.get("mlp_bias")),
        "sliding_window": bool(sliding),
        "quantization_config": bool(fields.get("quantization_config")),
    }
    for name in (name for name, present in unknown.items() if present):
        raise WeightsError(f"{name} is not supported", where=path, got=fields[name])
    bias = bool(fields.get("attention_bias"))
    try:
        positions = fields.get("max_position_embeddings", 2048)
        tree = {
            "vocab_size": fields["vocab_size"],
            "hidden_size": fields["hidden_size"],
            "num_layers": fields["num_hidden_layers"],
            "num_heads": fields["num_attention_heads"],
            "num_kv_heads": fields.get("num_key_value_heads") or fields["num_attention_heads"],
            "head_dim": fields.get("head_dim") or 0,
            "ffn_size": fields["intermediate_size"],
            "context_length": fields.get("internlm_context_length", positions),
            "norm_eps": fields.get("rms_norm_eps", 1e-6),
            "qkv_bias": bias or family == "qwen2",
            "output_bias": bias and family == "llama",
            "tie_embeddings": bool(fields.get("tie_word_embeddings")),
            "rope": _rope(fields, positions, path),
        }
        if family == "mixtral":
            per_token, layers = fields["num_experts_per_tok"], fields["num_hidden_layers"]
            theirs = fields.get("router_aux_loss_coef", 0.001) * per_token / layers
            tree["experts"] = {
                "count": fields["num_local_experts"],
                "per_token": fields["num_experts_per_tok"],
                "balance_loss": fields.get("internlm_balance_loss", theirs),
                "z_loss": fields.get("internlm_router_z_loss", 0.001),
            }
    except KeyError as error:
        raise WeightsError(f"lacks {error}", where=path) from None
    try:
        return decode(ModelConfig, tree)
    except ConfigError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise WeightsError(f"describes no model: {problems}", where=path) from None


def _rope_fields(scaling: Scaling | None) -> dict[str, Any] | None:
    """Return `rope_scaling` as Transformers writes it."""
    if scaling is None:
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if isinstance(scaling, YarnScaling | Llama3Scaling):
        fields["original_max_position_embeddings"] = scaling.original_length
    if isinstance(scaling, YarnScaling):
        fields |= {"beta_fast": float(scaling.beta_fast), "beta_slow": float(scaling.beta_slow)}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = float(scaling.attention_factor)
    if isinstance(scaling, Llama3Scaling):
        fields["low_freq_factor"] = float(scaling.low_frequency_factor)
        fields["high_freq_factor"] = float(scaling.high_frequency_factor)
    return fields


def _rope(fields: dict[str, Any], positions: Any, path: Path) -> dict[str, Any]:
    """Return the rotary positions that a config.json describes, in the old form or the new, as a tree."""
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        part = fields.get(name) or {}
        if not isinstance(part, dict):
            raise WeightsError(f"{name} is no JSON object", where=path, got=part)
        found |= part
    base = found.get("rope_theta") or fields.get("rope_theta") or 10000.0
    kind = found.get("rope_type", found.get("type", "default"))
    changed = [name for name in ("mscale", "mscale_all_dim", "truncate") if found.get(name) not in (None, True)]
    if found.get("partial_rotary_factor", fields.get("partial_rotary_factor")) not in (None, 1.0):
        changed.append("partial_rotary_factor")
    if changed:
        raise WeightsError(f"rotary option {changed[0]} is not supported", where=path)
    original = found.get("original_max_position_embeddings") or positions
    if kind == "default":
        return {"base": base}
    if kind == "linear":
        options = {}
    elif kind == "dynamic":
        options = {"original_length": positions}
    elif kind == "yarn":
        options = {
            "original_length": original,
            "beta_fast": found.get("beta_fast") or 32.0,
            "beta_slow": found.get("beta_slow") or 1.0,
            "attention_factor": found.get("attention_factor"),
        }
    elif kind == "llama3":
        options = {
            "original_length": original,
            "low_frequency_factor": found["low_freq_factor"],
            "high_frequency_factor": found["high_freq_factor"],
        }
    else:
        allowed = ["default", "linear", "dynamic", "yarn", "llama3"]
        raise WeightsError("this rotary scaling cannot be read", where=path, got=kind, allowed=allowed)
    return {"base": base, "scaling": {"kind": kind, "factor": found["factor"], **options}}
