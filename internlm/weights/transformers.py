"""Transformers folders, both ways: a plain `LlamaForCausalLM`, so that every other tool loads what we train.

With experts it is a `MixtralForCausalLM`.

    export(model.named_parameters(), config, Path("out"), Talk(tokenizer, "chatml"))
    AutoModelForCausalLM.from_pretrained("out")            # no remote code
    model = load("out")                                     # and back: the same bits

Tensors pass one at a time: memory holds one shard, never a second model. `export(read_tensors(a), read_config(a), b)`
writes the same weight files again.

Where the formats differ:
- Llama has one switch for the biases of all four attention matrices. Where only some of ours have one, the others are
  written as zeros, which is exact.
- Transformers measures dynamic NTK from `max_position_embeddings`, so that is our `original_length`; the context goes
  into `internlm_context_length`. Early 4.x measures YaRN from there too: exact only where both lengths are equal.
- BOS is written by the chat template, and by nothing else: `tokenizer(text)` gives the ids of `Tokenizer.encode`, so no
  path adds it twice. A base model is asked with `tokenizer(tokenizer.bos_token + text)`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internlm import storage
from internlm.errors import StorageError, WeightsError
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer
from internlm.weights.llama_config import from_llama, to_llama
from internlm.weights.load import Check, load_model, shapes
from internlm.weights.names import expert_of, from_transformers, is_stacked, to_transformers
from internlm.weights.talk import Talk, write_json

logger = logging.getLogger(__name__)

KIND = "export"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written."""

    dtype: torch.dtype | None = None
    """Of the written tensors; None: as they come."""
    max_shard_bytes: int = 5 * 2**30
    """A file that would grow over this is followed by another."""
    replace: bool = False
    """Whether an earlier export may be replaced."""
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts for the manifest."""


def export(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    out: str | Path,
    talk: Talk = Talk(),  # noqa: B008 (frozen)
    options: ExportOptions = ExportOptions(),
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load without remote code.

    Args:
        tensors: our names; every weight once, a tied head may be left out.
        config: shape of the model.
        out: the folder; complete or absent.
        talk: tokenizer and chat format, written along.
        options: how the folder is written.

    Raises:
        WeightsError: tensors are missing, left over or of another shape, or Llama cannot express the shape.
        TokenizerError, DataError: tokenizer and chat format do not belong together.
        StorageError: the folder exists, or could not be written.
    """
    out = Path(out)
    has_bias = config.qkv_bias or config.output_bias
    written = dataclasses.replace(config, qkv_bias=has_bias, output_bias=has_bias)
    described = to_llama(written)
    talk.check(config.vocab_size)
    storage.check_free(out, KIND, replace=options.replace)
    with storage.writing(out, KIND, replace=options.replace) as folder:
        shards = _Shards(folder.path, options.max_shard_bytes)
        for name, tensor in _checked(tensors, config):
            if not shards.elements:
                size = (options.dtype or tensor.dtype).itemsize
                storage.require_space(out, config.num_parameters * size, f"export {out.name}")
            stored_tensor = tensor.detach().to("cpu", options.dtype or tensor.dtype)
            if not stored_tensor.isfinite().all():
                raise WeightsError(
                    f"is not finite as {stored_tensor.dtype}",
                    where=name,
                    do="Export as float32 or bfloat16, or train anew.",
                )
            if is_stacked(name):
                for number, matrix in enumerate(stored_tensor):
                    shards.add(to_transformers(name, number), matrix)
            else:
                shards.add(to_transformers(name), stored_tensor)
        shards.close()
        stored = str(shards.main_dtype).removeprefix("torch.")
        # Transformers 4 reads `torch_dtype`, 5 writes `dtype` and reads both.
        write_json(folder.path / "config.json", described | talk.role_ids() | {"torch_dtype": stored, "dtype": stored})
        talk.write(folder.path)
        storage.write_text(folder.path / "README.md", _card(written, stored, talk))
        folder.meta.update({"internlm_template": talk.template, "dtype": stored, **options.notes})


