"""GGUF files, both ways: what llama.cpp and the programs around it (Ollama, LM Studio, …) run.

    export(of_tensors(model.named_parameters()), config, Path("out"), Talk(tokenizer, "chatml"))
    # out/out-f32.gguf, for `llama-cli -m`; beside it the tokenizer's own files, README.md and manifest.json
    model = read_model(read_config("out"), open_weights("out"))      # and back: the same bits

The file is of llama.cpp's architecture `llama`, with any biases of attention, and experts as of a Mixtral; with norms
of queries and keys it is `qwen3` or `qwen3moe`.

Rotary pairs: ours are (x[i], x[i + E/2]). Those of `llama` lie side by side, (x[2i], x[2i + 1]): rows of wq and wk, and
their biases, go from one order into the other. Attention does not see it: q and k are turned alike.

    head of width 6        ours  a0 a1 a2 b0 b1 b2        theirs  a0 b0 a1 b1 a2 b2

Norms, biases and routers are float32 there. A rotary scaling that llama.cpp has no name for goes as a table of
factors. Dynamic NTK cannot be written: such a file is exact up to the trained length, which it gives as its context.

Read are files of one part, of these architectures and qwen2; quantised tensors come as float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from internlm import disk, storage
from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.runtime import dtype_name
from internlm.weights import card, files
from internlm.weights import talk as talks
from internlm.weights import weight as lazy
from internlm.weights.families.table import to_transformers as translated
from internlm.weights.gguf import fields, header, vocabulary
from internlm.weights.load import check, ordered, shapes
from internlm.weights.talk import Talk
from internlm.weights.transformers import KIND, ExportOptions, exporting
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
    """Write a folder with one file `<folder>-<dtype>.gguf`, whatever its size, and the tokenizer's own files beside it.

    Otherwise arguments, result and errors are those of `transformers.export`.

    Args:
        quantization: "q8_0": matrices as 8-bit integers with a float16 scale for each 32 of a row; rows that are no
            multiple of 32 become float16.

    Raises:
        UsageError: the package gguf is not installed.
        WeightsError, TokenizerError: llama.cpp cannot express the shape, or has no such tokenizer.
    """
    gguf, out = header.library(), Path(os.path.abspath(out))
    check(weights, config)
    theirs = _written(weights, config, options.dtype, quantization)
    talk.check(config.vocab_size)
    tag = TYPES[theirs["token_embd.weight"].dtype].lower() if quantization is None else quantization
    with exporting(out, theirs.values(), talk, options) as folder:
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
            with disk.explained(f"writing {path}"):
                _write(writer, theirs, options.progress)
                with open(beside, "rb") as written:
                    os.fsync(written.fileno())  # its name says that it is complete
                os.replace(beside, path)
        disk.write_text(folder.path / "README.md", _card(config, path.name, talk, tag, options.notes))
        folder.meta["dtype"] = tag
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
    """Return how the model of a GGUF file is talked to: what our folder around it says (`read_talk`), else nothing."""
    file = _file(Path(path))
    is_ours = storage.is_complete(file.parent, KIND) and len(list(file.parent.glob("*.gguf"))) == 1
    return talks.read_talk(file.parent) if is_ours else Talk()


def read_config(path: str | Path) -> ModelConfig:
    """Return the shape of the model in a GGUF file.

    Raises:
        WeightsError: the file is damaged, or describes something this decoder does not have.
    """
    return fields.read_config(header.read_header(_file(Path(path))))


def open_weights(path: str | Path) -> Weights:
    """Return the weights of a GGUF file by our names, not read yet.

    Norms, biases and routers come in the dtype of the matrices where it holds all their values.

    Raises:
        WeightsError: the file is damaged, or a tensor is not one of the architecture's.
    """
    opened = header.read_header(_file(Path(path)))
    config = fields.read_config(opened)
    expected = {name: tuple(shape) for name, shape in shapes(config).items()}
    found: Weights = {}
    for tensor in opened.tensors.values():
        if tensor.name == fields.ROPE_TABLE:
            continue
        name = translated(tensor.name, _BACK, opened.path)
        shape = expected.get(name, tensor.shape)
        if tensor.shape != shape:
            raise WeightsError(f"is {tensor.shape}, not {shape}", where=f"{opened.path}: {tensor.name}")
        weight = Weight(tensor.shape, tensor.dtype, tensor.read, tensor.name)
        is_turned = name in expected and _is_turned(name, opened.fields["general.architecture"])
        found[name] = lazy.pairs_apart(weight, config.head_dim) if is_turned else weight
    found, dtype = ordered(found, config), lazy.main_dtype(found)
    others = {name: weight for name, weight in found.items() if torch.promote_types(weight.dtype, dtype) != dtype}
    if any(not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for _, tensor in lazy.tensors(others)):
        return found
    return {name: weight.to(dtype) for name, weight in found.items()}


def _written(weights: Weights, config: ModelConfig, dtype: torch.dtype | None, quantization: str | None) -> Weights:
    architecture = fields.architecture(config)
    theirs: Weights = {}
    for name, shape in shapes(config).items():
        weight = weights[name]
        if _is_turned(name, architecture):
            weight = _pairs_together(weight, config.head_dim)
        if len(shape) == 1 or ".router." in name:
            weight = weight.to(torch.float32)
        elif quantization is not None:
            weight = _quantized(name, weight)
        else:
            weight = weight.to(dtype)
        if weight.dtype not in TYPES:
            allowed = [dtype_name(dtype) for dtype in TYPES if dtype.is_floating_point]
            raise WeightsError("cannot be written as it is", where=name, got=str(weight.dtype), allowed=allowed)
        theirs[translated(name, NAMES)] = weight
    if fields.needs_table(config.rope):
        theirs[fields.ROPE_TABLE] = lazy.of_tensor(fields.table(config), "(rotary scaling)")
    return theirs


def _quantized(name: str, weight: Weight) -> Weight:
    """Return a matrix as Q8_0: rows of blocks, each a float16 scale and 32 int8, as bytes."""
    if weight.shape[-1] % 32:
        return weight.to(torch.float16)
    library = header.library()

    def read() -> Tensor:
        tensor = files.require_finite(name, lazy.read(name, weight).float())
        return torch.from_numpy(library.quants.quantize(tensor.numpy(), library.GGMLQuantizationType.Q8_0))

    return Weight((*weight.shape[:-1], weight.shape[-1] // 32 * 34), torch.uint8, read, f"{weight.origin} as q8_0")


def _is_turned(name: str, architecture: str) -> bool:
    """Return whether the rotary pairs of one of our weights lie side by side there."""
    return architecture == "llama" and name.split(".")[-2] in ("wq", "wk")


def _pairs_together(weight: Weight, head_dim: int) -> Weight:
    """Undo `lazy.pairs_apart`."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return weight.turned(weight.shape, turn, " (pairs together)")


