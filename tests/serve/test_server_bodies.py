"""Bodies that do not fit: one fault is found, quickly, and told in the words of what the client meant."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from internlm.infer.engine import Limits
from internlm.serve.api.problems import from_validation
from internlm.serve.api.schema import ChatRequest, CompletionRequest, DetokenizeRequest, EncodeRequest
from tests.serve.servers import SHAPE, TOKENIZER, Running, SlowEngine, random_model, serving

USER: list[Any] = [{"role": "user", "content": "What?"}]
MANY = 200_000
NOTHING: list[Any] = [None] * MANY


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def fault(kind: type[BaseModel], body: Any) -> str:
    """Return what is told of a body, which must have few faults: each costs time."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 3
    return str(from_validation(caught.value.errors(), body))


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        (CompletionRequest, {"prompt": NOTHING}, "prompt: must be a text, texts, ids"),
        (CompletionRequest, {"prompt": [[1], NOTHING]}, "prompt.1.0: "),
        (CompletionRequest, {"prompt": [1, *NOTHING]}, "prompt.1: Input should be a valid integer"),
        (CompletionRequest, {"prompt": ["a", *NOTHING]}, "prompt.1: Input should be a valid string"),
        (CompletionRequest, {"prompt": [1.5] * MANY}, "prompt.0: "),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"x{n}": 1 for n in range(MANY)}}, "logit_bias: 'x0' is"),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(n): None for n in range(MANY)}}, "logit_bias: the bias"),
        (CompletionRequest, {"prompt": "a", "guided_choice": NOTHING}, "guided_choice"),
        (ChatRequest, {"messages": USER * 5000}, "messages: List should have at most 4096 items"),
        (ChatRequest, {"messages": NOTHING}, "messages.0: must be an object"),
        (ChatRequest, {"messages": [{"role": "user", "content": NOTHING}]}, "messages.0.content.0: must be an object"),
        (ChatRequest, {"messages": [{**USER[0], "tool_calls": [{}] * MANY}]}, "messages.0.tool_calls.0.function"),
        (ChatRequest, {"messages": USER, "tools": [{}] * 100}, "tools.0.type: Field required"),
        (ChatRequest, {"messages": USER, "stop": NOTHING}, "stop.0: "),
        (DetokenizeRequest, {"tokens": NOTHING}, "tokens.0: Input should be a valid integer"),
        (EncodeRequest, {"input": NOTHING}, "input.0: "),
    ],
)  # fmt: skip
def test_of_a_body_with_many_faults_one_is_found(kind: type[BaseModel], body: Any, told: str) -> None:
    assert fault(kind, body).startswith(told)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"stop": 5}, "stop: must be a text or a list of texts"),
        ({"stop": ""}, "stop: String should have at least 1 character"),
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"tool_choice": 5}, 'tool_choice: must be "none", "auto", "required" or {"type": "function", …}'),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function: Field required"),
        ({"guided_json": [1]}, "guided_json: must be a JSON Schema: an object, or the text of one"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json: must be a JSON Schema"),
        ({"logit_bias": [5]}, 'logit_bias: must be an object of ids of tokens and biases, such as {"15": -100}'),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: must be a text or a list of parts"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0: must be an object"),
    ],
)  # fmt: skip
def test_a_field_of_several_kinds_is_told_by_the_kind_that_was_meant(body: Any, told: str) -> None:
    assert fault(ChatRequest, {"messages": USER, **body}).startswith(told)


def test_whole_numbers_are_ids_as_they_are_numbers_of_tokens() -> None:
    assert CompletionRequest.model_validate({"prompt": [1.0, 2]}).prompt == [1, 2]
    assert CompletionRequest.model_validate({"prompt": [[1.0], [2]]}).prompt == [[1], [2]]
    assert type(DetokenizeRequest.model_validate({"tokens": [3.0]}).tokens[0]) is int


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [("repeat_penalty", 1.8, "repetition_penalty"), ("n_predict", 2, "max_tokens"), ("stop_sequences", ["a"], "stop"),
     ("random_seed", 9, "seed"), ("xtc_probability", 1.0, None), ("dry_multiplier", 2.0, None)],
)  # fmt: skip
def test_what_other_servers_have_is_refused_with_what_this_one_has(
    server: Running, field: str, value: Any, instead: str | None
) -> None:
    refused = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, field: value})
    told = f"{field}: this server does not support it" + (f"; {instead} is what it has" if instead else "")
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, told)


def test_a_schema_that_is_too_wide_to_follow_is_refused(server: Running) -> None:
    def ask(count: int, **more: Any) -> httpx.Response:
        wide = {"type": "object", "properties": {f"k{n}": {"type": "null"} for n in range(count)}, **more}
        schema = {"type": "object", "properties": {"a": wide}, "required": ["a"], "additionalProperties": False}
        return server.post("/v1/completions", {"prompt": "x", "max_tokens": 40, "guided_json": schema, "seed": 1})

    error = ask(600).json()["error"]
    assert error["message"].startswith("guided_json: an object has 600 properties that may be left out, and 400 are")
    assert error["param"] == "guided_json"
    assert ask(400).status_code == 200
    assert ask(600, required=[f"k{n}" for n in range(300)]).status_code == 200


def test_the_limit_of_a_body_grows_with_context_and_batch_and_is_told(server: Running) -> None:
    large = {"prompt": [[1] * 8] * 2048, "user": "x" * 2**20}
    error = server.post("/v1/completions", large).json()["error"]
    limit = "the body is larger than 1048576 bytes, which is the limit of this server"
    assert error["message"] == f"{limit}: send fewer or shorter prompts in one request"
    engine = SlowEngine(random_model(replace(SHAPE, context_length=16384)), TOKENIZER, Limits(batch=16))
    with serving(engine) as wide:
        answer = wide.post("/v1/completions", large)
        assert answer.json()["error"]["message"].startswith("prompt: over")
        assert wide.post("/v1/completions", {**large, "user": "x" * 2**21}).status_code == 413


@pytest.mark.parametrize("tells_length", [True, False])
def test_a_client_that_still_sends_reads_why_its_body_is_too_large(server: Running, tells_length: bool) -> None:
    size, piece = 2**23, b"x" * 2**16
    how = f"Content-Length: {size}" if tells_length else "Transfer-Encoding: chunked"
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        link.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\n{how}\r\n\r\n".encode())
        for _ in range(size // len(piece)):
            link.sendall(piece if tells_length else f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if not tells_length:
            link.sendall(b"0\r\n\r\n")
        assert link.recv(2**16).startswith(b"HTTP/1.1 413")


def test_a_client_that_asks_before_it_sends_is_answered_at_once(server: Running) -> None:
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\nExpect: 100-continue\r\n\r\n"
        )
        assert link.recv(2**16).startswith(b"HTTP/1.1 413")
