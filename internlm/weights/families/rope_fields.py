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
from internlm.model.rope import yarn_attention
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
    """Return what one of `rope_scaling` and `rope_parameters` describes, with what stands beside them, as a tree."""
    usual, beside = default_of(family, "rope_theta"), fields.get("rope_theta")
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
    if kind not in KINDS:
        raise WeightsError("this rotary scaling cannot be read", where=path, got=kind, allowed=KINDS)
    positions = fields.get("max_position_embeddings", default_of(family, "max_position_embeddings"))
    scaling = {"kind": kind, "factor": found["factor"]}
    if kind == "dynamic":
        return {"base": base, "scaling": scaling | {"original_length": positions}}
    name = "original_max_position_embeddings"
    original = fields.get(name) or found.get(name) or positions  # Transformers prefers the one outside too
    return {"base": base, "scaling": scaling | _options(kind, found, original, path)}


def _options(kind: str, found: dict[str, Any], original: Any, path: Path) -> dict[str, Any]:
    """Return what belongs to one kind of scaling."""
    if kind == "yarn":
        return {
            "original_length": original,
            "beta_fast": found.get("beta_fast") or 32.0,
            "beta_slow": found.get("beta_slow") or 1.0,
            "attention_factor": _attention_factor(found, path),
        }
    if kind == "llama3":
        return {
            "original_length": original,
            "low_frequency_factor": found["low_freq_factor"],
            "high_frequency_factor": found["high_freq_factor"],
        }
    return {}


def _attention_factor(found: dict[str, Any], path: Path) -> Any:
    """Return YaRN's scale on cos and sin where it is not the usual one: as it stands, or DeepSeek's ratio of two.

    Raises:
        WeightsError: only one of the two is there, or they have no ratio.
    """
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
