"""`internlm chat --url`: the same conversation with a server's model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator

import pytest

from internlm.cli import main
from internlm.errors import EngineError
from internlm.infer.client import Client
from internlm.serve.chat.answer import Facts, FromServer, Settings
from internlm.serve.chat.conversation import Chat
from internlm.serve.chat.terminal import Screen, say
from internlm.text.chat import Message
from tests.processes import environment
from tests.serve.parrots import FakeServer, serving


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as state:
        yield state


def test_the_server_gets_the_conversation_and_the_settings_that_matter(server: FakeServer) -> None:
    chat = Chat(FromServer(Client(server.url, api_key="k")), Settings(temperature=0), "Be brief.")
    assert list(chat.answer("one two")) == ["one", " two"]
    assert chat.answerer.name == "echo"
    chat.use(Settings(top_k=5, seed=3, stop=("x",)), None)
    assert "".join(chat.answer("three")) == "three"
    stream = {"model": "echo", "stream": True, "stream_options": {"include_usage": True}}
    turn = [{"role": "user", "content": "one two"}]
    assert server.bodies == [
        {
            **stream, "messages": [{"role": "system", "content": "Be brief."}, *turn],
            "temperature": 0, "top_p": 0.8, "max_tokens": 512,
        },
        {
            **stream,
            "messages": [*turn, {"role": "assistant", "content": "one two"}, {"role": "user", "content": "three"}],
            "temperature": 0.8, "top_p": 0.8, "max_tokens": 512, "top_k": 5, "seed": 3 + 1, "stop": ["x"],
        },
    ]  # fmt: skip
    assert server.keys == ["Bearer k", "Bearer k"]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}, (11, 3, 8)),
        ({"prompt_tokens": 11, "completion_tokens": "3", "prompt_tokens_details": None}, (11, None, None)),
        (None, (None, None, None)),
        (["strange"], (None, None, None)),
    ],
)
def test_facts_are_what_the_server_says_if_it_does(
    usage: object, expected: tuple[int | None, ...], server: FakeServer
) -> None:
    server.usage = usage
    answerer = FromServer(Client(server.url, "m"))
    list(answerer.answer([Message("user", "a")], Settings()))
    assert answerer.facts == Facts("stop", *expected)


def test_turns_that_are_too_many_for_the_server_are_dropped(server: FakeServer) -> None:
    notes: list[str] = []
    server.turns = 1
    chat = Chat(FromServer(Client(server.url)), note=notes.append)
    for question in ("a", "b", "c"):
        assert "".join(chat.answer(question)) == question
    assert [message.content for message in chat.history] == ["b", "b", "c", "c"]
    assert notes == ["the context is full: the oldest 1 turn dropped"]
    server.turns = -1
    with pytest.raises(EngineError, match="maximum context length"):
        list(chat.answer("d"))
    assert len(chat.history) == 4


def test_an_answer_that_breaks_off_leaves_the_conversation_as_it_was(server: FakeServer) -> None:
    server.breaks = True
    chat = Chat(FromServer(Client(server.url)))
    with pytest.raises(EngineError, match="died"):
        list(chat.answer("a b"))
    assert not chat.history
    server.breaks = False
    assert "".join(chat.retry()) == "a b"


def test_ctrl_c_ends_the_wait_for_the_server_and_the_server_hears_of_it(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.pause_s = 1.0
    screen = Screen(sys.stdout, sys.stderr)
    chat = Chat(FromServer(Client(server.url)), note=screen.note)

    def heard(pieces: Generator[str]) -> Generator[str]:
        with contextlib.closing(pieces):
            for piece in pieces:
                if piece == " 1":
                    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
                yield piece

    say(chat, heard(chat.answer(" ".join(map(str, range(100))))), screen)
    assert capsys.readouterr().out == "0 1\n"
    assert chat.history[1] == Message("assistant", "0 1")
    assert chat.last is not None
    assert chat.last.finished == "abort"
    assert server.gone.wait(10)


def test_a_piped_question_is_answered_by_the_server_without_importing_torch(server: FakeServer) -> None:
    code = "import sys; from internlm.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, "chat", "--url", server.url, "--model", "m"]
    known = environment(INTERNLM_API_KEY="secret\n")  # as `$(cat file)` would not, but Docker's secrets do
    done = subprocess.run(command, input="x 你".encode(), capture_output=True, env=known, timeout=60)
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "x 你\n", "")
    assert server.bodies[0]["model"] == "m"
    assert server.keys == ["Bearer secret"]


def test_json_has_the_answer_and_the_facts(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", server.url, "-p", "x y", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("first_s") <= facts.pop("seconds")
    assert facts == {"answer": "x y", "prompt_tokens": 11, "cached_tokens": 8, "tokens": 3, "finished": "stop"}


def test_a_server_that_fails_or_is_not_there_is_an_error(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.breaks = True
    assert main(["chat", "--url", server.url, "-p", "x"]) == 1
    assert "worker" in capsys.readouterr().err
    assert main(["chat", "--url", "http://127.0.0.1:9", "-p", "x"]) == 1
    assert "no answer from the server" in capsys.readouterr().err
