"""Training state on disk: complete or absent, sharded by torch.distributed.checkpoint, named by parameter.

    RUN/checkpoints/step-00001200/
        manifest.json     sizes and SHA-256 of every file, written last; meta: step, tokens, data position, recipe
        tensors/          torch.distributed.checkpoint: `model.<name>`, `optim.<name>.<slot>`, `random.<generator>`
        model.yaml        the ModelConfig
        tokenizer/        the vocabulary the model was trained with

Every rank writes and reads its parts; rank 0 makes the folder visible when all have written. Tensors are named and
whole, so another number of ranks, or another layout, reads them as well.

Limits: the folder must be one that all ranks see; the run waits while a checkpoint is written.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from internlm import config as recipes
from internlm import storage
from internlm.config import require_positive, section
from internlm.errors import InternLMError, StorageError
from internlm.model.config import ModelConfig
from internlm.text.tokenizer import Tokenizer
from internlm.weights.weight import Weight, Weights

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

logger = logging.getLogger(__name__)
T = TypeVar("T")

KIND = "checkpoint"
_STEP = re.compile(r"step-(\d+)$")


@section
class CheckpointConfig:
    """When training state is written, and how much of it is kept."""

    every_steps: int | None = None
    """Steps between two checkpoints; None: only at the end."""
    keep_last: int = 2
    """How many of the newest are kept. The newest complete one is never removed."""
    resume: bool = True
    """Whether a run folder with a checkpoint is continued; false: such a folder is an error."""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint", "every_steps", "keep_last")


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
        """Fill the given tensors, in place.

        Raises:
            StorageError: a name is not in the checkpoint, or has another shape; or a file is damaged.
        """
        on_first(lambda: storage.verify(self.path))
        known = self._metadata()
        for name, tensor in into.items():
            facts = known.get(name)
            if facts is None or tuple(facts.size) != tuple(tensor.shape):
                found = "is not in the checkpoint" if facts is None else f"has shape {tuple(facts.size)} there"
                raise StorageError(f"tensor {name} {tuple(tensor.shape)} {found}", where=self.path)
        _read_tensors(into, self.path / "tensors", _is_alone())

    def weights(self, prefix: str = "model.") -> Weights:
        """Return the tensors whose name begins with `prefix`, by the rest of it, not read yet.

        Raises:
            StorageError: a file is damaged.
        """
        storage.verify(self.path)
        found = {}
        for name, facts in self._metadata().items():
            if name.startswith(prefix):
                dtype = facts.properties.dtype
                read = functools.partial(self._read, name, facts.size, dtype)
                found[name.removeprefix(prefix)] = Weight(tuple(facts.size), dtype, read, name)
        return found

    def _read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        _read_tensors({name: tensor}, self.path / "tensors", True)
        return tensor

    def holds(self, name: str) -> bool:
        """Return whether there is a tensor of this name."""
        return name in self._metadata()

    def _metadata(self) -> dict[str, TensorStorageMetadata]:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        entries = FileSystemReader(self.path / "tensors").read_metadata().state_dict_metadata
        return {name: facts for name, facts in entries.items() if isinstance(facts, TensorStorageMetadata)}


def save(
    path: Path, tensors: dict[str, Tensor], model: ModelConfig, tokenizer: Path | None, meta: dict[str, Any]
) -> None:
    """Write a checkpoint folder that is complete or absent. Every rank must call it.

    Args:
        path: the folder, `…/step-<n>`.
        tensors: by logical name; of a DTensor each rank writes its part.
        model: shape of the model.
        tokenizer: folder of the tokenizer's files, copied in.
        meta: JSON-able facts; must have `step`.

    Raises:
        StorageError: the disk is full (checked before anything is written), or writing failed.
    """
    with contextlib.ExitStack() as stack:
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        opened: list[storage.Writing] = []  # on rank 0

        def begin() -> Path:
            storage.require_space(path, needed + (1 << 20), f"checkpoint {path.name}")
            if path.is_dir() and not is_checkpoint(path):
                shutil.rmtree(path)  # damaged: the run went back to an earlier one and is here again
            opened.append(stack.enter_context(storage.writing(path, KIND, replace=True)))
            return opened[0].path

        def finish() -> None:
            (partial / "model.yaml").write_text(recipes.dump(model), encoding="utf-8")
            if tokenizer is not None:
                (partial / "tokenizer").mkdir()
                Tokenizer.load(tokenizer).save(partial / "tokenizer")
            opened[0].meta.update(meta)
            stack.close()

        partial = on_first(begin)
        with storage.explained(f"writing {path}"):
            _write_tensors(tensors, partial / "tensors", path)
        on_first(finish)


def _read_tensors(into: dict[str, Tensor], folder: Path, alone: bool) -> None:
    """Fill tensors from a folder. The import takes a second: who reads no checkpoint does not wait for it."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    with _quiet():
        load_tensors(into, storage_reader=FileSystemReader(folder), no_dist=alone)


def _write_tensors(tensors: dict[str, Tensor], folder: Path, target: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

    writer = FileSystemWriter(folder, sync_files=False)  # storage.writing syncs every file
    try:
        with _quiet():
            save_tensors(tensors, storage_writer=writer, no_dist=_is_alone())
    except CheckpointException as error:
        # torch wraps what its writer threads raise, and reports a short write as a position that is off
        cause = next(cause for cause, _ in error.failures.values())
        if isinstance(cause, OSError):
            raise cause from error
        what = str(cause).splitlines()[0][:200]
        raise StorageError(f"writing failed: {what}", where=target, do="Is the disk full?") from error


def on_first(work: Callable[[], T]) -> T:
    """Return what `work` returns on rank 0, on every rank. Every rank must call it.

    Raises:
        StorageError: on every rank, what it raised on rank 0.
    """
    if _is_alone():
        return work()
    said: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            said[0] = work()
        except (InternLMError, OSError) as error:
            failure, said[1] = error, str(error)
    dist.broadcast_object_list(said, src=0)
    if failure is not None:
        raise failure
    if said[1] is not None:
        raise StorageError(said[1])
    return said[0]


def _is_alone() -> bool:
    return not dist.is_initialized()


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


def retain(run: Path, keep_last: int) -> None:
    """Remove everything older than the newest `keep_last` complete checkpoints; what is newer is not touched."""
    kept = listed(run)[-max(1, keep_last) :]
    if not kept:
        return
    for path in _steps(run):
        if path == kept[0]:
            return
        # The manifest goes first: a removal that is cut short leaves something nobody reads.
        (path / storage.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


class _quiet(warnings.catch_warnings):
    """Silence torch's remark that no process group exists: that is what `no_dist` says."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered
