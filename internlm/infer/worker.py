"""The engine on a thread of its own, for callers on other threads.

    worker = Worker(engine)
    id_ = worker.submit(request, deliver)      # at once; deliver(deltas) is called from the engine's thread
    worker.abort(id_)                          # its last deltas say "abort"
    worker.drain(30)                           # nothing new; what runs may end; what is left then is aborted

Commands go through a queue that is emptied before every step; a worker without work sleeps on it. After a step each
receiver is called once, with the new deltas of all requests that were submitted with it. Every answer ends with exactly
one delta whose `finished` is set, also when the thread dies.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from internlm.errors import EngineError
from internlm.infer.engine import Engine, Stats
from internlm.infer.request import Checked, Delta, Request

logger = logging.getLogger(__name__)

Deliver = Callable[[list[Delta]], None]
"""Takes the deltas of a step. It is called on the engine's thread and must not block."""


class Busy(EngineError):
    """Too many requests wait: come back later."""


class Stopping(EngineError):
    """Nothing new is taken: the worker drains, was closed or has died."""


@dataclass(frozen=True)
class Health:
    """Whether the worker works."""

    alive: bool
    """Whether its thread runs."""
    stalled: bool
    """Whether a step takes longer than it should."""
    draining: bool

    @property
    def is_good(self) -> bool:
        """Whether requests are being served."""
        return self.alive and not self.stalled


@dataclass
class _Job:
    """A request that has not ended."""

    request: Checked
    deliver: Deliver
    left: set[int]
    """Answers that have not ended."""


class Worker:
    """Runs an engine on a thread. All methods may be called from any thread but the engine's own.

    Args:
        engine: nobody else may use it from now on.
        max_waiting: answers that may wait beside those that fit into the engine's batch.
        stall_seconds: a step that takes longer is reported as a stall.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256, stall_seconds: float = 90.0) -> None:
        self.engine, self.stall_seconds = engine, stall_seconds
        self.capacity = engine.limits.batch + max_waiting
        """Answers that may be under way at once; a request for more than these is taken when there are no others."""
        self.problem: str | None = None
        """Why the thread ended, if it has."""
        self._commands: SimpleQueue[tuple[str, int]] = SimpleQueue()
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        self._jobs: dict[int, _Job] = {}
        self._load = 0
        self._stopping = False
        self._working_since: float | None = None
        self._stats = engine.stats
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request and return its id, which its deltas bear; one that was checked at once, whatever its length.

        Raises:
            Busy: `capacity` is used up.
            Stopping: nothing new is taken.
            EngineError: the request cannot be served.
        """
        checked = self.engine.check(request)
        with self._lock:
            if self._stopping:
                raise Stopping(self.problem or "the engine is stopping")
            if self._load and self._load + request.n > self.capacity:
                problem = f"{self._load} answers are under way or wait, and {self.capacity} are the limit"
                raise Busy(problem, do="Try again later.")
            id_ = next(self.engine.ids)
            self._jobs[id_] = _Job(checked, deliver, set(range(request.n)))
            self._load += request.n
            self._commands.put(("add", id_))
        return id_

    def abort(self, id: int) -> None:
        """End a request where it is. One that has ended, or never was, is left alone."""
        if id in self._jobs:
            self._commands.put(("abort", id))

    @property
    def stats(self) -> Stats:
        """How the engine did after its last step; `waiting` counts what it has not taken yet too."""
        stats = self._stats
        return dataclasses.replace(stats, waiting=max(stats.waiting, self._load - stats.running))

    @property
    def health(self) -> Health:
        """Whether the worker works."""
        since = self._working_since
        stalled = since is not None and time.monotonic() - since > self.stall_seconds
        return Health(self._thread.is_alive() and self.problem is None, stalled, self._stopping)

    def drain(self, seconds: float) -> int:
        """Take nothing new, wait for what is under way, then abort the rest; return how many requests those were."""
        with self._empty:
            self._stopping = True
            self._empty.wait_for(lambda: not self._jobs, seconds)
            left = list(self._jobs)
            for id_ in left:
                self._commands.put(("abort", id_))
            self._empty.wait_for(lambda: not self._jobs, 5.0)
        return len(left)

    def close(self) -> None:
        """Abort everything and end the thread."""
        self.drain(0)
        self._commands.put(("close", 0))
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            while self._obey():
                deltas = self.engine.step()
                self._stats = self.engine.stats
                self._working_since = time.monotonic()
                self._hand_out(deltas)
        except BaseException as error:
            logger.exception("the engine has died")
            self._die(f"the engine has died: {type(error).__name__}: {error}")
        else:
            self._die("the engine was closed")

    def _obey(self) -> bool:
        """Carry out the commands, waiting for one if there is nothing else to do; return whether to go on."""
        while True:
            if not self.engine.is_busy:
                self._working_since = None
            try:
                name, id_ = self._commands.get(block=not self.engine.is_busy)
            except Empty:
                return True
            self._working_since = self._working_since or time.monotonic()
            if name == "close":
                return False
            if name == "abort":
                self.engine.abort(id_)
            else:
                self._add(id_)

    def _add(self, id_: int) -> None:
        """Give a request to the engine; one that it does not take after all ends."""
        request = self._jobs[id_].request
        try:
            self.engine.add(request, id_)
        except Exception as error:  # such as memory that is short
            problem = f"{type(error).__name__}: {error}"
            self._hand_out([Delta(id_, [], "", "error", index, problem=problem) for index in range(request.n)])

    def _hand_out(self, deltas: list[Delta]) -> None:
        """Give each receiver its deltas, and forget the requests that ended."""
        mail: dict[Deliver, list[Delta]] = {}
        for delta in deltas:
            mail.setdefault(self._jobs[delta.id].deliver, []).append(delta)
        for deliver, part in mail.items():
            try:
                deliver(part)
            except Exception as error:  # such as an event loop that is gone
                logger.warning("warning: a receiver failed, its requests end: %s: %s", type(error).__name__, error)
                for id_ in {delta.id for delta in part}:
                    self._commands.put(("abort", id_))
        self._forget([delta for delta in deltas if delta.finished])

    def _forget(self, ends: list[Delta]) -> None:
        """Let go of the answers that these deltas end."""
        if not ends:
            return
        with self._empty:
            for delta in ends:
                job = self._jobs[delta.id]
                job.left.discard(delta.index)
                self._load -= 1
                if not job.left:
                    del self._jobs[delta.id]
            if not self._jobs:
                self._empty.notify_all()

    def _die(self, problem: str) -> None:
        """End every answer that is still waited for."""
        with self._empty:
            self._stopping, self.problem, self._working_since = True, problem, None
            jobs = list(self._jobs.items())
            self._jobs.clear()
            self._load = 0
            self._empty.notify_all()
        for id_, job in jobs:
            last = [Delta(id_, [], "", "error", index, problem=problem) for index in sorted(job.left)]
            try:
                job.deliver(last)
            except Exception as error:
                logger.warning("warning: a receiver failed: %s: %s", type(error).__name__, error)
