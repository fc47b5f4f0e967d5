"""Writing checkpoints while the training goes on.

    saver = Saver(run / "checkpoints")
    saver.save("step-00000100", tensors, Beside(model, tokenizer, meta))     # copies, and returns
    saver.finish()                                                           # how the last one went

    all ranks         who writes which piece (once a run) → copies of them → a thread: file, SHA-256, word to rank 0
    rank 0's thread   waits for the word of all → index, model, tokenizer, manifest → rename

A step waits for the copy only. The threads agree through files in the folder that is being written, so that they need
no collective beside those of the training. What goes wrong in them is told to `after`, and by `finish`: the run goes
on, and the checkpoints before are untouched.

Limits: all ranks see the folder. A copy of the state is held in memory; where there is no room for one, the training
waits until the checkpoint is written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from internlm import config as recipes
from internlm import ranks, runtime, storage
from internlm.checkpoint import pieces
from internlm.checkpoint.pieces import Entry, Index, Piece
from internlm.errors import InternLMError, StorageError
from internlm.hashed_file import HashedFile
from internlm.model.config import ModelConfig
from internlm.text.tokenizer import Tokenizer
from internlm.weights.files import as_bytes

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

logger = logging.getLogger(__name__)

KIND = "checkpoint"
_ROOM = 0.8
"""Share of the free memory that copies may take."""
_LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Beside:
    """What a checkpoint holds beside tensors."""

    model: ModelConfig
    tokenizer: Path | None
    """Folder of the tokenizer's files, copied in."""
    meta: dict[str, Any]
    """JSON-able facts; must have `step`."""


@dataclass(frozen=True)
class Saved:
    """How a save went, as rank 0 knows it."""

    path: Path
    bytes: int
    """Of all tensors."""
    seconds: float
    """From the copy to the end."""
    problem: str | None = None
    """Why there is no checkpoint."""


@dataclass(frozen=True)
class _Plan:
    """What this rank writes in every save; on rank 0, what all write."""

    form: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Of the tensors it was made for."""
    items: list[WriteItem]
    head: bytes
    """Of this rank's file."""
    bytes: int
    """Of this rank's file."""
    index: Index
    """Rank 0's: of all files."""


class Saver:
    """Writes the checkpoints of a run. Every rank has one, and calls the same methods in the same order.

    Args:
        folder: of the checkpoints.
        background: whether the training goes on while one is written.
        patience_s: how long rank 0 waits for the slowest rank's file.
        after: called on rank 0 when a save has ended, well or not, in the thread that wrote.
    """

    def __init__(
        self,
        folder: Path,
        *,
        background: bool = True,
        patience_s: float = 1800.0,
        after: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        self.folder, self.background, self.patience_s = folder, background, patience_s
        self._after = after
        self._plan: _Plan | None = None
        self._copies: list[Tensor] | None = None
        self._thread: threading.Thread | None = None
        self._last: Saved | None = None
        self._count = 0
        self._mark = ranks.gather(os.getpid())[0]
        if ranks.rank() == 0:
            _clear(folder)

    def save(self, name: str, tensors: dict[str, Tensor], beside: Beside) -> float:
        """Begin a checkpoint; return the seconds that were waited for the one before, which ends first.

        Args:
            name: of its folder.
            tensors: by logical name; of a DTensor each rank writes its part. They may change when this returns.
            beside: what rank 0 writes.

        Raises:
            StorageError: a tensor cannot be written.
        """
        begun = time.monotonic()
        self.join()
        waited = time.monotonic() - begun
        if self._plan is None or self._plan.form != _form(tensors):
            self._plan, self._copies = _make_plan(tensors), None
        self._count += 1
        draft = self.folder / f"{name}.partial-{self._mark}.{self._count}"
        sources = [_local(item, tensors) for item in self._plan.items]
        job = _Job(self._plan, self.folder / name, draft, beside, self.patience_s, time.monotonic())
        if not self.background or not self._has_room():
            self._end(job, [source.to("cpu") for source in sources], lambda: None)
            return waited
        work = functools.partial(self._end, job, *self._copy(sources))
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()
        return waited

    def finish(self) -> Saved | None:
        """Wait until nothing is being written; return on every rank how the last save went, None if there was none."""
        self.join()
        return ranks.gather(self._last)[0]

    def join(self, seconds: float | None = None) -> None:
        """Wait until this rank writes nothing, but no longer than that: for a run that ends without the others."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def _has_room(self) -> bool:
        """Return whether every rank has memory for copies; they are made once and kept."""
        assert self._plan is not None, "there is a plan before there are copies"
        if self._copies is not None:
            return True
        if min(ranks.gather(_ROOM * runtime.available_memory() >= self._plan.bytes * ranks.local_size())):
            return True
        logger.warning("warning: no memory for a copy of the state: the run waits while checkpoints are written")
        self.background = False
        return False

    def _copy(self, sources: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Return copies of this rank's pieces, and what waits until they are made where the device makes them."""
        if self._copies is None:
            pinned = any(source.is_cuda for source in sources)
            self._copies = [
                torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned and source.is_cuda)
                for source in sources
            ]
        for copy, source in zip(self._copies, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        devices = {source.device for source in sources if source.is_cuda}
        if not devices:
            return self._copies, lambda: None
        # What the training does next on this stream waits for the copies by itself.
        done = [torch.cuda.current_stream(device).record_event() for device in devices]

        def wait() -> None:
            for event in done:
                event.synchronize()

        return self._copies, wait

    def _end(self, job: _Job, parts: list[Tensor], copied: Callable[[], None]) -> None:
        """Write a checkpoint, and tell how it went."""
        problem = None
        try:
            copied()
            job.run(parts)
        except InternLMError as error:
            problem = str(error)
        except Exception as error:  # the run must not end because a checkpoint cannot be written
            logger.exception("a checkpoint could not be written")
            problem = f"{type(error).__name__}: {error}"
        total = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in job.plan.index.values())
        self._last = Saved(job.target, total, time.monotonic() - job.begun, problem)
        if ranks.rank() == 0:
            self._after(self._last)


