"""A run that stands still is found, named and ended.

Two threads of each rank, which run also while the rank waits for others in an exchange. One writes, every few seconds,

    RUN/alive/rank-00003.json    {"time": 1764341423.1, "step": 17, "phase": "train", "host": "node3", "pid": 4711, …}

and notes whether the file of the next rank changes. The other looks at the clock of this rank:

    start ──── first step ── step ── step ── evaluate ── step ── save ── step …
    start_s          stall_s each            no limit            no limit

Where a limit is passed, or nothing happens here and the next rank is silent for `stall_s`, this rank writes the stacks
of its threads to RUN/stacks/rank-00003.txt (and what torch's flight recorder has to RUN/stacks/trace-00003); the first
one names the ranks that are silent or behind, in the log and in RUN/stacks/report.txt; and each ends its process.

Limits: a process that holds Python's lock for ever is found by its neighbour only. What stood still because the whole
process was stopped (Ctrl-Z, a suspended laptop) has its clock set back when it goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm import storage
from internlm.compat import groups
from internlm.config import section
from internlm.errors import ConfigError, StorageError
from internlm.log import duration
from internlm.train.stop import Stopped

logger = logging.getLogger(__name__)

EXIT_CODE = 124
"""Of a process that is ended because the run stands still; that of `timeout`."""
_MOST_NAMED = 8


@section
class WatchConfig:
    """When a run counts as one that stands still."""

    stall_s: float | None = 1200.0
    """Longest that one training step may take. More ends the run, with the stacks of all ranks and the names of those
    that are silent. None: never. Keep it below `runtime.timeout_s`, which ends the run too, without names."""
    start_s: float = 7200.0
    """The same for the first step of a start: it compiles, and opens connections."""
    heartbeat_s: float = 5.0
    """Seconds between two signs of life of each rank."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                what = "must be finite" if value == math.inf else "must be above 0"
                raise ConfigError(what, where=f"watch.{name}", got=value)


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank."""

    rank: int
    time: float
    """Of its host's clock, in seconds since 1970."""
    step: int
    """Steps that it has taken."""
    phase: str
    """start, train, evaluate, save, load; at the end done, stopped, failed or stalled."""
    host: str
    pid: int
    count: int
    """Of the signs that this process has given."""

    @property
    def is_over(self) -> bool:
        """Return whether no other sign is due. Of a rank that stalled one is missed: its neighbour ends, too."""
        return self.phase in ("done", "stopped", "failed")


def path_of(run: Path, rank: int) -> Path:
    """Return the file with the last sign of life of a rank."""
    return run / "alive" / f"rank-{rank:05d}.json"


def read_beat(run: Path, rank: int) -> Beat | None:
    """Return the last sign of life of a rank; None where there is none that can be read."""
    try:
        known = json.loads(path_of(run, rank).read_text(encoding="utf-8"))
        return Beat(rank, **known)
    except (OSError, ValueError, TypeError):
        return None


class Heartbeat:
    """What this rank is doing, told to the others every `every_s` seconds.

    Args:
        run: folder of the run.
        rank, world_size: of this process.
        every_s: between two signs.
    """

    def __init__(self, run: Path, rank: int, world_size: int, every_s: float) -> None:
        self.run, self.rank, self.world_size, self.every_s = run, rank, world_size, every_s
        self.step, self.phase = 0, "start"
        self.since = self.heard = time.monotonic()
        """When this rank last made progress; when the next rank was last heard of."""
        self._count = 0
        self._next: Beat | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to give signs."""
        self.since = self.heard = time.monotonic()
        self.tell()
        self._thread.start()

    def stop(self, phase: str) -> None:
        """Give the last sign. A file system that hangs is not waited for."""
        self.phase = phase
        self._over.set()
        self._thread.join(self.every_s)

    def tell(self) -> bool:
        """Write one sign of life; return whether that went well. A full disk ends no run here."""
        path = path_of(self.run, self.rank)
        self._count += 1
        fact: dict[str, Any] = {
            "time": round(time.time(), 3), "step": self.step, "phase": self.phase, "host": socket.gethostname(),
            "pid": os.getpid(), "count": self._count,
        }  # fmt: skip
        try:
            storage.write_json(path, fact, durable=False)
        except StorageError:
            return False
        return True

    def _run(self) -> None:
        while not self._over.wait(self.every_s):
            could_write = self.tell()
            beat = read_beat(self.run, (self.rank + 1) % self.world_size)
            # Where this rank cannot write, the next one may not be able to either.
            if beat != self._next or not could_write or (beat is not None and beat.is_over):
                self._next, self.heard = beat, time.monotonic()
        self.tell()


class Watchdog:
    """Ends this process when the run stands still; a context around the training loop.

    Args:
        run: folder of the run.
        config: the limits.
        rank, world_size: of this process.
        told: called before the process ends, with the report by the rank that makes it, with None by the others.
        end: called with the exit code.
    """

    def __init__(
        self,
        run: Path,
        config: WatchConfig,
        rank: int = 0,
        world_size: int = 1,
        told: Callable[[str | None], None] = lambda report: None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.run, self.config, self.rank, self.world_size = run, config, rank, world_size
        self._told, self._end = told, end
        self._over = threading.Event()
        self.heart = self._new_heart()

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            self._clear()
        self._over.clear()
        self.heart = self._new_heart()  # a thread lives once
        self.heart.start()
        if self.config.stall_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._over.set()
        self.heart.stop("done" if kind is None else "stopped" if issubclass(kind, Stopped) else "failed")

    def advance(self, step: int) -> None:
        """Note that a step has ended, the how manieth of the run."""
        self.heart.step, self.heart.phase, self.heart.since = step, "train", time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note that the block is no training: it has no limit of its own."""
        before = self.heart.phase
        self.heart.phase, self.heart.since = name, time.monotonic()
        yield
        self.heart.phase, self.heart.since = before, time.monotonic()

    def _new_heart(self) -> Heartbeat:
        return Heartbeat(self.run, self.rank, self.world_size, self.config.heartbeat_s)

    def _clear(self) -> None:
        """Remove what an earlier process of the run left, and what ranks left that there are no more."""
        known = {path_of(self.run, rank) for rank in range(self.world_size)}
        with contextlib.suppress(OSError):
            (self.run / "stacks" / "report.txt").unlink(missing_ok=True)
            for path in (self.run / "alive").glob("rank-*.json"):
                if path not in known:
                    path.unlink()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(min(self.config.heartbeat_s, 1.0)):
            now = time.monotonic()
            if now - looked > 3 * self.config.heartbeat_s + 2:  # this process was stopped itself
                self.heart.since = self.heart.heard = now
            looked = now
            if self._is_stalled(now):
                self._end_run(now - self.heart.since)
                return

    def _is_stalled(self, now: float) -> bool:
        stall_s = self.config.stall_s
        assert stall_s is not None, "without a limit nobody watches"
        spent, phase = now - self.heart.since, self.heart.phase
        limit = {"train": stall_s, "start": self.config.start_s}.get(phase)
        is_silent = self.world_size > 1 and now - self.heart.heard > stall_s
        return (limit is not None and spent > limit) or (spent > stall_s and is_silent)

    def _end_run(self, stood_s: float) -> None:
        """Write and say what is known, and end this process; a file system that hangs does not hold it up."""
        work = threading.Thread(target=self._report, args=(stood_s,), name="report", daemon=True)
        work.start()
        # The others look in the same rhythm: none ends before all have written their stacks.
        time.sleep(2 * min(self.config.heartbeat_s, 1.0))
        work.join(10)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        self._end(EXIT_CODE)

    def _report(self, stood_s: float) -> None:
        folder = self.run / "stacks"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self.rank:05d}.txt", "w", encoding="utf-8") as file:
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{now}: process {os.getpid()}, its threads, the latest call first\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        try:
            with open(folder / "report.txt", "x", encoding="utf-8") as file:
                text = self._found(stood_s)
                file.write(text + "\n")
        except FileExistsError:
            text = None  # another rank has said it
        except OSError:
            text = self._found(stood_s)
        if text is not None:
            logger.error("error: %s", text)
        trace = groups.flight_record()
        if trace:
            with contextlib.suppress(OSError):
                (folder / f"trace-{self.rank:05d}").write_bytes(trace)
        self.heart.phase = "stalled"
        self.heart.tell()
        self._told(text)

    def _found(self, stood_s: float) -> str:
        """Return in words which ranks are to blame, as far as their last signs of life tell."""
        heart = self.heart
        head = f"the run stands still: nothing in {duration(stood_s)} after step {heart.step} ({heart.phase})"
        beats = [read_beat(self.run, rank) for rank in range(self.world_size)]
        now = time.time()
        silent = [
            f"rank {rank} was never heard of"
            if beat is None
            else f"rank {rank} on {beat.host} (process {beat.pid}) was last heard of {duration(now - beat.time)} ago, "
            f"in {beat.phase} after step {beat.step}"
            for rank, beat in enumerate(beats)
            if beat is None or (not beat.is_over and now - beat.time > 3 * self.config.heartbeat_s + 2)
        ]
        if not silent:
            known = [beat for beat in beats if beat is not None]
            first = max((beat.step for beat in known), default=0)
            silent = [
                f"rank {beat.rank} on {beat.host} (process {beat.pid}) lives and is {what}"
                for beat in known
                for what in [f"behind, in {beat.phase} after step {beat.step}" if beat.step < first else beat.phase]
                if beat.step < first or beat.is_over
            ]
        if not silent:
            silent = ["every rank lives and is as far: their stacks say what they wait for"]
        more = [f"and {len(silent) - _MOST_NAMED} more"] if len(silent) > _MOST_NAMED else []
        return "; ".join([head, *silent[:_MOST_NAMED], *more, f"stacks: {self.run / 'stacks'}"])
