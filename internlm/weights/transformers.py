"""Transformers folders, both ways: a plain `LlamaForCausalLM`, which every other tool loads.

With experts it is a `MixtralForCausalLM`, with norms of queries and keys a `Qwen3ForCausalLM`, with both a
`Qwen3MoeForCausalLM`; `ExportOptions.family` names any other of `families.table`.

    export(of_tensors(model.named_parameters()), config, Path("out"), Talk(tokenizer, "chatml"))
    AutoModelForCausalLM.from_pretrained("out")            # no remote code
    model = load("out")                                     # and back: the same bits

`export(open_weights(a), read_config(a), b)` writes the same weight files again.

Where the formats differ:
- Transformers measures dynamic NTK from `max_position_embeddings`, so that is our `original_length`; the context goes
  into `internlm_context_length`. Early 4.x measures YaRN from there too: exact only where both lengths are equal.
- Where a chat template of ours writes BOS nothing else does: `tokenizer(text)` gives the ids of `Tokenizer.encode`. A
  base model is asked with `tokenizer(tokenizer.bos_token + text)`, one whose `tokenizer.json` puts BOS before a text
  itself with `tokenizer(text)`: the card says which.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internlm import disk, storage
from internlm.errors import StorageError, WeightsError
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer
from internlm.runtime import dtype_name
from internlm.weights import carried, files
from internlm.weights import weight as lazy
from internlm.weights.card import card
from internlm.weights.families import fields
from internlm.weights.families import translate as families
from internlm.weights.load import check, read_model
from internlm.weights.talk import Talk
from internlm.weights.weight import Weight, Weights

KIND = "export"


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written."""

    dtype: torch.dtype | None = None
    """Of the written tensors; None: as they come."""
    max_shard_bytes: int = 5 * 2**30
    """Of a file, unless one tensor is larger."""
    replace: bool = False
    """Whether an earlier export may be replaced."""
    notes: dict[str, Any] = field(default_factory=dict)
    """For the manifest and the model card (see `card`)."""
    resume: str | None = None
    """All that the weights depend on: what an interrupted export with the same text has written is kept."""
    family: str | None = None
    """`model_type` to write; None: the plainest that fits (`table.fitting`)."""
    remote_code: bool = False
    """Whether the folder carries the code that gives it `model.chat`; its family is then `internlm`."""
    licences: tuple[Path, ...] = ()
    """Files that say how the weights may be used, copied in."""
    progress: Callable[[int], None] = lambda done_bytes: None
    """Told the bytes of each tensor that was written."""


@contextlib.contextmanager
def exporting(out: Path, weights: Iterable[Weight], talk: Talk, options: ExportOptions) -> Iterator[storage.Writing]:
    """Yield the folder of an export with these weights; licences and notes go in when the block ends.

    What an interrupted export has left counts as room on the disk; without enough, an empty folder is removed.
    """
    with storage.writing(out, KIND, replace=options.replace, resume=options.resume) as folder:
        there = sum(file.stat().st_size for file in folder.path.iterdir())
        try:
            needed = sum(weight.nbytes for weight in weights)
            disk.require_space(folder.path, needed - there, f"export {out.name}")
        except StorageError:
            with contextlib.suppress(OSError):  # not empty: the next try goes on with it
                folder.path.rmdir()
            raise
        yield folder
        for file in options.licences:
            with disk.explained(f"copying {file}"):
                shutil.copyfile(file, folder.path / file.name)
        folder.meta.update({"internlm_template": talk.template, **options.notes})


def export(
    weights: Weights,
    config: ModelConfig,
    out: str | Path,
    talk: Talk = Talk(),  # noqa: B008 (frozen)
    options: ExportOptions = ExportOptions(),
) -> Weights:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, without remote code but for InternLM's own.

    Args:
        weights: our names; a tied head may be left out.
        config: shape of the model.
        out: the folder; complete or absent.
        talk: tokenizer and chat format, written along.
        options: how the folder is written.

    Returns:
        the weights by the names that were written, each with its origin.

    Raises:
        WeightsError: weights are missing, left over or of another shape, or the family cannot express the shape.
        TokenizerError, DataError: tokenizer and chat format do not belong together.
        StorageError: the folder exists, or could not be written.
    """
    out = Path(out)
    check(weights, config)
    described, theirs = families.write(weights, config, _family(options))
    theirs = {name: weight.to(options.dtype) for name, weight in theirs.items()}
    talk.check(config.vocab_size)
    if options.remote_code:
        described |= carried.fields(talk)
    with exporting(out, theirs.values(), talk, options) as folder:
        files.write(folder, theirs, options.max_shard_bytes, options.progress)
        stored = dtype_name(lazy.main_dtype(theirs))
        # Transformers 4 reads `torch_dtype`, 5 writes `dtype` and reads both.
        described |= talk.role_ids() | {"torch_dtype": stored, "dtype": stored}
        disk.write_json(folder.path / "config.json", described)
        talk.write(folder.path)
        if options.remote_code:
            carried.write(folder.path, talk)
        notes = {"remote_code": options.remote_code, **options.notes}
        disk.write_text(folder.path / "README.md", card(config, described["architectures"][0], stored, talk, notes))
        folder.meta["dtype"] = stored
    return theirs


def read_config(folder: str | Path) -> ModelConfig:
    """Return the shape of the model in a Transformers folder.

    Raises:
        WeightsError: there is no config.json, or it describes something this decoder does not have.
    """
    return fields.read_config(_fields(Path(folder)), Path(folder) / "config.json")


def open_weights(folder: str | Path) -> Weights:
    """Return the weights of a Transformers folder by our names, not read yet.

    Raises:
        WeightsError: as `files.open_folder` and `families.read`.
    """
    folder = Path(folder)
    return families.read(files.open_folder(folder), _fields(folder), folder / "config.json")


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Transformer:
    """Return the model of a Transformers folder; errors as of `read_model`."""
    return read_model(read_config(folder), open_weights(folder), dtype=dtype)


def _family(options: ExportOptions) -> str | None:
    if options.remote_code and options.family not in (None, carried.FAMILY):
        raise WeightsError(
            "the code that gives a folder `model.chat` is InternLM's",
            where="family", got=options.family, allowed=[carried.FAMILY], do="Leave out one of the two.",
        )  # fmt: skip
    return carried.FAMILY if options.remote_code else options.family


def _fields(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise WeightsError("no config.json: this is no Transformers folder", where=folder)
    return disk.read_json(folder / "config.json", WeightsError)
