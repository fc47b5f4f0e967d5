"""GGUF files, both ways: what llama.cpp and the programs around it (Ollama, LM Studio, …) run.

    export(of_tensors(model.named_parameters()), config, Path("out"), Talk(tokenizer, "chatml"))
    # out/out-f32.gguf, for `llama-cli -m`; beside it the tokenizer's own files, README.md and manifest.json
    model = load_model(read_config("out"), tensors(open_weights("out")))      # and back: the same bits

The file is of llama.cpp's architecture `llama`, whatever biases the model has: it takes those of all four attention
matrices where they are there; with experts it is what llama.cpp makes of a Mixtral. With norms of queries and keys it
is `qwen3` or `qwen3moe`.

Rotary pairs: ours are (x[i], x[i + E/2]). Those of `llama` lie side by side, (x[2i], x[2i + 1]): rows of wq and wk, and
their biases, go from one order into the other. Attention does not see it: q and k are turned in the same order.

    head of width 6        ours  a0 a1 a2 b0 b1 b2        theirs  a0 b0 a1 b1 a2 b2

Norms, biases and routers are float32 there, as llama.cpp needs them. A rotary scaling that it has no name for goes as
a table of factors: llama3's, and YaRN's with other betas than 32 and 1. Dynamic NTK cannot be written: such a file is
exact up to the trained length, which it gives as its context.

Read are files of one part, of these architectures and qwen2; quantised tensors come as float32. Not read: the tokenizer
of a file that has no folder of ours around it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from internlm import storage
from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.runtime import dtype_name
from internlm.weights import card, files
from internlm.weights import talk as talks
from internlm.weights import weight as lazy
from internlm.weights.gguf import fields, header, vocabulary
from internlm.weights.load import check, shapes
from internlm.weights.talk import Talk
from internlm.weights.transformers import KIND, ExportOptions
from internlm.weights.weight import Weight, Weights

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "Q8_0"}
"""dtype of a written tensor → its GGML type; blocks of Q8_0 are bytes here."""
NAMES: dict[str, str] = {
    "embedding.weight": "token_embd.weight",
    "blocks.{i}.attention_norm.weight": "blk.{i}.attn_norm.weight",
    "blocks.{i}.attention.wq.weight": "blk.{i}.attn_q.weight",
    "blocks.{i}.attention.wq.bias": "blk.{i}.attn_q.bias",
    "blocks.{i}.attention.wk.weight": "blk.{i}.attn_k.weight",
    "blocks.{i}.attention.wk.bias": "blk.{i}.attn_k.bias",
    "blocks.{i}.attention.wv.weight": "blk.{i}.attn_v.weight",
    "blocks.{i}.attention.wv.bias": "blk.{i}.attn_v.bias",
    "blocks.{i}.attention.wo.weight": "blk.{i}.attn_output.weight",
    "blocks.{i}.attention.wo.bias": "blk.{i}.attn_output.bias",
    "blocks.{i}.attention.q_norm.weight": "blk.{i}.attn_q_norm.weight",
    "blocks.{i}.attention.k_norm.weight": "blk.{i}.attn_k_norm.weight",
    "blocks.{i}.feed_forward_norm.weight": "blk.{i}.ffn_norm.weight",
    "blocks.{i}.feed_forward.w_gate.weight": "blk.{i}.ffn_gate.weight",
    "blocks.{i}.feed_forward.w_up.weight": "blk.{i}.ffn_up.weight",
    "blocks.{i}.feed_forward.w_down.weight": "blk.{i}.ffn_down.weight",
    "blocks.{i}.feed_forward.router.weight": "blk.{i}.ffn_gate_inp.weight",
    "blocks.{i}.feed_forward.experts.w_gate.weight": "blk.{i}.ffn_gate_exps.weight",
    "blocks.{i}.feed_forward.experts.w_up.weight": "blk.{i}.ffn_up_exps.weight",
    "blocks.{i}.feed_forward.experts.w_down.weight": "blk.{i}.ffn_down_exps.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
"""Ours → those of a file; `{i}` is the layer."""
_BACK = {theirs: ours for ours, theirs in NAMES.items()}


def export(
    weights: Weights,
    config: ModelConfig,
    out: str | Path,
    talk: Talk = Talk(),  # noqa: B008 (frozen)
    options: ExportOptions = ExportOptions(),  # noqa: B008 (frozen)
    *,
    quantization: Literal["q8_0"] | None = None,
) -> Weights:
    """Write a folder with one file `<folder>-<dtype>.gguf`, and the tokenizer's own files beside it.

    Args:
        weights: our names; a tied head may be left out.
        config: shape of the model.
        out: the folder; complete or absent.
        talk: tokenizer and chat format, written into the file.
        options: how it is written; the file is one, whatever `max_shard_bytes`.
        quantization: "q8_0": matrices as 8-bit integers with a float16 scale for each 32 of a row. Rows that are no
            multiple of 32 become float16.

    Returns:
        what was written: the weights by the names of the file, each with its origin; q8_0 as rows of bytes.

    Raises:
        UsageError: the package gguf is not installed.
        WeightsError: weights are missing, left over or of another shape, or llama.cpp cannot express the shape.
        TokenizerError, DataError: tokenizer and chat format do not belong together, or llama.cpp has no such tokenizer.
        StorageError: the folder exists, or could not be written.
    """
    gguf, out = header.library(), Path(os.path.abspath(out))
    check(weights, config)
    theirs = _written(weights, config, options.dtype, quantization)
    talk.check(config.vocab_size)
    storage.check_free(out, KIND, replace=options.replace)
    tag = TYPES[theirs["token_embd.weight"].dtype].lower() if quantization is None else quantization
    with storage.writing(out, KIND, replace=options.replace, resume=options.resume) as folder:
        files.require_space(folder, sum(weight.nbytes for weight in theirs.values()), f"export {out.name}")
        talk.write(folder.path)
        name = out.name.removesuffix(".gguf")
        path = folder.path / f"{name}-{tag}.gguf"
        if not path.exists():  # complete, where an interrupted export goes on
            beside = path.with_suffix(".unfinished")
            writer = gguf.GGUFWriter(beside, fields.architecture(config))
            writer.add_type("model")
            writer.add_name(name)
            writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if tag == 'f32' else 'MOSTLY'}_{tag.upper()}"])
            if quantization is not None:
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            fields.describe(writer, config)
            vocabulary.describe(writer, talk, folder.path, config.vocab_size)
            with storage.explained(f"writing {path}"):
                _write(writer, theirs, options.progress)
                with open(beside, "rb") as written:
                    os.fsync(written.fileno())  # its name says that it is complete, after a power cut too
                os.replace(beside, path)
        options.copy_licences(folder.path)
        storage.write_text(folder.path / "README.md", _card(config, path.name, talk, tag, options.notes))
        folder.meta.update({"internlm_template": talk.template, "dtype": tag, **options.notes})
    return theirs


def is_one(path: str | Path) -> bool:
    """Return whether `path` is a GGUF file, or a folder that holds one and no other format."""
    path = Path(path)
    if path.is_dir():
        return any(path.glob("*.gguf")) and not (path / "config.json").exists()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == header.MAGIC


def read_talk(path: str | Path) -> Talk:
    """Return how the model of a GGUF file is talked to: what our folder around it says, else nothing.

    Raises:
        TokenizerError: the tokenizer is damaged, or of a kind that is not known.
    """
    file = _file(Path(path))
    is_ours = storage.is_complete(file.parent, KIND) and len(list(file.parent.glob("*.gguf"))) == 1
    return talks.read_talk(file.parent) if is_ours else Talk()


def read_config(path: str | Path) -> ModelConfig:
    """Return the shape of the model in a GGUF file.

    Raises:
        UsageError: the package gguf is not installed.
        WeightsError: the file is damaged, or describes something this decoder does not have.
    """
    return fields.read_config(header.read_header(_file(Path(path))))


def open_weights(path: str | Path) -> Weights:
    """Return the weights of a GGUF file by our names, not read yet.

    Norms, biases and routers are float32 there; they come in the dtype of the matrices where it holds all their values.

    Raises:
        UsageError: the package gguf is not installed.
        WeightsError: the file is damaged, or a tensor is not one of the architecture's.
    """
    opened = header.read_header(_file(Path(path)))
    config = fields.read_config(opened)
    expected = {name: tuple(shape) for name, shape in shapes(config).items()}
    found: Weights = {}
    for tensor in opened.tensors.values():
        if tensor.name == fields.ROPE_TABLE:
            continue
        name = _translated(tensor.name, _BACK)
        if name is None:
            raise WeightsError("no such tensor in a model of this kind", where=f"{opened.path}: {tensor.name}")
        shape = expected.get(name, tensor.shape)
        if tensor.shape != shape:
            raise WeightsError(f"is {tensor.shape}, not {shape}", where=f"{opened.path}: {tensor.name}")
        heads = _turned_heads(name, config, opened.fields["general.architecture"]) if name in expected else None
        weight = Weight(tensor.shape, tensor.dtype, tensor.read, tensor.name)
        found[name] = weight if heads is None else _pairs_apart(weight, heads)
    order = [name for name in expected if name in found]
    order += [name for name in found if name not in set(order)]
    dtype = lazy.main_dtype(found)
    others = {name: weight for name, weight in found.items() if torch.promote_types(weight.dtype, dtype) != dtype}
    if any(not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for _, tensor in lazy.tensors(others)):
        return {name: found[name] for name in order}
    return {name: found[name].to(dtype) for name in order}


def _written(weights: Weights, config: ModelConfig, dtype: torch.dtype | None, quantization: str | None) -> Weights:
    """Return the weights by the names and in the forms of a file.

    Raises:
        WeightsError: llama.cpp has no such shape or dtype.
    """
    architecture = fields.architecture(config)
    theirs: Weights = {}
    for name, shape in shapes(config).items():
        weight, heads = weights[name], _turned_heads(name, config, architecture)
        if heads is not None:
            weight = _pairs_together(weight, heads)
        if len(shape) == 1 or ".router." in name:
            weight = weight.to(torch.float32)
        elif quantization is not None:
            weight = _quantized(name, weight)
        else:
            weight = weight.to(dtype)
        if weight.dtype not in TYPES:
            allowed = [dtype_name(dtype) for dtype in TYPES if dtype.is_floating_point]
            raise WeightsError("cannot be written as it is", where=name, got=str(weight.dtype), allowed=allowed)
        theirs[_translated(name, NAMES) or name] = weight
    if fields.needs_table(config.rope):
        theirs[fields.ROPE_TABLE] = lazy.of_tensor(fields.table(config), "(rotary scaling)")
    return theirs


def _quantized(name: str, weight: Weight) -> Weight:
    """Return a matrix as Q8_0: rows of blocks, each a float16 scale and 32 int8."""
    if weight.shape[-1] % 32:
        return weight.to(torch.float16)
    library = header.library()

    def read() -> Tensor:
        tensor = lazy.read(name, weight).float()
        if not files.is_finite(tensor):
            raise WeightsError("is not finite", where=name)
        return torch.from_numpy(library.quants.quantize(tensor.numpy(), library.GGMLQuantizationType.Q8_0))

    return Weight((*weight.shape[:-1], weight.shape[-1] // 32 * 34), torch.uint8, read, f"{weight.origin} as q8_0")


def _turned_heads(name: str, config: ModelConfig, architecture: str) -> int | None:
    """Return how many heads one of our weights makes, if their rotary pairs lie otherwise there."""
    if not fields.pairs_lie_together(architecture):
        return None
    return {"wq": config.num_heads, "wk": config.num_kv_heads}.get(name.split(".")[-2])


def _pairs_together(weight: Weight, heads: int) -> Weight:
    """Return wq or wk, or a bias of them, with the rows of a rotary pair side by side."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return weight.turned(weight.shape, turn, " (pairs together)")


