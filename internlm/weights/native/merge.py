"""Parts of weights in rank files of InternLM v0.2 and InternEvo → whole weights by our names.

    {Place(stage 1, tensor 0): {"model.blocks.0.mixer.Wqkv.weight": [3H/t, H]}, …}        what ranks have
    {"blocks.4.attention.three.weight": [part of tensor rank 0, part of tensor rank 1]}   gather
    {"blocks.4.attention.wq.weight": [H, H], …}                                           merge

Blocks are numbered within their pipeline stage. A rank with interleaved chunks has several: `{chunk}.model.blocks.{i}`;
the layers run chunk 0 of stage 0, 1, …, then chunk 1 of stage 0, 1, ….

How a weight is cut over t tensor ranks [rows, columns]:

    rows       wq wk wv w_gate w_up head     [rows / t, columns]
    columns    wo w_down                     [rows, columns / t]
    Wqkv       three matrices                each rank has its heads of q, then of k, then of v: not rows of the whole
    wqkv       grouped (InternLM2)           by key-value head: its queries, the key, the value
    embedding  by hidden size or vocabulary  whichever the shape says
    same       norms; the bias of wo is in the file of rank 0 only

InternEvo's weight parallelism cuts each of a block's weights into rows, whatever it is, and gathers before use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from internlm.errors import WeightsError, did_you_mean
from internlm.model.config import ModelConfig
from internlm.weights import weight as lazy
from internlm.weights.load import ordered
from internlm.weights.weight import Weight, Weights

logger = logging.getLogger(__name__)

INTERNLM: dict[str, str] = {
    "embedding.weight": "embedding.weight",
    "embedding.word_embeddings.weight": "embedding.weight",
    "blocks.{i}.mixer.Wqkv.weight": "blocks.{i}.attention.three.weight",
    "blocks.{i}.mixer.Wqkv.bias": "blocks.{i}.attention.three.bias",
    "blocks.{i}.mixer.out_proj.weight": "blocks.{i}.attention.wo.weight",
    "blocks.{i}.mixer.out_proj.bias": "blocks.{i}.attention.wo.bias",
    "blocks.{i}.norm1.weight": "blocks.{i}.attention_norm.weight",
    "blocks.{i}.norm2.weight": "blocks.{i}.feed_forward_norm.weight",
    **{f"blocks.{{i}}.mlp.{w}.weight": f"blocks.{{i}}.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")},
    "norm.weight": "norm.weight",
    "head.weight": "head.weight",
}
"""Model type INTERNLM → ours, but for `three` (Wqkv), w1, w2 and w3, which `merge` resolves; in its order."""

LLAMA: dict[str, str] = {
    "tok_embeddings.weight": "embedding.weight",
    "tok_embeddings.word_embeddings.weight": "embedding.weight",
    **{
        f"layers.{{i}}.attention.{name}.{kind}": f"blocks.{{i}}.attention.{name}.{kind}"
        for name in ("wq", "wk", "wv", "wqkv", "wo")
        for kind in ("weight", "bias")
    },
    "layers.{i}.attention_norm.weight": "blocks.{i}.attention_norm.weight",
    "layers.{i}.ffn_norm.weight": "blocks.{i}.feed_forward_norm.weight",
    **{f"layers.{{i}}.feed_forward.{w}.weight": f"blocks.{{i}}.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")},
    "norm.weight": "norm.weight",
    "output.weight": "head.weight",
}
"""Model types LLAMA2 and INTERNLM2 → ours, but for wqkv (grouped), w1, w2 and w3; in their order."""

_NAMES = INTERNLM | LLAMA
_RAW = re.compile(r"(?:(\d+)\.)?(?:model\.)?((?:blocks|layers)\.(\d+)\.)?(.+)")
ROWS = {"wq", "wk", "wv", "w_gate", "w_up", "head"}
COLUMNS = {"wo", "w_down"}


class Place(NamedTuple):
    """Which part of a model a file holds."""

    stage: int
    """Pipeline stage."""
    tensor: int
    """Rank of tensor parallelism."""
    weight: int = 0
    """Rank of InternEvo's weight parallelism."""


@dataclass(frozen=True)
class Reading:
    """What names and shapes of a checkpoint do not say."""

    is_interleaved: bool = False
    """Whether rotary pairs are neighbours there, as in Llama's own files; here they are half a head apart."""
    w2: Literal["up", "down"] = "up"
    """Which matrix w2 is: up in v0.2, down in InternEvo since March 2024; w3 is the other."""
    is_weight_parallel: bool = False


Parts = dict[str, list[Weight]]
"""By our names (three, wqkv, w1, w2 and w3 as there): the parts of a weight, in the order of the ranks."""


def is_buffer(raw: str) -> bool:
    """Return whether an entry of a rank file is no weight: rotary frequencies."""
    return raw.endswith(("rotary_emb.inv_freq", "rope.freqs"))


def gather(shards: Mapping[Place, Weights], folder: Path, *, is_weight_parallel: bool = False) -> Parts:
    """Return the parts of every weight, blocks numbered through, of what each rank's file holds by the names in it.

    Raises:
        WeightsError: a name is not known, or ranks of one stage have different weights.
    """
    starts = _starts(shards, folder)
    found: Parts = {}
    for stage in sorted({place.stage for place in shards}):
        places = sorted(place for place in shards if place.stage == stage)
        by_tensor = {place.tensor: place for place in reversed(places)}
        by_weight = {place.weight: place for place in reversed(places)}
        for raw in dict.fromkeys(raw for place in places for raw in shards[place]):
            if is_buffer(raw):
                continue
            ours = _ours(raw, stage, starts, folder)
            is_blocks = ours.startswith("blocks.")
            ranks = by_weight if is_weight_parallel and (is_blocks or ours == "norm.weight") else by_tensor
            having = [ranks[rank] for rank in sorted(ranks) if raw in shards[ranks[rank]]]
            only_first = ours.endswith(".wo.bias") and having == [ranks[0]]
            if len(having) < len(ranks) and not only_first:
                raise WeightsError(f"stage {stage}: {len(ranks)} ranks, {len(having)} of them have {raw}", where=folder)
            if ours in found:
                raise WeightsError(f"{raw} of stage {stage} came already", where=folder)
            found[ours] = [shards[place][raw] for place in having]
    return found


