"""The server as a process: a socket, signals, an orderly end.

    code = run(Server(app, worker, address, drain_seconds=30), bind(address))

The first SIGTERM or Ctrl-C stops listening, lets answers end for some seconds, and aborts what is left; a second one
ends at once. A worker that has died ends the process with code 1.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from internlm.errors import UsageError
from internlm.infer.worker import Worker

_IDLE_SECONDS = 75
"""That a connection is kept for another request: longer than by proxies (60 s), whose next one may be on its way."""
_ALIVE_SECONDS = 1.0
_DEAD_SECONDS = 3.0
"""How long a server whose engine has died goes on saying so."""


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    certificate: str | None = None
    """File of a TLS certificate (PEM); with it the server speaks https."""
    key: str | None = None


class Server(uvicorn.Server):
    """Uvicorn that drains the worker before it ends."""

    def __init__(self, app: ASGIApp, worker: Worker, address: Address, *, drain_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            ssl_certfile=address.certificate,
            ssl_keyfile=address.key,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=int(drain_seconds) + 10,
        )
        super().__init__(config)
        self.worker, self.drain_seconds = worker, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order at the first signal, at once at the second."""
        self.force_exit = self.should_exit
        if not self.should_exit:
            self.should_exit = True
            # A thread of its own: the handler may have interrupted one who holds the worker's lock.
            threading.Thread(target=self.worker.drain, args=(self.drain_seconds,), daemon=True).start()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes or the engine dies."""
        watch = asyncio.create_task(self._watch())
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while self.worker.health.alive:
            await asyncio.sleep(_ALIVE_SECONDS)
        await asyncio.sleep(_DEAD_SECONDS)
        self.should_exit = True


def bind(address: Address) -> socket.socket:
    """Return a socket that listens there, or raise UsageError: the address is not ours, or taken."""
    if not 0 <= address.port < 65536:
        raise UsageError("is no port", where="--port", got=address.port, allowed=["0 to 65535"])
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(2048)
    except (OSError, UnicodeError) as error:  # the latter of a name like `a..b`
        raise UsageError(
            f"cannot listen at {address.host}:{address.port}: {error}", do="Choose another --host or --port."
        ) from error
    return listener


def url_of(address: Address, listener: socket.socket) -> str:
    """Return where a browser finds the server."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{'https' if address.certificate else 'http'}://{host}:{listener.getsockname()[1]}"


def run(server: Server, listener: socket.socket) -> int:
    """Serve until the end and return the exit code: 1 if the engine died."""
    try:
        server.run(sockets=[listener])
    finally:
        died = server.worker.problem is not None
        server.worker.close()
    return 1 if died else 0
