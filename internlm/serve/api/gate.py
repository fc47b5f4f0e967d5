"""What every request passes before it is looked at: its number, the key, the size of its body.

The whole body is read here, up to the limit, so that nothing behind ever holds more. On the way back failed responses
are counted, a defect becomes a proper response, and the log gets a line.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internlm.errors import UsageError
from internlm.serve.api import problems
from internlm.serve.api.metrics import Metrics

logger = logging.getLogger(__name__)

_NUMBER = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#@:\s\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS = {"http": "80", "https": "443"}
_DROPPED_BYTES = 2**26
"""Of a body that is too large, so much is read and thrown away: who still sends it reads no answer before it is out."""
RETRY_SECONDS = 5


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much.

    Raises:
        UsageError: a key or an origin is none that a client could send.
    """

    keys: tuple[str, ...] = ()
    """One of them must come with every request, but for health, readiness and the page; none: everyone may."""
    origins: tuple[str, ...] = ()
    """Other origins whose pages may call the server (CORS), as browsers write them; `*`: all."""
    hosts: tuple[str, ...] | None = None
    """Public names that a client may call the server by, beside addresses and names of private networks; None: any.

    A page of a stranger can let a name of its own point to 127.0.0.1 (DNS rebinding), and then counts as our origin.
    """
    body_bytes: int | None = None
    """Most bytes of a request; None: as many as the model's context and batch need."""
    body_seconds: float = 60.0
    """Most seconds until it has come."""

    def __post_init__(self) -> None:
        for key in self.keys:
            if not (key.isascii() and key.isprintable()):  # clients disagree on how a header holds anything else
                do = "Make another, such as `openssl rand -hex 32` does."
                raise UsageError("a key has characters beyond printable ASCII", where="--api-key", do=do)
        object.__setattr__(self, "origins", tuple(map(_origin, self.origins)))


def _origin(text: str) -> str:
    """Return an origin as a browser sends it: without a slash at its end, and without the port that is usual.

    Raises:
        UsageError: it is none.
    """
    if text in ("*", "null"):
        return text
    found = _ORIGIN.fullmatch(text.lower().removesuffix("/"))
    if found is None:
        allowed = ["https://HOST", "http://HOST:PORT", "*"]
        raise UsageError("is no origin: scheme and host", where="--allow-origin", got=text, allowed=allowed)
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and port != _PORTS.get(scheme) else "")


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: what is behind it.
        access: who may enter, and with how much; `body_bytes` must be set.
        open_paths: need no key.
        metrics: failed responses are counted there.
    """

    def __init__(self, app: ASGIApp, *, access: Access, open_paths: Iterable[str], metrics: Metrics) -> None:
        self.app, self.access, self.metrics = app, access, metrics
        assert access.body_bytes is not None, "`make_app` sets it"
        self._body_bytes = access.body_bytes
        self.keys = [key.encode() for key in access.keys]
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        number = given if _NUMBER.fullmatch(given) else uuid.uuid4().hex.encode()
        began, status = time.monotonic(), 0

        async def send_marked(event: Message) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                extra = [(b"x-request-id", number), (b"x-content-type-options", b"nosniff")]
                if status in (429, 503):
                    extra.append((b"retry-after", str(RETRY_SECONDS).encode()))
                if status >= 400:
                    self.metrics.errors[status] += 1
                event["headers"] = [*event.get("headers", ()), *extra]
            await send(event)

        try:
            await self._admit(scope, headers, receive, send_marked)
        except Exception:
            if status:
                raise  # it has begun: the connection breaks, and the traceback is the server's to tell
            logger.exception("a defect: %s (%s)", _name(scope), number.decode())
            await _refuse(send_marked, 500, "the server has a defect; its log says more", "internal_error")
        finally:
            if scope["path"] not in self.open_paths and scope["path"] != "/metrics":  # those are asked all the time
                seconds = time.monotonic() - began
                logger.info("%s: %d after %.3f s (%s)", _name(scope), status, seconds, number.decode())

    async def _admit(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Let a request through if it may enter."""
        if self.access.hosts is not None and not _is_ours(headers.get(b"host", b""), self.access.hosts):
            text = "this server is not known by this name: --allow-origin names it, or --api-key asks for a key"
            await _refuse(send, 403, text, "unknown_host")
            return
        if scope["path"] not in self.open_paths and not self._may_enter(headers.get(b"authorization", b"")):
            await _refuse(send, 401, "the API key is missing or wrong", "invalid_api_key")
            return
        try:
            async with asyncio.timeout(self.access.body_seconds):
                body = await self._read(headers, receive)
        except TimeoutError:
            text = f"the body did not come within {self.access.body_seconds:g} seconds"
            await _refuse(send, 408, text, "body_too_slow")
            return
        if body is None:
            text = f"the body is larger than {self._body_bytes} bytes, which is the limit of this server"
            await _refuse(send, 413, f"{text}: send fewer or shorter prompts in one request", "body_too_large")
            return
        await self.app(scope, _replay(body, receive), send)

    def _may_enter(self, header: bytes) -> bool:
        """Whether the header holds one of the keys; all are compared, in constant time."""
        if not self.keys:
            return True
        scheme, _, given = header.partition(b" ")
        fitting = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(fitting)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Return the body, None if it is too large; then it is read, up to a bound, and thrown away."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._body_bytes:
            if headers.get(b"expect", b"").lower() != b"100-continue":  # who asks so has not sent it, and will not
                await _drop(receive)
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return b"".join(parts)  # the client has gone: what is behind notices
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            more = event.get("more_body")
            if size > self._body_bytes:
                if more:
                    await _drop(receive)
                return None
            if not more:
                return b"".join(parts)


async def _drop(receive: Receive) -> None:
    """Read the rest of a body, up to a bound, and throw it away."""
    left = _DROPPED_BYTES
    while left > 0:
        event = await receive()
        if not event.get("more_body"):  # the end, or the client has gone
            return
        left -= len(event.get("body", b""))


def _is_ours(header: bytes, hosts: Iterable[str]) -> bool:
    """Whether a Host header holds one of these names, or one that no stranger can let point here."""
    text = header.decode("latin-1").lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0].rstrip(".")
    if "." not in name or name.endswith((".localhost", ".local", ".internal")) or name in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name(scope: Scope) -> str:
    """Return what was asked for, as a log can hold it: a client must not be able to write lines of its own."""
    path = scope["path"][:200].encode("unicode_escape").decode()
    return f"{scope['method']} {path}"


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what the connection gives."""
    given = False

    async def again() -> Message:
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
    if status in (408, 413):
        kinds.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": kinds})
    await send({"type": "http.response.body", "body": body})