def save(
    path: Path, tensors: dict[str, Tensor], model: ModelConfig, tokenizer: Path | None, meta: dict[str, Any]
) -> None:
    """Write one checkpoint folder, and return when it is there. Every rank must call it.

    Args:
        path: the folder, `…/step-<n>`.
        tensors, model, tokenizer, meta: as `Saver.save` and `Beside` have them.

    Raises:
        StorageError: it could not be written.
    """
    saver = Saver(path.parent, background=False)
    saver.save(path.name, tensors, Beside(model, tokenizer, meta))
    saved = saver.finish()
    assert saved is not None, "one was begun"
    if saved.problem is not None:
        raise StorageError(saved.problem)


@dataclass(frozen=True)
class _Job:
    """One checkpoint being written."""

    plan: _Plan
    target: Path
    draft: Path
    beside: Beside
    patience_s: float
    begun: float

    def run(self, parts: list[Tensor]) -> None:
        """Write this rank's file; on rank 0, wait for the others and make the checkpoint visible.

        Raises:
            StorageError: something failed, here or, on rank 0, on another rank; what was written is removed.
        """
        try:
            word = {"sha256": self._write(parts), "bytes": self.plan.bytes}
        except (StorageError, OSError) as error:
            if ranks.rank() == 0:
                shutil.rmtree(self.draft, ignore_errors=True)
            else:
                with contextlib.suppress(StorageError):  # rank 0 will miss it
                    storage.write_text(self._word(ranks.rank()), json.dumps({"problem": str(error)}))
            raise
        if ranks.rank():
            storage.write_text(self._word(ranks.rank()), json.dumps(word))
            return
        try:
            self._commit({0: word} | self._words())
        except BaseException:
            shutil.rmtree(self.draft, ignore_errors=True)
            raise

    def _write(self, parts: list[Tensor]) -> str:
        """Write this rank's tensors; return the file's SHA-256."""
        path = self.draft / pieces.file_of(ranks.rank())
        with storage.explained(f"writing {self.target}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.require_space(path, self.plan.bytes + (1 << 20), f"checkpoint {self.target.name}")
            with HashedFile(path) as file:
                file.write(self.plan.head)
                for part in parts:
                    file.write(as_bytes(part))
                return file.sha256()

    def _word(self, rank: int) -> Path:
        """Return the file by which a rank says that its tensors are on the disk, or why not."""
        return self.draft / f"word-{rank:05d}.json"

    def _words(self) -> dict[int, dict[str, Any]]:
        """Return what all other ranks say, when they have.

        Raises:
            StorageError: one failed, or is not heard of.
        """
        heard: dict[int, dict[str, Any]] = {}
        missing = set(range(1, ranks.world_size()))
        until = time.monotonic() + self.patience_s
        while missing:
            for rank in sorted(missing):
                path = self._word(rank)
                if not path.exists():
                    continue
                heard[rank] = json.loads(path.read_text(encoding="utf-8"))
                if "problem" in heard[rank]:
                    raise StorageError(f"rank {rank} could not write its part: {heard[rank]['problem']}")
                path.unlink()
                missing.discard(rank)
            if missing and time.monotonic() > until:
                raise StorageError(
                    f"nothing was heard of rank {min(missing)} for {self.patience_s:.0f} s",
                    where=self.target,
                    do="Do all ranks see this folder?",
                )
            if missing:
                time.sleep(_LOOK_EVERY_S)
        return heard

    def _commit(self, words: dict[int, dict[str, Any]]) -> None:
        """Write what lies beside the tensors, and make the checkpoint visible."""
        with storage.explained(f"writing {self.target}"):
            (self.draft / pieces.INDEX).write_text(pieces.dump(self.plan.index), encoding="utf-8")
            (self.draft / "model.yaml").write_text(recipes.dump(self.beside.model), encoding="utf-8")
            if self.beside.tokenizer is not None:
                (self.draft / "tokenizer").mkdir()
                Tokenizer.load(self.beside.tokenizer).save(self.draft / "tokenizer")
            if self.target.is_dir() and not storage.is_complete(self.target, KIND):
                shutil.rmtree(self.target)  # damaged: the run went back to an earlier one and is here again
            hashes = {pieces.file_of(rank): word["sha256"] for rank, word in words.items()}
            storage.commit(storage.Writing(self.draft, dict(self.beside.meta), hashes), self.target, KIND)


def _clear(folder: Path) -> None:
    """Remove what interrupted saves left: one run works in a folder. A checkpoint that was moved aside comes back."""
    for draft in folder.glob("*.partial-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for aside in folder.glob("*.replaced-*"):
        target = aside.with_name(aside.name.rpartition(".replaced-")[0])
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)


def _form(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _make_plan(tensors: dict[str, Tensor]) -> _Plan:
    """Return who writes what: each piece is written by one rank, and the ranks write about as much. Rank 0 decides."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # takes a second

    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(tensors, is_coordinator=ranks.rank() == 0)
    index: Index = {}

    def share(wishes: list[SavePlan]) -> list[list[WriteItem]]:
        items = [_sorted(plan.items) for plan in planner.create_global_plan(wishes)[0]]
        for rank, own in enumerate(items):
            _, starts, _ = _layout(own)
            for item, start in zip(own, starts, strict=True):
                name, shape, dtype, offsets = _facts(item)
                known = index.get(name)
                piece = Piece(pieces.file_of(rank), start, offsets, shape)
                assert item.tensor_data is not None, "tensors only"
                index[name] = Entry(dtype, tuple(item.tensor_data.size), (*(known.pieces if known else ()), piece))
        return items

    own = ranks.decide(planner.create_local_plan(), share)
    head, _, size = _layout(own)
    return _Plan(_form(tensors), own, head, size, index)


def _sorted(items: list[WriteItem]) -> list[WriteItem]:
    """Return items in the order of their file: wide numbers first, so that each begins at a multiple of its width."""
    return sorted(items, key=lambda item: -_facts(item)[2].itemsize)


def _layout(items: list[WriteItem]) -> tuple[bytes, list[int], int]:
    """Return the head of a file of these items, where each begins, and the file's size."""
    parts = []
    for item in items:
        name, shape, dtype, offsets = _facts(item)
        assert item.tensor_data is not None, "tensors only"
        is_whole = shape == tuple(item.tensor_data.size)
        parts.append((name if is_whole else f"{name}@{','.join(map(str, offsets))}", shape, dtype))
    return pieces.header(parts)


def _facts(item: WriteItem) -> tuple[str, tuple[int, ...], torch.dtype, tuple[int, ...]]:
    """Return name, shape, dtype and offsets of a piece."""
    data = item.tensor_data
    assert data is not None, "tensors only"
    return item.index.fqn, tuple(data.chunk.sizes), data.properties.dtype, tuple(data.chunk.offsets)


def _local(item: WriteItem, tensors: dict[str, Tensor]) -> Tensor:
    """Return what this rank holds of a tensor."""
    from torch.distributed.tensor import DTensor

    tensor = tensors[item.index.fqn].detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
