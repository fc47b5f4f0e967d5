"""Training state on disk: complete or absent, in pieces that any layout can read, named by parameter.

    step-00001200/
        manifest.json     sizes and SHA-256 of every file, written last; meta: step, tokens, data position, recipe
        tensors.json      dtype, shape and place of `model.<name>`, `optim.<name>.<slot>`, `random.<generator>`
        tensors/          see `pieces`
        model.yaml        the ModelConfig
        tokenizer/        the vocabulary the model was trained with

`saver` writes them, `listing` finds them. Tensors are whole to whoever reads, and each rank reads its part, so
another number of ranks, or another layout, goes on as well.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from internlm import __version__, ranks
from internlm import config as recipes
from internlm.checkpoint import listing, pieces, place
from internlm.checkpoint.place import Place
from internlm.compat.groups import begin, local
from internlm.errors import ConfigError, StorageError
from internlm.model.config import ModelConfig
from internlm.weights.weight import Weight, Weights


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, opened: small facts are here, tensors are read when asked for."""

    path: Place
    meta: dict[str, Any]
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)
    """Files that `weights` has compared with their SHA-256."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.meta["step"]

    @property
    def config(self) -> ModelConfig:
        """Shape of the model.

        Raises:
            StorageError: it is written as another version writes it.
        """
        text = (self.path / "model.yaml").read_text(encoding="utf-8")
        try:
            return recipes.decode(ModelConfig, yaml.safe_load(text))
        except (ConfigError, yaml.YAMLError) as error:
            raise self._unknown(f"model.yaml cannot be understood: {error}") from error

    def fact(self, *names: str) -> Any:
        """Return a fact of `meta`, or what stands below it under further names, that a run cannot go on without.

        Raises:
            StorageError: there is none.
        """
        found: Any = self.meta
        for name in names:
            if not isinstance(found, dict) or name not in found:
                raise self._unknown(f"its manifest.json says nothing of {'.'.join(names)}")
            found = found[name]
        return found

    def _unknown(self, problem: str) -> StorageError:
        """Return the error of a checkpoint that is whole, but not as this version writes them."""
        writer = self.meta.get("versions", {}).get("internlm", "another version")
        do = f"It was written by internlm {writer}, this is {__version__}: use that version."
        return StorageError(problem, where=self.path, do=do)

    @functools.cached_property
    def tokenizer_path(self) -> Path | None:
        """Folder of the tokenizer it was trained with; of a checkpoint in a store a copy."""
        folder = self.path / "tokenizer"
        return place.fetched(folder) if place.names(folder) else None

    def load(self, into: dict[str, Tensor]) -> None:
        """Fill the given tensors, in place. Every rank must call it.

        Raises:
            StorageError: a name is not in the checkpoint, or has another shape; or a file is damaged.
        """
        self.verify()
        ranks.together(lambda: self._fill(into))

    @torch.no_grad()
    def _fill(self, into: dict[str, Tensor]) -> None:
        for name, tensor in into.items():
            entry = self.index.get(name)
            if entry is None or entry.shape != tuple(tensor.shape):
                found = "is not in the checkpoint" if entry is None else f"has shape {entry.shape} there"
                raise StorageError(f"tensor {name} {tuple(tensor.shape)} {found}", where=self.path)
        for name, tensor in into.items():
            pieces.fill(local(tensor), begin(tensor), self.path, self.index[name])

    def verify(self) -> None:
        """Compare every file with its SHA-256; ranks share the work. Every rank must call it.

        Raises:
            StorageError: a file is damaged.
        """
        ranks.together(lambda: place.verify(self.path, ranks.rank(), ranks.world_size()))

    def weights(self, prefix: str = pieces.MODEL) -> Weights:
        """Return the tensors whose name begins with `prefix`, by the rest of it, not read yet.

        Only the files that hold them are verified, and those only once.

        Raises:
            StorageError: one of these files is damaged.
        """
        entries = {name: entry for name, entry in self.index.items() if name.startswith(prefix)}
        files = {piece.file for entry in entries.values() for piece in entry.pieces} - self._verified
        place.verify(self.path, of=files.__contains__)
        self._verified.update(files)
        found = {}
        for name, entry in entries.items():
            read = functools.partial(pieces.read, self.path, entry)
            (first, *others) = entry.pieces
            file = self.path / first.file
            lies = (file, first.start) if isinstance(file, Path) and not others else None
            found[name.removeprefix(prefix)] = Weight(entry.shape, entry.dtype, read, name, lies)
        return found

    @functools.cached_property
    def index(self) -> pieces.Index:
        """Its tensors.

        Raises:
            StorageError: the index cannot be read.
        """
        return pieces.read_index(self.path)


def open_checkpoint(path: str | Place) -> Checkpoint:
    """Open a checkpoint, or the newest complete one of a run. All but its tensors is compared with its checksums.

    `path` is a checkpoint folder, a run folder, or its `checkpoints` folder; a path or a URL.

    Raises:
        StorageError: there is no complete checkpoint, or the newest one is damaged.
    """
    path = place.at(path)
    if not listing.is_checkpoint(path):
        found = listing.newest(listing.folder_of(path))
        if found is None:
            raise StorageError("no complete checkpoint here", where=path, do="Was the run stopped before the first?")
        path = found
    place.verify(path, of=lambda name: not pieces.is_tensors(name))
    return Checkpoint(path, place.read_manifest(path))


def open_newest(folder: Place) -> Checkpoint | None:
    """Open the newest complete checkpoint in a folder of them, or return None where there is none.

    Every rank must call it. Rank 0 looks: the listing of a network folder may be older on another machine, and ranks
    that went on from different checkpoints would train different models.

    Raises:
        StorageError: the newest one is damaged, or a rank does not see it, or sees another of its name.
    """
    found = ranks.together(lambda: listing.newest(folder) if ranks.rank() == 0 else None)
    name = ranks.gather(None if found is None else found.name)[0]
    if name is None:
        return None
    advice = "Let all ranks see one folder."

    def opened() -> Checkpoint:
        if not listing.is_checkpoint(folder / name):
            raise StorageError("rank 0 sees a checkpoint here, this rank does not", where=folder / name, do=advice)
        return open_checkpoint(folder / name)

    checkpoint = ranks.together(opened)
    digest = hashlib.sha256(json.dumps(checkpoint.meta, sort_keys=True).encode()).hexdigest()
    digests = ranks.gather(digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise StorageError(f"rank {rank} sees another checkpoint here than rank 0", where=folder / name, do=advice)
    return checkpoint
