"""Ending a run early, on purpose: at the end of a step, on all ranks, with a checkpoint.

    with Stop(run) as stop:
        while …:
            wish = stop.wish()                   # this rank's; all ranks sum theirs, and so decide the same
            …
            if reason := Stop.reason(total): …   # save, then `raise Stopped(reason)`

SIGTERM and SIGUSR1 are preemption, SIGINT is Ctrl-C, and a file RUN/stop, which is removed, ends a run as well. A
second signal ends the process at once; so does the first where the launcher of one machine among others is gone.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from internlm import ranks

logger = logging.getLogger(__name__)

FILE = "stop"
_LOOK_EVERY_S = 2.0
"""Between two looks for the file: on a shared file system each costs."""


class Reason(Enum):
    """Why a run ends early. The value is its weight in the sum of all ranks' wishes: the heaviest counts."""

    FILE = 1
    PREEMPTED = 1_000_000
    INTERRUPTED = 1_000_000_000_000


EXIT_CODES = {Reason.FILE: 0, Reason.PREEMPTED: 75, Reason.INTERRUPTED: 130}
"""75 is EX_TEMPFAIL: try again later."""
_SIGNALS = {"SIGTERM": Reason.PREEMPTED, "SIGUSR1": Reason.PREEMPTED, "SIGINT": Reason.INTERRUPTED}


class Stopped(Exception):
    """A run ended early, with a checkpoint. Not an error."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name.lower())
        self.reason = reason


class Stop:
    """Listens, inside a `with` block of the main thread, for what asks this process to end.

    `run` is the folder where the file may appear; None: another rank looks.
    """

    def __init__(self, run: Path | None) -> None:
        self._file = None if run is None else run / FILE
        self._asked: Reason | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._looked = 0.0

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)  # Windows has no SIGUSR1
                if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def wish(self) -> float:
        """Return what this rank adds to the sum by which all decide."""
        if self._asked is None and self._file is not None and time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._looked = time.monotonic()
            if self._file.exists():
                self._asked = Reason.FILE
                logger.warning("%s is there: the run saves at the end of this step and ends", self._file)
                with contextlib.suppress(OSError):
                    self._file.unlink()
        return 0.0 if self._asked is None else float(self._asked.value)

    @staticmethod
    def reason(total: float) -> Reason | None:
        """Return why the run shall end, by the sum of all wishes; None: it goes on."""
        return next((reason for reason in reversed(Reason) if total >= reason.value), None)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if ranks.is_cut_off():  # nobody asks the run to end: a machine of it is lost, which the others do without
            logger.warning("%s: the launcher has ended, and this rank with it", name)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self._asked in (Reason.PREEMPTED, Reason.INTERRUPTED):
            logger.warning("%s again: ending at once", name)
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        logger.warning("%s: the run saves at the end of this step and ends; again: at once", name)
        self._asked = _SIGNALS[name]
