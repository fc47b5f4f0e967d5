"""The server under clients that leave, crowds, signals, and an engine that dies."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from internlm import runtime
from internlm.cli import KEY_VARIABLE, main, serve
from internlm.errors import UsageError
from internlm.model.config import DynamicScaling
from internlm.serve.api import run
from internlm.serve.api.run import Address, bind
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors
from tests import processes
from tests.processes import until
from tests.serve.servers import (
    SHAPE,
    TOKENIZER,
    Running,
    random_model,
    serving,
    slow_engine,
)

LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 240, "ignore_eos": True}


def idle(server: Running) -> bool:
    stats = server.worker.stats
    return (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def open_request(server: Running, body: dict[str, Any]) -> socket.socket:
    """Send a request on a socket of our own and return it."""
    raw = json.dumps(body).encode()
    link = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)
    link.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(raw) + raw
    )
    return link


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    with serving(slow_engine(0.02)) as server:
        link = open_request(server, {**LONG, "stream": stream})
        assert until(lambda: server.worker.stats.running == 1)
        if stream:
            assert b"200 OK" in link.recv(4096)
        link.close()
        assert until(lambda: idle(server))
        assert server.engine.stats.counters.written_tokens < 200
        assert until(lambda: server.metrics.ended["abort"] == 1)
        assert not server.server.config.app.state.service.inbox.tickets


def test_clients_that_leave_at_any_time_leave_nothing_behind() -> None:
    with serving(slow_engine(0.005, batch=4)) as server:
        service = server.server.config.app.state.service
        for round_ in range(40):
            link = open_request(server, {**LONG, "stream": round_ % 2 == 0, "n": 1 + round_ % 3})
            time.sleep(0.004 * (round_ % 6))
            link.close()
        assert until(lambda: idle(server))
        assert until(lambda: not service.inbox.tickets)

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        loop = service.inbox._loop
        before = asyncio.run_coroutine_threadsafe(tasks(), loop).result(5)
        assert before <= 4, "the server's own tasks, and this one"
        assert server.post("/v1/completions", {"prompt": [1], "max_tokens": 1}).status_code == 200


def test_half_a_request_and_nonsense_harm_nobody() -> None:
    with serving() as server:
        port = int(server.url.rpartition(":")[2])
        for raw in (
            b"",
            b"GET",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
            b"\x16\x03\x01\x02",
        ):
            with socket.create_connection(("127.0.0.1", port)) as link:
                link.sendall(raw)
        assert server.get("/health").status_code == 200
        assert idle(server)


def test_a_crowd_beyond_the_queue_is_told_to_come_back() -> None:
    with serving(slow_engine(0.05, batch=1), max_waiting=1) as server:
        links = [open_request(server, {**LONG, "stream": True}) for _ in range(2)]
        assert until(lambda: server.worker.stats.running + server.worker.stats.waiting == 2)
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="a")
        assert server.get("/health").status_code == 200, "a full server is a healthy one"
        for link in links:
            link.close()
        assert until(lambda: idle(server))
        assert server.post("/v1/completions", {"prompt": [1], "max_tokens": 1}).status_code == 200


def test_of_several_prompts_none_runs_when_one_finds_no_place() -> None:
    with serving(slow_engine(0.05, batch=2), max_waiting=1) as server:
        link = open_request(server, {**LONG, "n": 2})
        assert until(lambda: server.worker.stats.running == 2)
        assert server.post("/v1/completions", {**LONG, "prompt": [[5], [6]]}).status_code == 429
        link.close()
        assert until(lambda: idle(server))


def test_an_engine_that_dies_ends_streams_properly_and_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_ALIVE_SECONDS", 0.2)
    monkeypatch.setattr(run, "_DEAD_SECONDS", 1.5)
    with serving(slow_engine(0.02)) as server:
        with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, timeout=20) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.engine.fail = MemoryError("gone")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "has died" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
        assert server.get("/health").status_code == 503
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        server.thread.join(10)
        assert not server.thread.is_alive(), "it ends by itself, for whoever watches over it to start it anew"


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    with serving(slow_engine(0.02), drain=20) as server:
        found: dict[str, httpx.Response] = {}
        thread = threading.Thread(
            target=lambda: found.update(a=server.post("/v1/completions", {**LONG, "max_tokens": 30}))
        )
        thread.start()
        assert until(lambda: server.worker.stats.running == 1)
        with httpx.Client(base_url=server.url) as kept:
            assert kept.get("/ready").status_code == 200
        server.server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert found["a"].json()["choices"][0]["finish_reason"] == "length"
        server.thread.join(10)
        assert not server.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            server.get("/health")


def test_what_is_not_done_when_the_drain_is_over_ends_with_abort() -> None:
    with serving(slow_engine(0.05), drain=0.3) as server:
        with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, timeout=20) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert rest[-1] == "data: [DONE]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny-chat"
    talk = Talk(TOKENIZER, "internlm")
    folders.export(of_tensors(random_model().named_parameters()), SHAPE, path, talk)
    return path


def test_sigterm_lets_answers_end_and_the_process_ends_with_code_0(folder: Path) -> None:
    """Of a server that is started as a user does; the others are threads or forks."""
    words = ["api_server", str(folder), "--server-port", "0", "--model-name", "mine", "--max-batch-size", "2"]
    with processes.serving(*words, INTERNLM_API_KEY="secret") as on:
        assert any("internlm serve" in line and "note" in line for line in on.said)
        assert "serving mine at http://127.0.0.1:" in on.said[-1]
        client = openai.OpenAI(base_url=on.url + "/v1", api_key="secret", max_retries=0)
        options: dict[str, Any] = {"model": "mine", "prompt": [5, 6, 7], "max_tokens": 200, "stream": True}
        stream = client.completions.create(**options, extra_body={"ignore_eos": True})
        next(stream)
        on.child.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert on.child.wait(20) == 0


def test_a_second_signal_ends_at_once() -> None:
    with serving(slow_engine(0.05), drain=60) as server:
        link = open_request(server, {**LONG, "stream": True})
        assert link.recv(4096)
        server.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.5)
        assert server.thread.is_alive()
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(5)
        assert not server.thread.is_alive()
        link.close()


def test_a_certificate_makes_the_server_speak_tls(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    try:
        subprocess.run([*request, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    with serving(address=Address(port=0, certificate=certificate, key=key)) as server:
        assert server.url.startswith("https://")
        assert httpx.get(server.url + "/health", verify=False).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no such folder"),
        (["MODEL", "other"], "one model is served"),
        (["MODEL", "--max-batch", "0"], "--max-batch: must be at least 1"),
        (["MODEL", "--cache-gib", "0"], "--cache-gib: must be over 0"),
        (["MODEL", "--cache-gib", "1e-9", "--max-length", "64"], "cache has room for"),
        (["MODEL", "--template", "internln"], "Did you mean 'internlm'?"),
        (["MODEL", "--ssl-keyfile", "none.pem"], "no such file"),
        (["MODEL", "--ssl-certfile", "MODEL/config.json"], "--ssl-certfile: cannot be used"),
        (["MODEL", "--drain-seconds", "nan"], "--drain-seconds: must be 0 or more"),
        (["MODEL", "--drain-seconds", "inf"], "--drain-seconds: must be 0 or more"),
        (["MODEL", "--api-key", ""], "a key is empty"),
        (["MODEL", "--api-key-file", "none"], "cannot be read"),
        (["MODEL", "--port", "99999"], "is no port"),
        (["MODEL", "--host", "no.such.host.invalid"], "cannot listen"),
        (["MODEL", "--host", "no..host"], "cannot listen"),
    ],
)
def test_wrong_use_says_what_is_wrong(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("MODEL", str(folder)) for word in words]
    assert main(["serve", *given, *(["--port", "0"] if "--port" not in given else [])]) != 0
    assert message in capsys.readouterr().err


def test_a_cache_beyond_the_free_memory_is_refused_with_both_numbers_before_it_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 3 * 2**29)
    assert main(["serve", str(folder), "--port", "0", "--device", "cpu", "--cache-gib", "2"]) == 2
    said = "--cache-gib: 2 GiB are asked for, and only 1.5 GiB are free on cpu. Give less, or leave it out: memory"
    assert said in capsys.readouterr().err
    assert main(["serve", str(folder), "--port", "0", "--device", "cpu", "--cache-gib", "1e300"]) == 2
    assert "only 1.5 GiB are free" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "rope", "warns"), [(257, None, True), (256, None, False), (257, "dynamic", False)])
def test_a_length_beyond_the_trained_one_is_warned_of_unless_positions_are_scaled(
    length: int, rope: str | None, warns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = None if rope is None else DynamicScaling(original_length=128)
    shape = replace(SHAPE, rope=replace(SHAPE.rope, scaling=scaling))
    folders.export(
        of_tensors(random_model(shape).named_parameters()), shape, tmp_path / "m", Talk(TOKENIZER, "internlm")
    )
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args([str(tmp_path / "m"), "--device", "cpu", "--max-length", str(length)])
    serve._foreign_spelling(arguments)
    assert serve._open(arguments).engine.length == length
    said = capsys.readouterr().err
    assert ("warning: --max-length 257: the model was trained for 256 tokens" in said) == warns


def test_a_port_that_is_taken_is_an_error_of_the_user() -> None:
    with bind(Address(port=0)) as listener, pytest.raises(UsageError, match="cannot listen"):
        bind(Address(port=listener.getsockname()[1]))


def test_keys_come_from_the_line_the_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeff# ours\nb\n\n c \na\n", encoding="utf-8")
    monkeypatch.setenv(KEY_VARIABLE, "d\n")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args(["m", "--api-key", "a", "--api-keys", "e ", "f", "--api-key-file", str(file)])
    assert serve._keys(arguments) == ("a", "e", "f", "b", "c", "d")


def test_a_server_for_others_without_a_key_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    serve._warn_of_strangers("127.0.0.1", ())
    serve._warn_of_strangers("0.0.0.0", ("key",))
    assert capsys.readouterr().err == ""
    serve._warn_of_strangers("0.0.0.0", ())
    assert "anyone who reaches this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "keys", "hosts"),
    [
        ([], (), ()),
        (["--allow-origin", "https://Chat.example:8443"], (), ("chat.example",)),
        (["--allow-origin", "*"], (), None),
        (["--host", "0.0.0.0"], (), None),
        ([], ("key",), None),
    ],
)
def test_a_server_for_this_machine_without_a_key_knows_its_names(
    words: list[str], keys: tuple[str, ...], hosts: tuple[str, ...] | None
) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args(["m", *words])
    serve._foreign_spelling(arguments)
    assert serve._hosts(arguments, keys) == hosts
