"""Writing checkpoints while the training goes on.

    saver = Saver(run / "checkpoints")
    saver.save("step-00000100", tensors, Beside(model, tokenizer, meta))     # returns at once
    saver.copied()                                                           # before the tensors change
    saver.finish()                                                           # how the last one went

    all ranks         who writes which piece (once a run) → copies of them → a thread: files, SHA-256, word to rank 0
    rank 0's thread   waits for the word of all → index, model, tokenizer, manifest → rename

The threads agree through files in the folder that is being written, so that they need no collective beside those of
the training. What goes wrong in them is told to `after`, and by `finish`: the run goes on.

Limits: all ranks see the folder. A copy of the state is held in memory; where there is no room for one, the training
waits until the checkpoint is written.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from internlm import config as recipes
from internlm import ranks, runtime
from internlm.checkpoint import pieces, place
from internlm.checkpoint.pieces import Entry, Index, Piece
from internlm.checkpoint.place import Draft, Facts, Place
from internlm.compat.groups import begin, local
from internlm.errors import InternLMError, StorageError
from internlm.model.config import ModelConfig
from internlm.text.tokenizer import Tokenizer
from internlm.weights.files import as_bytes, header

logger = logging.getLogger(__name__)

_ROOM = 0.8
"""Share of the free memory that copies may take."""
PATIENCE_S = 1800.0
"""How long rank 0 waits for the slowest rank's files."""


@dataclass(frozen=True)
class Beside:
    """What a checkpoint holds beside tensors."""

    model: ModelConfig
    tokenizer: Tokenizer | None
    """What the model's ids mean; its files are written."""
    meta: dict[str, Any]
    """JSON-able facts; must have `step`."""


@dataclass(frozen=True)
class Saved:
    """How a save went, as rank 0 knows it."""

    path: Place
    bytes: int
    """Of all tensors."""
    seconds: float
    """From the copy to the end."""
    problem: str | None = None
    """Why there is no checkpoint."""


@dataclass(frozen=True)
class _Part:
    """What a rank holds of a tensor."""

    name: str
    dtype: torch.dtype
    whole: tuple[int, ...]
    """Shape of the tensor."""
    begin: tuple[int, ...]
    """Where it begins there."""
    shape: tuple[int, ...]


Files = dict[str, list[_Part]]
"""What a rank writes, by the name of the file, in the order of the bytes there."""


@dataclass(frozen=True)
class _Plan:
    """What this rank writes in every save; on rank 0, what all write."""

    form: dict[str, Any]
    """Of the tensors it was made for."""
    files: Files
    """This rank's."""
    index: Index
    """Rank 0's: of all files."""


