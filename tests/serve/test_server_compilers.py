"""Grammars are compiled apart: for whom, how often, and who waits for them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from internlm.errors import EngineError
from internlm.serve.api import structure
from tests.processes import until
from tests.serve.servers import Running, serving, slow_engine

COMPLETE = "/v1/completions"


class Compiler:
    """Stands in for `structure.compile`: notes what it compiles, and holds it until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain, self.go, self.texts = structure.compile, threading.Event(), list[str]()
        self.problem: str | None = None
        self.go.set()
        monkeypatch.setattr(structure, "compile", self)

    def __call__(self, engine: Any, wanted: structure.Wanted, stop_ids: tuple[int, ...]) -> Any:
        self.texts.append(wanted.text)
        assert self.go.wait(20)
        if self.problem is not None:
            raise EngineError(self.problem)
        return self.plain(engine, wanted, stop_ids)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


@pytest.fixture
def server(compiler: Compiler) -> Iterator[Running]:
    with serving(slow_engine()) as running:
        yield running
        compiler.go.set()


def body(expression: str) -> Any:
    return {"prompt": "a", "max_tokens": 3, "guided_regex": expression}


def send_and_leave(server: Running, expression: str) -> None:
    """Ask for an answer, and close the connection before it comes."""
    raw = json.dumps(body(expression)).encode()
    head = (
        f"POST {COMPLETE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as link:
        link.sendall(head.encode() + raw)


def test_clients_that_left_keep_none_from_the_compilers(server: Running, compiler: Compiler) -> None:
    compiler.go.clear()
    with ThreadPoolExecutor(3) as clients:
        held = [clients.submit(server.post, COMPLETE, body(text)) for text in ("a", "b")]
        assert until(lambda: len(compiler.texts) == 2)
        for number in range(4):
            send_and_leave(server, f"x{number}")
        assert until(lambda: server.metrics.errors[499] == 4)
        held.append(clients.submit(server.post, COMPLETE, body("c")))
        compiler.go.set()
        assert [one.result().status_code for one in held] == [200] * 3
    assert sorted(compiler.texts) == ["a", "b", "c"]


def test_what_was_compiled_passes_by_those_that_wait(server: Running, compiler: Compiler) -> None:
    assert server.post(COMPLETE, body("known")).status_code == 200
    compiler.go.clear()
    with ThreadPoolExecutor(2) as clients:
        held = [clients.submit(server.post, COMPLETE, body(text)) for text in ("a", "b")]
        assert until(lambda: len(compiler.texts) == 3)
        assert server.post(COMPLETE, body("known")).status_code == 200
        assert not any(one.done() for one in held)
        compiler.go.set()
    assert len(compiler.texts) == 3


def test_what_could_not_be_compiled_is_refused_at_once_for_a_while(
    server: Running, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.problem = "takes too long"
    for _ in range(2):
        refused = server.post(COMPLETE, body("hard"))
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "guided_regex: takes too long"
    assert len(compiler.texts) == 1
    monkeypatch.setattr(structure, "_FAILED_SECONDS", -1.0)
    for _ in range(2):
        assert server.post(COMPLETE, body("harder")).status_code == 400
    assert len(compiler.texts) == 3
