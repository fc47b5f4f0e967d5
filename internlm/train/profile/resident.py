"""The memory that this process holds, by phase of a step: what a snapshot is on a GPU, for a CPU.

Linux tells how many pages a process holds; a thread asks every 2 ms, so a peak that is shorter may be missed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

from internlm.log import warn_once

logger = logging.getLogger(__name__)

REST = "rest"
"""What is no phase."""
_SAMPLE_S = 0.002


class Resident:
    """Watches, if wanted, the memory that the process holds, by phase of a step; sampled, and on Linux only."""

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
