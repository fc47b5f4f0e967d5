"""Weights → a training checkpoint of InternLM v0.2, at any tensor × pipeline layout, for those who stay with it.

    export(weights, config, "out", layout=Layout(tensor=2, pipeline=2))
    # ckpt.load_ckpt_info = dict(path="local:out", content=("model",), ckpt_type="internlm")

The model types it has:

    INTERNLM   as many key-value heads as heads, all biases (where only some of ours have one, the others are zeros)
    LLAMA2     grouped heads, and no biases at all (or all); rotary pairs half a head apart (adapt_hf=True)

What neither expresses is refused. A head that is the embedding is written as a copy of it. Tensors pass one at a time.
model_config.pt is a plain dict: the old tools read it by keys, and the class they would write belongs to them. There is
no optimizer state and no context.pt: load "model" alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internlm import storage
from internlm.errors import WeightsError
from internlm.model.config import DynamicScaling, ModelConfig
from internlm.runtime import dtype_name
from internlm.weights import card, files
from internlm.weights import weight as lazy
from internlm.weights.load import check, shapes
from internlm.weights.native import archive, fields
from internlm.weights.native.rank_files import CONFIG
from internlm.weights.talk import Talk
from internlm.weights.transformers import KIND, ExportOptions
from internlm.weights.weight import Weight, Weights


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut."""

    tensor: int = 1
    """Tensor ranks; the old framework loads only its own number of them."""
    pipeline: int = 1
    """Pipeline stages, likewise."""
    embed_split_hidden: bool = True
    """Whether tensor ranks share the embedding by hidden size, as all shipped configs have it, or by vocabulary."""
    w2: Literal["up", "down"] = "up"
    """What w2 is: up in v0.2, down in InternEvo since March 2024."""
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

    Args:
        weights: our names; a tied head may be left out.
        config: shape of the model.
        out: the folder; complete or absent.
        talk: the tokenizer is written along.
        options: how files are written; their size follows from the layout.
        layout: how the model is cut.

    Returns:
        what was written: `tp[t]_pp[p] name`, each with its origin.

    Raises:
        WeightsError: weights are missing, left over or of another shape, or the old framework cannot express the model.
        StorageError: the folder exists, or could not be written.
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
    storage.check_free(out, KIND, replace=options.replace)
    total = sum(weight.nbytes for rank in ranks.values() for weight in rank.values())
    with storage.writing(out, KIND, replace=options.replace, resume=options.resume) as folder:
        files.require_space(folder, total, f"export {out.name}")
        for (tensor, stage), rank in ranks.items():
            _write(folder, f"model_tp{tensor}_pp{stage}.pt", rank, options)
            topology = {} if layout.embed_split_hidden or stage else {_embedding(dialect, layout): {"dim": 0}}
            torch.save(topology, folder.path / f"topo_tp{tensor}_pp{stage}.json")
        dtype = lazy.main_dtype(next(iter(ranks.values())))
        described = _described(config, layout, dialect, dtype)
        torch.save(described, folder.path / CONFIG)
        torch.save(_as_python(described, config, dialect), folder.path / "config_file.pt")
        torch.save({"step": layout.step}, folder.path / f"{layout.step}.step")
        if talk.tokenizer is not None:
            talk.write(folder.path)
        options.copy_licences(folder.path)
        readme = _card(config, dialect, layout, dtype_name(dtype), options.notes)
        storage.write_text(folder.path / "README.md", readme)
        folder.meta.update({"internlm_template": talk.template, **options.notes})
    return {f"tp[{t}]_pp[{p}] {name}": weight for (t, p), rank in ranks.items() for name, weight in rank.items()}


def _dialect(config: ModelConfig) -> str:
    """Return the model type that can express a shape."""
    has_bias = config.qkv_bias or config.output_bias
    return "INTERNLM" if has_bias and config.num_kv_heads == config.num_heads else "LLAMA2"


def _check(config: ModelConfig, layout: Layout, dialect: str) -> None:
    """Refuse a model that the old framework cannot express, and a layout it cannot be cut into."""
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
    """Return the weights with what the model type has and the model has not."""
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
    """Yield the weights of a (tensor rank, stage) by their names there, in the order of the old model's parameters."""
    tensor, stage = rank
    cut = _Cut(tensor, layout.tensor)
    is_internlm = dialect == "INTERNLM"
    starts = _starts(config.num_layers, layout.pipeline)
    down = "w3" if layout.w2 == "up" else "w2"
    up = "w2" if layout.w2 == "up" else "w3"
    feed_forward = {"w1": "w_gate", up: "w_up", down: "w_down"}
    if stage == 0:
        dim = 1 if layout.embed_split_hidden else 0
        yield f"{_embedding(dialect, layout)}.weight", cut(whole["embedding.weight"], dim)
    for number in range(starts[stage], starts[stage + 1]):
        ours, local = f"blocks.{number}", number - starts[stage]
        theirs = f"model.{'blocks' if is_internlm else 'layers'}.{local}"
        yield from _attention(whole, ours, theirs, cut, is_internlm)
        norms = ("norm1", "norm2") if is_internlm else ("attention_norm", "ffn_norm")
        norm_weights = [
            (f"{theirs}.{name}.weight", whole[f"{ours}.{own}.weight"])
            for name, own in zip(norms, ("attention_norm", "feed_forward_norm"), strict=True)
        ]
        mlp = "mlp" if is_internlm else "feed_forward"
        yield from norm_weights
        for name in ("w1", "w2", "w3"):
            weight = whole[f"{ours}.feed_forward.{feed_forward[name]}.weight"]
            yield f"{theirs}.{mlp}.{name}.weight", cut(weight, 1 if name == down else 0)
    if stage == layout.pipeline - 1:
        yield "model.norm.weight", whole["norm.weight"]
        yield f"model.{'head' if is_internlm else 'output'}.weight", cut(whole["head.weight"], 0)


