"""What stands before the routes: defects, slow and stuck clients, names of the server, the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from internlm.errors import UsageError
from internlm.infer.worker import Busy, Worker
from internlm.serve.api import app as application
from internlm.serve.api import asked as asking
from internlm.serve.api.app import Service
from internlm.serve.api.asked import Served
from internlm.serve.api.gate import Access
from internlm.weights.talk import Talk
from tests.processes import until
from tests.serve.servers import TOKENIZER, Running, serving, slow_engine

COMPLETE = "/v1/completions"


def port_of(server: Running) -> int:
    return int(server.url.rpartition(":")[2])


def break_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(asking, "ask_completion", fail)


def test_a_defect_is_answered_counted_and_logged_like_any_other_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_routes(monkeypatch)
    origin = "https://page.example"
    with serving(access=Access(origins=(origin,))) as server:
        headers = {"origin": origin, "x-request-id": "mine"}
        response = server.post(COMPLETE, {"prompt": "a"}, headers=headers)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert response.headers["x-request-id"] == "mine"
        assert response.headers["access-control-allow-origin"] == origin
        assert server.metrics.errors[500] == 1
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="a")
    (first, *_) = [record for record in caplog.records if "defect" in record.message]
    assert "mine" in first.message
    assert first.exc_info is not None


def test_each_request_has_a_line_in_the_log_without_keys_and_texts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "internlm")
    with serving(access=Access(keys=("hidden",))) as server:
        key = {"authorization": "Bearer hidden", "x-request-id": "n-1"}
        server.post(COMPLETE, {"prompt": "my words", "max_tokens": 1}, headers=key)
        server.get("/v1/x%0AForged%1b%5b31m", headers=key)
        server.get("/v1/models")
        server.get("/health")
        assert until(lambda: len([one for one in caplog.messages if " after " in one]) == 3)
    told = [re.sub(r"\d\.\d+ s", "… s", one) for one in caplog.messages if " after " in one]
    assert told[0] == "POST /v1/completions: 200 after … s (n-1)"
    assert told[1] == "GET /v1/x\\nForged\\x1b[31m: 404 after … s (n-1)"
    assert told[2].startswith("GET /v1/models: 401 after … s (")
    assert not [one for one in caplog.messages if "hidden" in one or "my words" in one]


def test_a_body_that_comes_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.serve.api.gate._BODY_SECONDS", 0.3)
    with serving() as server:
        with socket.create_connection(("127.0.0.1", port_of(server))) as link:
            link.settimeout(10)
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            answer = b""
            while part := link.recv(4096):  # until the server closes
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert (error["code"], error["type"]) == ("body_too_slow", "invalid_request_error")
        assert server.post(COMPLETE, {"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("version", ["2.3", "2.4"])  # of ASGI: they watch for clients that leave in different ways
def test_a_client_that_reads_nothing_of_its_stream_is_let_go(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "_UNREAD_SECONDS", 0.1)
    closed: list[bool] = []

    class Ticket:
        def close(self) -> None:
            closed.append(True)

    async def events() -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    async def nothing() -> Any:
        await asyncio.sleep(60)

    async def send(event: Any) -> None:
        if event["type"] == "http.response.body":
            await asyncio.sleep(60)  # as a server does whose buffers are full

    stream = application._Stream(events(), Ticket())  # type: ignore[arg-type]
    scope = {"type": "http", "asgi": {"spec_version": version}}
    asyncio.run(asyncio.wait_for(stream(scope, nothing, send), 5))
    assert closed == [True]


def test_only_so_many_prompts_wait_to_be_read() -> None:
    worker = Worker(slow_engine(batch=1), max_waiting=1)
    service = Service(Served(worker.engine, Talk(TOKENIZER, None), ("m",)), worker)

    async def crowd() -> list[Any]:
        return await asyncio.gather(*(service.prepare(time.sleep, 0.1) for _ in range(5)), return_exceptions=True)

    found = asyncio.run(crowd())
    assert [type(one) for one in found] == [type(None)] * 2 + [Busy] * 3
    assert asyncio.run(crowd())[0] is None, "they have left again"
    worker.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("192.168.1.5:80", 200),
        ("gpu-box:8000", 200),
        ("gpu.local", 200),
        ("host.docker.internal:8000", 200),
        ("Chat.Example.com.", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
    ],
)
def test_a_stranger_s_name_that_points_here_is_refused(named: Running, host: str, status: int) -> None:
    for path in ("/v1/models", "/"):
        response = named.get(path, headers={"host": host})
        assert response.status_code == status
        if status == 403:
            assert response.json()["error"]["code"] == "unknown_host"


@pytest.fixture(scope="module")
def named() -> Any:
    with serving(access=Access(hosts=("chat.example.com",))) as running:
        yield running


def test_no_page_of_the_server_runs_foreign_code() -> None:
    with serving() as server:
        assert server.get("/docs").status_code == server.get("/redoc").status_code == 404
        assert server.get("/openapi.json").status_code == 200


def test_an_idle_connection_is_kept_longer_than_a_proxy_keeps_it() -> None:
    with serving() as server:
        assert server.server.config.timeout_keep_alive > 60


def test_the_fingerprint_tells_servers_apart_whose_answers_may_differ() -> None:
    def told(server: Running) -> set[str]:
        whole = server.post(COMPLETE, {"prompt": "a", "max_tokens": 1}).json()
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        lines = server.post("/v1/chat/completions", {**chat, "stream": True}).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return {one["system_fingerprint"] for one in [whole, server.post("/v1/chat/completions", chat).json(), *chunks]}

    with serving() as one, serving() as like, serving(slow_engine(context=128)) as other:
        assert len(told(one)) == 1
        assert told(one) == told(like) != told(other)


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "a\tb", "a\x7f"])
def test_a_key_that_clients_write_in_different_ways_is_refused_at_the_start(key: str) -> None:
    with pytest.raises(UsageError, match="--api-key: a key has characters beyond printable ASCII") as caught:
        Access(keys=("good", key))
    assert key not in str(caught.value)


def test_an_origin_is_taken_as_browsers_write_it() -> None:
    given = ("https://Chat.example.com/", "http://a:80", "http://a:8080", "https://[::1]:443", "*", "null")
    wanted = ("https://chat.example.com", "http://a", "http://a:8080", "https://[::1]", "*", "null")
    assert Access(origins=given).origins == wanted
    with serving(access=Access(origins=("https://chat.example.com/",))) as server:
        answer = server.get("/v1/models", headers={"origin": "https://chat.example.com"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example.com"


@pytest.mark.parametrize(
    "origin", ["chat.example.com", "https://a/b", "https://", "a:80", "https://a?b", "https://a@b"]
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(UsageError, match="--allow-origin: is no origin"):
        Access(origins=(origin,))
