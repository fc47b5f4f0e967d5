"""Rotary positions as the fields of a config.json, both ways, in the forms that there are.

rope_theta, rope_scaling {rope_type, factor, …}     Transformers 4; `type` and `factor` alone are InternLM2's
rope_parameters {rope_type, rope_theta, …}          Transformers 5
rotary {base, type: origin | dynamic}               InternLM of 2023
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internlm.errors import WeightsError
from internlm.model.config import DynamicScaling, Llama3Scaling, RopeConfig, Scaling, YarnScaling
from internlm.weights.families.table import Family, default_of

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def write(rope: RopeConfig, family: Family) -> dict[str, Any]:
    """Return the rotary fields of a config.json; a scaling must be one of the family's."""
    scaling = rope.scaling
    if family.rope == "transformers":
        found = _scaling_fields(scaling)
        parameters = {**(found or {"rope_type": "default"}), "rope_theta": rope.base}
        return {"rope_theta": rope.base, "rope_scaling": found, "rope_parameters": parameters}
    typed = None if scaling is None else {"type": scaling.kind, "factor": float(scaling.factor)}
    fields: dict[str, Any] = {"rope_theta": rope.base, "rope_scaling": typed}
    if family.rope == "rotary":
        fields["rotary"] = {"base": rope.base, "type": "origin"}
        if scaling is not None:
            fields["rotary"] |= {"type": scaling.kind, "scaling_factor": float(scaling.factor)}
    return fields


def read(fields: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Return the rotary positions that a config.json describes, as a tree.

    Args:
        fields: its content.
        family: of its `model_type`.
        path: of the file, for errors.

    Raises:
        WeightsError: it has something that this decoder has not, or says two things at once.
    """
    if family.rope != "rotary":
        return _read(fields, family, path)
    newer = _read(fields, family, path) if fields.keys() & {"rope_theta", "rope_scaling", "rope_parameters"} else None
    if newer is not None and fields.get("rotary") is None:
        return newer
    older = _read_rotary(fields.get("rotary", {"base": 10000.0, "type": "dynamic"}), fields, family, path)
    if newer is not None and newer != older:
        raise WeightsError("rotary and rope_theta, rope_scaling say different things", where=path, got=fields["rotary"])
    return older


def _scaling_fields(scaling: Scaling | None) -> dict[str, Any] | None:
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


def length_of(rope: RopeConfig, context_length: int) -> int:
    """Return `max_position_embeddings`: Transformers and InternLM measure dynamic scaling from it."""
    return rope.scaling.original_length if isinstance(rope.scaling, DynamicScaling) else context_length


def _read_rotary(rotary: Any, fields: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Return what `rotary` describes, as a tree."""
    if not isinstance(rotary, dict):
        raise WeightsError("rotary is no JSON object", where=path, got=rotary)
    kind, base = rotary.get("type", "origin"), rotary.get("base") or 10000.0
    if kind == "origin":
        return {"base": base}
    if kind != "dynamic":
        raise WeightsError("this rotary type cannot be read", where=path, got=kind, allowed=["origin", "dynamic"])
    positions = fields.get("max_position_embeddings", default_of(family, "max_position_embeddings"))
    factor = rotary.get("scaling_factor", 1.0)
    return {"base": base, "scaling": {"kind": "dynamic", "factor": factor, "original_length": positions}}


def _read(fields: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Return what `rope_theta` and `rope_scaling`, or `rope_parameters`, describe, as a tree."""
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        part = fields.get(name) or {}
        if not isinstance(part, dict):
            raise WeightsError(f"{name} is no JSON object", where=path, got=part)
        found |= part
    base = found.get("rope_theta") or fields.get("rope_theta") or default_of(family, "rope_theta")
    kind = found.get("rope_type", found.get("type", "default"))
    changed = [name for name in ("mscale", "mscale_all_dim", "truncate") if found.get(name) not in (None, True)]
    if found.get("partial_rotary_factor", fields.get("partial_rotary_factor")) not in (None, 1.0):
        changed.append("partial_rotary_factor")
    if changed:
        raise WeightsError(f"rotary option {changed[0]} is not supported", where=path)
    if kind == "default":
        return {"base": base}
    if kind not in KINDS:
        raise WeightsError("this rotary scaling cannot be read", where=path, got=kind, allowed=KINDS)
    positions = fields.get("max_position_embeddings", default_of(family, "max_position_embeddings"))
    return {"base": base, "scaling": {"kind": kind, "factor": found["factor"], **_options(kind, found, positions)}}


def _options(kind: str, found: dict[str, Any], positions: Any) -> dict[str, Any]:
    """Return what belongs to one kind of scaling."""
    original = found.get("original_max_position_embeddings") or positions
    if kind == "dynamic":
        return {"original_length": positions}
    if kind == "yarn":
        return {
            "original_length": original,
            "beta_fast": found.get("beta_fast") or 32.0,
            "beta_slow": found.get("beta_slow") or 1.0,
            "attention_factor": found.get("attention_factor"),
        }
    if kind == "llama3":
        return {
            "original_length": original,
            "low_frequency_factor": found["low_freq_factor"],
            "high_frequency_factor": found["high_freq_factor"],
        }
    return {}
