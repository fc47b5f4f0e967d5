"""Logging, amounts as people write them, progress: on a terminal a line that moves, else a line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

_warned: set[str] = set()
_rank = 0


def setup(rank: int = 0) -> None:
    """Send this package's log to stderr: INFO on rank 0, WARNING on the others."""
    global _rank
    _rank = rank
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger = logging.getLogger("internlm")
    logger.handlers[:] = [handler]
    logger.setLevel("INFO" if rank == 0 else "WARNING")
    logger.propagate = False


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, the first time in the process."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("warning: %s", message)


def duration(seconds: float) -> str:
    """Return a duration as people say it: `8s`, `3m20s`, `5h12m`, `2d3h`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600}h"


def quantity(value: float, units: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """Return a count with three significant digits and the unit of its thousands: `41.2k`, `7.32B`."""
    power = sum(abs(value) >= 0.9995 * 1000**n for n in range(1, len(units)))  # what rounds up is in the next unit
    return f"{value / 1000**power:.3g}{units[power]}"


def size(value: float) -> str:
    """Return bytes with three significant digits: `41.2 kB`, `7.32 GB`."""
    return quantity(value, (" B", " kB", " MB", " GB", " TB"))


class Progress:
    """Show how far a long piece of work is, with an estimate of the time left.

    Args:
        what: such as "tokenising".
        total: units of work, if known.
        unit: their name; "bytes" are shown in kB, MB, GB.
    """

    def __init__(self, what: str, total: float | None, unit: str = "") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0.0
        self.started = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.every_s = 0.2 if self.terminal else 5.0

    def advance(self, amount: float = 1.0) -> None:
        """Count `amount` more units as done, and show it now and then."""
        self.done += amount
        now = time.monotonic()
        if now - self.last >= self.every_s:
            self.last = now
            self._show(now)

    def close(self) -> None:
        """Show the final line."""
        self._show(time.monotonic(), final=True)

    def _show(self, now: float, final: bool = False) -> None:
        if _rank != 0:
            return
        spent = max(now - self.started, 1e-9)
        rate = self.done / spent
        amount = size if self.unit == "bytes" else lambda value: f"{quantity(value)} {self.unit}"
        text = f"{self.what}: {amount(self.done)}"
        if self.total:
            text += f" of {amount(self.total)} ({min(1.0, self.done / self.total):.0%})"
        text += f" | {amount(rate)}/s"
        if final:
            text += f" | took {duration(spent)}"
        elif self.total and rate > 0:
            text += f" | eta {duration((self.total - self.done) / rate)}"
        start, end = ("\r\x1b[2K", "\n" if final else "") if self.terminal else ("", "\n")
        sys.stderr.write(start + text + end)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
