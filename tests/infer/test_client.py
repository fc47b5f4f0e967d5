"""The client against a small server that answers, breaks off, refuses and talks nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from internlm.errors import EngineError
from internlm.infer.client import Client, Refused

Respond = Callable[[BaseHTTPRequestHandler, Any], None]


@contextmanager
def serving(respond: Respond) -> Iterator[str]:
    """Give the URL of a server; `respond` gets each request with its JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self, None)

        def do_POST(self) -> None:
            respond(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, data: bytes, kind: str, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def send_json(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    send(handler, json.dumps(body).encode(), "application/json", status, **headers)


def events(*bodies: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(body, ensure_ascii=False).encode() for body in bodies)


def piece(text: str, finished: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finished}]}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
HELLO = [{"role": "user", "content": "你好"}]


def streaming(data: bytes) -> Respond:
    return lambda handler, body: send(handler, data, "text/event-stream; charset=utf-8")


def test_a_chat_comes_in_pieces_with_its_end_and_usage_and_the_settings_arrive() -> None:
    got: list[Any] = []

    def respond(handler: BaseHTTPRequestHandler, body: Any) -> None:
        got.append((handler.path, handler.headers["Authorization"], body))
        end = events({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"
        send(handler, events(ROLE, piece("你"), piece("好👋"), piece("", "stop")) + end, "text/event-stream")

    with serving(respond) as url:
        reply = Client(url + "/v1/", model="m", api_key="secret").chat(HELLO, temperature=0, stop=["x"])
        assert list(reply) == ["你", "好👋"]
    assert (reply.finished, reply.usage) == ("stop", USAGE)
    (path, key, body) = got[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "m", "messages": HELLO, "temperature": 0, "stop": ["x"],
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_the_first_listed_model_is_asked_and_looked_up_once() -> None:
    got: list[Any] = []

    def respond(handler: BaseHTTPRequestHandler, body: Any) -> None:
        got.append((handler.path, handler.headers["Authorization"], body and body["model"]))
        if body is None:
            send_json(handler, {"data": [{"id": "one"}, {"id": "two"}]})
        else:
            text = body["messages"][0]["content"] * 2
            answer = {"choices": [{"delta": {"content": text}, "finish_reason": "length"}]}
            send(handler, events(answer), "text/event-stream")

    with serving(respond) as url:
        client = Client(url)
        for _ in range(2):
            reply = client.chat([{"role": "user", "content": "ab"}])
            assert (list(reply), reply.finished, reply.usage) == (["abab"], "length", None)
        assert client.models() == ["one", "two"]
    lookup, completion = ("/v1/models", None, None), ("/v1/chat/completions", None, "one")
    assert got == [lookup, completion, completion, lookup]


def test_events_may_have_comments_other_fields_carriage_returns_and_several_lines() -> None:
    data = (
        b': ping\r\nevent: message\r\ndata: {"choices":\r\ndata: '
        b'[{"delta": {"content": "a\\nb"}, "finish_reason": "stop"}]}\r\n\r\n'
    )
    with serving(streaming(data + b"id: 7\n\n\ndata:[DONE]\n\nnever read")) as url:
        assert list(Client(url, "m").chat(HELLO)) == ["a\nb"]


def test_a_stream_that_breaks_off_is_an_error_after_its_text() -> None:
    with serving(streaming(events(ROLE, piece("half")))) as url:
        reply = Client(url, "m").chat(HELLO)
        assert next(reply) == "half"
        with pytest.raises(EngineError, match="broke off"):
            next(reply)


def test_an_error_inside_the_stream_is_told_in_the_server_s_words() -> None:
    with serving(streaming(events(piece("a"), {"error": {"message": "out of memory", "code": 500}}))) as url:
        reply = Client(url, "m").chat(HELLO)
        assert next(reply) == "a"
        with pytest.raises(EngineError, match="out of memory"):
            next(reply)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"error": {"message": "no such model 'm'", "type": "x"}}, 404, "404.*no such model 'm'"),
        ({"error": "plain words"}, 500, "plain words"),
        ({"message": "flat", "object": "error"}, 400, "flat"),
        ({"detail": "not found"}, 404, "not found"),
        ({"detail": [{"loc": ["body"]}]}, 422, "loc"),
        ({"error": {"message": "bad key"}}, 401, "bad key.*API key"),
    ],
)
def test_a_refusal_has_the_server_s_message(body: Any, status: int, message: str) -> None:
    with serving(lambda handler, _: send_json(handler, body, status)) as url:
        with pytest.raises(EngineError, match=message):
            Client(url, "m").chat(HELLO)
        with pytest.raises(EngineError, match=message):
            Client(url).models()


