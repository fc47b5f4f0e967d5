"""What every request passes before it is looked at: its number, the key, the size of its body.

The whole body is read here, up to the limit, so that nothing behind ever holds more.
"""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from internlm.serve import problems
from internlm.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NUMBER = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
RETRY_SECONDS = 5


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: what is behind it.
        keys: one of them must come as `Authorization: Bearer KEY`; none: everyone may enter.
        open_paths: need no key.
        body_bytes: most bytes of a body.
        metrics: failed responses are counted there.
    """

    def __init__(
        self, app: App, *, keys: Iterable[str], open_paths: Iterable[str], body_bytes: int, metrics: Metrics
    ) -> None:
        self.app, self.body_bytes, self.metrics = app, body_bytes, metrics
        self.keys = [key.encode() for key in keys]
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        number = given if _NUMBER.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_marked(event: Event) -> None:
            if event["type"] == "http.response.start":
                status = event["status"]
                extra = [(b"x-request-id", number), (b"x-content-type-options", b"nosniff")]
                if status in (429, 503):
                    extra.append((b"retry-after", str(RETRY_SECONDS).encode()))
                if status >= 400:
                    self.metrics.errors[status] += 1
                event["headers"] = [*event.get("headers", ()), *extra]
            await send(event)

        if scope["path"] not in self.open_paths and not self._may_enter(headers.get(b"authorization", b"")):
            await _refuse(send_marked, 401, "the API key is missing or wrong", "invalid_api_key")
            return
        body = await self._read(headers, receive)
        if body is None:
            text = f"the body is larger than {self.body_bytes} bytes"
            await _refuse(send_marked, 413, text, "body_too_large")
            return
        await self.app(scope, _replay(body, receive), send_marked)

    def _may_enter(self, header: bytes) -> bool:
        """Whether the header holds one of the keys; all are compared, in constant time."""
        if not self.keys:
            return True
        scheme, _, given = header.partition(b" ")
        fitting = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(fitting)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Return the body, None if it is too large."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.body_bytes:
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return b"".join(parts)  # the client has gone: what is behind notices
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            if size > self.body_bytes:
                return None
            if not event.get("more_body"):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what the connection gives."""
    given = False

    async def again() -> Event:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    body = problems.body_of(message, status, code=code)
    kinds = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        kinds.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        kinds.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": kinds})
    await send({"type": "http.response.body", "body": body})
