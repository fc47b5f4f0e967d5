"""What a run does with its time and memory: traced steps, and windows in which it is looked at closely.

What communication costs is known from one step now and then, by asking a trace what ran when:

    with Trace(device) as trace:
        trainer.step()
    trace.communication_s, trace.waiting_s

Communication overlaps computation where it can. What slows a step down is the part in which nothing is computed:

    computation      ████████████      ████████
    communication        ██████████████
    waiting                      ██████

On a GPU the kernels count, of all streams; on a CPU the operators of the rank, and gloo's exchanges.

A window is asked for in the recipe, `profile: {start: 10, steps: 3, memory: true, modules: true}`, and leaves files in
RUN/profile:

    step    10  11  12 │ 13  14
            traced     │ bytes and times of modules        the profiler would lengthen them

    step-00000010-rank-0.json.gz         the trace, for ui.perfetto.dev or chrome://tracing
    step-00000010-rank-0.txt             time by family and by operator, see `operators`
    step-00000010-rank-0.memory.pickle   on a GPU: who allocated what, for pytorch.org/memory_viz
    step-00000010-rank-0.memory.txt      on a CPU: memory of the process by phase of the step
    modules.txt, modules.json            see `modules`; of other ranks modules-rank-3.txt
    oom-rank-0.pickle                    what lay in the GPU's memory when it was full

Steps outside of windows pay nothing. A window that cannot be opened or written is a warning.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import record_function

from internlm import storage
from internlm.compat import profiling
from internlm.config import require_positive, section
from internlm.data.loader import Loader
from internlm.errors import ConfigError
from internlm.log import warn_once
from internlm.optim.optimizer import Optimizer
from internlm.parallel.apply import Parallel
from internlm.train.profile.modules import ModuleTable
from internlm.train.profile.operators import STEP, Event, Spans, length, outside, table
from internlm.train.profile.resident import Resident

logger = logging.getLogger(__name__)

MAX_STEPS = 20
"""Of a window: a step of a large model is a hundred thousand events, all held in memory."""
MAX_TRACE_BYTES = 256 * 2**20
"""Of a compressed trace; viewers give up before."""
MEMORY_EVENTS = 200_000
"""Allocations that a memory snapshot goes back."""
DATA, RUN, UPDATE = "data", "forward and backward", "update"
"""Phases of a step."""

Kind = Literal["trace", "bytes", "times"]


@section
class ProfileConfig:
    """Steps that are looked at closely."""

    start: int | None = None
    """The first step of the first window. None: there is none."""
    steps: int = 3
    """Steps of a window that torch's profiler traces."""
    every: int | None = None
    """Steps between the starts of two windows. None: there is one."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that are looked at."""
    memory: bool = False
    """Also memory: on GPUs a snapshot with every allocation, on CPUs what the process holds in each phase of a step."""
    modules: bool = False
    """Also a table of modules, made in the two steps after: what they keep in memory, and their times."""
    depth: int = 1
    """Of that table: 0 blocks as a whole, 1 attention, feed-forward and norms, 2 what is in these."""

    def __post_init__(self) -> None:
        require_positive(self, "profile", "start", "steps", "every")
        if self.steps > MAX_STEPS:
            raise ConfigError(f"must be at most {MAX_STEPS}", where="profile.steps", got=self.steps)
        if self.every is not None and self.every <= self.length:
            what = f"must be more than the {self.length} steps of a window"
            raise ConfigError(what, where="profile.every", got=self.every)
        if any(rank < 0 for rank in self.ranks):
            raise ConfigError("must not be negative", where="profile.ranks", got=self.ranks)
        if self.depth < 0:
            raise ConfigError("must not be negative", where="profile.depth", got=self.depth)

    @property
    def length(self) -> int:
        """Steps of a window."""
        return self.steps + 2 * self.modules

    def at(self, step: int) -> Kind | None:
        """Return what is looked at in a step; None outside of windows."""
        if self.start is None or step < self.start:
            return None
        place = step - self.start if self.every is None else (step - self.start) % self.every
        if place >= self.length:
            return None
        return "trace" if place < self.steps else "bytes" if place == self.steps else "times"


class Trace:
    """A context in which everything that runs is noted; what it cost stands in the fields afterwards.

    Args:
        device: of the rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.communication_s = self.waiting_s = math.nan
        """How long something was exchanged; how long of it nothing was computed. Unknown where nothing was noted, as
        when another tool has the GPU's profiler."""

    def __enter__(self) -> Trace:
        self._profiler = profiling.start_profiler(self.device)
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if self.device.type == "cuda" and kind is None:
            torch.cuda.synchronize(self.device)
        events = [Event(*event) for event in profiling.stop_profiler(self._profiler)]
        communication, computation = spans(events, self.device.type != "cpu")
        if communication and computation:
            self.communication_s, self.waiting_s = (
                length(communication) / 1e9,
                outside(communication, computation) / 1e9,
            )


