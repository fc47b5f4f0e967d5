"""What every request passes before it is looked at: its number, the key, the size of its body.

The whole body is read here, so that nothing behind ever holds more than the limit. On the way back failed responses are
counted, a defect becomes a proper response, and the log gets a line.
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
from internlm.serve.api.problems import ApiError

logger = logging.getLogger(__name__)

_NUMBER = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#@:\s\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS = {"http": "80", "https": "443"}
_DROPPED_BYTES = 2**26
"""Read beyond the limit, and thrown away: who still sends reads no answer before it is out."""
_BODY_SECONDS = 60.0
RETRY_SECONDS = 5


@dataclass(frozen=True)
class Access:
    """Who may ask; a key or an origin that no client could send is a UsageError."""

    keys: tuple[str, ...] = ()
    """One must come with every request, but for health, readiness and the page; none: everyone may."""
    origins: tuple[str, ...] = ()
    """Other origins whose pages may call the server (CORS), as browsers write them; `*`: all."""
    hosts: tuple[str, ...] | None = None
    """Public names that a client may call the server by, beside addresses and private names; None: any.

    A stranger's page can let a name of its own point to 127.0.0.1 (DNS rebinding), and then counts as our origin.
    """

    def __post_init__(self) -> None:
        for key in self.keys:
            if not (key.isascii() and key.isprintable()):  # clients disagree on how a header holds anything else
                do = "Make another, such as `openssl rand -hex 32` does."
                raise UsageError("a key has characters beyond printable ASCII", where="--api-key", do=do)
        object.__setattr__(self, "origins", tuple(map(_origin, self.origins)))


def _origin(text: str) -> str:
    """Return an origin as a browser sends it: without a slash at its end, and without the port that is usual."""
    if text in ("*", "null"):
        return text
    found = _ORIGIN.fullmatch(text.lower().removesuffix("/"))
    if found is None:
        allowed = ["https://HOST", "http://HOST:PORT", "*"]
        raise UsageError("is no origin: scheme and host", where="--allow-origin", got=text, allowed=allowed)
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and port != _PORTS.get(scheme) else "")


class Gate:
    """ASGI middleware around the whole application; open paths need no key."""

    def __init__(
        self, app: ASGIApp, *, access: Access, body_bytes: int, open_paths: Iterable[str], metrics: Metrics
    ) -> None:
        self.app, self.access, self.body_bytes, self.metrics = app, access, body_bytes, metrics
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
            try:
                body = await self._admit(scope, headers, receive)
            except ApiError as refusal:
                await _refuse(send_marked, refusal)
            else:
                await self.app(scope, _replay(body, receive), send_marked)
        except Exception:
            if status:
                raise  # it has begun: the connection breaks, and the traceback is the server's to tell
            logger.exception("a defect: %s (%s)", _name(scope), number.decode())
            await _refuse(send_marked, ApiError(problems.DEFECT, status=500, code="internal_error"))
        finally:
            if scope["path"] not in self.open_paths and scope["path"] != "/metrics":  # those are asked all the time
                seconds = time.monotonic() - began
                logger.info("%s: %d after %.3f s (%s)", _name(scope), status, seconds, number.decode())

    async def _admit(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the body of a request that may enter, or raise ApiError."""
        access = self.access
        if access.hosts is not None and not _is_ours(headers.get(b"host", b""), access.hosts):
            text = "this server is not known by this name: --allow-origin names it, or --api-key asks for a key"
            raise ApiError(text, status=403, code="unknown_host")
        if scope["path"] not in self.open_paths and not self._may_enter(headers.get(b"authorization", b"")):
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                return await self._read(headers, receive)
        except TimeoutError as error:
            text = f"the body did not come within {_BODY_SECONDS:g} seconds"
            raise ApiError(text, status=408, code="body_too_slow") from error

    def _may_enter(self, header: bytes) -> bool:
        """Whether the header holds one of the keys; all are compared, in constant time."""
        scheme, _, given = header.partition(b" ")
        fitting = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return not fitting or (scheme.lower() == b"bearer" and any(fitting))

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        too_large = length.isdigit() and int(length[:20]) > self.body_bytes
        # Who asks before a body that is too large has not sent it, and will not.
        more = not too_large or headers.get(b"expect", b"").lower() != b"100-continue"
        parts: list[bytes] = []
        size = 0
        while more and size < self.body_bytes + _DROPPED_BYTES:
            event = await receive()  # of a client that has gone it is the end: what is behind notices
            parts.append(event.get("body", b""))
            size, more = size + len(parts[-1]), event.get("more_body", False)
            too_large = too_large or size > self.body_bytes
            if too_large:
                parts.clear()
        if too_large:
            text = f"the body is larger than {self.body_bytes} bytes, which is the limit of this server"
            do = "send fewer or shorter prompts in one request"
            raise ApiError(f"{text}: {do}", status=413, code="body_too_large")
        return b"".join(parts)


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
    """Return what was asked for, so that a client cannot write lines of its own into the log."""
    path = scope["path"][:200].encode("unicode_escape").decode()
    return f"{scope['method']} {path}"


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what the connection gives."""
    events: list[Message] = [{"type": "http.request", "body": body}]

    async def again() -> Message:
        return events.pop() if events else await receive()

    return again


async def _refuse(send: Send, error: ApiError) -> None:
    body = problems.body_of(error)
    kinds = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        kinds.append((b"www-authenticate", b"Bearer"))
    if error.status in (408, 413):
        kinds.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": kinds})
    await send({"type": "http.response.body", "body": body})
