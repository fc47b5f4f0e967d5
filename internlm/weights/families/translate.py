"""Model families of Transformers: whose config.json and weight names we read, and which we write.

    described, theirs = write(ours, config)            # config.json and weights of the family that fits
    ours = read(theirs, described, path)                # and back

Two weights hold several of ours; in each group the rows of one lie after those of another:

    wqkv           [K, H/K + 2, E] · hidden     for each key head: the queries that share it, the key, the value
    gate_up_proj   [X, 2, F] · hidden           for each expert: gate, up
"""

from __future__ import annotations

import dataclasses
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.weights import weight as lazy
from internlm.weights.families import table as rows
from internlm.weights.families.fields import describe, read_config
from internlm.weights.families.table import from_transformers, is_stacked, to_transformers
from internlm.weights.load import ordered, shapes
from internlm.weights.weight import Weight, Weights


def read(weights: Weights, fields: dict[str, Any], path: Path) -> Weights:
    """Return a family's weights by our names, in the model's order; what the model does not know comes last.

    Args:
        weights: by the family's names.
        fields: content of config.json.
        path: of that file.

    Raises:
        WeightsError: a name is not one of the family's, a weight comes twice, or the parts of one do not fit.
    """
    config = read_config(fields, path)
    if config.num_layers > len(weights):  # else as many layers would be made to compare them
        raise WeightsError(f"says that there are {config.num_layers} layers of {len(weights)} weights", where=path)
    tables = rows.FAMILIES[fields["model_type"]].names
    found: dict[str, list[tuple[int | None, Weight]]] = {}  # ours → expert and weight: one, or one per expert
    for name, weight in weights.items():
        if name.endswith("rotary_emb.inv_freq"):  # in old exports; it follows from the config
            continue
        ours, expert = from_transformers(name, *tables)
        if not weight.dtype.is_floating_point:
            raise WeightsError("holds integers, which are no weights", where=f"{path.parent}: {name}", got=weight.dtype)
        pieces = [weight] if len(ours) == 1 else cut(weight, ours, config)
        for one, piece in zip(ours, pieces, strict=True):
            found.setdefault(one, []).append((expert, piece))
    whole = ordered({name: _whole(name, parts) for name, parts in found.items()}, config)
    if config.tie_embeddings and {"head.weight", "embedding.weight"} <= whole.keys():
        _check_tied(whole["head.weight"], whole["embedding.weight"], path)
    return whole


def _check_tied(head: Weight, embedding: Weight, path: Path) -> None:
    """Refuse a head that is said to be the embedding and is another: Transformers 4 takes the embedding, 5 the head."""
    if head.place is not None and head.place == embedding.place:
        return
    if head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
        raise WeightsError(
            f"says that the head is the embedding, and there is a {head.origin} that is another", where=path,
            do="Set tie_word_embeddings to false in it, if that head is the model's; else delete the head.",
        )  # fmt: skip


def write(weights: Weights, config: ModelConfig, family: str | None = None) -> tuple[dict[str, Any], Weights]:
    """Return config.json, without token ids and dtype, and the weights by the names of a family.

    Args:
        weights: by our names, complete.
        config: shape of the model.
        family: its `model_type`; None: the plainest that fits (`table.fitting`).

    Raises:
        WeightsError: there is no such family, or it cannot express the shape.
    """
    name = family or rows.fitting(config)
    rows.check(config, name)
    row = rows.family_of(name)
    stored = _with_biases(config, row)
    needed, dtype = shapes(stored), lazy.main_dtype(weights)
    groups: dict[str, list[str]] = {}  # theirs → ours
    for ours in needed:
        groups.setdefault(to_transformers(ours, row.names[0]), []).append(ours)
    theirs: Weights = {}
    for their, names in groups.items():
        parts = [weights[one] if one in weights else lazy.zeros(needed[one], dtype) for one in names]
        if len(parts) > 1:
            theirs[their] = join(parts, names, stored)
        elif is_stacked(names[0]):
            whole = lazy.shared(parts[0], parts[0].shape[0])
            theirs |= {
                their.replace("{e}", str(e)): whole.turned(whole.shape[1:], itemgetter(e), f"[{e}]")
                for e in range(whole.shape[0])
            }
        else:
            theirs[their] = parts[0]
    return describe(stored, name), theirs


def _with_biases(config: ModelConfig, family: rows.Family) -> ModelConfig:
    """Return the shape with the biases that the family always has, or has with others: zeros."""
    qkv, output = config.qkv_bias or family.qkv_bias is True, config.output_bias
    if family.qkv_bias == family.output_bias and family.qkv_bias is not False:
        qkv = output = qkv or output
    return dataclasses.replace(config, qkv_bias=qkv, output_bias=output)


def _whole(name: str, parts: list[tuple[int | None, Weight]]) -> Weight:
    if len(parts) == 1 and (parts[0][0] is None or not is_stacked(name)):
        return parts[0][1]
    parts = sorted(parts, key=lambda part: -1 if part[0] is None else part[0])
    if not is_stacked(name) or [expert for expert, _ in parts] != list(range(len(parts))):
        listed = ", ".join(weight.origin for _, weight in parts[:4])
        raise WeightsError("is there twice, or experts are missing", where=name, got=listed)
    matrices = [weight for _, weight in parts]
    if len({matrix.shape for matrix in matrices}) > 1:
        raise WeightsError("the experts differ in shape", where=name)
    return lazy.joined(matrices, (len(matrices), *matrices[0].shape), torch.stack)


def cut(weight: Weight, names: list[str], config: ModelConfig) -> list[Weight]:
    """Return the weights of ours that one of theirs holds; raise WeightsError where it is of another shape."""
    parts = _shapes(names, config)
    whole = _whole_shape(parts)
    if weight.shape != whole:
        raise WeightsError(f"is {weight.shape}, not {whole}", where=weight.origin)
    notes = [f"[{name.split('.')[-2]}]" for name in names]
    return lazy.apart(lazy.shared(weight, len(names)), _groups(names, config), parts, notes)


def join(weights: list[Weight], names: list[str], config: ModelConfig) -> Weight:
    """Return one weight of theirs from those of ours that it holds."""
    groups, whole = _groups(names, config), _whole_shape(_shapes(names, config))

    def together(tensors: list[Tensor]) -> Tensor:
        grouped = [t.reshape(groups, lazy.rows_of(t.shape, groups), -1) for t in tensors]
        return torch.cat(grouped, 1).reshape(whole)

    return lazy.joined(weights, whole, together)


def _shapes(names: list[str], config: ModelConfig) -> list[torch.Size]:
    known = shapes(dataclasses.replace(config, num_layers=1, qkv_bias=True))
    return [known[".".join(["blocks", "0", *name.split(".")[2:]])] for name in names]


def _groups(names: list[str], config: ModelConfig) -> int:
    if is_stacked(names[0]):
        assert config.experts is not None, "only a model with experts has stacked weights"
        return config.experts.count
    return config.num_kv_heads


def _whole_shape(parts: list[torch.Size]) -> tuple[int, ...]:
    """Return the shape of the weight that holds these: their rows are added up."""
    dim = max(0, len(parts[0]) - 2)
    return tuple(sum(p[dim] for p in parts) if i == dim else size for i, size in enumerate(parts[0]))