def spans(events: Iterable[Event], is_device: bool) -> tuple[Spans, Spans]:
    """Return when something was exchanged, and when something was computed.

    Args:
        events: what ran.
        is_device: whether what runs on the GPU counts, or what runs on the CPU.
    """
    communication: Spans = []
    computation: Spans = []
    for name, begin, end, on_device, _ in events:
        if on_device != is_device:
            continue
        if name.startswith(("nccl", "gloo:")):
            communication.append((begin, end))
        elif is_device or name.startswith(("aten::", "internlm::", "mkldnn::", "## Call CompiledFxGraph")):
            computation.append((begin, end))
    return communication, computation


@dataclass
class Parts:
    """What is looked at."""

    parallel: Parallel
    optimizer: Optimizer
    loader: Loader

    @contextlib.contextmanager
    def phases(self, around: Callable[..., Any]) -> Iterator[None]:
        """Call, inside, `around(phase, call, *arguments)` for every phase of a step that is a call."""
        watched: list[tuple[Any, str, str]] = [
            (self.loader, "next_batch", DATA),
            (self.parallel.run, "train", RUN),
            (self.optimizer, "step", UPDATE),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, phase in watched:
                stack.enter_context(_replaced(owner, name, functools.partial(around, phase, getattr(owner, name))))
            yield


class Windows:
    """Opens and closes the windows of a run on this rank.

    Args:
        config: when and what.
        folder: where files go.
        parts: what is looked at.
        trace_every: steps between two whose communication is traced; None: none is.

    A context, for the whole run: at its end a window that is open is closed, and full memory is written down.
    """

    def __init__(self, config: ProfileConfig, folder: Path, parts: Parts, trace_every: int | None) -> None:
        self.config, self.folder, self.parts, self.trace_every = config, folder, parts, trace_every
        self.device, self.rank = parts.parallel.device, parts.parallel.rank
        self.is_watched = config.start is not None and self.rank in config.ranks
        self.spent_s = 0.0
        """What opening and closing took around the last step."""
        self._trace: _Open | None = None
        self._table: ModuleTable | None = None
        self.ranks = parts.parallel.layout.world_size
        missing = [rank for rank in config.ranks if rank >= self.ranks]
        if config.start is not None and missing and self.rank == 0:
            warn_once(logger, f"profile.ranks {missing}: there are {self.ranks} ranks")

    def traces(self, step: int) -> bool:
        """Return whether communication is traced in a step: the second, every so many after, or the next that is free.

        The same on all ranks, whichever of them have windows: the figure is a mean over all.
        """
        every = self.trace_every
        if every is None or self.ranks == 1 or self.config.at(step) is not None:
            return False
        first = step
        while self.config.at(first - 1) is not None:  # a window was before it
            first -= 1
        return any((each - 1) % every == 1 % every for each in range(first, step + 1))

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[bool]:
        """Look at the step that is taken inside, if it lies in a window; yield whether communication is to be traced.

        Args:
            number: of the step, from 1.
        """
        self.spent_s = 0.0
        kind = self.config.at(number) if self.is_watched else None
        is_traced = self.traces(number)
        if kind is None and self._trace is None:
            yield is_traced
            return
        if kind != "trace":
            self.close()  # the run went back
        elif self._trace is None:
            with self._careful():
                self._trace = _Open(self, number)
        if self._trace is not None:
            self._trace.last = number
        looks: dict[Kind, Callable[[], contextlib.AbstractContextManager[None]]]
        looks = {"trace": self._traced, "bytes": self._bytes, "times": self._times}
        with contextlib.nullcontext() if kind is None else looks[kind]():
            yield is_traced
        if kind == "trace" and self.config.at(number + 1) != "trace":
            self.close()
        elif kind == "times":
            with self._careful():
                self._write_table(number)

    def close(self) -> None:
        """End a window that is open, and write what it has."""
        trace, self._trace = self._trace, None
        if trace is not None:
            with self._careful():
                trace.close()

    def __enter__(self) -> Windows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self.out_of_memory()
        self.close()

    def out_of_memory(self) -> None:
        """Write what lies in the memory of the GPU, which is full."""
        if self.device.type != "cuda":
            return
        with self._careful():
            path = self.path(f"oom-rank-{self.rank}.pickle")
            with storage.beside(path, durable=False) as draft:
                profiling.dump_memory(str(draft))
            logger.warning("what lay in the memory of %s: %s, see pytorch.org/memory_viz", self.device, path)

    def path(self, name: str) -> Path:
        """Return a file of the folder, which is made."""
        with storage.explained(f"making {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        """Turn a failure into a warning, which ends looking; and count the time."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.is_watched, self._trace, self._table = False, None, None
            logger.warning("warning: the run is not profiled any more: %s: %s", type(error).__name__, error)
        self.spent_s += time.perf_counter() - started

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        if self._trace is None:  # it could not be opened
            yield
            return

        def around(phase: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
            with record_function(f"internlm/{phase}"), resident.phase(phase):
                return call(*args, **named)

        resident = self._trace.resident
        with record_function(STEP), self.parts.phases(around):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def _bytes(self) -> Iterator[None]:
        self._table = None
        with self._careful():
            self._table = ModuleTable(self.parts.parallel, self.parts.optimizer, self.config.depth)
        if self._table is None:
            yield
            return
        found = self._table

        def around(phase: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
            result = call(*args, **named)
            if phase == RUN:
                with self._careful():
                    found.count_states()
            return result

        with self.parts.phases(around), found.count_bytes():
            yield

    @contextlib.contextmanager
    def _times(self) -> Iterator[None]:
        if self._table is None:  # the run begins here, or something went wrong
            yield
            return
        with self._table.take_times() as clock:

            def around(phase: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
                with contextlib.nullcontext() if phase == RUN else clock.running(f"({phase})"):
                    return call(*args, **named)

            with self.parts.phases(around):
                yield

    def _write_table(self, number: int) -> None:
        found, self._table = self._table, None
        if found is None:
            return
        if found.problem is not None:
            logger.warning("warning: no table of modules: %s", found.problem)
            return
        title = f"modules, steps {number - 1} and {number}, rank {self.rank}\n"
        name = "modules" if self.rank == 0 else f"modules-rank-{self.rank}"
        facts = {"step": number, "rank": self.rank, **found.as_json()}
        storage.write_json(self.path(f"{name}.json"), facts)
        storage.write_text(self.path(f"{name}.txt"), title + found.as_text())
        logger.info("%s%s", title, found.as_text().rstrip())


class _Open:
    """A window that is open."""

    def __init__(self, windows: Windows, first: int) -> None:
        self.windows, self.first, self.last = windows, first, first
        config, self.device = windows.config, windows.device
        self.has_snapshot = config.memory and self.device.type == "cuda"
        self.resident = Resident(config.memory and self.device.type == "cpu")
        if self.has_snapshot:
            profiling.record_memory(MEMORY_EVENTS)
        self.profiler = profiling.start_profiler(self.device, cpu_too=True)

    def close(self) -> None:
        """Write the files; say where they are."""
        windows, stem = self.windows, f"step-{self.first:08d}-rank-{self.windows.rank}"
        self.resident.stop()
        events = [Event(*event) for event in profiling.stop_profiler(self.profiler)]
        try:
            if self.has_snapshot:
                with storage.beside(windows.path(f"{stem}.memory.pickle"), durable=False) as draft:
                    profiling.dump_memory(str(draft))
        finally:
            if self.has_snapshot:
                profiling.record_memory(0)
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        steps += f", rank {windows.rank}"
        storage.write_text(windows.path(f"{stem}.txt"), table(events, steps))
        if self.resident.is_on:
            storage.write_text(windows.path(f"{stem}.memory.txt"), f"{steps}\n{self.resident.as_text()}")
        path = windows.path(f"{stem}.json.gz")
        with storage.beside(path, durable=False) as draft:
            _pack(self.profiler, draft)
        logger.info("profile of %s: %s and .txt", steps, path)


def _pack(profiler: Any, path: Path) -> None:
    """Write a trace, compressed.

    Raises:
        StorageError: the disk is full. ValueError: it would be too large for viewers.
    """
    plain = path.with_name(f"{path.name}.plain")
    try:
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(path, "wb", compresslevel=4) as target:
            shutil.copyfileobj(source, target, 2**20)
    finally:
        plain.unlink(missing_ok=True)
    if path.stat().st_size > MAX_TRACE_BYTES:
        raise ValueError(f"the trace has more than {MAX_TRACE_BYTES >> 20} MiB: lower profile.steps")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute of a name, for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
