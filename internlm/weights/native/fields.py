"""The shape of a model of InternLM v0.2 or InternEvo: from model_config.pt, the weights themselves, and the user.

    config, reading = describe(parts, {"num_attention_heads": 32, "layer_norm_epsilon": 1e-5, …}, {"w2": "up"}, folder)

Sizes are those of the weights. What they cannot say (heads, epsilon, rotary base) comes from model_config.pt. Without
that file the user says how many heads there are and how rotary pairs lie; epsilon and base are the framework's
defaults, with a warning.
"""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from internlm.errors import WeightsError, did_you_mean
from internlm.model.config import ModelConfig
from internlm.weights.load import decoded
from internlm.weights.native.merge import Parts, Reading

logger = logging.getLogger(__name__)

CONFIG = "model_config.pt"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


_YES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
OVERRIDES: dict[str, tuple[Callable[[str], Any], str]] = {
    "num_heads": (int, "query heads"),
    "norm_eps": (_positive, "added to the mean square in RMSNorm"),
    "rope_base": (_positive, "base of the rotary positions"),
    "context_length": (int, "longest text trained for, in tokens"),
    "rotary": ({"half": "half", "interleaved": "interleaved"}.__getitem__, "half or interleaved (adapt_hf is false)"),
    "w2": ({"up": "up", "down": "down"}.__getitem__, "what w2 is: up (v0.2) or down (InternEvo since March 2024)"),
    "unfinished": (lambda text: _YES[text.lower()], "true: read a checkpoint without the mark of completeness"),
}
"""What a user may say about a checkpoint: how to read the value, and what it means."""

_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "norm_type": (lambda value: str(value).lower() != "rmsnorm", "its norms are no RMSNorm"),
    "use_swiglu": (lambda value: not value, "its feed-forward is not gated (use_swiglu)"),
    "is_reward": (bool, "it is a reward model"),
    "norm_head": (bool, "its head is normalised (norm_head)"),
    "num_experts": (lambda value: value > 1, "it has a mixture of experts"),
    "deepnorm": (bool, "it has deepnorm"),
}
"""Fields of model_config.pt: when this decoder cannot express them, and why."""
_NUMBERS = (
    *("num_attention_heads", "num_kv_attention_heads", "hidden_size", "num_layers", "vocab_size", "num_experts"),
    *("layer_norm_epsilon", "rope_base", "max_position_embeddings"),
)