class Saver:
    """Writes the checkpoints of a run. Every rank has one, and calls the same methods in the same order.

    `after` is called on rank 0, in the thread that wrote, when a save has ended, well or not.

    Raises:
        StorageError: the folder is in a store that does not answer, or that cannot be written.
    """

    def __init__(
        self, folder: Place, *, background: bool = True, after: Callable[[Saved], None] = lambda saved: None
    ) -> None:
        self.folder, self.background = folder, background
        self._after = after
        self._plan: _Plan | None = None
        self._copies: list[Tensor] | None = None
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._last: Saved | None = None
        self._count = 0
        self._mark = ranks.gather(secrets.token_hex(4))[0]
        for name in ranks.together(lambda: place.clear(folder) if ranks.rank() == 0 else []):
            logger.info("removed what an interrupted save left: %s", name)

    def save(self, name: str, tensors: dict[str, Tensor], beside: Beside) -> float:
        """Begin a checkpoint; return the seconds that were waited for the one before, which ends first.

        Args:
            name: of its folder.
            tensors: by logical name; of a DTensor each rank writes its part. They may change after `copied`.
            beside: what rank 0 writes; its facts may change when this returns.
        """
        begun = time.monotonic()
        self._settle()
        waited = time.monotonic() - begun
        if self._plan is None or self._plan.form != _form(tensors):
            self._plan, self._copies = _make_plan(tensors), None
        self._count += 1
        target = self.folder / name
        draft = place.draft_of(target, f"{self._mark}.{self._count}")
        sources = [local(tensors[part.name].detach()) for parts in self._plan.files.values() for part in parts]
        beside = replace(beside, meta=copy.deepcopy(beside.meta))  # the run goes on to change what it may refer to
        job = _Job(self._plan, target, draft, beside, time.monotonic())
        if self.background and self._has_room():
            parts, make = self._copy(sources)
        else:
            parts, make = [source.to("cpu") for source in sources], lambda: None
        self._copied.clear()
        work = functools.partial(self._end, job, parts, make)
        thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        thread.start()  # first: a signal may end the wait for it, and one that has not started cannot be joined
        self._job, self._thread = job, thread
        if not self.background:
            self._settle()
        return waited

    def copied(self) -> None:
        """Wait until the tensors of the last save may change."""
        self._copied.wait()

    def finish(self) -> Saved | None:
        """Wait until nothing is being written; return on every rank how the last save went, None if there was none."""
        self._settle()
        return ranks.gather(self._last)[0]

    def _settle(self) -> None:
        """Wait until no rank writes. Rank 0 hears of parts that failed where their ranks could not leave a word."""
        if self._thread is None or self._job is None:
            return
        if ranks.rank():
            self.join()
        problems = ranks.gather(self._last.problem if ranks.rank() and self._last else None)
        self._job.failed.update({rank: problem for rank, problem in enumerate(problems) if problem})
        self.join()
        if ranks.rank() == 0 and self._last and self._last.problem:
            self._job.draft.discard()  # again: others may have written since

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
        size = sum(_layout(parts)[2] for parts in self._plan.files.values())
        if min(ranks.gather(_ROOM * runtime.available_memory() >= size * ranks.local_size())):
            return True
        logger.warning("warning: no memory for a copy of the state: the run waits while checkpoints are written")
        self.background = False
        return False

    def _copy(self, sources: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Return copies of this rank's pieces, and what makes them, or waits for the device that does."""
        if self._copies is None:
            self._copies = [torch.empty(s.shape, dtype=s.dtype, pin_memory=s.is_cuda) for s in sources]
        pairs = list(zip(self._copies, sources, strict=True))
        for target, source in pairs:
            if source.is_cuda:
                target.copy_(source, non_blocking=True)  # what follows on this stream waits for it by itself
        devices = {source.device for source in sources if source.is_cuda}
        done = [torch.cuda.current_stream(device).record_event() for device in devices]

        def make() -> None:
            for target, source in pairs:
                if not source.is_cuda:
                    target.copy_(source)
            self._copied.set()
            for event in done:
                event.synchronize()

        return self._copies, make

    def _end(self, job: _Job, parts: list[Tensor], make: Callable[[], None]) -> None:
        problem = None
        try:
            try:
                make()
            finally:
                self._copied.set()
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


@dataclass(frozen=True)
class _Job:
    plan: _Plan
    target: Place
    draft: Draft
    beside: Beside
    begun: float
    failed: dict[int, str] = field(default_factory=dict)
    """Problems of ranks that did not leave a word of them: for rank 0, from another thread."""

    def run(self, parts: list[Tensor]) -> None:
        """Write this rank's files; on rank 0, wait for the others and make the checkpoint visible.

        Raises:
            StorageError: something failed, here or, on rank 0, on another rank; what was written is removed.
        """
        rank = ranks.rank()
        try:
            files = self._write(parts)
            if rank:
                self.draft.say(rank, json.dumps({"files": files}))
            else:
                self._commit(files | self._words())
        except BaseException as error:
            if rank == 0:
                self.draft.discard()
            else:
                with contextlib.suppress(StorageError):  # rank 0 will miss it
                    self.draft.say(rank, json.dumps({"problem": str(error)}))
            raise

    def _write(self, parts: list[Tensor]) -> Facts:
        """Write this rank's tensors; return what is to know of their files."""
        written, rest = {}, iter(parts)
        for file, members in self.plan.files.items():
            head, _, size = _layout(members)
            name = file.replace(pieces.FOLDER, pieces.FOLDER + self.draft.suffix, 1)
            sha256 = self.draft.write(name, [head, *map(as_bytes, itertools.islice(rest, len(members)))])
            written[name] = {"bytes": size, "sha256": sha256}
        return written

    def _words(self) -> Facts:
        """Return the files of all other ranks, when they have said that these are written.

        Raises:
            StorageError: one failed, or is not heard of.
        """
        files: Facts = {}
        missing = set(range(1, ranks.world_size()))
        until = time.monotonic() + PATIENCE_S
        while missing:
            for rank, text in sorted(self.draft.said().items()):
                word = json.loads(text)
                files |= word.get("files", {})
                self.failed.update({rank: word["problem"]} if "problem" in word else {})
                missing.discard(rank)
            for rank, problem in sorted(self.failed.items()):
                raise StorageError(f"rank {rank} could not write its part: {problem}")
            if missing and time.monotonic() > until:
                raise StorageError(
                    f"nothing was heard of rank {min(missing)} for {PATIENCE_S:.0f} s",
                    where=self.target,
                    do="Do all ranks see this folder?",
                )
            if missing:
                time.sleep(self.draft.look_every_s)
        return files

    def _commit(self, files: Facts) -> None:
        with self.draft.beside() as folder:
            index = pieces.moved(self.plan.index, self.draft.suffix)
            (folder / pieces.INDEX).write_text(pieces.dump(index), encoding="utf-8")
            (folder / "model.yaml").write_text(recipes.dump(self.beside.model), encoding="utf-8")
            if self.beside.tokenizer is not None:
                (folder / "tokenizer").mkdir()
                self.beside.tokenizer.save(folder / "tokenizer")
            self.draft.commit(folder, self.beside.meta, files)


def _form(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what a plan depends on; it changes on all ranks, or on none."""
    return {n: (tuple(t.shape), t.dtype, getattr(t, "placements", None)) for n, t in tensors.items()}


def _make_plan(tensors: dict[str, Tensor]) -> _Plan:
    """Return who writes what: each part is written by one rank, and the ranks write about as much. Rank 0 decides."""
    own = [_Part(n, t.dtype, tuple(t.shape), begin(t), tuple(local(t.detach()).shape)) for n, t in tensors.items()]
    index: Index = {}

    def share(wishes: list[list[_Part]]) -> list[Files]:
        holders: dict[_Part, list[int]] = {}
        for rank, parts in enumerate(wishes):
            for part in parts:
                holders.setdefault(part, []).append(rank)
        shared: list[Files] = [{} for _ in wishes]
        loads = [0] * len(wishes)
        for part in sorted(holders, key=lambda part: -part.dtype.itemsize):  # so each lies at a multiple of its width
            rank = min(holders[part], key=lambda rank: loads[rank])
            loads[rank] += math.prod(part.shape) * part.dtype.itemsize
            shared[rank].setdefault(pieces.file_of(part.name, rank), []).append(part)
        for file, parts in (pair for files in shared for pair in files.items()):
            for part, start in zip(parts, _layout(parts)[1], strict=True):
                before = index[part.name].pieces if part.name in index else ()
                piece = Piece(file, start, part.begin, part.shape)
                index[part.name] = Entry(part.dtype, part.whole, (*before, piece))
        return shared

    return _Plan(_form(tensors), ranks.decide(own, share), index)


def _layout(parts: list[_Part]) -> tuple[bytes, list[int], int]:
    """Return the head of a file of these parts, where each begins, and the file's size."""
    names = (p.name if p.shape == p.whole else f"{p.name}@{','.join(map(str, p.begin))}" for p in parts)
    return header((name, part.shape, part.dtype) for name, part in zip(names, parts, strict=True))
