"""A model's shape as the config.json of a family, both ways.

Where this decoder has more than a family, the file has fields of ours: `internlm_context_length` beside dynamic
scaling, and the weights of experts' side losses.

Rotary positions have three forms:

    rope_theta, rope_scaling {rope_type, factor, …}     Transformers 4; `type` and `factor` alone are InternLM2's
    rope_parameters {rope_type, rope_theta, …}          Transformers 5
    rotary {base, type: origin | dynamic}               InternLM of 2023
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from internlm.errors import WeightsError
from internlm.log import warn_once
from internlm.model.config import (
    DynamicScaling,
    ExpertsConfig,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from internlm.model.rope import yarn_attention
from internlm.weights.families.table import EVERY_SCALING, FAMILIES, LLAMA_DEFAULTS, ExpertFields, Family, family_of
from internlm.weights.load import decoded

logger = logging.getLogger(__name__)

LAYER_KINDS = ("full_attention", "sliding_attention")
ROPE_KINDS = ("default", *EVERY_SCALING)


def describe(config: ModelConfig, name: str) -> dict[str, Any]:
    """Return the content of a config.json, without token ids and dtype, of a family that can express the shape."""
    family = family_of(name)
    # Transformers and InternLM measure dynamic scaling from `max_position_embeddings`.
    scaling = config.rope.scaling
    positions = scaling.original_length if isinstance(scaling, DynamicScaling) else config.context_length
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
        **_write_rope(config.rope, family),
        "use_cache": True,
    }
    if family.own_head_dim:
        fields["head_dim"] = config.head_dim
    for is_on, where in ((config.qkv_bias, family.qkv_bias), (config.output_bias, family.output_bias)):
        if isinstance(where, str):
            fields[where] = is_on or fields.get(where, False)
    if family.window != "never":
        fields["sliding_window"] = None
        if family.window != "always":
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


def read_config(fields: Any, path: Path) -> ModelConfig:
    """Return the shape that a config.json of this content describes.

    Raises:
        WeightsError: it is of a family that is not known, or has a part that this decoder has not.
    """
    if not isinstance(fields, dict):
        raise WeightsError("is no JSON object", where=path)
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise WeightsError("this model_type cannot be read", where=path, got=name, allowed=FAMILIES)
    family = FAMILIES[name]
    fields = LLAMA_DEFAULTS | dict(family.defaults) | fields
    _check_fields(fields, family, path)
    try:
        tree = _tree(fields, family, path)
    except KeyError as error:
        raise WeightsError(f"lacks {error}", where=path) from None
    return decoded(ModelConfig, tree, path)


def _check_fields(fields: dict[str, Any], family: Family, path: Path) -> None:
    """Raise WeightsError where a field that has one value here has another."""
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
    positions = fields["max_position_embeddings"]
    tree = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "head_dim": fields.get("head_dim") or 0,
        "ffn_size": fields["intermediate_size"],
        "context_length": _context(fields, family, fields.get("internlm_context_length", positions), path),
        "norm_eps": fields["rms_norm_eps"],
        "qkv_bias": _has(fields, family.qkv_bias),
        "output_bias": _has(fields, family.output_bias),
        "qk_norm": family.qk_norm,
        "tie_embeddings": bool(fields.get("tie_word_embeddings")),
        "rope": _read_rope(fields, family, path),
    }
    if family.experts is not None:
        tree |= {"ffn_size": fields[family.experts.size], "experts": _experts(fields, family.experts)}
    return tree


def _has(fields: dict[str, Any], where: str | bool) -> bool:
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
    if family.window in ("never", "always"):
        return family.window == "always"
    if not fields.get("use_sliding_window") or family.window == "asked":
        return bool(fields.get("use_sliding_window"))
    kinds = fields.get("layer_types")
    if kinds is None:
        first, layers = fields["max_window_layers"], fields["num_hidden_layers"]
        return not isinstance(first, int) or not isinstance(layers, int) or first < layers
    if not isinstance(kinds, list) or any(kind not in LAYER_KINDS for kind in kinds):
        raise WeightsError("layer_types are not all known", where=path, got=kinds, allowed=LAYER_KINDS)
    return "sliding_attention" in kinds


def _write_rope(rope: RopeConfig, family: Family) -> dict[str, Any]:
    scaling = rope.scaling
    if family.rope != "transformers":
        typed = None if scaling is None else {"type": scaling.kind, "factor": float(scaling.factor)}
        fields: dict[str, Any] = {"rope_theta": rope.base, "rope_scaling": typed}
        if family.rope == "rotary":
            fields["rotary"] = {"base": rope.base, "type": "origin"}
            if scaling is not None:
                fields["rotary"] |= {"type": scaling.kind, "scaling_factor": float(scaling.factor)}
        return fields
    found: dict[str, Any] = {} if scaling is None else {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if isinstance(scaling, YarnScaling | Llama3Scaling):
        found["original_max_position_embeddings"] = scaling.original_length
    if isinstance(scaling, YarnScaling):
        found |= {"beta_fast": float(scaling.beta_fast), "beta_slow": float(scaling.beta_slow)}
        if scaling.attention_factor is not None:
            found["attention_factor"] = float(scaling.attention_factor)
    if isinstance(scaling, Llama3Scaling):
        found["low_freq_factor"] = float(scaling.low_frequency_factor)
        found["high_freq_factor"] = float(scaling.high_frequency_factor)
    parameters = (found or {"rope_type": "default"}) | {"rope_theta": rope.base}
    return {"rope_theta": rope.base, "rope_scaling": found or None, "rope_parameters": parameters}


def _read_rope(fields: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Return the rotary positions, as a tree."""
    if family.rope != "rotary":
        return _read(fields, family, path)
    newer = _read(fields, family, path) if fields.keys() & {"rope_theta", "rope_scaling", "rope_parameters"} else None
    if newer is not None and fields.get("rotary") is None:
        return newer
    older = _read_rotary(fields.get("rotary", {"base": 10000.0, "type": "dynamic"}), fields, path)
    if newer is not None and newer != older:
        raise WeightsError("rotary and rope_theta, rope_scaling say different things", where=path, got=fields["rotary"])
    return older


