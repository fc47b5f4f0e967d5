"""Weights → a training checkpoint of InternLM v0.2, at any tensor × pipeline layout.

    export(weights, config, "out", layout=Layout(tensor=2, pipeline=2))
    # ckpt.load_ckpt_info = dict(path="local:out", content=("model",), ckpt_type="internlm")

The model types it has:

    INTERNLM   as many key-value heads as heads, all biases (where only some of ours have one, the others are zeros)
    LLAMA2     grouped heads, and no biases at all (or all); rotary pairs half a head apart (adapt_hf=True)

A head that is the embedding is written as a copy of it. model_config.pt is a plain dict, which the old tools read by
keys. There is no optimizer state and no context.pt: load "model" alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm import disk
from internlm.errors import WeightsError
from internlm.model.config import DynamicScaling, ModelConfig
from internlm.runtime import dtype_name
from internlm.weights import card, files
from internlm.weights import weight as lazy
from internlm.weights.load import check, shapes
from internlm.weights.native import archive, fields, merge
from internlm.weights.talk import Talk
from internlm.weights.transformers import ExportOptions, exporting
from internlm.weights.weight import Weight, Weights


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut."""

    tensor: int = 1
    """Tensor ranks; the old framework loads only its own number of them."""
    pipeline: int = 1
    """Pipeline stages, likewise."""
    step: int = 0
    """Step that the checkpoint says it is of."""


def export(
    weights: Weights,
    config: ModelConfig,
    out: str | Path,
    talk: Talk = Talk(),  # noqa: B008 (frozen)
    options: ExportOptions = ExportOptions(),  # noqa: B008 (frozen)
    layout: Layout = Layout(),
) -> Weights:
    """Write a checkpoint folder that InternLM v0.2 loads.

    Its files are as large as the layout makes them. Otherwise arguments, result (by names `tp[t]_pp[p] name`) and
    errors are those of `transformers.export`.
    """
    out = Path(out)
    check(weights, config)
    dialect = _dialect(config)
    _check(config, layout, dialect)
    talk.check(config.vocab_size)
    whole = _whole(weights, config)
    ranks = {
        (tensor, stage): {
            name: weight.to(options.dtype) for name, weight in _shard(whole, config, layout, (tensor, stage), dialect)
        }
        for stage in range(layout.pipeline)
        for tensor in range(layout.tensor)
    }
    named = {f"tp[{t}]_pp[{p}] {name}": weight for (t, p), rank in ranks.items() for name, weight in rank.items()}
    with exporting(out, named.values(), talk, options) as folder:
        for (tensor, stage), rank in ranks.items():
            files.write_file(folder, f"model_tp{tensor}_pp{stage}.pt", rank, options.progress, archive.write)
            torch.save({}, folder.path / f"topo_tp{tensor}_pp{stage}.json")
        dtype = lazy.main_dtype(next(iter(ranks.values())))
        described = _described(config, dialect, dtype)
        torch.save(described, folder.path / fields.CONFIG)
        torch.save(_as_python(described, config, dialect), folder.path / "config_file.pt")
        torch.save({"step": layout.step}, folder.path / f"{layout.step}.step")
        if talk.tokenizer is not None:
            talk.write(folder.path)
        readme = _card(config, dialect, layout, dtype_name(dtype), options.notes)
        disk.write_text(folder.path / "README.md", readme)
    return named


def _dialect(config: ModelConfig) -> str:
    has_bias = config.qkv_bias or config.output_bias
    return "INTERNLM" if has_bias and config.num_kv_heads == config.num_heads else "LLAMA2"


def _check(config: ModelConfig, layout: Layout, dialect: str) -> None:
    fields.mlp_ratio(config)
    scaling = config.rope.scaling
    is_dynamic = isinstance(scaling, DynamicScaling) and scaling.factor == 1
    wrong = {
        "model.experts": (config.experts is not None, "experts"),
        "model.qk_norm": (config.qk_norm, "norms of queries and keys"),
        "model.head_dim": (config.head_dim * config.num_heads != config.hidden_size, "heads of another width"),
        "model.rope.scaling": (scaling is not None and not (is_dynamic and dialect == "INTERNLM"), "this scaling"),
    }
    for where, (is_wrong, what) in wrong.items():
        if is_wrong:
            raise WeightsError(f"InternLM v0.2 ({dialect}) has no {what}", where=where)
    if layout.tensor < 1:
        raise WeightsError("must be at least 1", where="tensor", got=layout.tensor)
    if not 1 <= layout.pipeline <= config.num_layers:
        raise WeightsError(f"{config.num_layers} layers cannot be cut", where="pipeline", got=layout.pipeline)
    for name in ("num_heads", "num_kv_heads", "ffn_size", "vocab_size", "hidden_size"):
        if getattr(config, name) % layout.tensor:
            raise WeightsError(f"{name} {getattr(config, name)} cannot be cut", where="tensor", got=layout.tensor)