def _attention(whole: Weights, ours: str, theirs: str, cut: _Cut, is_internlm: bool) -> Iterator[tuple[str, Weight]]:
    """Yield the attention weights of a block for a tensor rank."""
    kinds = [kind for kind in ("weight", "bias") if f"{ours}.attention.wq.{kind}" in whole]
    if is_internlm:
        for kind in kinds:
            yield f"{theirs}.mixer.Wqkv.{kind}", cut.together([whole[f"{ours}.attention.w{x}.{kind}"] for x in "qkv"])
    else:
        for x in "qkv":
            for kind in kinds:
                yield f"{theirs}.attention.w{x}.{kind}", cut(whole[f"{ours}.attention.w{x}.{kind}"], 0)
    output = "mixer.out_proj" if is_internlm else "attention.wo"
    yield f"{theirs}.{output}.weight", cut(whole[f"{ours}.attention.wo.weight"], 1)
    if "bias" in kinds and cut.rank == 0:  # added after the sum over ranks, by one of them
        yield f"{theirs}.{output}.bias", whole[f"{ours}.attention.wo.bias"]


@dataclass(frozen=True)
class _Cut:
    """Cuts weights for one of several tensor ranks."""

    rank: int
    ranks: int

    def __call__(self, weight: Weight, dim: int) -> Weight:
        """Return the rank's part: 0: rows, 1: columns."""
        if self.ranks == 1:
            return weight
        shape = list(weight.shape)
        shape[dim] //= self.ranks
        note = f" ({'columns' if dim else 'rows'} of {self.ranks})"
        return weight.turned(shape, lambda tensor: self.part(tensor, dim), note)

    def together(self, weights: list[Weight]) -> Weight:
        """Return the rank's rows of several weights, one below the other."""
        rows = sum(weight.shape[0] for weight in weights) // self.ranks
        note = "" if self.ranks == 1 else f" (rows of {self.ranks})"
        shape = (rows, *weights[0].shape[1:])
        return lazy.joined(weights, shape, lambda tensors: torch.cat([self.part(t, 0) for t in tensors]), note)

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the rank's part of a tensor."""
        return tensor.chunk(self.ranks, dim)[self.rank]


def _starts(layers: int, stages: int) -> list[int]:
    """Return where each stage begins, and the end: the later stages have the layers that are over."""
    sizes = [layers // stages + (stage >= stages - layers % stages) for stage in range(stages)]
    return [sum(sizes[:stage]) for stage in range(stages + 1)]


def _embedding(dialect: str, layout: Layout) -> str:
    """Return the name of the embedding's module."""
    name = "embedding" if dialect == "INTERNLM" else "tok_embeddings"
    return f"model.{name}" if layout.embed_split_hidden else f"model.{name}.word_embeddings"


def _described(config: ModelConfig, layout: Layout, dialect: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return model_config.pt: the model section of the old framework's config."""
    scaling = config.rope.scaling
    described: dict[str, Any] = {
        "num_attention_heads": config.num_heads,
        "embed_split_hidden": layout.embed_split_hidden,
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
    """Return config_file.pt: the part of the old framework's Python config that the model needs."""
    text = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in described.items()}
    model = "".join(f"    {name}={value!r},\n" for name, value in text.items())
    sizes = f"SEQ_LEN = {config.context_length}\nHIDDEN_SIZE = {config.hidden_size}\n"
    return f'model_type = "{dialect}"\n{sizes}model = dict(\n{model})\n'


def _write(folder: storage.Writing, name: str, weights: Weights, options: ExportOptions) -> None:
    """Write a rank's file; one that an interrupted export has finished is kept."""
    path = folder.path / name
    if path.exists():
        options.progress(sum(weight.nbytes for weight in weights.values()))
        return
    beside = path.with_suffix(".unfinished")
    with storage.explained(f"writing {path}"):
        folder.hashes[name] = archive.write(beside, weights, options.progress)
        os.replace(beside, path)


def _card(config: ModelConfig, dialect: str, layout: Layout, dtype: str, notes: Mapping[str, Any]) -> str:
    """Return the README.md of a checkpoint."""
    about = [
        f"Weights only, of model type `{dialect}`, tensor {layout.tensor}, pipeline {layout.pipeline}; the values of",
        "its section `model` are in `model_config.pt`, and as Python in `config_file.pt`.", "",
    ]  # fmt: skip
    use = ["```python", 'load_ckpt_info = dict(path="local:.", content=("model",), ckpt_type="internlm")', "```"]
    name = {"name": "Training checkpoint for InternLM v0.2"}
    return card.page(None, [*about, *card.shape(config, dtype)], use, {**name, **notes}, card.window(config))
