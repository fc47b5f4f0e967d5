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
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from internlm.errors import EngineError
from internlm.infer.engine import Engine, Stats
from internlm.infer.request import Delta, Request

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
    heartbeat: float
    """Seconds since the last sign of life, 0 when it sleeps for want of work."""

    @property
    def is_good(self) -> bool:
        """Whether requests are being served."""
        return self.alive and not self.stalled


@dataclass
class _Job:
    """A request that has not ended."""

    request: Request
    deliver: Deliver
    left: set[int]
    """Answers that have not ended."""
    since: float
    """When it came."""


class Worker:
    """Runs an engine on a thread. All methods may be called from any thread but the engine's own.

    Args:
        engine: nobody else may use it from now on.
        max_waiting: answers that may wait beside those that fit into the engine's batch.
        stall_seconds: a step that takes longer is reported as a stall.
        note_wait: told, on the engine's thread, the seconds that each request waited before its first step.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 256,
        stall_seconds: float = 90.0,
        note_wait: Callable[[float], None] | None = None,
    ) -> None:
        self.engine, self.stall_seconds = engine, stall_seconds
        self.capacity = engine.limits.batch + max_waiting
        """Answers that may be under way at once."""
        self.problem: str | None = None
        """Why the thread died, if it has."""
        self._note_wait = note_wait or (lambda seconds: None)
        self._commands: SimpleQueue[tuple[str, int]] = SimpleQueue()
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        self._jobs: dict[int, _Job] = {}
        self._load = 0
        self._numbers = itertools.count(1)
        self._stopping = False
        self._working_since: float | None = None
        self._ours: dict[int, int] = {}
        """Engine's id → ours. This and the next belong to the engine's thread."""
        self._theirs: dict[int, int] = {}
        self._not_started: set[int] = set()
        self._stats = engine.stats
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request and return its id, which its deltas bear.

        Raises:
            Busy: `capacity` is used up.
            Stopping: nothing new is taken.
            EngineError: the request cannot be served.
        """
        self.engine.check(request)
        with self._lock:
            if self._stopping:
                raise Stopping(self.problem or "the engine is stopping")
            if self._load >= self.capacity:
                raise Busy(f"{self._load} answers are under way or wait, which is the limit", do="Try again later.")
            id_ = next(self._numbers)
            self._jobs[id_] = _Job(request, deliver, set(range(request.n)), time.monotonic())
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
        age = 0.0 if since is None else time.monotonic() - since
        return Health(self._thread.is_alive(), age > self.stall_seconds, self._stopping, age)

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
                if id_ in self._theirs:
                    self.engine.abort(self._theirs[id_])
                continue
            theirs = self.engine.add(self._jobs[id_].request)
            self._ours[theirs], self._theirs[id_] = id_, theirs
            self._not_started.add(id_)

    def _hand_out(self, deltas: list[Delta]) -> None:
        """Give each receiver its deltas, and forget the requests that ended."""
        ours = [dataclasses.replace(delta, id=self._ours[delta.id]) for delta in deltas]
        if self._not_started:
            running = (self._ours[sequence.id] for sequence in self.engine.scheduler.running)
            self._start({delta.id for delta in ours}.union(running))
        mail: dict[Deliver, list[Delta]] = {}
        for delta in ours:
            mail.setdefault(self._jobs[delta.id].deliver, []).append(delta)
        for deliver, part in mail.items():
            try:
                deliver(part)
            except Exception as error:  # such as an event loop that is gone
                logger.warning("warning: a receiver failed, its requests end: %s: %s", type(error).__name__, error)
                for id_ in {delta.id for delta in part}:
                    self._commands.put(("abort", id_))
        self._forget(ours)

    def _start(self, ids: set[int]) -> None:
        """Note how long requests have waited that were not known to run."""
        now = time.monotonic()
        for id_ in ids & self._not_started:
            self._not_started.discard(id_)
            self._note_wait(now - self._jobs[id_].since)

    def _forget(self, deltas: Iterable[Delta]) -> None:
        """Let go of the answers that these deltas end."""
        with self._empty:
            for delta in deltas:
                if not delta.finished:
                    continue
                job = self._jobs[delta.id]
                job.left.discard(delta.index)
                self._load -= 1
                if not job.left:
                    del self._jobs[delta.id]
                    self._not_started.discard(delta.id)
                    self._ours.pop(self._theirs.pop(delta.id, -1), None)
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