def _write(writer: Any, weights: Weights, done: Callable[[int], None]) -> None:
    """Write a file, one tensor at a time: what stands before them depends on their forms alone."""
    types = header.library().GGMLQuantizationType
    try:
        for name, weight in weights.items():
            kind = np.uint8 if weight.dtype == torch.uint8 else np.float32  # shapes of uint8 are in bytes
            writer.add_tensor_info(name, weight.shape, np.dtype(kind), weight.nbytes, types[TYPES[weight.dtype]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights.items():
            tensor = files.require_finite(name, lazy.read(name, weight))
            writer.write_tensor_data(np.asarray(files.as_bytes(tensor)))
            done(weight.nbytes)
    finally:
        writer.close()


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names = [file.name for file in found]
        raise WeightsError(f"holds {len(found)} GGUF files", where=path, got=names or None, do="Give the file itself.")
    return found[0]


def _card(config: ModelConfig, file: str, talk: Talk, dtype: str, notes: Mapping[str, Any]) -> str:
    chats = talk.template is not None or talk.foreign is not None
    kind = "a chat model" if chats else "a base model (plain continuation, no chat format)"
    about = [f"`{file}`: {config.num_parameters:,} parameters, {kind}, for llama.cpp and the programs around it.", ""]
    use = ["```sh", f"llama-cli -m {file} {'-cnv --jinja' if chats else '-no-cnv -p Once'}", "```"]
    return card.page("gguf", [*about, *card.shape(config, dtype)], use, notes, config)