def _whole(weights: Weights, config: ModelConfig) -> Weights:
    """Return the weights, and what the model type has beside them."""
    whole = dict(weights)
    if config.tie_embeddings:
        whole["head.weight"] = weights["embedding.weight"]
    if config.qkv_bias != config.output_bias:
        all_biased = dataclasses.replace(config, qkv_bias=True, output_bias=True)
        dtype = lazy.main_dtype(weights)
        whole |= {name: lazy.zeros(shape, dtype) for name, shape in shapes(all_biased).items() if name not in whole}
    return whole


def _shard(
    whole: Weights, config: ModelConfig, layout: Layout, rank: tuple[int, int], dialect: str
) -> Iterator[tuple[str, Weight]]:
    """Yield the weights of a (tensor rank, stage) by their names there, in the old model's order."""
    tensor, stage = rank
    cut = partial(_cut, tensor, layout.tensor)
    starts = _starts(config.num_layers, layout.pipeline)
    table = merge.INTERNLM if dialect == "INTERNLM" else merge.LLAMA
    embedding, _, *of_blocks, norm, head = table.items()
    rows = [embedding] if stage == 0 else []
    for number in range(starts[stage], starts[stage + 1]):
        local = str(number - starts[stage])
        rows += [(theirs.replace("{i}", local), ours.replace("{i}", str(number))) for theirs, ours in of_blocks]
    rows += [norm, head] if stage == layout.pipeline - 1 else []
    for theirs, ours in rows:
        for old, new in (("w1", "w_gate"), ("w2", "w_up"), ("w3", "w_down")):
            ours = ours.replace(old, new)
        module = ours.split(".")[-2]
        parts = [ours.replace("three", name) for name in ("wq", "wk", "wv")] if module == "three" else [ours]
        of_wo = ours.endswith("wo.bias")  # added after the sum over ranks, by one of them
        if parts[0] not in whole or (of_wo and tensor > 0):
            continue
        weights = [whole[part] for part in parts]
        if module == "three" or module in merge.ROWS:
            weights = [cut(weights, 0)]
        elif module == "embedding" or (module in merge.COLUMNS and not of_wo):
            weights = [cut(weights, 1)]
        yield f"model.{theirs}", weights[0]


def _cut(rank: int, ranks: int, weights: list[Weight], dim: int) -> Weight:
    """Return a tensor rank's rows (0) or columns (1) of weights, one below the other."""
    if len(weights) == ranks == 1:
        return weights[0]

    def join(tensors: list[Tensor]) -> Tensor:
        parts = [tensor.chunk(ranks, dim)[rank] for tensor in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # a view, which is written without a copy

    shape = [sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]]
    shape[dim] //= ranks
    return lazy.joined(weights, shape, join, f" ({'columns' if dim else 'rows'} of {ranks})" if ranks > 1 else "")


def _starts(layers: int, stages: int) -> list[int]:
    """Return where each stage begins, and the end: the later stages have the layers that are over."""
    sizes = [layers // stages + (stage >= stages - layers % stages) for stage in range(stages)]
    return [sum(sizes[:stage]) for stage in range(stages + 1)]


def _described(config: ModelConfig, dialect: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return model_config.pt: the model section of the old framework's config."""
    scaling = config.rope.scaling
    described: dict[str, Any] = {
        "num_attention_heads": config.num_heads,
        "embed_split_hidden": True,
        "vocab_size": config.vocab_size,
        "embed_grad_scale": 1,
        "parallel_output": True,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "mlp_ratio": fields.mlp_ratio(config),
        "dtype": dtype,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": config.norm_eps,
        "num_chunks": 1,
        "rope_base": config.rope.base,
    }
    if dialect == "INTERNLM":
        length = scaling.original_length if isinstance(scaling, DynamicScaling) else config.context_length
        return described | {"max_position_embeddings": length, "use_dynamic_ntk_rope": scaling is not None}
    has_bias = config.qkv_bias or config.output_bias
    return described | {"num_kv_attention_heads": config.num_kv_heads, "no_bias": not has_bias, "adapt_hf": True}


def _as_python(described: dict[str, Any], config: ModelConfig, dialect: str) -> str:
    """Return config_file.pt: the part of the Python config that the model needs."""
    text = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in described.items()}
    model = "".join(f"    {name}={value!r},\n" for name, value in text.items())
    sizes = f"SEQ_LEN = {config.context_length}\nHIDDEN_SIZE = {config.hidden_size}\n"
    return f'model_type = "{dialect}"\n{sizes}model = dict(\n{model})\n'


def _card(config: ModelConfig, dialect: str, layout: Layout, dtype: str, notes: Mapping[str, Any]) -> str:
    about = [
        f"Weights only, of model type `{dialect}`, tensor {layout.tensor}, pipeline {layout.pipeline}; the values of",
        "its section `model` are in `model_config.pt`, and as Python in `config_file.pt`.", "",
    ]  # fmt: skip
    use = ["```python", 'load_ckpt_info = dict(path="local:.", content=("model",), ckpt_type="internlm")', "```"]
    name = {"name": "Training checkpoint for InternLM v0.2"}
    return card.page(None, [*about, *card.shape(config, dtype)], use, {**name, **notes}, config)
