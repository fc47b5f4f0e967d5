"""What became of a run's time since its first start, all restarts included.

A run is, at each moment, in one phase; the seconds of all add up to the wall time since the first start.
docs/operations.md says what belongs to each, and goodput = useful / wall time.

RUN/goodput.json holds the seconds, so that the next process goes on from there; each checkpoint holds how many were
useful when it was made, so that whoever goes back to it knows how many are lost: those of the file − its own.

Limits: rank 0's clock. A killed process has written the file at most `WRITE_EVERY_S` and a step before; what came after
that counts as down. What a GPU still does of a step's update belongs to the phase that follows.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from internlm import disk
from internlm.errors import StorageError
from internlm.log import duration, warn_once

logger = logging.getLogger(__name__)

Phase = Literal["useful", "data", "skipped", "lost", "stalled", "evaluate", "checkpoint", "startup", "down", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)

FILE = "goodput.json"
WRITE_EVERY_S = 10.0
LOG_EVERY_S = 1800.0


class Goodput:
    """The time of a run by phase. Begins in phase `startup`.

    Args:
        run: the folder where the seconds are kept; None: another rank keeps them.
        clock: seconds since 1970.
        born: when this process started; None: as the system says.
    """

    def __init__(self, run: Path | None = None, clock: Callable[[], float] = time.time, born: float | None = None):
        self._file = None if run is None else run / FILE
        self._clock = clock
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.starts = 1
        """Processes that worked on the run so far."""
        self.phase: Phase = "startup"
        now = clock()
        self._since = min(now, _born(now) if born is None else born)
        self._written, self._logged = 0.0, now
        before = None if self._file is None else read(self._file)
        if before is not None:
            self.seconds |= before["seconds"]
            self.starts = before["starts"] + 1
            self._since = min(now, max(self._since, before["until"]))
            self.seconds["down"] += max(0.0, self._since - before["until"])

    def enter(self, phase: Phase, was: Phase | None = None) -> None:
        """End the present phase, which turned out to be `was` where that is given, and begin another."""
        now = self._clock()
        self.seconds[was or self.phase] += max(0.0, now - self._since)  # a clock that was set back counts nothing
        self._since = now
        self.phase = phase

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Spend the block in a phase, then return to the one before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """End the start of the process, and keep and log the time when the block ends."""
        self.enter("other")
        try:
            yield
        finally:
            self.write(at_once=True)
            if self._file is not None:
                logger.info("%s", self)

    def stall(self) -> None:
        """Keep the time of a run that stands still, before its process is ended: nothing came of the present phase."""
        self.enter("stalled", was="stalled")
        self.write(at_once=True)

    def go_back(self, useful_s: float | None) -> None:
        """Count as lost what was useful since a checkpoint, in which so much was; None: it does not say."""
        if useful_s is None:
            return
        lost = self.seconds["useful"] - useful_s
        self.seconds["useful"] = useful_s
        # Less than nothing: the process died before it wrote the file, and what it did then was taken for no process.
        self.seconds["lost" if lost >= 0 else "down"] += lost
        self.seconds["down"] = max(0.0, self.seconds["down"])

    def shares(self) -> dict[str, float]:
        """Return metrics: the share of each phase in the wall time, the wall time, and how often a process started."""
        self.enter(self.phase)
        shares, wall = self._shares()
        found = {f"goodput/{name}": share for name, share in shares.items()}
        return found | {"goodput/wall_s": wall, "goodput/starts": float(self.starts)}

    def write(self, *, at_once: bool = False) -> None:
        """Keep the seconds in the run folder, unless it was done a moment ago. A failure is one warning."""
        if self._file is None or (not at_once and self._clock() - self._written < WRITE_EVERY_S):
            return
        self.enter(self.phase)
        self._written = self._since
        state = {"seconds": self.seconds, "starts": self.starts, "until": self._since}
        if self._since - self._logged > LOG_EVERY_S:
            self._logged = self._since
            logger.info("%s", self)
        try:  # what a machine that loses its power forgets is a few seconds of this
            disk.write_json(self._file, state, durable=False)
        except StorageError as error:
            warn_once(logger, str(error))

    def __str__(self) -> str:
        """Return the time in words: `goodput 91.2% of 5h12m | down 4.1%, startup 2.0%, lost 1.3%`."""
        return sentence(*self._shares())

    def _shares(self) -> tuple[dict[str, float], float]:
        wall = sum(self.seconds.values())
        return {name: spent / wall if wall else 0.0 for name, spent in self.seconds.items()}, wall


def sentence(shares: dict[str, float], wall_s: float) -> str:
    """Return shares of phases in words, the largest that are not useful first; below 0.1 % is not said."""
    rest = sorted(((share, name) for name, share in shares.items() if name != "useful"), reverse=True)
    said = ", ".join(f"{name} {share:.1%}" for share, name in rest if share >= 0.001)
    return f"goodput {shares.get('useful', 0.0):.1%} of {duration(wall_s)}" + (f" | {said}" if said else "")


def read(path: Path) -> dict[str, Any] | None:
    """Return what a goodput file holds: `seconds` by phase, `starts`, `until`; None if it is missing or damaged."""
    try:
        found = disk.read_json(path)
        seconds = {str(name): float(spent) for name, spent in found["seconds"].items() if name in PHASES}
        starts, until = int(found["starts"]), float(found["until"])
    except (StorageError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    is_sane = math.isfinite(until) and all(math.isfinite(spent) and spent >= 0 for spent in seconds.values())
    return {"seconds": seconds, "starts": starts, "until": until} if is_sane else None


def _born(now: float) -> float:
    """Return when this process started, in seconds since 1970; `now` where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return now - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now
