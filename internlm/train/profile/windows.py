"""What a run does with its time and memory: traced steps, and windows in which it is looked at closely.

What communication costs is known from one step now and then, by asking a `Trace` what ran when. What slows a step down
is the part in which nothing is computed:

    computation      ████████████      ████████
    communication        ██████████████
    waiting                      ██████

On a GPU the kernels count, of all streams; on a CPU the operators of the rank, and gloo's exchanges.

A window is asked for in the recipe, and leaves files in RUN/profile (docs/performance.md lists them). The table of
modules has steps of its own, which the profiler would lengthen:

    step    10  11  12 │ 13  14
            traced     │ bytes and times of modules

Steps outside of windows pay nothing. A window that cannot be opened or written is a warning.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import record_function

from internlm import compat, disk
from internlm.config import require, require_positive, section
from internlm.errors import ConfigError
from internlm.log import warn_once
from internlm.train.profile.modules import ModuleTable
from internlm.train.profile.operators import STEP, Spans, length, outside, table
from internlm.train.step import Stepper

logger = logging.getLogger(__name__)

MAX_STEPS = 20
"""Of a window: a step of a large model is a hundred thousand events, all held in memory."""
MAX_TRACE_BYTES = 256 * 2**20
"""Of a compressed trace; viewers give up before."""
MEMORY_EVENTS = 200_000
"""Allocations that a memory snapshot goes back."""
DATA, RUN, UPDATE, REST = "data", "forward and backward", "update", "rest"
"""Phases of a step, and what is none."""
_SAMPLE_S = 0.002

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
        require(self, "profile", ("steps",), lambda steps: steps <= MAX_STEPS, f"must be at most {MAX_STEPS}")
        what = f"must be more than the {self.length} steps of a window"
        require(self, "profile", ("every",), lambda steps: steps > self.length, what)
        if any(rank < 0 for rank in self.ranks):
            raise ConfigError("must not be negative", where="profile.ranks", got=self.ranks)
        require(self, "profile", ("depth",), lambda depth: depth >= 0, "must not be negative")

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
    """A context in which everything that runs is noted; what it cost stands in the fields afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.communication_s = self.waiting_s = math.nan
        """How long something was exchanged; how long of it nothing was computed. Unknown where nothing was noted, as
        when another tool has the GPU's profiler."""

    def __enter__(self) -> Trace:
        self._profiler = compat.start_profiler(self.device)
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if self.device.type == "cuda" and kind is None:
            torch.cuda.synchronize(self.device)
        events = compat.stop_profiler(self._profiler)
        communication, computation = spans(events, self.device.type != "cpu")
        if communication and computation:
            self.communication_s = length(communication) / 1e9
            self.waiting_s = outside(communication, computation) / 1e9


def spans(events: Iterable[compat.Event], is_device: bool) -> tuple[Spans, Spans]:
    """Return when something was exchanged and when computed: on the GPU if `is_device`, else on the CPU."""
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


