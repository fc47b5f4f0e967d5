"""Training state on disk: complete or absent, in pieces that any layout can read, named by parameter.

    RUN/checkpoints/step-00001200/
        manifest.json     sizes and SHA-256 of every file, written last; meta: step, tokens, data position, recipe
        tensors.json      dtype, shape and place of `model.<name>`, `optim.<name>.<slot>`, `random.<generator>`
        tensors/          safetensors, one file of each rank that wrote
        model.yaml        the ModelConfig
        tokenizer/        the vocabulary the model was trained with

`saver` writes them. Tensors are whole to whoever reads, and each rank reads what it needs of them, so another number of
ranks, or another layout, goes on as well.

Limits: the folder must be one that all ranks see.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch import Tensor

from internlm import config as recipes
from internlm import ranks, storage
from internlm.checkpoint import pieces
from internlm.checkpoint.saver import KIND
from internlm.config import require_positive, section
from internlm.errors import StorageError
from internlm.model.config import ModelConfig
from internlm.weights.weight import Weight, Weights

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)$")


@section
class CheckpointConfig:
    """When training state is written, and how much of it is kept."""

    every_steps: int | None = None
    """Steps between two checkpoints; None: only at the end."""
    keep_last: int = 2
    """How many of the newest are kept. The newest complete one is never removed."""
    keep_every_tokens: int | None = None
    """Of every so many tokens, the first checkpoint is kept for ever. None: of none."""
    keep_best: str | None = None
    """Name of a metric, such as `valid/loss/held_out`: the checkpoint where it is lowest is kept. None: none."""
    background: bool = True
    """Whether the run goes on while a checkpoint is written; a copy of the state is then held in memory."""
    resume: bool = True
    """Whether a run folder with a checkpoint is continued; false: such a folder is an error."""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint", "every_steps", "keep_last", "keep_every_tokens")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, opened: small facts are here, tensors are read when asked for."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.meta["step"]

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return recipes.decode(ModelConfig, yaml.safe_load((self.path / "model.yaml").read_text(encoding="utf-8")))

    @property
    def tokenizer_path(self) -> Path | None:
        """Folder of the tokenizer it was trained with."""
        folder = self.path / "tokenizer"
        return folder if folder.is_dir() else None

    @property
    def template(self) -> str | None:
        """Name of the chat template of its training data, if there was one."""
        return self.meta.get("template")

    def load(self, into: dict[str, Tensor]) -> None:
        """Fill the given tensors, in place. Every rank must call it.

        Raises:
            StorageError: a name is not in the checkpoint, or has another shape; or a file is damaged.
        """
        self.verify()
        known = self.index
        for name, tensor in into.items():
            entry = known.get(name)
            if entry is None or entry.shape != tuple(tensor.shape):
                found = "is not in the checkpoint" if entry is None else f"has shape {entry.shape} there"
                raise StorageError(f"tensor {name} {tuple(tensor.shape)} {found}", where=self.path)
        from torch.distributed.checkpoint.state_dict_loader import load as load_tensors  # takes a second

        with _quiet():
            load_tensors(into, storage_reader=pieces.reader(self.path, known), no_dist=not dist.is_initialized())

    def verify(self) -> None:
        """Compare every file with its SHA-256; ranks share the work. Every rank must call it.

        Raises:
            StorageError: a file is damaged.
        """
        ranks.together(lambda: storage.verify(self.path, ranks.rank(), ranks.world_size()))

    def weights(self, prefix: str = "model.") -> Weights:
        """Return the tensors whose name begins with `prefix`, by the rest of it, not read yet.

        Raises:
            StorageError: a file is damaged.
        """
        storage.verify(self.path)
        found = {}
        for name, entry in self.index.items():
            if name.startswith(prefix):
                read = functools.partial(pieces.read, self.path, entry)
                (first, *others) = entry.pieces
                place = None if others else (self.path / first.file, first.start)
                found[name.removeprefix(prefix)] = Weight(entry.shape, entry.dtype, read, name, place)
        return found

    def holds(self, name: str) -> bool:
        """Return whether there is a tensor of this name."""
        return name in self.index

    @functools.cached_property
    def index(self) -> pieces.Index:
        """Its tensors.

        Raises:
            StorageError: the index cannot be read.
        """
        return pieces.read_index(self.path)


def is_checkpoint(path: str | Path) -> bool:
    """Return whether `path` is a complete checkpoint."""
    return storage.is_complete(path, KIND)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, or the newest complete one of a run.

    Args:
        path: a checkpoint folder, a run folder, or its `checkpoints` folder.

    Raises:
        StorageError: there is no complete checkpoint.
    """
    path = Path(path)
    if not is_checkpoint(path):
        found = newest(path)
        if found is None:
            raise StorageError("no complete checkpoint here", where=path, do="Was the run stopped before the first?")
        path = found
    return Checkpoint(path, storage.read_manifest(path, KIND))


def newest(run: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder (or of its `checkpoints` folder), or None."""
    complete = listed(run)
    return complete[-1] if complete else None


def listed(run: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [path for path in _steps(run) if is_checkpoint(path)]


def damaged(run: str | Path) -> list[Path]:
    """Return the checkpoints of a run that are newer than the newest complete one, oldest first."""
    damaged: list[Path] = []
    for path in _steps(run):
        damaged = [] if is_checkpoint(path) else [*damaged, path]
    return damaged


@dataclass(frozen=True)
class Found:
    """A checkpoint folder, complete or not."""

    path: Path
    step: int
    bytes: int
    meta: dict[str, Any]
    """Empty where the manifest cannot be read."""
    problem: str | None
    """What is wrong with it."""


def survey(run: str | Path, *, verify: bool = False) -> list[Found]:
    """Return all checkpoint folders of a run, oldest first.

    Args:
        run: a run, or its `checkpoints` folder.
        verify: whether every file is read and compared with its checksum.
    """
    found = []
    for path in _steps(run):
        meta: dict[str, Any] = {}
        problem = None
        try:
            meta = storage.read_manifest(path, KIND)
            if verify:
                storage.verify(path)
        except StorageError as error:
            problem = str(error).removeprefix(f"{path}: ")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        found.append(Found(path, int(path.name.rpartition("-")[2]), size, meta, problem))
    return found


def _steps(run: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, complete or not, oldest first."""
    run = Path(run)
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if not folder.is_dir():
        return []
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def path_of(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def retain(run: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints that a run need not keep; what is newer than its newest complete one is not touched."""
    complete = [(path, storage.read_manifest(path, KIND)) for path in listed(run)]
    if not complete:
        return
    last = [path for path, _ in complete[-max(1, config.keep_last) :]]
    kept = set(last)
    firsts: dict[int, Path] = {}
    for path, meta in complete if config.keep_every_tokens else ():
        firsts.setdefault(meta.get("tokens", 0) // (config.keep_every_tokens or 1), path)
    kept |= {path for number, path in firsts.items() if number}
    if config.keep_best is not None:
        values = {path: meta.get("metrics", {}).get(config.keep_best) for path, meta in complete}
        rated = {path: value for path, value in values.items() if value is not None and math.isfinite(value)}
        kept |= {min(rated, key=lambda path: rated[path])} if rated else set()
    for path in _steps(run):
        if path == last[0]:
            return
        if path in kept:
            continue
        # The manifest goes first: a removal that is cut short leaves something nobody reads.
        (path / storage.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


class _quiet(warnings.catch_warnings):
    """Silence torch's remark that no process group exists: that is what `no_dist` says."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered
