"""A run that stands still is found, named and ended: what becomes of it is in docs/operations.md.

Two threads of each rank run also while the rank waits for others in an exchange. One writes a sign of life every few
seconds, and notes whether that of the next rank changes. The other looks at the clock:

    start ──── first step ── step ── step ── evaluate ── step ── save ── step …
    start_s          stall_s each            no limit            no limit

Where a limit is passed, or nothing happens here and the next rank is silent for `stall_s`, this rank writes its stacks;
the first one names the ranks that are silent or behind; and each ends its process.

Limits: a process that holds Python's lock for ever is found by its neighbour only. What stood still because the whole
process was stopped (Ctrl-Z, a suspended laptop) has its clock set back when it goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.compat import groups
from internlm.config import require, section
from internlm.errors import StorageError
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
        require(self, "watch", vars(self), lambda seconds: seconds > 0, "must be above 0")


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

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

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
        return Beat(rank, **disk.read_json(path_of(run, rank)))
    except (StorageError, TypeError):
        return None


class Watchdog:
    """Ends this process when the run stands still; a context around the training loop.

    Before, `told` is called, with the report by the rank that makes it, else with None; then `end` with the exit code.
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
        self.step, self.doing = 0, "start"
        self.since = self.heard = time.monotonic()
        """When this rank last made progress; when the next rank was last heard of."""
        self._count = 0
        self._next: Beat | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            self._clear()
        self._over.clear()
        self._note("start")
        self.heard = self.since
        self._tell()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()
        if self.config.stall_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.doing = "done" if kind is None else "stopped" if issubclass(kind, Stopped) else "failed"
        self._over.set()
        self._heart.join(self.config.heartbeat_s)  # a file system that hangs is not waited for

    def advance(self, step: int) -> None:
        """Note that a step has ended, the how manieth of the run."""
        self.step = step
        self._note("train")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note that the block is no training: it has no limit of its own."""
        before = self.doing
        self._note(name)
        yield
        self._note(before)

    def _note(self, phase: str) -> None:
        self.doing, self.since = phase, time.monotonic()

    def _tell(self) -> bool:
        """Write one sign of life; return whether that went well. A full disk ends no run here."""
        self._count += 1
        fact: dict[str, Any] = {
            "time": round(time.time(), 3), "step": self.step, "phase": self.doing, "host": socket.gethostname(),
            "pid": os.getpid(), "count": self._count,
        }  # fmt: skip
        try:
            disk.write_json(path_of(self.run, self.rank), fact, durable=False)
        except StorageError:
            return False
        return True

    def _beat(self) -> None:
        while not self._over.wait(self.config.heartbeat_s):
            could_write = self._tell()
            beat = read_beat(self.run, (self.rank + 1) % self.world_size)
            # Where this rank cannot write, the next one may not be able to either.
            if beat != self._next or not could_write or (beat is not None and beat.is_over):
                self._next, self.heard = beat, time.monotonic()
        self._tell()

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
                self.since = self.heard = now
            looked = now
            if self._is_stalled(now):
                self._end_run(now - self.since)
                return

    def _is_stalled(self, now: float) -> bool:
        stall_s = self.config.stall_s
        assert stall_s is not None, "without a limit nobody watches"
        spent = now - self.since
        limit = {"train": stall_s, "start": self.config.start_s}.get(self.doing)
        is_silent = self.world_size > 1 and now - self.heard > stall_s
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
        self.doing = "stalled"
        self._tell()
        self._told(text)

    def _found(self, stood_s: float) -> str:
        """Return in words which ranks are to blame, as far as their last signs of life tell."""
        head = f"the run stands still: nothing in {duration(stood_s)} after step {self.step} ({self.doing})"
        beats = [read_beat(self.run, rank) for rank in range(self.world_size)]
        now = time.time()
        silent = [
            f"rank {rank} was never heard of"
            if beat is None
            else f"{beat} was last heard of {duration(now - beat.time)} ago, in {beat.phase} after step {beat.step}"
            for rank, beat in enumerate(beats)
            if beat is None or (not beat.is_over and now - beat.time > 3 * self.config.heartbeat_s + 2)
        ]
        if not silent:
            known = [beat for beat in beats if beat is not None]
            first = max((beat.step for beat in known), default=0)
            silent = [
                f"{beat} lives and is "
                + (f"behind, in {beat.phase} after step {beat.step}" if beat.step < first else beat.phase)
                for beat in known
                if beat.step < first or beat.is_over
            ]
        if not silent:
            silent = ["every rank lives and is as far: their stacks say what they wait for"]
        more = [f"and {len(silent) - _MOST_NAMED} more"] if len(silent) > _MOST_NAMED else []
        return "; ".join([head, *silent[:_MOST_NAMED], *more, f"stacks: {self.run / 'stacks'}"])
