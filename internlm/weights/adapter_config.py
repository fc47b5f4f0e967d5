"""The adapter_config.json of PEFT, both ways: which layers an adapter changes, with which rank and alpha.

    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.…": 4}}

Layers go by their names in Transformers there. A target is a name's end, or one regular expression of whole names; a
pattern of `rank_pattern` and `alpha_pattern` is a regular expression of a name's end, of which the first that fits
counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from internlm import disk
from internlm.errors import WeightsError, did_you_mean
from internlm.model import lora
from internlm.model.config import ModelConfig
from internlm.model.lora import ALL_LINEAR, LoraConfig
from internlm.weights.families.table import TRANSFORMERS, Names, to_transformers
from internlm.weights.load import decoded

logger = logging.getLogger(__name__)

FILE = "adapter_config.json"
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings with which an adapter computes, or trains, something else."""
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`: those that leave the base as it was. PiSSA, OLoRA, CorDA … change it when training begins."""
_KNOWN = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("target_modules", "use_dora", "use_rslora"),
    # Without effect here:
    *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode"),
    *("loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "task_type"),
}
V = TypeVar("V")


def theirs(layer: str, names: Names = TRANSFORMERS) -> str:
    """Return the name there of one of our layers."""
    return to_transformers(f"{layer}.weight", names).removesuffix(".weight")


def load(path: Path) -> dict[str, Any]:
    """Return the content of an adapter_config.json.

    Raises:
        WeightsError: it cannot be read, or the adapter is of a kind that is not known.
    """
    if not path.exists():
        raise WeightsError("cannot be read: there is no such file", where=path)
    fields = disk.read_json(path, WeightsError)
    if fields.get("peft_type") != "LORA":
        raise WeightsError(
            "adapters of this kind cannot be read", where=f"{path}: peft_type", got=fields.get("peft_type"),
            allowed=["LORA (and with it rsLoRA and DoRA)"],
        )  # fmt: skip
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise WeightsError(f"{name} is not supported", where=path, got=fields[name])
    if fields.get("bias", "none") != "none":
        raise WeightsError("biases that were trained along cannot be read", where=f"{path}: bias", got=fields["bias"])
    if fields.get("init_lora_weights", True) not in _STARTS:
        raise WeightsError(
            "an adapter that began like this belongs to a base that was changed then",
            where=f"{path}: init_lora_weights", got=fields["init_lora_weights"], allowed=_STARTS[1:],
            do="Save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain adapter of it.",
        )  # fmt: skip
    for name in sorted(fields.keys() - _KNOWN - set(_UNSUPPORTED)):
        if fields[name]:
            logger.warning("warning: %s: the setting %s is not known here and passed over", path, name)
    return fields


def read(fields: dict[str, Any], path: Path, model: ModelConfig, names: Names) -> LoraConfig:
    """Return the adapter that an adapter_config.json describes.

    Args:
        fields: its content, from `load`.
        path: of the file.
        model: shape of the base.
        names: the base's, in which several of our layers may be one.

    Raises:
        WeightsError: it names layers that the base has not, or its values mean nothing.
    """
    layers = {layer: theirs(layer, names) for layer in lora.linear_layers(model)}
    tables = [theirs(table, names) for table in ("embedding", "head")]
    is_target = _target(fields, list(layers.values()), tables, path)
    targets = {layer: name for layer, name in layers.items() if is_target(name)}
    if not targets:
        raise WeightsError("targets no linear layer of the base", where=path, got=fields.get("target_modules"))
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    ranks = {layer: _first(fields, "rank_pattern", name, rank, path) for layer, name in targets.items()}
    alphas = {layer: _first(fields, "alpha_pattern", name, alpha, path) for layer, name in targets.items()}
    tree = {
        "rank": rank,
        "alpha": alpha,
        "rank_stabilized": bool(fields.get("use_rslora")),
        "dora": bool(fields.get("use_dora")),
        "dropout": fields.get("lora_dropout", 0.0),
        "targets": list(_compact(dict.fromkeys(targets, True), layers, _ours_short, str)),
        "ranks": _without(_compact(ranks, targets, _ours_short, str), rank),
        "alphas": _without(_compact(alphas, targets, _ours_short, str), alpha),
    }
    return decoded(LoraConfig, tree, path, "adapter")


def write(config: LoraConfig, model: ModelConfig, saved: Iterable[str], base: str | None) -> dict[str, Any]:
    """Return the content of an adapter_config.json; `saved`: their names of modules that are kept whole.

    Raises:
        ConfigError: the adapter's targets are no layers of the base.
    """
    targets, all_layers = lora.updates(config, model), lora.linear_layers(model)
    ranks = {layer: update.rank for layer, update in targets.items()}
    alphas = {layer: _number(update.alpha) for layer, update in targets.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": list(_compact(dict.fromkeys(targets, True), all_layers, _their_short, theirs)),
        "rank_pattern": _without(_compact(ranks, targets, _their_short, theirs), config.rank),
        "alpha_pattern": _without(_compact(alphas, targets, _their_short, theirs), config.alpha),
        "use_rslora": config.rank_stabilized,
        "use_dora": config.dora,
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target(fields: dict[str, Any], layers: list[str], tables: list[str], path: Path) -> Callable[[str], bool]:
    """Return the function that says whether one of `layers`, by its name there, is a target; `tables` cannot be."""
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules") or []
    is_named, is_excluded = _matcher(targets, path), _matcher(excluded, path)
    if not targets:
        raise WeightsError("names no targets", where=f"{path}: target_modules", got=targets)
    allowed = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    for target in [targets] if isinstance(targets, str) else targets:
        one = _matcher(targets if isinstance(targets, str) else [target], path)
        refused = [name for name in tables if targets != ALL_LINEAR and one(name) and not is_excluded(name)]
        if not refused and any(map(one, layers)):
            continue
        what = "fits no linear layer of the base outside of experts"
        if refused:
            what = f"fits {refused[0]}, which can have no adapter here"
        close = None if refused else did_you_mean(target, allowed)
        raise WeightsError(what, where=f"{path}: target_modules", got=target, allowed=allowed, do=close)
    numbers = fields.get("layers_to_transform")
    numbers = [numbers] if isinstance(numbers, int) else numbers
    if numbers and fields.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        raise WeightsError("is not supported", where=f"{path}: layers_pattern", got=fields["layers_pattern"])

    def is_target(name: str) -> bool:
        is_here = not numbers or isinstance(targets, str) or int(name.split(".")[2]) in numbers
        return is_named(name) and not is_excluded(name) and is_here

    return is_target


def _matcher(targets: Any, path: Path) -> Callable[[str], bool]:
    """Return PEFT's rule: one regular expression of whole names, or a list of names and ends of names."""
    if targets == ALL_LINEAR:
        return lambda name: True
    if isinstance(targets, str):
        rule = _regex(targets, path)
        return lambda name: rule.fullmatch(name) is not None
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise WeightsError("is neither a text nor a list of texts", where=f"{path}: target_modules", got=targets)
    ends = tuple(f".{target}" for target in targets or ())
    return lambda name: f".{name}".endswith(ends)


def _first(fields: dict[str, Any], key: str, name: str, default: V, path: Path) -> V:
    patterns = fields.get(key) or {}
    if not isinstance(patterns, dict):
        raise WeightsError("is no JSON object", where=f"{path}: {key}", got=patterns)
    for pattern, value in patterns.items():
        if _regex(rf"(.*\.)?({pattern})$", path).match(name):
            return value
    return default


def _regex(pattern: str, path: Path) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise WeightsError(f"is no regular expression: {error}", where=path, got=pattern) from None


def _compact(
    values: Mapping[str, V], layers: Iterable[str], short: Callable[[str], str], full: Callable[[str], str]
) -> dict[str, V]:
    """Return values by as few names as possible: `short` ones, without a number, where all `layers` agree."""
    places: dict[str, list[str]] = {}
    for layer in layers:
        places.setdefault(short(layer), []).append(layer)
    found: dict[str, V] = {}
    for place, members in places.items():
        if all(layer in values for layer in members) and len({values[layer] for layer in members}) == 1:
            found[place] = values[members[0]]
        else:
            found |= {full(layer): values[layer] for layer in members if layer in values}
    return found


def _ours_short(layer: str) -> str:
    return f"blocks.*.{layer.split('.', 2)[2]}"


def _their_short(layer: str) -> str:
    return theirs(layer).rpartition(".")[2]


def _without(values: Mapping[str, V], default: object) -> dict[str, V]:
    return {name: value for name, value in values.items() if value != default}


def _number(value: float) -> float:
    return int(value) if value == int(value) else value  # PEFT's alpha is whole