def read_config(folder: str | Path) -> ModelConfig:
    """Return the shape of the model in a Transformers folder.

    Raises:
        WeightsError: there is no config.json, or it describes something this decoder does not have.
    """
    path = Path(folder) / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError("no config.json: this is no Transformers folder", where=folder) from None
    except (ValueError, NotADirectoryError) as error:
        raise WeightsError(f"cannot be read: {error}", where=path) from error
    return from_llama(described, path)


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor) one at a time, in the model's order; what the model does not know comes last.

    Raises:
        WeightsError: there are no safetensors files, one is damaged, or a name is not a Llama's.
    """
    folder = Path(folder)
    located = _locate(folder)
    # Old exports carry the rotary frequencies, which follow from the config.
    named = {name for name in located if not name.endswith("rotary_emb.inv_freq")}
    found: dict[str, list[str]] = {}  # ours → theirs: one, or one per expert
    for name in sorted(named, key=lambda name: expert_of(name) or 0):
        found.setdefault(from_transformers(name), []).append(name)
    order = [name for name in shapes(read_config(folder)) if name in found]
    order += [name for name in found if name not in set(order)]
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            file = located[name]
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                return opened[file].get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"cannot be read: {error}", where=file, do="Copy the file again.") from error

        for name in order:
            parts = [read(theirs) for theirs in found[name]]
            if len({part.shape for part in parts}) > 1:
                raise WeightsError("the experts differ in shape", where=name)
            yield name, torch.stack(parts) if is_stacked(name) else parts[0]


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
    """Return the model of a Transformers folder.

    Args:
        folder: config.json and safetensors.
        dtype: of the weights; None: as stored.
        device: where they go, one tensor at a time.

    Raises:
        WeightsError: as `read_config`, `read_tensors` and `fill`.
    """
    return load_model(read_config(folder), read_tensors(folder), dtype=dtype, device=device)


def _checked(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that Llama needs: ours, and zeros for the biases that we have not."""
    check = Check(shapes(config), config.tie_embeddings)
    dtype = None
    for name, tensor in tensors:
        if check.accepts(name, tensor.shape):
            dtype = dtype or tensor.dtype
            yield name, tensor
    check.finish()
    if config.qkv_bias == config.output_bias:
        return
    absent = ("wo",) if config.qkv_bias else ("wq", "wk", "wv")
    logger.info("Llama has biases on all attention matrices or on none: zeros are written for %s", ", ".join(absent))
    for name, shape in shapes(config).items():
        part = name.split(".")[-2]
        if part in absent:
            yield name.removesuffix("weight") + "bias", torch.zeros(shape[0], dtype=dtype)


class _Shards:
    """Writes safetensors files of bounded size; the count in their names is known, and given, at the end."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.held: dict[str, Tensor] = {}
        self.held_bytes = self.total_bytes = 0
        self.files: list[list[str]] = []
        self.elements: dict[torch.dtype, int] = {}

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype that most elements have."""
        return max(self.elements, key=lambda dtype: self.elements[dtype])

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a weight; write a file when it is full."""
        size = tensor.numel() * tensor.element_size()
        if self.held and self.held_bytes + size > self.max_bytes:
            self._flush()
        self.held[name] = tensor.contiguous()
        self.held_bytes += size
        self.total_bytes += size
        self.elements[tensor.dtype] = self.elements.get(tensor.dtype, 0) + tensor.numel()

    def close(self) -> None:
        """Write the last file, give all files their names, and the index where there are several."""
        self._flush()
        if len(self.files) == 1:
            self._path(0).rename(self.folder / SINGLE)
            return
        where = {}
        for number, names in enumerate(self.files):
            final = f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"
            self._path(number).rename(self.folder / final)
            where.update(dict.fromkeys(names, final))
        write_json(self.folder / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": where})

    def _flush(self) -> None:
        # safetensors refuses tensors that share memory, as a view of a larger one does.
        apart = {name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in self.held.items()}
        with storage.explained(f"writing {self.folder}"):
            try:
                save_file(apart, self._path(len(self.files)), metadata={"format": "pt"})
            except SafetensorError as error:  # it wraps what the system said, such as a full disk
                raise StorageError(f"failed while writing weights: {error}", where=self.folder) from error
        self.files.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}.safetensors"


def _locate(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor in a Transformers folder."""
    if (folder / INDEX).is_file():
        try:
            where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise WeightsError(f"cannot be read: {error}", where=folder / INDEX) from error
        return {name: folder / file for name, file in where.items()}
    single = folder / SINGLE
    if not single.is_file():
        raise WeightsError(f"holds neither {SINGLE} nor {INDEX}", where=folder, do="Only safetensors are read.")
    try:
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except SafetensorError as error:
        raise WeightsError(f"cannot be read: {error}", where=single, do="Copy the file again.") from error


def _card(config: ModelConfig, dtype: str, talk: Talk) -> str:
    """Return the README.md of an export."""
    model = "LlamaForCausalLM" if config.experts is None else "MixtralForCausalLM"
    can_chat = talk.template is not None or talk.foreign is not None
    kind = "a base model (plain continuation, no chat format)"
    if can_chat:
        kind = f"a chat model (format `{talk.template}`)" if talk.template else "a chat model (its own format)"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", "# Model", "",
        f"A `{model}` with {config.num_parameters:,} parameters, {kind}.", "",
        "| | |", "|---|---|",
        f"| layers | {config.num_layers} |",
        f"| hidden size | {config.hidden_size} |",
        f"| heads (key-value heads) × head size | {config.num_heads} ({config.num_kv_heads}) × {config.head_dim} |",
        f"| feed-forward size | {config.ffn_size} |",
        f"| vocabulary | {config.vocab_size} |",
        f"| context | {config.context_length} tokens |",
        f"| stored as | {dtype} |", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained(".")',
    ]  # fmt: skip
    if talk.tokenizer is not None:
        lines.append('tokenizer = AutoTokenizer.from_pretrained(".")')
        start = "tokenizer.bos_token + " if talk.tokenizer.bos_id is not None else ""
        ids = f'tokenizer({start}"Once", return_tensors="pt")'
        if can_chat:
            question = '[{"role": "user", "content": "Hello"}]'
            options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
            ids = f"tokenizer.apply_chat_template({question}, {options})"
        lines += [f"inputs = {ids}", "print(tokenizer.decode(model.generate(**inputs)[0]))"]
    lines += ["```", "", "Or talk to it: `internlm chat .`", ""]
    return "\n".join(lines)
