"""A model's shape as the config.json of a family, both ways.

Where this decoder has more than a family, the file has fields of ours: `internlm_context_length` beside dynamic
scaling, whose `max_position_embeddings` is the trained length, and the weights of experts' side losses.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from internlm.config import decode
from internlm.errors import ConfigError, WeightsError
from internlm.log import warn_once
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.weights.families import rope_fields
from internlm.weights.families.table import FAMILIES, ExpertFields, Family, default_of, family_of

logger = logging.getLogger(__name__)

LAYER_KINDS = ("full_attention", "sliding_attention")


def describe(config: ModelConfig, name: str) -> dict[str, Any]:
    """Return the content of a config.json, without token ids and dtype.

    Args:
        config: a shape that the family can express (`family.check`).
        name: `model_type` of the family.
    """
    family = family_of(name)
    positions = rope_fields.length_of(config.rope, config.context_length)
    fields = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": config.norm_eps,
        **family.fixed,
        "tie_word_embeddings": config.tie_embeddings,
        **rope_fields.write(config.rope, family),
        "use_cache": True,
    }
    if family.own_head_dim:
        fields["head_dim"] = config.head_dim
    for is_on, where in ((config.qkv_bias, family.qkv_bias), (config.output_bias, family.output_bias)):
        if isinstance(where, str):
            fields[where] = is_on or fields.get(where, False)
    if family.window != "never":
        fields["sliding_window"] = None
    if family.window in ("asked", "layers"):
        fields["use_sliding_window"] = False
    if config.experts is not None and family.experts is not None:
        fields |= _expert_fields(config, config.experts, family.experts)
    if positions != config.context_length:
        fields["internlm_context_length"] = config.context_length
    return fields


def _expert_fields(config: ModelConfig, experts: ExpertsConfig, where: ExpertFields) -> dict[str, Any]:
    fields = {
        where.count: experts.count,
        where.size: config.ffn_size,
        "num_experts_per_tok": experts.per_token,
        # Theirs is k times ours when even, and a mean over layers where ours is a sum.
        "router_aux_loss_coef": experts.balance_loss * config.num_layers / experts.per_token,
        "internlm_balance_loss": experts.balance_loss,
        "internlm_router_z_loss": experts.z_loss,
        "output_router_logits": False,
    }
    if where.normalize is not None:
        fields[where.normalize] = experts.normalize
    return fields


def understand(fields: Any, path: Path) -> ModelConfig:
    """Return the shape that a config.json describes.

    Args:
        fields: its content.
        path: of the file, for errors.

    Raises:
        WeightsError: it is of a family that is not known, or has a part that this decoder has not.
    """
    if not isinstance(fields, dict):
        raise WeightsError("is no JSON object", where=path)
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise WeightsError("this model_type cannot be read", where=path, got=name, allowed=FAMILIES)
    family = FAMILIES[name]
    fields = dict(family.defaults) | fields
    _check_fields(fields, family, path)
    try:
        tree = _tree(fields, family, path)
    except KeyError as error:
        raise WeightsError(f"lacks {error}", where=path) from None
    try:
        return decode(ModelConfig, tree)
    except ConfigError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise WeightsError(f"describes no model: {problems}", where=path) from None


def _check_fields(fields: dict[str, Any], family: Family, path: Path) -> None:
    """Check the fields that have one value here.

    Raises:
        WeightsError: one has another.
    """
    switches = {"tie_word_embeddings", "use_sliding_window", family.qkv_bias, family.output_bias}
    for name in sorted(name for name in switches if isinstance(name, str)):
        if not isinstance(fields.get(name, False), bool | None):
            raise WeightsError(f"{name} is neither true nor false", where=path, got=fields[name])
    unknown = {name: fields.get(name) not in (None, value) for name, value in family.fixed.items()}
    unknown["hidden_act"] = fields.get("hidden_act", "silu") not in ("silu", "swish")
    unknown["quantization_config"] = bool(fields.get("quantization_config"))
    for name in (name for name, present in unknown.items() if present):
        raise WeightsError(f"{name} is not supported", where=path, got=fields[name])


def _tree(fields: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Return a model's configuration as a tree, not checked yet."""
    positions = fields.get("max_position_embeddings", default_of(family, "max_position_embeddings"))
    tree = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "head_dim": fields.get("head_dim") or 0,
        "ffn_size": fields["intermediate_size"],
        "context_length": _context(fields, family, fields.get("internlm_context_length", positions), path),
        "norm_eps": fields.get("rms_norm_eps", default_of(family, "rms_norm_eps")),
        "qkv_bias": _has(fields, family.qkv_bias),
        "output_bias": _has(fields, family.output_bias),
        "qk_norm": family.qk_norm,
        "tie_embeddings": bool(fields.get("tie_word_embeddings")),
        "rope": rope_fields.read(fields, family, path),
    }
    if family.experts is not None:
        tree |= {"ffn_size": fields[family.experts.size], "experts": _experts(fields, family.experts)}
    return tree


def _has(fields: dict[str, Any], where: str | bool) -> bool:
    """Return whether there is a part that a field says, or the family."""
    return bool(fields.get(where)) if isinstance(where, str) else where


def _experts(fields: dict[str, Any], where: ExpertFields) -> dict[str, Any]:
    # Transformers has two names for their number, and changed which one it writes.
    count = next((fields[n] for n in (where.count, "num_local_experts", "num_experts") if n in fields), None)
    if count is None:
        raise KeyError(where.count)
    per_token, layers = fields["num_experts_per_tok"], fields["num_hidden_layers"]
    balance = fields.get("internlm_balance_loss")
    if balance is None:
        balance = fields.get("router_aux_loss_coef", 0.001)
        if all(isinstance(value, int | float) for value in (balance, per_token, layers)) and layers:
            balance = balance * per_token / layers
    return {
        "count": count,
        "per_token": per_token,
        "normalize": where.normalize is None or bool(fields[where.normalize]),
        "balance_loss": balance,
        "z_loss": fields.get("internlm_router_z_loss", 0.001),
    }


def _context(fields: dict[str, Any], family: Family, context: Any, path: Path) -> Any:
    """Return the context, cut to a sliding window: up to there both are the same."""
    window = fields.get("sliding_window")
    if window is None or not _slides(fields, family, path):
        return context
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise WeightsError("sliding_window is no number of tokens", where=path, got=window)
    if not isinstance(context, int) or context <= window:
        return context
    warn_once(logger, f"{path}: attention has a window of {window} tokens there, none here: context is cut to it")
    return window


def _slides(fields: dict[str, Any], family: Family, path: Path) -> bool:
    """Return whether any layer looks through the sliding window."""
    if family.window == "never":
        return False
    if family.window == "always":
        return True
    if not fields.get("use_sliding_window"):
        return False
    kinds = fields.get("layer_types")
    if family.window == "asked":
        return True
    if kinds is None:
        first, layers = fields["max_window_layers"], fields["num_hidden_layers"]
        return not isinstance(first, int) or not isinstance(layers, int) or first < layers
    if not isinstance(kinds, list) or any(kind not in LAYER_KINDS for kind in kinds):
        raise WeightsError("layer_types are not all known", where=path, got=kinds, allowed=LAYER_KINDS)
    return "sliding_attention" in kinds
