"""Faults in the midst of serving hit the request that has them, and nobody else, as clients see it over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
import torch

from internlm.infer.cache import Cache, Piece
from internlm.serve.api.replies import Reply
from internlm.text.tokenizer import Tokenizer
from tests.infer.engines import check_blocks
from tests.processes import until
from tests.serve.servers import TOKENIZER, Running, serving, slow_engine

BAD, GOOD = (TOKENIZER.encode(letter)[0] for letter in "xy")
FAULTY_STEP = 5
TOKENS = 20
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


def ask(server: Running, letter: int, **more: Any) -> httpx.Response:
    """Ask for 20 times one letter."""
    body = {"prompt": [5, 6, 7], "max_tokens": TOKENS, "ignore_eos": True, "logit_bias": {str(letter): 100}, **more}
    return server.post("/v1/completions", body)


def events(response: httpx.Response) -> list[Any]:
    """Return what the events of a stream hold; the last is no JSON."""
    *chunks, end = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert end == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def check(server: Running, problem: str, written: int = FAULTY_STEP) -> None:
    """Ask for the bad letter among good ones, whole and as a stream, and check what everyone gets."""
    found: dict[str, httpx.Response] = {}

    def run(name: str, *given: Any, **options: Any) -> None:
        found[name] = ask(server, *given, **options)

    asks = [("bad", BAD, {}), ("bad stream", BAD, {"stream": True})]
    asks += [(f"good {i}", GOOD, {"stream": i % 2 == 0, "n": 1 + i % 3}) for i in range(6)]
    threads = [threading.Thread(target=run, args=(name, letter), kwargs=options) for name, letter, options in asks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found["bad"].status_code == 500
    assert found["bad"].json()["error"]["type"] == "server_error"
    assert problem in found["bad"].json()["error"]["message"]
    *chunks, last = events(found["bad stream"])
    assert problem in last["error"]["message"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "x" * written
    for number in range(6):
        response, texts = found[f"good {number}"], [""] * (1 + number % 3)
        assert response.status_code == 200
        for part in events(response) if number % 2 == 0 else [response.json()]:
            for choice in part["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == ["y" * TOKENS] * (1 + number % 3)
    assert ask(server, GOOD).json()["choices"][0]["text"] == "y" * TOKENS
    assert server.get("/health").status_code == 200
    assert until(lambda: server.engine.stats.blocks_used == server.engine.stats.running == 0)
    assert not server.server.config.app.state.service.inbox.tickets
    check_blocks(server.engine.blocks)


Run = Callable[[Sequence[Piece]], torch.Tensor]


def is_bad(piece: Piece) -> bool:
    """Whether this is where the bad letter has been written so often."""
    return piece.tokens[-1] == BAD and piece.past + len(piece.tokens) >= 3 + FAULTY_STEP


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(NO_MEMORY),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no room"),
        KeyError("a defect"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:30],
)
def test_an_error_in_the_forward_pass_ends_its_request_alone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Run = Cache.run  # type: ignore[assignment]

    def run(cache: Cache, pieces: Sequence[Piece]) -> torch.Tensor:
        if any(is_bad(piece) for piece in pieces):
            raise error
        return plain(cache, pieces)  # type: ignore[call-arg, arg-type]

    monkeypatch.setattr(Cache, "run", run)
    with serving(slow_engine()) as server:
        check(server, type(error).__name__)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_end_their_request_alone(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Run = Cache.run  # type: ignore[assignment]

    def run(cache: Cache, pieces: Sequence[Piece]) -> torch.Tensor:
        hidden = plain(cache, pieces).clone()  # type: ignore[call-arg, arg-type]
        end = 0
        for piece in pieces:
            end += len(piece.tokens)
            if is_bad(piece):
                hidden[end - 1] = value
        return hidden

    monkeypatch.setattr(Cache, "run", run)
    with serving(slow_engine()) as server:
        check(server, "not finite")


def test_a_tokenizer_that_fails_on_a_token_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tokenizer.token_bytes

    def token_bytes(self: Tokenizer, id: int, **options: bool) -> bytes:
        if id == BAD:
            raise ValueError("no such piece")
        return plain(self, id, **options)

    monkeypatch.setattr(Tokenizer, "token_bytes", token_bytes)
    with serving(slow_engine()) as server:
        check(server, "no such piece", written=0)


def test_a_tokenizer_that_fails_on_a_prompt_is_an_error_of_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tokenizer.encode

    def encode(self: Tokenizer, text: str, *given: Any, **options: Any) -> list[int]:
        if text == "the end":
            raise ValueError("the table is gone")
        return plain(self, text, *given, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with serving(slow_engine()) as server:
        for stream in (False, True):
            response = ask(server, GOOD, prompt="the end", stream=stream)
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "internal_error"
            assert "table" not in response.text, "the log says it, strangers do not read it"
        assert ask(server, GOOD).json()["choices"][0]["text"] == "y" * TOKENS


def test_an_error_while_an_answer_is_written_down_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Reply.add

    def add(self: Reply, *given: Any) -> Any:
        if BAD in self.asked.requests[0].logit_bias and given[1].tokens and self.usage["completion_tokens"] > 4:
            raise LookupError("a defect")
        return plain(self, *given)

    monkeypatch.setattr(Reply, "add", add)
    with serving(slow_engine()) as server:
        check(server, "defect")
