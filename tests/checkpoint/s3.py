"""An S3 server on loopback, behind a proxy that can fail: moto's, which keeps objects and parts as S3 does."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from xml.etree import ElementTree

from tests.processes import Fork, free_port, listened_to, places, until

BUCKET = "bucket"
SECRET = "a-secret-that-nobody-may-print"
Rule = Callable[[str, str, int], "int | float | str | None"]
"""Takes method, path with query, and how many bytes come; returns a status to answer with, seconds to wait, `reset`,
or None: the request goes through."""


def answer(code: str) -> bytes:
    """Return the body of an error, as S3 writes it."""
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as the test wants it</Message></Error>'.encode()


CODES = {403: "AccessDenied", 404: "NoSuchBucket", 500: "InternalError", 503: "ServiceUnavailable"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def _pass_on(self) -> None:
        body = self._body()
        store = self.server
        store.seen.append((self.command, self.path))
        what = store.rule(self.command, self.path, len(body))
        if what == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            self.close_connection = True
            return
        if isinstance(what, float):
            time.sleep(what)
        elif isinstance(what, int):
            self._send(what, {"Content-Type": "application/xml"}, answer(CODES[what]))
            return
        connection = http.client.HTTPConnection("127.0.0.1", store.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOPS}
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        self._send(reply.status, dict(reply.getheaders()), content)
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        with contextlib.suppress(OSError):  # the client is gone: it was killed
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in _HOPS:
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


_HOPS = ("content-length", "transfer-encoding", "connection", "expect", "date", "server")


class Store(ThreadingHTTPServer):
    """The server and its proxy.

    Args:
        log: file for what moto says.
    """

    daemon_threads = True

    def __init__(self, log: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rule: Rule = lambda method, path, size: None
        self.seen: list[tuple[str, str]] = []
        self.behind = free_port()
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.behind)]
        with open(log, "wb") as output:
            self.moto = subprocess.Popen(words, stdout=output, stderr=output)
        Thread(target=self.serve_forever, daemon=True).start()
        assert until(lambda: listened_to(self.behind), 90), log.read_text()
        self.ask("PUT", f"/{BUCKET}")

    @property
    def environment(self) -> dict[str, str]:
        """What a client must have in its environment."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",  # the client's own tries, which take their time
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def ask(self, method: str, path: str) -> bytes:
        """Ask moto, past the proxy."""
        connection = http.client.HTTPConnection("127.0.0.1", self.behind, timeout=20)
        connection.request(method, path)
        content = connection.getresponse().read()
        connection.close()
        return content

    def keys(self, prefix: str = "") -> list[str]:
        """Return the objects of the bucket."""
        tree = ElementTree.fromstring(self.ask("GET", f"/{BUCKET}?list-type=2&prefix={prefix}"))
        return [str(node.text) for node in tree.iter() if node.tag.endswith("}Key")]

    def uploads(self) -> int:
        """Return how many multi-part uploads were begun and neither completed nor given up."""
        tree = ElementTree.fromstring(self.ask("GET", f"/{BUCKET}?uploads"))
        return sum(node.tag.endswith("}Upload") for node in tree.iter())

    def end(self) -> None:
        """Stop both."""
        self.shutdown()
        self.server_close()
        self.moto.terminate()
        self.moto.wait()


def train(recipe: Path, store: Store, world: int = 1) -> list[Fork]:
    """Start a training with so many ranks; each is a process of its own."""
    ranks = places(world) if world > 1 else [{}]
    return [Fork("train", str(recipe), **store.environment, **place) for place in ranks]