def settings(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a user said, as values; raise WeightsError for unknown names and values."""
    said = {}
    for name, value in (overrides or {}).items():
        if name not in OVERRIDES:
            raise WeightsError("cannot be set", where=name, allowed=OVERRIDES, do=did_you_mean(name, OVERRIDES))
        cast, meaning = OVERRIDES[name]
        try:
            said[name] = cast(str(value))
        except (ValueError, KeyError):
            raise WeightsError(f"has no such value ({meaning})", where=name, got=value) from None
    return said


def describe(
    parts: Parts, stored: Mapping[str, Any] | None, said: Mapping[str, Any], folder: Path, *, weight_parallel: bool
) -> tuple[ModelConfig, Reading]:
    """Return the shape of a model, and how its weights are to be read.

    Args:
        parts: its weights.
        stored: content of model_config.pt; None: there is none.
        said: what the user says, from `settings`; it goes before the rest.
        folder: for errors.
        weight_parallel: whether blocks are cut over weight ranks.

    Raises:
        WeightsError: something must be said, contradicts the weights, or cannot be expressed.
    """
    known = _known(stored or {}, folder)
    of_block = ("blocks.0.feed_forward.w1.weight", "blocks.0.attention.wo.weight")
    for needed in ("embedding.weight", "norm.weight", "head.weight", *of_block):
        if needed not in parts:
            raise WeightsError(f"is not whole: no {needed} in any file", where=folder, do="Copy it again.")
        if any(len(part.shape) != (1 if needed == "norm.weight" else 2) for part in parts[needed]):
            raise WeightsError(f"{needed} has another form than in the old framework", where=folder)
    hidden = parts["norm.weight"][0].shape[0]
    output = parts["blocks.0.attention.wo.weight"]
    if sum(part.shape[0 if weight_parallel else 1] for part in output) != hidden:
        raise WeightsError("is not whole: files of the last ranks are missing", where=folder, do="Copy it again.")
    reading = _reading(parts, known if stored is not None else None, said, folder, weight_parallel)
    heads = _heads(said.get("num_heads", known.get("num_attention_heads")), hidden, folder)
    for name, default in (("norm_eps", 1e-5), ("rope_base", 10000.0)):
        if stored is None and name not in said:
            logger.warning(
                "warning: %s has no model_config.pt: %s is taken to be %s, as in v0.2", folder, name, default
            )
    embedding = parts["embedding.weight"]
    is_by_rows = embedding[0].shape[1] == hidden
    tree: dict[str, Any] = {
        "vocab_size": sum(part.shape[0] for part in (embedding if is_by_rows else embedding[:1])),
        "hidden_size": hidden,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in parts if name.startswith("blocks.")),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(parts, hidden // heads, heads),
        "ffn_size": sum(part.shape[0] for part in parts["blocks.0.feed_forward.w1.weight"]),
        "norm_eps": said.get("norm_eps", known.get("layer_norm_epsilon", 1e-5)),
        "qkv_bias": any(f"blocks.0.attention.{name}.bias" in parts for name in ("three", "wqkv", "wq")),
        "output_bias": "blocks.0.attention.wo.bias" in parts,
    }
    _compare(tree, known, folder)
    trained = known.get("max_position_embeddings", 2048)
    tree["context_length"] = said.get("context_length", trained)
    tree["rope"] = {"base": said.get("rope_base", known.get("rope_base", 10000.0))}
    if known.get("use_dynamic_ntk_rope"):
        tree["rope"]["scaling"] = {"kind": "dynamic", "original_length": trained}
    return decoded(ModelConfig, tree, folder), reading


def trained_length(text: object) -> int | None:
    """Return SEQ_LEN of the framework's Python config, the length of the rows that a model was trained on."""
    try:
        tree = ast.parse(text if isinstance(text, str) else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, int):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "SEQ_LEN" in names:
                return node.value.value
    return None


def mlp_ratio(config: ModelConfig) -> float:
    """Return the ratio from which the framework computes the feed-forward."""
    for ratio in (8 / 3, config.ffn_size / config.hidden_size):
        if 256 * math.ceil(int(config.hidden_size * ratio) / 256) == config.ffn_size:
            return ratio
    raise WeightsError("InternLM v0.2 has only multiples of 256", where="model.ffn_size", got=config.ffn_size)


def _known(stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields of model_config.pt that are set; refuse what this decoder cannot express."""
    known = {name: value for name, value in stored.items() if value is not None}
    for name in _NUMBERS:
        if not isinstance(known.get(name, 0), int | float):
            raise WeightsError("is no number", where=f"{folder / CONFIG}: {name}", got=known[name])
    for name, (is_refused, why) in _REFUSED.items():
        if name in known and is_refused(known[name]):
            raise WeightsError(f"{why}, which cannot be read", where=folder, got=known[name])
    return known


def _reading(
    parts: Parts, known: Mapping[str, Any] | None, said: Mapping[str, Any], folder: Path, weight_parallel: bool
) -> Reading:
    is_internlm = "blocks.0.attention.three.weight" in parts
    if known is not None and known.get("apply_post_layer_norm") and not is_internlm:
        raise WeightsError(
            "its norms stand behind the blocks (apply_post_layer_norm), which cannot be read", where=folder
        )
    rotary = said.get("rotary")
    if rotary is None and is_internlm:
        rotary = "half"
    if rotary is None and known is not None:
        # Where the key is absent, the framework's constructors have False for LLAMA2, True for INTERNLM2.
        is_half = known.get("adapt_hf", "blocks.0.attention.wqkv.weight" in parts)
        rotary = "half" if is_half else "interleaved"
    if rotary is None:
        raise WeightsError(
            "has no model_config.pt, and weights do not say how rotary pairs lie",
            where=folder,
            do="Say it: --set rotary=interleaved (adapt_hf was false, as in Llama's own files) or --set rotary=half.",
        )
    return Reading(
        is_interleaved=rotary == "interleaved",
        w2=_w2(parts, said.get("w2"), folder, weight_parallel),
        is_weight_parallel=weight_parallel,
    )


def _w2(parts: Parts, said: str | None, folder: Path, weight_parallel: bool) -> Literal["up", "down"]:
    """Return which matrix w2 is: gate and up have one shape, down another."""
    shapes = {}
    for name in ("w1", "w2", "w3"):
        if f"blocks.0.feed_forward.{name}.weight" not in parts:
            raise WeightsError(f"block 0 has no {name}", where=folder)
        shapes[name] = parts[f"blocks.0.feed_forward.{name}.weight"][0].shape
    rows, hidden = shapes["w1"]
    ranks = len(parts["blocks.0.feed_forward.w1.weight"])
    down = (hidden // ranks, rows * ranks) if weight_parallel else (hidden, rows)
    fits = {
        "up": shapes["w2"] == shapes["w1"] and shapes["w3"] == down,
        "down": shapes["w3"] == shapes["w1"] and shapes["w2"] == down,
    }
    possible = [way for way in fits if fits[way] and said in (None, way)]
    if not possible:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise WeightsError(
            f"w1, w2, w3 are no feed-forward{f' where w2 is {said}' if said else ''}: {found}", where=folder
        )
    if len(possible) > 1:
        raise WeightsError(
            f"w2 and w3 have the same shape {list(down)}: nothing says which of them is up and which is down",
            where=folder,
            do="Say it: --set w2=up (InternLM v0.2) or --set w2=down (InternEvo since March 2024).",
        )
    return "up" if possible == ["up"] else "down"


def _heads(heads: int | None, hidden: int, folder: Path) -> int:
    if heads is None:
        raise WeightsError(
            "has no model_config.pt, and weights do not say how many heads there are",
            where=folder,
            do=f"Say it: --set num_heads={max(1, hidden // 128)} if a head is 128 wide, as in all released InternLM.",
        )
    if heads < 1 or hidden % heads:
        raise WeightsError(f"hidden size {hidden} is not divisible by the number of heads", where=folder, got=heads)
    return heads


def _kv_heads(parts: Parts, head_dim: int, heads: int) -> int:
    if "blocks.0.attention.wqkv.weight" in parts:
        fused = sum(part.shape[0] for part in parts["blocks.0.attention.wqkv.weight"])
        return (fused // head_dim - heads) // 2
    if "blocks.0.attention.wk.weight" in parts:
        return sum(part.shape[0] for part in parts["blocks.0.attention.wk.weight"]) // head_dim
    return heads


def _compare(tree: Mapping[str, Any], known: Mapping[str, Any], folder: Path) -> None:
    for ours in ("vocab_size", "hidden_size", "num_layers", "num_kv_heads"):
        expected = known.get("num_kv_attention_heads" if ours == "num_kv_heads" else ours)
        if expected not in (None, -1) and expected != tree[ours]:
            raise WeightsError(
                f"the files hold {ours} {tree[ours]}, model_config.pt says {expected}",
                where=folder,
                do="Files of some ranks are missing, or of another model: copy it again.",
            )
