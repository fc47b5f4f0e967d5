"""The engine on a thread of its own, for callers on other threads.

    worker = Worker(engine)
    id_ = worker.submit(request, deliver)      # at once; deliver(deltas) is called from the engine's thread
    worker.abort(id_)                          # its last deltas say "abort"
    worker.drain(30)                           # nothing new; what runs may end; what is left then is aborted

Commands go through a queue that is emptied before every step. After a step each receiver is called once, with the new
deltas of all its requests. Every answer ends with one delta whose `finished` is set, also when the thread dies.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

from internlm.errors import EngineError
from internlm.infer.engine import Engine, Stats
from internlm.infer.request import Checked, Delta, Request

logger = logging.getLogger(__name__)

_STALL_SECONDS = 90.0
"""A step that takes longer is reported as a stall."""
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
    stalled: bool
    draining: bool

    @property
    def is_good(self) -> bool:
        """Whether requests are being served."""
        return self.alive and not self.stalled


@dataclass
class _Job:
    """A request that has not ended."""

    deliver: Deliver
    left: set[int]
    """Answers that have not ended."""


class Worker:
    """Runs an engine, which nobody else may use, on a thread. All methods may be called from any other thread.

    `max_waiting` answers may wait beside those that fit into the engine's batch.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        self.engine = engine
        self.capacity = engine.limits.batch + max_waiting
        """Answers that may be under way at once; a request for more is taken when there are no others."""
        self.problem: str | None = None
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._empty = threading.Condition()
        """Notified when nothing is under way; its lock is that of `_jobs`."""
        self._jobs: dict[int, _Job] = {}
        self._load = 0
        self._stopping = False
        self._working_since: float | None = None
        self._stats = engine.stats
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request and return its id, which its deltas bear; one that was `Checked` at once, however long.

        Raises:
            Busy: `capacity` is used up.
            Stopping: nothing new is taken.
            EngineError: the request cannot be served.
        """
        checked = self.engine.check(request)
        with self._empty:
            if self._stopping:
                raise Stopping(self.problem or "the engine is stopping")
            if self._load and self._load + request.n > self.capacity:
                problem = f"{self._load} answers are under way or wait, and {self.capacity} are the limit"
                raise Busy(problem, do="Try again later.")
            id_ = next(self.engine.ids)
            self._jobs[id_] = _Job(deliver, set(range(request.n)))
            self._load += request.n
            self._commands.put(partial(self._add, id_, checked))
        return id_

    def abort(self, id: int) -> None:
        """End a request where it is. One that has ended, or never was, is left alone."""
        if id in self._jobs:
            self._commands.put(partial(self.engine.abort, id))

    @property
    def stats(self) -> Stats:
        """How the engine did after its last step; what it has not taken yet waits too."""
        stats = self._stats
        return dataclasses.replace(stats, waiting=max(stats.waiting, self._load - stats.running))

    @property
    def health(self) -> Health:
        """Whether the worker works."""
        since = self._working_since
        stalled = since is not None and time.monotonic() - since > _STALL_SECONDS
        return Health(self._thread.is_alive() and self.problem is None, stalled, self._stopping)

    def drain(self, seconds: float) -> int:
        """Take nothing new, wait for what is under way, then abort the rest; return how many requests that is."""
        with self._empty:
            self._stopping = True
            self._empty.wait_for(lambda: not self._jobs, seconds)
            left = list(self._jobs)
            for id_ in left:
                self.abort(id_)
            self._empty.wait_for(lambda: not self._jobs, 5.0)
        return len(left)

    def close(self) -> None:
        """Abort everything and end the thread."""
        self.drain(0)
        self._commands.put(None)
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
                command = self._commands.get(block=not self.engine.is_busy)
            except Empty:
                return True
            self._working_since = self._working_since or time.monotonic()
            if command is None:
                return False
            command()

    def _add(self, id_: int, request: Checked) -> None:
        """Give a request to the engine, or end it."""
        try:
            self.engine.add(request, id_)
        except Exception as error:  # such as memory that is short
            self._fail([id_], f"{type(error).__name__}: {error}")

    def _fail(self, ids: Iterable[int], problem: str) -> None:
        left = [(id_, index) for id_ in ids for index in sorted(self._jobs[id_].left)]
        self._hand_out([Delta(id_, [], "", "error", index, problem=problem) for id_, index in left])

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
                    self.abort(id_)
        self._forget([delta for delta in deltas if delta.finished])

    def _forget(self, ends: list[Delta]) -> None:
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
        self._fail(self._jobs, problem)