def _pairs_apart(weight: Weight, heads: int) -> Weight:
    """Undo `_pairs_together`."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return weight.turned(weight.shape, turn, " (pairs apart)")


def _write(writer: Any, weights: Weights, done: Callable[[int], None]) -> None:
    """Write a file, one tensor at a time: what stands before the tensors depends on their forms alone."""
    types = header.library().GGMLQuantizationType
    try:
        for name, weight in weights.items():
            kind = np.uint8 if weight.dtype == torch.uint8 else np.float32  # shapes of uint8 are in bytes
            writer.add_tensor_info(name, weight.shape, np.dtype(kind), weight.nbytes, types[TYPES[weight.dtype]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights.items():
            tensor = lazy.read(name, weight)
            if not files.is_finite(tensor):
                raise WeightsError(f"is not finite as {tensor.dtype}", where=name, do="Choose bfloat16 or float32.")
            writer.write_tensor_data(np.asarray(files.as_bytes(tensor)))
            done(weight.nbytes)
    finally:
        writer.close()


def _file(path: Path) -> Path:
    """Return the GGUF file that `path` is or holds."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names = [file.name for file in found]
        raise WeightsError(f"holds {len(found)} GGUF files", where=path, got=names or None, do="Give the file itself.")
    return found[0]


def _translated(name: str, table: dict[str, str]) -> str | None:
    """Return a weight's name on the other side of a table, None where it has none."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return table.get(name)
    found = table.get(name.replace(f".{number[0]}.", ".{i}.", 1))
    return found and found.replace("{i}", number[0])


def _card(config: ModelConfig, file: str, talk: Talk, dtype: str, notes: Mapping[str, Any]) -> str:
    """Return the README.md of an export."""
    chats = talk.template is not None or talk.foreign is not None
    kind = "a chat model" if chats else "a base model (plain continuation, no chat format)"
    about = [f"`{file}`: {config.num_parameters:,} parameters, {kind}, for llama.cpp and the programs around it.", ""]
    use = ["```sh", f"llama-cli -m {file} {'-cnv --jinja' if chats else '-no-cnv -p Once'}", "```"]
    return card.page("gguf", [*about, *card.shape(config, dtype)], use, notes, card.window(config))