def _read_rotary(rotary: Any, fields: dict[str, Any], path: Path) -> dict[str, Any]:
    if not isinstance(rotary, dict):
        raise WeightsError("rotary is no JSON object", where=path, got=rotary)
    kind, base = rotary.get("type", "origin"), rotary.get("base") or 10000.0
    if kind == "origin":
        return {"base": base}
    if kind != "dynamic":
        raise WeightsError("this rotary type cannot be read", where=path, got=kind, allowed=["origin", "dynamic"])
    factor, positions = rotary.get("scaling_factor", 1.0), fields["max_position_embeddings"]
    return {"base": base, "scaling": {"kind": "dynamic", "factor": factor, "original_length": positions}}


def _read(fields: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Return what `rope_theta` and `rope_scaling`, or `rope_parameters`, describe."""
    parts = {name: fields.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name in (name for name, part in parts.items() if not isinstance(part, dict)):
        raise WeightsError(f"{name} is no JSON object", where=path, got=parts[name])
    found = [_read_one(part, fields, family, path) for part in parts.values() if part]
    # Transformers takes rope_scaling alone where it is there: no matter, if all that the other says is the same base.
    if len(found) == 2 and found[1] not in (found[0], {"base": found[0]["base"]}):
        problem, advice = "rope_scaling and rope_parameters say different things", "Write all into rope_parameters."
        raise WeightsError(problem, where=path, got=parts, do=f"{advice} Then take rope_scaling out.")
    return found[0] if found else _read_one({}, fields, family, path)


def _read_one(found: dict[str, Any], fields: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Return what one of them describes, with what stands beside it."""
    usual, beside = family.defaults.get("rope_theta", 10000.0), fields.get("rope_theta")
    base = found.get("rope_theta") or beside or usual
    if beside not in (None, base, usual):
        raise WeightsError("there are two values of rope_theta", where=path, got=(base, beside), do="Take one out.")
    kind = found.get("rope_type", found.get("type", "default"))
    changed = [name for name, value in found.items() if isinstance(value, dict)]  # one for each kind of layer
    changed += [name for name in ("mscale", "mscale_all_dim") if kind != "yarn" and found.get(name) is not None]
    if found.get("truncate") not in (None, True):
        changed.append("truncate")
    if found.get("partial_rotary_factor", fields.get("partial_rotary_factor")) not in (None, 1.0):
        changed.append("partial_rotary_factor")
    if changed:
        raise WeightsError(f"rotary option {changed[0]} is not supported", where=path)
    if kind == "default":
        return {"base": base}
    if kind not in ROPE_KINDS:
        raise WeightsError("this rotary scaling cannot be read", where=path, got=kind, allowed=ROPE_KINDS)
    positions = fields["max_position_embeddings"]
    scaling = {"kind": kind, "factor": found["factor"]}
    name = "original_max_position_embeddings"
    original = fields.get(name) or found.get(name) or positions  # Transformers prefers the one outside too
    if kind != "linear":
        scaling["original_length"] = positions if kind == "dynamic" else original
    if kind == "yarn":
        scaling |= {
            "beta_fast": found.get("beta_fast") or 32.0,
            "beta_slow": found.get("beta_slow") or 1.0,
            "attention_factor": _attention_factor(found, path),
        }
    if kind == "llama3":
        scaling |= {
            "low_frequency_factor": found["low_freq_factor"],
            "high_frequency_factor": found["high_freq_factor"],
        }
    return {"base": base, "scaling": scaling}


def _attention_factor(found: dict[str, Any], path: Path) -> Any:
    """Return YaRN's scale on cos and sin where it is not the usual one: as it stands, or DeepSeek's ratio of two."""
    given, above, below = (found.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or (above is None and below is None):
        return given
    if above is None or below is None:
        raise WeightsError("mscale and mscale_all_dim count together only", where=path, do="Give both or neither.")
    try:
        factor = found["factor"]
        return yarn_attention(factor, above) / yarn_attention(factor, below) if above and below else None
    except (TypeError, ValueError, ArithmeticError) as error:
        problem = f"mscale and mscale_all_dim give no factor: {error}"
        raise WeightsError(problem, where=path, got=(above, below)) from None