def merge(parts: Parts, config: ModelConfig, reading: Reading) -> Weights:
    """Return whole weights by our names, in the model's order; what the model does not know comes last."""
    found: Weights = {}
    for name, shards in parts.items():
        found |= _merged(name, shards, config, reading)
    return ordered(found, config)


def _starts(shards: Mapping[Place, Weights], folder: Path) -> dict[tuple[int, int], int]:
    """Return the number of the first layer of every (chunk, stage)."""
    layers: dict[tuple[int, int], set[int]] = {}
    for place, weights in shards.items():
        for raw in weights:
            match = _RAW.fullmatch(raw)
            assert match, "matches any text"
            if match[3] is not None:
                layers.setdefault((int(match[1] or 0), place.stage), set()).add(int(match[3]))
    starts, total = {}, 0
    for chunk in range(1 + max((chunk for chunk, _ in layers), default=0)):
        for stage in range(1 + max(place.stage for place in shards)):
            here = layers.get((chunk, stage), set())
            if here != set(range(len(here))) or not here:
                raise WeightsError(
                    f"blocks of chunk {chunk} are missing in stage {stage}", where=folder, got=sorted(here)
                )
            starts[chunk, stage] = total
            total += len(here)
    return starts


def _ours(raw: str, stage: int, starts: Mapping[tuple[int, int], int], folder: Path) -> str:
    match = _RAW.fullmatch(raw)
    assert match, "matches any text"
    chunk, block, number, rest = match.groups()
    name = rest if block is None else f"{block.partition('.')[0]}.{{i}}.{rest}"
    if name not in _NAMES:
        if ".moe_layer." in raw or ".experts." in raw:
            raise WeightsError("has a mixture of experts of the old framework, which is not read", where=folder)
        raise WeightsError(f"has a weight that is not known: {raw}", where=folder, do=did_you_mean(name, _NAMES))
    first = starts[int(chunk or 0), stage]
    return _NAMES[name] if number is None else _NAMES[name].replace("{i}", str(first + int(number)))


def _merged(name: str, parts: list[Weight], config: ModelConfig, reading: Reading) -> Weights:
    """Return what the parts of one weight make: one, or the three of wqkv."""
    *stem, module, kind = name.split(".")
    if module in ("three", "wqkv"):
        return _unfused(name, parts, config, reading)
    renamed = {"w1": "w_gate", "w2": f"w_{reading.w2}", "w3": "w_down" if reading.w2 == "up" else "w_up"}
    module = renamed.get(module, module)
    name = ".".join([*stem, module, kind])
    is_cut_by_rows = reading.is_weight_parallel and name.startswith("blocks.") and not module.endswith("_norm")
    if module == "embedding":
        whole = joined(parts, 0 if parts[0].shape[1] == config.hidden_size else 1)
    elif is_cut_by_rows or module in ROWS:
        whole = joined(parts, 0)
    elif module in COLUMNS and kind == "weight":
        whole = joined(parts, 1)
    else:
        whole = _same(name, parts)
    if module in ("wq", "wk") and reading.is_interleaved:
        whole = lazy.pairs_apart(whole, config.head_dim)
    return {name: whole}


def joined(parts: list[Weight], dim: int) -> Weight:
    """Return the parts side by side: 0: rows, 1: columns."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    note = f" ({'columns' if dim else 'rows'} of {len(parts)})"
    return lazy.joined(parts, shape, lambda tensors: torch.cat(tensors, dim), note)


def _same(name: str, parts: list[Weight]) -> Weight:
    """Return a weight that all ranks have whole: the first rank's, with a warning where another's differs."""
    if len(parts) == 1:
        return parts[0]

    def first(tensors: list[Tensor]) -> Tensor:
        if any(not torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
            logger.warning("warning: the ranks' copies of %s differ: rank 0's is taken", name)
        return tensors[0]

    return lazy.joined(parts, parts[0].shape, first, f" (same in {len(parts)})")


def _unfused(name: str, parts: list[Weight], config: ModelConfig, reading: Reading) -> Weights:
    """Return wq, wk and wv of Wqkv (`three`: one matrix after the other) or wqkv (by key-value head)."""
    stem, module, kind = name.rsplit(".", 2)
    if reading.is_weight_parallel:
        parts = [joined(parts, 0)]
    ratio = config.num_heads // config.num_kv_heads if module == "wqkv" else 1
    pieces = []
    for part in parts:
        rows = part.shape[0] // (ratio + 2)
        groups = rows // config.head_dim if module == "wqkv" else 1
        shapes = [(rows * share, *part.shape[1:]) for share in (ratio, 1, 1)]
        pieces.append(lazy.apart(part, groups, shapes, [""] * 3))
    found = {}
    for which, cut in zip(("wq", "wk", "wv"), zip(*pieces, strict=True), strict=True):
        shape = (sum(piece.shape[0] for piece in cut), *cut[0].shape[1:])
        whole = lazy.joined(cut, shape, torch.cat, f" ({which[1]} of {len(parts)})")
        if which != "wv" and reading.is_interleaved:
            whole = lazy.pairs_apart(whole, config.head_dim)
        found[f"{stem}.{which}.{kind}"] = whole
    return found