def test_a_refusal_has_the_server_s_code_and_status_in_a_stream_too() -> None:
    for code, wanted in (("context_length_exceeded", "context_length_exceeded"), (500, None), (None, None)):
        body = {"error": {"message": "no", "code": code}}
        with serving(lambda handler, _, body=body: send_json(handler, body, 400)) as url:
            with pytest.raises(Refused) as refused:
                Client(url, "m").chat([])
            assert (refused.value.status, refused.value.code) == (400, wanted)
        with serving(streaming(events(piece("a"), body))) as url:
            reply = Client(url, "m").chat([])
            assert next(reply) == "a"
            with pytest.raises(Refused) as refused:
                next(reply)
            assert (refused.value.status, refused.value.code) == (200, wanted)


def test_a_busy_server_says_when_to_come_back() -> None:
    def respond(handler: BaseHTTPRequestHandler, body: Any) -> None:
        send_json(handler, {"error": {"message": "full"}}, 429, Retry_After="7")

    with serving(respond) as url, pytest.raises(EngineError, match=r"full.*in 7 seconds"):
        Client(url, "m").chat(HELLO)


def test_a_redirect_is_not_followed_with_the_key() -> None:
    reached: list[str] = []

    def respond(handler: BaseHTTPRequestHandler, body: Any) -> None:
        send(handler, b"", "text/html", 302, Location=f"{other}/thief")

    with (
        serving(lambda handler, _: reached.append(handler.path)) as other,
        serving(respond) as url,
        pytest.raises(EngineError, match=r"302.*/thief"),
    ):
        Client(url, api_key="secret").models()
    assert reached == []


@pytest.mark.parametrize("data", [b"<html>", b"[]", b'{"data": [3]}', b'"\xff"', b"null"])
def test_an_answer_of_another_form_is_an_error(data: bytes) -> None:
    with serving(lambda handler, _: send(handler, data, "text/html")) as url:
        client = Client(url, "m")
        for ask in (client.models, lambda: client.chat(HELLO)):
            with pytest.raises(EngineError, match="OpenAI-style"):
                ask()


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: 3\n\n", b'data: {"choices": [4]}\n\n', b"data: \xff\n\n"])
def test_events_of_another_form_are_errors(data: bytes) -> None:
    with serving(streaming(data)) as url, pytest.raises(EngineError):
        list(Client(url, "m").chat(HELLO))


def test_closing_early_closes_the_connection() -> None:
    noticed = threading.Event()

    def respond(handler: BaseHTTPRequestHandler, body: Any) -> None:
        send(handler, b"", "text/event-stream")
        try:
            while not noticed.wait(0.005):
                handler.wfile.write(events(piece("x")))
        except OSError:
            noticed.set()

    with serving(respond) as url:
        for leave in (lambda reply: reply.close(), lambda reply: reply.__exit__()):
            noticed.clear()
            reply = Client(url, "m").chat(HELLO)
            assert next(reply) == "x"
            leave(reply)
            assert noticed.wait(5), "the server still writes"
            assert list(reply) == []
            assert reply.finished is None
        noticed.clear()
        Client(url, "m").chat(HELLO).close()
        assert noticed.wait(5), "the server still writes to one that was never read"


def test_silence_ends_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.infer.client._MOST_SILENCE_SECONDS", 0.2)
    over = threading.Event()

    def respond(handler: BaseHTTPRequestHandler, body: Any) -> None:
        if body is not None:
            send(handler, events(piece("x")), "text/event-stream")
            handler.wfile.flush()
        over.wait(10)

    with serving(respond) as url:
        try:
            client = Client(url, "m")
            with pytest.raises(EngineError, match="timed out"):
                client.models()
            reply = client.chat(HELLO)
            assert next(reply) == "x"
            with pytest.raises(EngineError, match="timed out"):
                next(reply)
        finally:
            over.set()


def test_a_server_that_is_not_there_is_an_error_that_names_the_url() -> None:
    with serving(lambda handler, body: None) as url:
        pass
    with pytest.raises(EngineError, match=rf"{url}/v1/models: no answer"):
        Client(url).models()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://[::1"])
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(EngineError, match="url: is no URL"):
        Client(url)


def test_a_bare_host_gets_the_usual_path_and_another_path_is_kept() -> None:
    assert Client("http://host:8000/").url == "http://host:8000/v1"
    for route in ("chat/completions", "completions/"):
        assert Client(f"http://host:8000/chat/v1/{route}").url == "http://host:8000/chat/v1"
    assert Client("https://host/team/v2/").url == "https://host/team/v2"


def test_several_answers_and_settings_that_are_no_json_are_refused() -> None:
    client = Client("http://127.0.0.1:1", "m")
    with pytest.raises(EngineError, match="n: one answer"):
        client.chat(HELLO, n=2)
    with pytest.raises(EngineError, match="settings: cannot be sent"):
        client.chat(HELLO, temperature=float("nan"))
