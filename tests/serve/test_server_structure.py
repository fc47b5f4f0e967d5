"""Answers with a structure: JSON, schemas, expressions, tool calls; and the page."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from internlm.serve import web
from internlm.serve.api import structure
from tests.processes import until
from tests.serve.servers import TOKENIZER, Running, scripted, serving, slow_engine

CHAT = "/v1/chat/completions"
USER: list[Any] = [{"role": "user", "content": "What is the sum?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": true}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(slow_engine(context=2048)) as running:
        yield running


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)


def content(server: Running, **options: Any) -> str:
    body = {"messages": USER, "max_tokens": 200, "seed": 1, **options}
    answer = server.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_an_answer_follows_a_schema_an_expression_or_is_json(server: Running) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS, "strict": True}}
    found = json.loads(content(server, response_format=schema))
    assert found["a"] in (1, 2)
    assert isinstance(found["b"], bool)
    assert re.fullmatch("(ja|nein){2}", content(server, response_format={"type": "regex", "regex": "(ja|nein){2}"}))
    braces = [token for token in range(TOKENIZER.vocab_size) if b"}" in TOKENIZER.token_bytes(token)]
    bias = {str(token): 100 for token in braces}
    assert isinstance(json.loads(content(server, response_format={"type": "json_object"}, logit_bias=bias)), dict)
    parts = client_of(server).chat.completions.create(
        model="tiny", messages=USER, response_format=schema, seed=1, stream=True  # type: ignore[call-overload]
    )  # fmt: skip
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in parts)) == found


@pytest.mark.parametrize(
    "format_",
    [
        {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}},
        {"type": "regex", "regex": "("},
        {"type": "regex", "regex": "a" * 9000},
    ],
)
def test_a_format_that_cannot_be_followed_is_refused(server: Running, format_: dict[str, Any]) -> None:
    refused = server.post(CHAT, {"messages": USER, "response_format": format_})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format"


def test_a_deep_schema_is_refused_and_the_server_lives(server: Running) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    body = {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    assert server.post(CHAT, body).status_code == 400
    deep_tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert server.post(CHAT, {"messages": USER, "tools": [deep_tool]}).status_code == 400
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("choice", "stream"),
    [
        ("required", True),
        (NAMED, False),
        pytest.param("required", False, marks=pytest.mark.proof),
        pytest.param(NAMED, True, marks=pytest.mark.proof),
    ],
)
def test_a_call_that_must_be_made_is_made_even_by_a_random_model(choice: Any, stream: bool, server: Running) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": TOOLS[:1], "tool_choice": choice, "seed": 4}
    client = client_of(server)
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert pieces[0].id
        name = pieces[0].function.name if pieces[0].function else None
        arguments = "".join((piece.function.arguments or "") for piece in pieces if piece.function)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**options).choices[0]
        (call,) = answer.message.tool_calls or ()
        assert answer.message.content is None
        name, arguments, reason = call.function.name, call.function.arguments, answer.finish_reason
    assert (name, reason) == ("add", "tool_calls")
    assert set(json.loads(arguments)) == {"a", "b"}


@pytest.mark.parametrize("stream", [True, False])
def test_calls_in_a_text_are_read_and_the_text_stays(stream: bool) -> None:
    with serving(scripted(f"One moment.\n{CALL}\n{CALL}")) as server:
        options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": TOOLS}
        client = client_of(server)
        if stream:
            chunks = list(client.chat.completions.create(**options, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            made = [
                "".join((p.function.arguments or "") for p in pieces if p.index == index and p.function)
                for index in (0, 1)
            ]
            assert len({piece.id for piece in pieces if piece.id}) == 2
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        else:
            answer = client.chat.completions.create(**options).choices[0]
            text, made = answer.message.content, [call.function.arguments for call in answer.message.tool_calls or ()]
            assert answer.finish_reason == "tool_calls"
        assert text == "One moment."
        assert [json.loads(arguments) for arguments in made] == [{"a": 1, "b": True}] * 2


def test_with_one_call_at_most_the_answer_ends_after_it() -> None:
    with serving(scripted(CALL + "\n" + CALL + "the cat" * 40)) as server:
        body = {"messages": USER, "tools": TOOLS, "parallel_tool_calls": False}
        answer = server.post(CHAT, body).json()["choices"][0]
        assert len(answer["message"]["tool_calls"]) == 1
        assert answer["finish_reason"] == "tool_calls"
        assert until(lambda: server.metrics.ended["abort"] == 1), "the rest is not written"


def test_what_only_looks_like_a_call_is_content_and_no_call_is_forbidden_text() -> None:
    broken = '<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call>'
    with serving(scripted(broken)) as server:
        answer = server.post(CHAT, {"messages": USER, "tools": TOOLS}).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (broken, "stop")
    with serving(scripted(CALL)) as server:
        answer = server.post(CHAT, {"messages": USER, "tools": TOOLS, "tool_choice": "none"}).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (CALL, "stop")


def test_results_of_calls_go_back_to_the_model(server: Running) -> None:
    function = {"name": "add", "arguments": '{"a": 1, "b": true}'}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]
    assert server.post(CHAT, {"messages": messages, "tools": TOOLS, "max_tokens": 1}).status_code == 200
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = TOKENIZER.decode(tokens)
    assert '"arguments": {"a": 1, "b": true}' in text
    assert "<tool_response>\n4\n</tool_response>" in text
    for wrong in (messages[:2], [*messages[:2], {**messages[2], "tool_call_id": "c2"}], [*USER, messages[2]]):
        assert server.post(CHAT, {"messages": wrong, "tools": TOOLS}).json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "web"}]}, "tools"),
        ({"tools": TOOLS[:1] * 2}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_wrong_tools_are_refused(server: Running, extra: dict[str, Any], param: str) -> None:
    refused = server.post(CHAT, {"messages": USER, **extra})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_the_page_and_its_files_are_served_and_nothing_else(server: Running) -> None:
    files = web.files()
    assert "/" in files
    for path, file in files.items():
        got = server.get(path)
        assert (got.status_code, got.headers["content-type"]) == (200, file.kind)
        assert got.content
    assert b"<html" in server.get("/").content
    for path in ("/__init__.py", "/schema.py", "/i18n", "/../app.py"):
        assert server.get(path).status_code == 404


def test_grammars_that_take_long_to_compile_hold_up_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, begun, go = structure.compile, threading.Semaphore(0), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.release()
        assert go.wait(20)
        return plain(*arguments)

    monkeypatch.setattr(structure, "compile", slow)
    asked = [
        {"response_format": {"type": "regex", "regex": "[ab]{3}"}},
        {"tools": TOOLS, "tool_choice": "required"},
    ] * 4
    with serving(slow_engine(context=2048)) as server, ThreadPoolExecutor(len(asked)) as clients:
        held = [clients.submit(server.post, CHAT, {"messages": USER, "max_tokens": 9, **extra}) for extra in asked]
        assert begun.acquire(timeout=10)
        assert begun.acquire(timeout=10)
        free = server.post(CHAT, {"messages": USER, "max_tokens": 3})
        assert free.json()["usage"]["completion_tokens"] == 3
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 200
        assert not any(one.done() for one in held)
        go.set()
        assert [one.result().status_code for one in held] == [200] * len(asked)