class Windows:
    """Opens and closes the windows of a run on this rank, and says which steps are traced for their communication.

    A context, for the whole run: at its end a window that is open is closed, and full memory is written down.
    """

    def __init__(self, config: ProfileConfig, folder: Path, stepper: Stepper, trace_every: int | None) -> None:
        self.config, self.folder, self.stepper, self.trace_every = config, folder, stepper, trace_every
        self.device, self.rank = stepper.parallel.device, stepper.parallel.rank
        self.is_watched = config.start is not None and self.rank in config.ranks
        self.spent_s = 0.0
        """What opening and closing took around the last step."""
        self._trace: _Open | None = None
        self._table: ModuleTable | None = None
        self.ranks = stepper.parallel.layout.world_size
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
        """Look at the step taken inside, if it lies in a window; yield whether its communication is to be traced."""
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
        with self._look(kind):
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
        if isinstance(error, torch.OutOfMemoryError) and self.device.type == "cuda":
            with self._careful():
                path = self.folder / f"oom-rank-{self.rank}.pickle"
                _dump_memory(path)
                logger.warning("what lay in the memory of %s: %s, see pytorch.org/memory_viz", self.device, path)
        self.close()

    def _look(self, kind: Kind | None) -> contextlib.AbstractContextManager[None]:
        if kind == "trace" and self._trace is not None:  # it could be opened
            return self._traced(self._trace.resident)
        if kind == "bytes":
            self._table = None
            with self._careful():
                self._table = ModuleTable(self.stepper.parallel, self.stepper.optimizer, self.config.depth)
        if kind is None or self._table is None:  # the run begins here, or something went wrong
            return contextlib.nullcontext()
        return self._bytes(self._table) if kind == "bytes" else self._times(self._table)

    @contextlib.contextmanager
    def _phases(self, around: Callable[..., Any]) -> Iterator[None]:
        """Call, inside, `around(phase, call, *arguments)` for every phase of a step that is a call."""
        watched: list[tuple[Any, str, str]] = [
            (self.stepper.loader, "next_batch", DATA),
            (self.stepper.parallel.run, "train", RUN),
            (self.stepper.optimizer, "step", UPDATE),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, phase in watched:
                call = functools.partial(around, phase, getattr(owner, name))
                stack.enter_context(compat.replaced(owner, name, call))
            yield

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
    def _traced(self, resident: Resident) -> Iterator[None]:
        def around(phase: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
            with record_function(f"internlm/{phase}"), resident.phase(phase):
                return call(*args, **named)

        with record_function(STEP), self._phases(around):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def _bytes(self, found: ModuleTable) -> Iterator[None]:
        def around(phase: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
            result = call(*args, **named)
            if phase == RUN:
                with self._careful():
                    found.count_states()
            return result

        with self._phases(around), found.count_bytes():
            yield

    @contextlib.contextmanager
    def _times(self, found: ModuleTable) -> Iterator[None]:
        def around(phase: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
            with contextlib.nullcontext() if phase == RUN else clock.running(f"({phase})"):
                return call(*args, **named)

        with found.take_times() as clock, self._phases(around):
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
        disk.write_json(self.folder / f"{name}.json", facts)
        disk.write_text(self.folder / f"{name}.txt", title + found.as_text())
        logger.info("%s%s", title, found.as_text().rstrip())


class _Open:
    def __init__(self, windows: Windows, first: int) -> None:
        self.windows, self.first, self.last = windows, first, first
        config, self.device = windows.config, windows.device
        self.has_snapshot = config.memory and self.device.type == "cuda"
        self.resident = Resident(config.memory and self.device.type == "cpu")
        if self.has_snapshot:
            compat.record_memory(MEMORY_EVENTS)
        self.profiler = compat.start_profiler(self.device, cpu_too=True)

    def close(self) -> None:
        """Write the files; say where they are."""
        rank = self.windows.rank
        stem = self.windows.folder / f"step-{self.first:08d}-rank-{rank}"
        self.resident.stop()
        events = compat.stop_profiler(self.profiler)
        if self.has_snapshot:
            try:
                _dump_memory(Path(f"{stem}.memory.pickle"))
            finally:
                compat.record_memory(0)
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        steps += f", rank {rank}"
        disk.write_text(f"{stem}.txt", table(events, steps))
        if self.resident.is_on:
            disk.write_text(f"{stem}.memory.txt", f"{steps}\n{self.resident.as_text()}")
        path = Path(f"{stem}.json.gz")
        with disk.beside(path, durable=False) as draft:
            _pack(self.profiler, draft)
        logger.info("profile of %s: %s and .txt", steps, path)


class Resident:
    """Watches, if wanted, the memory that the process holds, by phase of a step: for CPUs what a snapshot is for GPUs.

    Linux tells how many pages a process holds; a thread asks every 2 ms, so a peak that is shorter may be missed.
    """

    def __init__(self, is_wanted: bool) -> None:
        self.is_on = is_wanted and resident_bytes() is not None
        if is_wanted and not self.is_on:
            warn_once(logger, "profile.memory has no effect on this system's CPU")
        self.held: dict[str, tuple[int, int]] = {}
        """Phase → at its last end, and the most in it, in bytes."""
        self._phase, self._stopped = REST, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if self.is_on:
            self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is held inside for a phase."""
        self._look()
        self._phase = name
        try:
            yield
        finally:
            self._look()
            self._phase = REST

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self.is_on:
            self._thread.join()
            self._look()

    def as_text(self) -> str:
        """Return a table: MiB."""
        lines = [f"{'memory of the process, MiB':<28}{'at the end':>12}{'most':>12}"]
        for name, (end, most) in sorted(self.held.items(), key=lambda item: item[0] == REST):
            lines.append(f"{name:<28}{end / 2**20:>12.1f}{most / 2**20:>12.1f}")
        return "\n".join(lines) + "\n"

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            self._look()

    def _look(self) -> None:
        if self.is_on:
            name, now = self._phase, resident_bytes() or 0
            self.held[name] = now, max(now, self.held.get(name, (0, 0))[1])


def resident_bytes() -> int | None:
    """Return the memory that this process holds now; None where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _dump_memory(path: Path) -> None:
    with disk.beside(path, durable=False) as draft:
        compat.dump_memory(str(draft))


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
