"""What a client can send that is wrong: a clean refusal in OpenAI's form, and a server that lives on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from internlm.infer.request import Request
from internlm.serve.api.gate import Access
from tests.processes import until
from tests.serve.servers import TOKENIZER, Running, Script, SlowEngine, random_model, serving, slow_engine

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER: list[Any] = [{"role": "user", "content": "What?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """Check that a response is a refusal in OpenAI's form, and return its error."""
    assert response.status_code == status, response.text[:300]
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000
    return error


def lives(server: Running) -> None:
    answer = server.post(COMPLETE, {"prompt": "the cat", "max_tokens": 2, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "JSON"),
        (b"{", "the body is no JSON: Expecting property name enclosed in double quotes (line 1, column 2): send JSON"),
        (b'{"prompt":\n "\xc3\xa9",}', "(line 2, column 6): send JSON with Content-Type"),
        (b"\xff\xfe{}", ""),
        (b"[]", ""),
        (b"null", ""),
        (b'"text"', ""),
        (b"[" * 200_000, ""),
        (b'{"a":' * 100_000, ""),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "finite"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e309}', "finite"),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": ' + b"9" * 5000 + b"}", ""),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 400 + b"}", "less than"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Running, raw: bytes, message: str) -> None:
    error = refused(server.post(CHAT, content=raw, headers={"content-type": "application/json"}))
    assert message in error["message"]
    lives(server)


def test_a_body_without_its_type_is_refused(server: Running) -> None:
    for headers in ({}, {"content-type": "text/plain"}):
        error = refused(server.post(CHAT, content=b'{"messages": []}', headers=headers))
        told = "no header says that the body is JSON: send it with Content-Type: application/json"
        assert error["message"] == told


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"messages": [*USER, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": USER * 5000}, "messages"),
        ({"messages": [{"role": "user", "content": "cat " * 300}]}, "messages"),
        ({"messages": USER, "max_tokens": -1}, "max_tokens"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "max_tokens": "5"}, "max_tokens"),
        ({"messages": USER, "max_tokens": 1.5}, "max_tokens"),
        ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": USER, "n": 0}, "n"),
        ({"messages": USER, "n": 129}, "n"),
        ({"messages": USER, "n": True}, "n"),
        ({"messages": USER, "temperature": -0.1}, "temperature"),
        ({"messages": USER, "temperature": 2.1}, "temperature"),
        ({"messages": USER, "top_p": 1.01}, "top_p"),
        ({"messages": USER, "top_k": -2}, "top_k"),
        ({"messages": USER, "repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"messages": USER, "presence_penalty": 3}, "presence_penalty"),
        ({"messages": USER, "logit_bias": {"cat": 1}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"5": 101}}, "logit_bias"),
        ({"messages": USER, "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"messages": USER, "stop": [""]}, "stop"),
        ({"messages": USER, "stop": ["a"] * 17}, "stop"),
        ({"messages": USER, "stop": 5}, "stop"),
        ({"messages": USER, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": USER, "timeout": 0}, "timeout"),
        ({"messages": USER, "response_format": {"type": "yaml"}}, "response_format"),
        ({"messages": USER, "modalities": ["audio"]}, "modalities"),
        ({"messages": USER, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": USER, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": USER, "use_beam_search": True}, "use_beam_search"),
    ],
)
def test_a_chat_request_that_is_wrong_is_refused_by_the_field(server: Running, body: Any, param: str) -> None:
    assert refused(server.post(CHAT, body))["param"] == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "x" * 5000])
def test_a_picture_is_answered_with_that_the_model_reads_text(server: Running, kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:"}}]
    error = refused(server.post(CHAT, {"messages": [{"role": "user", "content": parts}]}))
    place = "messages.0.content: this model reads text only, and here is a part of type"
    assert error["message"] == f"{place} {kind[:40]!r}"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, -5]}, "prompt"),
        ({"prompt": [1, 10**12]}, "prompt"),
        ({"prompt": [1, 324]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": [1, 321], "echo": True}, "prompt"),
    ],
)
def test_a_completion_request_that_is_wrong_is_refused_by_the_field(server: Running, body: Any, param: str) -> None:
    assert refused(server.post(COMPLETE, body))["param"] == param


