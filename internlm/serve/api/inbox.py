"""Between the engine's thread and the event loop: one wake-up of the loop a step, a queue for each HTTP request.

ticket = inbox.open(requests)            # Busy, Stopping: nothing was queued
try:
    async for deltas in ticket:          # [(place of the request, delta)]; [] now and then while nothing comes
        …
finally:
    ticket.close()                       # aborts what has not ended
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from internlm.errors import InternLMError
from internlm.infer.request import Checked, Delta
from internlm.infer.worker import Worker
from internlm.serve.api.metrics import Metrics

_Found = TypeVar("_Found")
Mail = list[tuple[int, Delta]]
_QUIET_SECONDS = 15.0
"""Without a delta, until a ticket gives an empty list, so that a stream can show life."""


class Gone(Exception):
    """The client has closed the connection."""


class Inbox:
    """Takes the engine's deltas to those who wait for them. Belongs to one event loop."""

    def __init__(self, worker: Worker, metrics: Metrics) -> None:
        self.worker, self.metrics = worker, metrics
        self.tickets: dict[int, Ticket] = {}
        """By the ids of their requests."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, requests: Sequence[Checked]) -> Ticket:
        """Submit requests and return what their deltas come to.

        Raises:
            Busy, Stopping: none of them was taken.
        """
        self._loop = asyncio.get_running_loop()
        ticket = Ticket(self, requests)
        try:
            for place, request in enumerate(requests):
                # The loop is busy here, so that no delta is looked at before its ticket is known.
                id_ = self.worker.submit(request, self._deliver)
                self.tickets[id_] = ticket
                ticket.places[id_] = place
        except InternLMError:
            ticket.close()
            raise
        return ticket

    def _deliver(self, deltas: list[Delta]) -> None:
        """Take the deltas of a step, on the engine's thread."""
        assert self._loop is not None, "it was set before anything was submitted"
        self._loop.call_soon_threadsafe(self._spread, deltas)

    def _spread(self, deltas: list[Delta]) -> None:
        mail: dict[Ticket, Mail] = {}
        for delta in deltas:
            if delta.waited is not None and not delta.index:
                self.metrics.queue.observe(delta.waited)
            if delta.finished:
                self.metrics.ended[delta.finished] += 1
            ticket = self.tickets.get(delta.id)
            if ticket is not None:
                mail.setdefault(ticket, []).append((ticket.places[delta.id], delta))
        for ticket, part in mail.items():
            ticket.take(part)


class Ticket:
    """What one HTTP request waits for."""

    def __init__(self, inbox: Inbox, requests: Sequence[Checked]) -> None:
        self.places: dict[int, int] = {}
        """By the id of each."""
        self._inbox = inbox
        self._left = sum(request.n for request in requests)
        self._queue: asyncio.Queue[Mail | None] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self._first: float | None = None
        self._counts: Counter[tuple[int, int]] = Counter()

    def watch(self, receive: Receive) -> None:
        """End with `Gone` when the client closes the connection."""

        async def wait() -> None:
            await _disconnected(receive)
            self.abort()
            self._queue.put_nowait(None)

        self._watch = asyncio.create_task(wait())

    def take(self, mail: Mail) -> None:
        """Queue deltas, on the event loop."""
        now = time.monotonic()
        metrics = self._inbox.metrics
        for place, delta in mail:
            if delta.tokens:
                if self._first is None:
                    self._first = now
                    metrics.first_token.observe(now - self._began)
                self._counts[place, delta.index] += len(delta.tokens)
            self._left -= delta.finished is not None
        if not self._left:
            metrics.total.observe(now - self._began)
            most = max(self._counts.values(), default=0)
            if self._first is not None and most > 1:
                metrics.per_token.observe((now - self._first) / (most - 1))
        self._queue.put_nowait(mail)

    async def __aiter__(self) -> AsyncIterator[Mail]:
        while True:
            try:
                mail = await asyncio.wait_for(self._queue.get(), _QUIET_SECONDS)
            except TimeoutError:
                yield []
                continue
            if mail is None:
                raise Gone
            yield mail
            if not self._left and self._queue.empty():
                return

    def abort(self) -> None:
        """End what has not ended."""
        for id_ in self.places:
            self._inbox.worker.abort(id_)

    def close(self) -> None:
        """Abort what has not ended, and take no further deltas."""
        if self._watch is not None:
            self._watch.cancel()
        self.abort()
        for id_ in self.places:
            self._inbox.tickets.pop(id_, None)


async def unless_gone(waiting: Coroutine[Any, Any, _Found], receive: Receive) -> _Found:
    """Return what is waited for; when the client closes the connection cancel it, and raise Gone."""
    task, left = asyncio.create_task(waiting), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
