"""A small server that speaks OpenAI's protocol and says what a test told it to, and gives the chat page at `/`."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from internlm.serve import web


@dataclass
class Answer:
    """What the server does with one request."""

    pieces: list[str]
    delay: float = 0.0
    """Seconds before each piece."""
    status: int = 200
    message: str = ""
    """Of the error, when the status is not 200 or `fails` is set."""
    fails: bool = False
    """Send an error after the pieces, in the stream."""
    breaks: bool = False
    """Close the connection after the pieces."""
    finish: str = "stop"
    gate: threading.Event | None = None
    """Wait for this before the last piece."""


@dataclass
class Stub:
    """What the server was asked, and what it will answer: the next of `answers`, or `otherwise`."""

    url: str = ""
    key: str | None = None
    models: list[str] = field(default_factory=lambda: ["tiny"])
    answers: list[Answer] = field(default_factory=list)
    otherwise: Answer = field(default_factory=lambda: Answer(["Fine."]))
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the chat requests."""
    paths: list[str] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client left in the middle of an answer."""


@contextlib.contextmanager
def serving(**changes: Any) -> Iterator[Stub]:
    """Run a server until the block ends."""
    stub = Stub(**changes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub, "files": web.files()}))
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    files: dict[str, web.File]

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_json(self, status: int, body: Any) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _refuse(self, status: int, message: str) -> None:
        self._send_json(status, {"error": {"message": message, "type": "error", "param": None, "code": None}})

    def _is_known(self) -> bool:
        known = self.stub.key is None or self.headers["Authorization"] == f"Bearer {self.stub.key}"
        if not known:
            self._refuse(401, "Incorrect API key provided.")
        return known

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.stub.paths.append(path)
        if path in self.files:
            self._send(200, self.files[path].kind, self.files[path].content)
        elif path == "/v1/models":
            if self._is_known():
                self._send_json(200, {"object": "list", "data": [{"id": name} for name in self.stub.models]})
        else:
            self._refuse(404, "no such page")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_known():
            return
        self.stub.requests.append(body)
        answer = self.stub.answers.pop(0) if self.stub.answers else self.stub.otherwise
        if answer.status != 200:
            self._refuse(answer.status, answer.message)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(answer)
        except OSError:
            self.stub.gone.set()

    def _stream(self, answer: Answer) -> None:
        self._choice({"role": "assistant", "content": ""})
        for i, piece in enumerate(answer.pieces):
            if answer.gate is not None and i == len(answer.pieces) - 1:
                answer.gate.wait(10)
            time.sleep(answer.delay)
            self._choice({"content": piece})
        if answer.breaks:
            return
        if answer.fails:
            self._event({"error": {"message": answer.message, "type": "server_error"}})
        else:
            self._choice({}, answer.finish)
            count = len(answer.pieces)
            usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
            self._event({"object": "chat.completion.chunk", "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _choice(self, delta: dict[str, str], finish: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self._event({"object": "chat.completion.chunk", "model": "tiny", "choices": [choice]})

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.wfile.flush()