def test_fields_that_contradict_each_other_are_refused(server: Running) -> None:
    for body, word in (
        ({"messages": USER, "top_logprobs": 3}, "logprobs"),
        ({"messages": USER, "stream_options": {"include_usage": True}}, "stream"),
        ({"messages": USER, "best_of": 3}, "best_of"),
        ({"messages": USER, "tool_choice": "required"}, "tools"),
        ({"messages": USER, "response_format": {"type": "json_schema"}}, "json_schema"),
    ):
        assert word in refused(server.post(CHAT, body))["message"]


def test_fields_without_effect_and_unknown_ones_are_accepted(server: Running) -> None:
    body = {"messages": USER, "max_tokens": 1, "user": "me", "store": False, "some_new_field": {"a": [1]}, "best_of": 1}
    body |= {
        "max_tokens": 1.0,
        "suffix": None,
        "functions": [],
        "tools": [],
        "response_format": {"type": "text"},
        "modalities": ["text"],
    }
    assert server.post(CHAT, body).status_code == 200


def test_the_prompt_may_fill_the_context_but_for_one_token_and_not_more(server: Running) -> None:
    at = server.post(COMPLETE, {"prompt": [5] * 255, "max_tokens": 10, "ignore_eos": True})
    assert at.json()["usage"]["completion_tokens"] == 1
    assert at.json()["choices"][0]["finish_reason"] == "length"
    for length in (256, 257, 5000):
        error = refused(server.post(COMPLETE, {"prompt": [5] * length, "max_tokens": 1}))
        assert error["code"] == "context_length_exceeded"
    lives(server)


@pytest.mark.parametrize(
    "text", ["\x00", "a\x00b\x1b[2J", "\ud800", "a\udfffb\ud800", "👋🏽‍👩‍👩‍👧", "\u202e", "﷽" * 20]
)
def test_strange_characters_are_only_text(server: Running, text: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    headers = {"content-type": "application/json"}
    assert server.post(CHAT, content=json.dumps(body).encode(), headers=headers).status_code == 200
    stopped = server.post(CHAT, content=json.dumps({**body, "stop": [text]}).encode(), headers=headers)
    assert stopped.status_code == 200 or refused(stopped)["param"] == "stop"
    raw = json.dumps({"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1}).encode()
    answer = server.post(COMPLETE, content=raw, headers=headers)
    assert answer.status_code == 200
    written = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert answer.json()["choices"][0]["text"].startswith(written)
    raw = json.dumps({"messages": USER, "model": text, "logit_bias": {text: 1}, text: text}).encode()
    refused(server.post(CHAT, content=raw, headers=headers))


def test_a_model_name_with_strange_characters_is_not_found(server: Running) -> None:
    raw = json.dumps({"messages": USER, "model": "\ud800\x00"}).encode()
    response = server.post(CHAT, content=raw, headers={"content-type": "application/json"})
    refused(response, response.status_code)
    assert response.status_code in (400, 404)
    refused(server.get("/v1/models/%00%ff%2e%2e"), 404)


def test_every_path_and_method_answers_in_the_same_form(server: Running) -> None:
    assert refused(server.get("/v1/nothing"), 404)["type"] == "not_found_error"
    refused(server.post("/v1/embeddings", {"input": "a"}), 404)
    response = server.get(CHAT)
    refused(response, 405)
    assert "POST" in response.headers["allow"]
    refused(server.get("/../../etc/passwd"), 404)
    refused(server.get("/%2e%2e/%2e%2e/app.py"), 404)


def test_a_body_over_the_limit_is_refused_however_it_comes(server: Running) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "a" * 2**20}]}).encode()
    assert refused(server.post(CHAT, content=big), 413)["code"] == "body_too_large"

    def parts() -> Iterator[bytes]:
        for at in range(0, len(big), 65536):
            yield big[at : at + 65536]

    refused(server.post(CHAT, content=parts()), 413)
    lives(server)


def test_ids_without_text_are_refused(server: Running) -> None:
    refused(server.post("/detokenize", {"tokens": [10**6]}))
    refused(server.post("/detokenize", {"tokens": [-1]}))
    refused(server.post("/tokenize", {}))
    refused(server.post("/tokenize", {"prompt": "a", "messages": USER}))
    refused(server.post("/tokenize", {"prompt": "a", "model": "x"}), 404)


