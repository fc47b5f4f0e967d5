"""What users of vLLM, LMDeploy, LangChain and of OpenAI's own helpers send: done as they mean it, or refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from internlm.infer.engine import Engine
from internlm.infer.request import Request
from internlm.serve.api.fields import UNSUPPORTED
from internlm.serve.api.schema import ChatRequest, CompletionRequest
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import get_template
from internlm.weights.talk import Talk
from tests.serve.servers import TOKENIZER, Running, random_model, serving, slow_engine

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER: list[Any] = [{"role": "user", "content": "What is the sum?"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]
EOS = TOKENIZER.eos_id


class Sum(pydantic.BaseModel):
    """Adds."""

    model_config = pydantic.ConfigDict(extra="forbid")
    even: bool
    digit: int = pydantic.Field(ge=0, le=9)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(slow_engine(context=1024)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def is_json(text: str) -> bool:
    found = json.loads(text)
    return found["a"] in (1, 2) and isinstance(found["b"], bool)


def is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{3}", text) is not None


def is_choice(text: str) -> bool:
    return text in ("the cat", "你好")


GRAMMAR = 'root ::= "the cat" | "你好"'
LARK = 'start: "the cat" | "你好"'
STRUCTURES: list[tuple[dict[str, Any], Any]] = [
    ({"guided_json": SCHEMA}, is_json),
    ({"guided_json": json.dumps(SCHEMA)}, is_json),
    ({"guided_regex": "[0-9]{3}"}, is_number),
    ({"guided_choice": ["the cat", "你好"]}, is_choice),
    ({"guided_grammar": GRAMMAR}, is_choice),
    ({"structured_outputs": {"json": SCHEMA}}, is_json),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_json),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, is_number),
    ({"structured_outputs": {"choice": ["the cat", "你好"]}}, is_choice),
    ({"structured_outputs": {"grammar": LARK}}, is_choice),
    ({"response_format": {"type": "regex_schema", "regex_schema": "[0-9]{3}"}}, is_number),
    ({"response_format": {"type": "regex", "regex": "[0-9]{3}"}}, is_number),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, is_json),
]


AGAIN = (1, 5)
"""Where a schema comes once more, as what the other name has by default: text, or an object."""


@pytest.mark.parametrize(
    ("extra", "is_good"),
    [
        pytest.param(*one, id=json.dumps(one[0])[:40], marks=[pytest.mark.proof] if number in AGAIN else [])
        for number, one in enumerate(STRUCTURES)
    ],
)
def test_a_structure_is_followed_under_every_name(extra: dict[str, Any], is_good: Any, server: Running) -> None:
    answer = server.post(CHAT, {"messages": USER, "seed": 3, **extra}).json()["choices"][0]
    assert is_good(answer["message"]["content"])
    assert answer["finish_reason"] == "stop"
    text = server.post(COMPLETE, {"prompt": "the", "max_tokens": 500, "seed": 3, **extra}).json()["choices"][0]
    assert is_good(text["text"])


def test_any_object_may_be_asked_for_under_vllms_name(server: Running) -> None:
    braces = [token for token in range(TOKENIZER.vocab_size) if b"}" in TOKENIZER.token_bytes(token)]
    body = {"structured_outputs": {"json_object": True}, "logit_bias": {str(token): 100 for token in braces}}
    answer = server.post(CHAT, {"messages": USER, "seed": 3, **body}).json()["choices"][0]
    assert isinstance(json.loads(answer["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "json": SCHEMA}}, "structured_outputs"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_json": "no json"}, "guided_json"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= nothing"}, "guided_grammar"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "whitespace_pattern"),
        ({"response_format": {"type": "regex_schema", "regex": "a"}}, "response_format"),
        ({"guided_regex": "a", "tools": TOOLS, "tool_choice": "required"}, "response_format"),
    ],
)
def test_structures_that_contradict_or_cannot_be_are_refused(
    extra: dict[str, Any], param: str, server: Running
) -> None:
    refused = server.post(CHAT, {"messages": USER, **extra})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_final_message_is_gone_on_with(server: Running) -> None:
    messages = [*USER, {"role": "assistant", "content": "The sum is "}]
    turns, template = [Message("user", "What is the sum?")], get_template("internlm")
    prompt = render_prompt(turns, template, TOKENIZER, ("The sum is ",))
    assert TOKENIZER.decode(prompt).endswith("The sum is ")
    stops = tuple(Talk(TOKENIZER, "internlm").stop_ids())
    engine = Engine(random_model(), TOKENIZER)
    (expected,) = engine.generate([Request(tokens=prompt, max_tokens=9, seed=5, stop_ids=stops, continuation=True)])
    body = {"messages": messages, "max_tokens": 9, "seed": 5, "continue_final_message": True}
    for extra in ({}, {"add_generation_prompt": False}):
        answer = server.post(CHAT, {**body, **extra}).json()
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    told = server.post("/tokenize", {"messages": messages, "continue_final_message": True})
    assert told.json()["tokens"] == prompt


@pytest.mark.parametrize(
    ("messages", "extra", "param"),
    [
        (USER, {"continue_final_message": True}, "continue_final_message"),
        ([*USER, {"role": "assistant", "content": ""}], {"continue_final_message": True}, "continue_final_message"),
        (
            [*USER, {"role": "assistant", "content": "a"}],
            {"continue_final_message": True, "tools": TOOLS, "tool_choice": "required"},
            "continue_final_message",
        ),
        ([{"role": "assistant", "content": "a"}], {"continue_final_message": True}, "messages"),
        (
            [*USER, {"role": "assistant", "content": "a"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ([*USER, {"role": "assistant", "content": "a"}], {}, "messages"),
        (USER, {"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    messages: list[Any], extra: dict[str, Any], param: str, server: Running
) -> None:
    refused = server.post(CHAT, {"messages": messages, **extra})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_the_ids_of_a_chat_with_tools_are_those_the_model_gets(server: Running) -> None:
    told = server.post("/tokenize", {"messages": USER, "tools": TOOLS}).json()
    answer = server.post(CHAT, {"messages": USER, "tools": TOOLS, "max_tokens": 1}).json()
    assert told["count"] == answer["usage"]["prompt_tokens"] > server.post("/tokenize", {"messages": USER}).json()[
        "count"
    ]  # fmt: skip
    assert server.post("/tokenize", {"messages": USER, "add_generation_prompt": False}).status_code == 400


@pytest.mark.parametrize(
    ("path", "model", "needed"),
    [(CHAT, ChatRequest, {"messages": USER}), (COMPLETE, CompletionRequest, {"prompt": "the"})],
)
def test_a_field_without_support_is_refused_and_its_default_is_not(
    path: str, model: Any, needed: dict[str, Any], server: Running
) -> None:
    names = [name for name in UNSUPPORTED if name not in model.model_fields]
    assert len(names) > 30
    for name in names:
        refused = server.post(path, {**needed, "max_tokens": 1, name: "anything"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
        assert refused.json()["error"]["code"] == "unsupported"
    for place in range(3):
        values = {name: UNSUPPORTED[name][min(place, len(UNSUPPORTED[name]) - 1)] for name in names}
        assert server.post(path, {**needed, "max_tokens": 1, **values}).status_code == 200
    nothing = {name: None for name in model.model_fields if name not in needed}
    assert server.post(path, {**needed, **nothing}).status_code == 200, "null is: not given"


def test_thinking_can_be_switched_off_and_not_on(server: Running) -> None:
    off = {"messages": USER, "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": False}}
    assert server.post(CHAT, off).status_code == 200
    for kwargs in ({"enable_thinking": True}, {"custom": 1}):
        refused = server.post(CHAT, {**off, "chat_template_kwargs": kwargs})
        assert refused.json()["error"]["param"] == "chat_template_kwargs"


def test_a_body_with_all_that_vllm_and_lmdeploy_know_at_its_default_is_served(server: Running) -> None:
    body = {
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "stop_token_ids": [], "stop": [],
        "include_stop_str_in_output": False, "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True,
        "spaces_between_special_tokens": True, "echo": False, "add_generation_prompt": True, "priority": 0,
        "continue_final_message": False, "add_special_tokens": False, "include_reasoning": True, "logit_bias": {},
        "session_id": -1, "do_preprocess": True, "user": "me", "tool_choice": "none", "parallel_tool_calls": True,
        "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0, "n": 1, "best_of": 1, "request_id": "r",
    }  # fmt: skip
    answer = server.post(CHAT, {"messages": USER, "max_tokens": 2, **body})
    assert answer.status_code == 200, answer.text


def test_the_newer_name_of_the_length_counts_everywhere(client: openai.OpenAI) -> None:
    bias = {str(EOS): -100}
    chat = client.chat.completions.create(
        model="tiny", messages=USER, max_completion_tokens=3, max_tokens=7, logit_bias=bias
    )
    assert chat.usage is not None
    text = client.completions.create(
        model="tiny", prompt="a", logit_bias=bias, extra_body={"max_completion_tokens": 3}
    ).usage  # fmt: skip
    assert text is not None
    assert chat.usage.completion_tokens == text.completion_tokens == 3


def test_usage_comes_with_every_chunk_where_that_is_asked_for(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}
    for stream in (
        client.chat.completions.create(model="tiny", messages=USER, max_tokens=5, stream=True, stream_options=options),
        client.completions.create(model="tiny", prompt="the", max_tokens=5, stream=True, stream_options=options),
    ):
        counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]  # type: ignore[union-attr]
        assert counts == sorted(counts)
        assert len(set(counts)) > 2
        assert counts[-2:] == [counts[-1]] * 2, "the last chunk is the usage alone"


@pytest.mark.parametrize("stream", [True, False])
def test_a_scored_text_has_one_token_more_even_where_the_text_ends(client: openai.OpenAI, stream: bool) -> None:
    """The harness asks so and takes the last token off."""
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode("the cat sat")]
    options: dict[str, Any] = {"model": "tiny", "prompt": [prompt], "max_tokens": 1, "echo": True, "logprobs": 1}
    expected = Engine(random_model(), TOKENIZER).score([id_ for id_ in prompt if id_ is not None]).tolist()
    for bias, reason in ((100, "stop"), (-100, "length")):
        answers = client.completions.create(**options, stream=stream, temperature=0, logit_bias={str(EOS): bias})
        choices = [chunk.choices[0] for chunk in answers] if stream else [answers.choices[0]]
        told = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs or []]
        assert len(told) == len(prompt) + 1
        assert told[1:-1] == pytest.approx(expected, abs=1e-4)
        assert choices[-1].finish_reason == reason
        assert "".join(choice.text for choice in choices).startswith("the cat sat")


def test_the_stop_token_has_no_logprob_in_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=5, logprobs=True, logit_bias={str(EOS): 100}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content == []


def test_openais_helpers_parse_stream_and_call(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=USER, response_format=Sum, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    with client.chat.completions.stream(model="tiny", messages=USER, response_format=Sum, seed=1) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
    assert {"chunk", "content.delta", "content.done"} <= kinds
    tools = [openai.pydantic_function_tool(Sum)]
    called = client.chat.completions.parse(model="tiny", messages=USER, tools=tools, tool_choice="required", seed=1)
    (call,) = called.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Sum)


def test_the_answer_can_be_sent_back_as_the_client_gives_it(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="tiny", messages=USER, tools=TOOLS, tool_choice="required", seed=1
    ).choices[0].message  # fmt: skip
    (call,) = first.tool_calls or ()
    for message in (first, first.model_dump(), first.to_dict()):
        history: list[Any] = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "4", "name": "add"}]
        answer = client.chat.completions.create(model="tiny", messages=history, tools=TOOLS, max_tokens=1)
        assert answer.choices[0].finish_reason


def test_raw_and_streaming_responses_have_the_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=USER, max_tokens=1, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == "mine"
    assert raw.parse().choices
    with client.completions.with_streaming_response.create(model="tiny", prompt="a", max_tokens=1) as response:
        assert response.headers["content-type"] == "application/json"
        assert json.loads(response.read())["object"] == "text_completion"


def test_a_refusal_is_the_clients_own_error_with_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, temperature=3)
    assert (caught.value.param, caught.value.type, caught.value.status_code) == (
        "temperature", "invalid_request_error", 400,
    )  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, stream=True, logit_bias={"a": 1})
    assert caught.value.param == "logit_bias"


def test_the_async_client_streams_calls_and_structures_together(server: Running) -> None:
    async def call(client: openai.AsyncOpenAI) -> Any:
        parts = await client.chat.completions.create(
            model="tiny", messages=USER, tools=TOOLS, tool_choice="required", seed=1, stream=True
        )
        pieces = [c async for chunk in parts for choice in chunk.choices for c in choice.delta.tool_calls or ()]
        return json.loads("".join(piece.function.arguments or "" for piece in pieces if piece.function))

    async def structure(client: openai.AsyncOpenAI) -> Any:
        parts = await client.chat.completions.create(
            model="tiny", messages=USER, seed=1, stream=True, extra_body={"guided_json": SCHEMA}
        )
        return json.loads("".join([chunk.choices[0].delta.content or "" async for chunk in parts]))

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return await asyncio.gather(call(client), structure(client), call(client), structure(client))

    one, two, *again = asyncio.run(ask())
    assert set(one) == set(two) == {"a", "b"}
    assert again == [one, two]
