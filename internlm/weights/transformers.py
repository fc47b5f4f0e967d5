"""Transformers folders, both ways: a plain `LlamaForCausalLM`, so that every other tool loads what we train.

    export(model.named_parameters(), config, Path("out"), tokenizer=tokenizer, template="chatml")
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
  path adds it twice. A base model is asked with `tokenizer(tokenizer.bos_token + text)`. (A foreign tokenizer.json that
  adds BOS by itself is copied as it is: its fingerprint says what the model was trained with.)
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internlm import storage
from internlm.errors import StorageError, TokenizerError, WeightsError
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer
from internlm.text.chat import Message, render, stop_ids
from internlm.text.templates import TEMPLATES, get_template, jinja
from internlm.text.tokenizer import Tokenizer
from internlm.weights.llama_config import from_llama, to_llama
from internlm.weights.load import Check, empty, fill, shapes
from internlm.weights.names import from_transformers, to_transformers

logger = logging.getLogger(__name__)

KIND = "export"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def export(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None,
    template: str | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    replace: bool = False,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load without remote code.

    Args:
        tensors: our names; every weight once, a tied head may be left out.
        config: shape of the model.
        out: the folder; complete or absent.
        tokenizer: written along; None: weights only.
        template: name of the chat template, None for a base model. Its stop tokens go into `generation_config.json`.
        dtype: of the written tensors; None: as they come.
        max_shard_bytes: a file that would grow over this is followed by another.
        replace: whether an earlier export may be replaced.
        notes: JSON-able facts for the manifest.

    Raises:
        WeightsError: tensors are missing, left over or of another shape, or Llama cannot express the shape.
        StorageError: the folder exists, or could not be written.
    """
    out = Path(out)
    has_bias = config.qkv_bias or config.output_bias
    written = dataclasses.replace(config, qkv_bias=has_bias, output_bias=has_bias)
    described = to_llama(written)
    _check_talk(config, tokenizer, template)
    storage.check_free(out, KIND, replace=replace)
    with storage.writing(out, KIND, replace=replace) as folder:
        shards = _Shards(folder.path, max_shard_bytes)
        for name, tensor in _checked(tensors, config):
            if not shards.elements:
                size = (dtype or tensor.dtype).itemsize
                storage.require_space(out, config.num_parameters * size, f"export {out.name}")
            stored_tensor = tensor.detach().to("cpu", dtype or tensor.dtype)
            if not stored_tensor.isfinite().all():
                raise WeightsError(
                    f"is not finite as {stored_tensor.dtype}",
                    where=name,
                    do="Export as float32 or bfloat16, or train anew.",
                )
            shards.add(to_transformers(name), stored_tensor)
        shards.close()
        stored = str(shards.main_dtype).removeprefix("torch.")
        tokens = {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}
        # Transformers 4 reads `torch_dtype`, 5 writes `dtype` and reads both.
        _write_json(folder.path / "config.json", described | tokens | {"torch_dtype": stored, "dtype": stored})
        stops = _write_tokenizer(tokenizer, template, folder.path)
        _write_json(folder.path / "generation_config.json", tokens | {"eos_token_id": stops or None})
        storage.write_text(folder.path / "README.md", _card(written, stored, template, tokenizer))
        folder.meta.update({"internlm_template": template, "dtype": stored, **(notes or {})})


def _check_talk(config: ModelConfig, tokenizer: Tokenizer | None, template: str | None) -> None:
    """Check, before anything is written, that tokenizer and template can be used with the model.

    Raises:
        WeightsError: the tokenizer has more ids than the model, or there is a template and no tokenizer.
        TokenizerError, DataError: the template is not known, or needs tokens that the tokenizer lacks.
    """
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise WeightsError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    if template is not None:
        chosen = get_template(template)
        if tokenizer is None:
            raise WeightsError(f"the chat format {template!r} needs a tokenizer")
        render([Message("user", "a"), Message("assistant", "a")], chosen, tokenizer)


def template_of(folder: str | Path) -> str | None:
    """Return the name of the chat template that a folder was exported with, None where it is not known."""
    try:
        described = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = described.get("internlm_template")
    if name in TEMPLATES:
        return name
    text = described.get("chat_template")
    known = next((t for t, template in TEMPLATES.items() if text is not None and text == jinja(template)), None)
    if known is None and (text is not None or (Path(folder) / "chat_template.jinja").exists()):
        logger.warning(
            "warning: %s has a chat template that is not known here: it is not used, and not exported", folder
        )
    return known


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
    files = {from_transformers(name): located[name] for name in located if not name.endswith("rotary_emb.inv_freq")}
    order = [name for name in shapes(read_config(folder)) if name in files]
    order += [name for name in files if name not in set(order)]
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name in order:
            file = files[name]
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                tensor = opened[file].get_tensor(to_transformers(name))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"cannot be read: {error}", where=file, do="Copy the file again.") from error
            yield name, tensor


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
    """Return the model of a Transformers folder.

    Args:
        folder: config.json and safetensors.
        dtype: of the weights; None: as stored.
        device: where they go, one tensor at a time.

    Raises:
        WeightsError: as `read_config`, `read_tensors` and `fill`.
    """
    model = empty(read_config(folder))
    # safe_open maps the file: a clone keeps the weights when the folder is replaced under a running process.
    fill(model, ((name, tensor.to(device, copy=True)) for name, tensor in read_tensors(folder)), dtype=dtype)
    return model


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
        _write_json(self.folder / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": where})

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


def _write_tokenizer(tokenizer: Tokenizer | None, template: str | None, folder: Path) -> list[int]:
    """Write the tokenizer's files and return the ids that end an answer."""
    if tokenizer is None:
        return []
    tokenizer.save(folder)
    if not (folder / "tokenizer.json").exists():
        try:
            tokenizer.write_tokenizer_json(folder / "tokenizer.json")
        except TokenizerError as error:
            logger.warning("warning: only tokenizer.model is written, AutoTokenizer may not load it: %s", error)
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.config()}
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if template is not None:
        chosen = get_template(template)
        described |= {"chat_template": jinja(chosen), "internlm_template": template}
        stops += [id_ for id_ in stop_ids(chosen, tokenizer) if id_ not in stops]
    _write_json(folder / "tokenizer_config.json", described)
    return stops


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    storage.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _card(config: ModelConfig, dtype: str, template: str | None, tokenizer: Tokenizer | None) -> str:
    """Return the README.md of an export."""
    kind = f"a chat model (format `{template}`)" if template else "a base model (plain continuation, no chat format)"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", "# Model", "",
        f"A `LlamaForCausalLM` with {config.num_parameters:,} parameters, {kind}.", "",
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
    if tokenizer is not None:
        lines.append('tokenizer = AutoTokenizer.from_pretrained(".")')
        start = "tokenizer.bos_token + " if tokenizer.bos_id is not None else ""
        ids = f'tokenizer({start}"Once", return_tensors="pt")'
        if template is not None:
            talk = '[{"role": "user", "content": "Hello"}]'
            options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
            ids = f"tokenizer.apply_chat_template({talk}, {options})"
        lines += [f"inputs = {ids}", "print(tokenizer.decode(model.generate(**inputs)[0]))"]
    lines += ["```", "", "Or talk to it: `internlm chat .`", ""]
    return "\n".join(lines)