def test_a_step_that_raises_fails_its_request_alone() -> None:
    class Breaking(SlowEngine):
        def add(self, request: Request, id: int | None = None) -> int:
            if list(request.tokens) == [7, 7, 7]:
                request = replace(request, grammar=Script([*TOKENIZER.encode("the cat"), None]))
            return super().add(request, id)

    engine = Breaking(random_model(), TOKENIZER)
    with serving(engine) as server:
        error = refused(server.post(COMPLETE, {"prompt": [7, 7, 7]}), 500)
        assert (error["type"], error["code"]) == ("server_error", "engine_error")
        streamed = server.post(COMPLETE, {"prompt": [7, 7, 7], "stream": True})
        events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        assert "boom" in json.loads(events[-2])["error"]["message"]
        assert events[-1] == "[DONE]"
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.APIError, match="boom"):
            list(client.completions.create(model="tiny", prompt=[7, 7, 7], stream=True))
        lives(server)


def test_keys_protect_everything_but_health_readiness_and_the_page() -> None:
    with serving(access=Access(keys=("first", "second"))) as server:
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/docs", "/internlm/models", "/v1/nothing"):
            assert refused(server.get(path), 401)["code"] == "invalid_api_key"
        for header in ("Bearer wrong", "first", "Basic first", "Bearer", "Bearer firs", "Bearer first second"):
            refused(server.get("/v1/models", headers={"authorization": header}), 401)
        for key in ("first", "second"):
            client = openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)
            assert client.models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="no", max_retries=0).models.list()
        assert server.metrics.errors[401] == 13


def test_other_origins_may_call_only_if_they_are_named() -> None:
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with serving() as server:
        assert "access-control-allow-origin" not in server.get("/v1/models", headers=headers).headers
        assert httpx.options(server.url + CHAT, headers=headers).status_code == 405
    with serving(access=Access(keys=("k",), origins=("https://page.example",))) as server:
        asked = httpx.options(server.url + CHAT, headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.options(server.url + CHAT, headers={**headers, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_an_answer_ends_when_its_time_is_over() -> None:
    with serving(slow_engine(0.05), timeout=0.6) as server:
        for extra in ({}, {"timeout": 100.0}):
            body = {"prompt": [5, 6], "max_tokens": 200, "ignore_eos": True, **extra}
            answer = server.post(COMPLETE, body).json()
            assert answer["choices"][0]["finish_reason"] == "timeout"
            assert 1 < answer["usage"]["completion_tokens"] < 20
        assert until(lambda: server.engine.stats.blocks_used == 0)


def test_the_vocabulary_of_the_tests_pads_the_model() -> None:
    assert TOKENIZER.vocab_size < 321, "ids 321 to 323 are the model's alone"


def test_special_tokens_are_text_wherever_a_client_writes_them(server: Running) -> None:
    names = "".join(TOKENIZER.special_tokens)
    function = {"name": "f", "description": "PLACE", "parameters": {"type": "object", "title": "PLACE"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "PLACE"}'}}
    body = {
        "messages": [
            {"role": "system", "content": "PLACE"},
            {"role": "user", "content": [{"type": "text", "text": "PLACE"}]},
            {"role": "assistant", "content": "PLACE", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "PLACE"},
            {"role": "assistant", "content": "PLACE"},
        ],
        "tools": [{"type": "function", "function": function}],
        "continue_final_message": True,
    }

    def specials(text: str) -> list[int]:
        raw = json.dumps(body).replace("PLACE", text)
        answer = server.post("/tokenize", content=raw, headers={"content-type": "application/json"})
        return [id_ for id_ in answer.json()["tokens"] if id_ in TOKENIZER.special_ids]

    assert specials(names) == specials("x")
    assert len(specials("x")) > 4


def test_a_conversation_of_very_many_messages_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": ""}] * 100_000}).encode()
    monkeypatch.setattr("internlm.serve.api.app._LEAST_BODY_BYTES", 2**24)
    with serving() as server:
        start = time.monotonic()
        error = refused(server.post(CHAT, content=raw, headers={"content-type": "application/json"}))
        assert error["param"] == "messages"
        assert time.monotonic() - start < 10
        lives(server)


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_json": {"$ref": "#"}},
        {"guided_json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
        {"guided_json": {"type": "array", "minItems": 10**9}},
        {"guided_regex": "(((.{1,500}x){1,500}y){1,500}z){1,500}"},
        {"guided_regex": "(a+)+$"},
        {"guided_grammar": "start: start"},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
            "tool_choice": "required",
        },
    ],
)
def test_loops_and_catastrophic_patterns_are_refused_or_bounded(server: Running, extra: dict[str, Any]) -> None:
    response = server.post(CHAT, {"messages": USER, "max_tokens": 4, **extra})
    if response.status_code != 200:
        refused(response)
    lives(server)
