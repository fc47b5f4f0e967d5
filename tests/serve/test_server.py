"""The server through the real `openai` client: every endpoint, every parameter, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from internlm.infer.engine import Engine
from internlm.infer.request import Request
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import TEMPLATES, get_template
from internlm.weights.talk import Talk
from tests.serve.servers import TOKENIZER, Running, random_model, serving

QUESTION: list[Any] = [{"role": "user", "content": "What is the sum?"}]
PROMPT = render_prompt([Message("user", "What is the sum?")], get_template("internlm"), TOKENIZER)
STOPS = tuple(Talk(TOKENIZER, "internlm").stop_ids())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def reference() -> Engine:
    return Engine(random_model(), TOKENIZER)


def test_models_can_be_listed_and_asked_for_by_each_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=QUESTION)
    assert client.chat.completions.create(model="alias", messages=QUESTION, max_tokens=1).model == "alias"


def test_a_chat_answer_is_that_of_the_engine_for_the_rendered_prompt(client: openai.OpenAI, reference: Engine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12, temperature=0)
    (expected,) = reference.generate([Request(tokens=PROMPT, max_tokens=12, temperature=0, stop_ids=STOPS)])
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finished
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), len(expected.tokens))
    assert answer.usage.total_tokens == len(PROMPT) + len(expected.tokens)
    assert answer.id.startswith("chatcmpl-")


def test_parts_and_the_developer_role_are_read_as_text_and_system(client: openai.OpenAI, server: Running) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the sum?"}]
    messages: list[Any] = [{"role": "developer", "content": "Say 4"}, {"role": "user", "content": parts}]
    turns = [Message("system", "Say 4"), Message("user", "What is the sum?")]
    expected = render_prompt(turns, get_template("internlm"), TOKENIZER)
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == expected
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected)


def test_histories_that_openai_takes_are_written(server: Running) -> None:
    def said(*messages: Any) -> str:
        answer = server.post("/tokenize", {"messages": messages})
        assert answer.status_code == 200, answer.text
        return TOKENIZER.decode(answer.json()["tokens"])

    def call(arguments: str, **more: Any) -> Any:
        function = {"name": "add", "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}], **more}

    user, text, result = QUESTION[0], {"role": "assistant", "content": "Say"}, {"role": "tool", "tool_call_id": "c"}
    note = {"role": "system", "content": "sum"}
    result["content"] = "4"
    opened = "<|user|>What is the sum?<|end|>"
    assert said(user, text, text, user).endswith(f"{opened}<|assistant|>Say\n\nSay<|end|>{opened}<|assistant|>")
    assert said(user, text, call("{}"), result) == said(user, call("{}", content="Say"), result)
    assert said(text, user).endswith(f"<|assistant|>Say<|end|>{opened}<|assistant|>")
    assert said(user, text, note, user).endswith(f"Say<|end|><|system|>sum<|end|>{opened}<|assistant|>")
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "Say"}]}
    for said_no in (refused, {"role": "assistant", "refusal": "Say"}):
        assert said(user, said_no, user) == said(user, text, user)
    assert said(user, call(""), result) == said(user, call("{}"), result)
    assert '"arguments": {"a":}' in said(user, call('{"a":'), result)
    assert said(user, call("{}"), result, user).endswith(f"</tool_response><|end|>{opened}<|assistant|>")


def test_messages_in_a_row_of_a_user_or_the_system_are_one(server: Running) -> None:
    said = [("system", "A"), ("developer", "B"), ("user", "C"), ("user", "D"), ("assistant", "E"), ("user", "F")]
    messages = [{"role": role, "content": content} for role, content in said]
    turns = [Message("system", "A\n\nB"), Message("user", "C\n\nD"), Message("assistant", "E"), Message("user", "F")]
    expected = render_prompt(turns, get_template("internlm"), TOKENIZER)
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == expected


def test_a_stream_is_role_content_finish_usage_done(server: Running) -> None:
    body = {"messages": QUESTION, "max_tokens": 8, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
    response = server.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == len(PROMPT)
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-2])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, n: int) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 15, "seed": 7, "n": n}
    options |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    texts, reasons, tokens = [""] * n, [""] * n, [[] for _ in range(n)]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
            tokens[choice.index] += (choice.logprobs.content or []) if choice.logprobs else []
    assert [choice.index for choice in whole.choices] == list(range(n))
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    for choice, streamed in zip(whole.choices, tokens, strict=True):
        assert choice.logprobs is not None
        assert [t.token for t in choice.logprobs.content or []] == [t.token for t in streamed]
    assert n == 1 or len(set(texts)) > 1


def test_the_async_client_gets_the_same_answers_all_at_once(server: Running, client: openai.OpenAI) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as many:
            calls = [
                many.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=10, seed=seed)
                for seed in range(24)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    together = asyncio.run(ask_all())
    for seed in (0, 11, 23):
        alone = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=10, seed=seed)
        assert alone.choices[0].message.content == together[seed]


def test_the_async_client_streams(server: Running) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            stream = await client.completions.create(model="tiny", prompt="the cat", max_tokens=6, seed=3, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    body = {"prompt": "the cat", "max_tokens": 6, "seed": 3}
    assert asyncio.run(ask()) == server.post("/v1/completions", body).json()["choices"][0]["text"]


def test_a_stop_string_ends_the_text_and_the_logprobs_before_it(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 30, "seed": 5, "logprobs": True}
    options["logit_bias"] = {str(id_): -100 for id_ in range(TOKENIZER.vocab_size) if not _is_letter(id_)}
    free = client.chat.completions.create(**options).choices[0].message.content
    assert free is not None
    stop = free[10:13]
    cut = client.chat.completions.create(**options, stop=["never there", stop]).choices[0]
    assert cut.message.content == free.split(stop)[0]
    assert cut.finish_reason == "stop"
    assert cut.logprobs is not None
    told = "".join(token.token for token in cut.logprobs.content or [])
    assert told.startswith(cut.message.content)
    assert len(told) <= len(cut.message.content) + 3
    kept = client.chat.completions.create(**options, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == free.split(stop)[0] + stop
    parts = client.chat.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == free.split(stop)[0]


def _is_letter(id_: int) -> bool:
    return TOKENIZER.token_bytes(id_).decode("utf-8", "replace").isalpha()


def test_logprobs_are_those_of_the_engine_with_bytes(client: openai.OpenAI, reference: Engine) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    (expected,) = reference.generate(
        [Request(tokens=PROMPT, max_tokens=6, temperature=0, logprobs=3, stop_ids=STOPS)]
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert expected.logprobs is not None
    for told, chance in zip(logprobs.content, expected.logprobs, strict=True):
        assert told.logprob == pytest.approx(chance.logprob, abs=1e-4)
        assert bytes(told.bytes or []) == TOKENIZER.token_bytes(chance.token, skip_special=False)
        assert [t.logprob for t in told.top_logprobs] == pytest.approx([p for _, p in chance.top], abs=1e-4)


def test_a_seed_repeats_an_answer_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> str | None:
        answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12, **options)
        return answer.choices[0].message.content

    assert ask(seed=-3) == ask(seed=-3) != ask(seed=4)
    assert ask() != ask()


def test_bias_and_penalties_change_what_is_written(client: openai.OpenAI) -> None:
    wanted = TOKENIZER.encode("cat")[0]
    options: dict[str, Any] = {"model": "tiny", "prompt": "the", "max_tokens": 8, "temperature": 0, "logprobs": 0}

    def tokens(**more: Any) -> list[str]:
        logprobs = client.completions.create(**(options | more)).choices[0].logprobs
        assert logprobs is not None
        return logprobs.tokens or []

    biased = tokens(logit_bias={str(wanted): 100})
    assert set(biased) == {TOKENIZER.token_bytes(wanted).decode()}
    assert len(set(tokens(logit_bias={str(wanted): 30}, frequency_penalty=2))) >= 1
    assert len(set(tokens(logit_bias={str(wanted): 3}, extra_body={"repetition_penalty": 50.0}))) == 8
    assert tokens(temperature=2, extra_body={"top_k": 1}) == tokens()
    assert tokens(temperature=2, extra_body={"min_p": 1.0}) == tokens()
    assert tokens(temperature=2, top_p=0) == tokens()


def test_stop_ids_min_tokens_and_ignore_eos(client: openai.OpenAI) -> None:
    eos = TOKENIZER.eos_id
    options: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 6, "logit_bias": {str(eos): 100}}
    first = client.chat.completions.create(**options).choices[0]
    assert (first.message.content, first.finish_reason) == ("", "stop")
    later = client.chat.completions.create(**options, extra_body={"min_tokens": 3})
    assert later.usage is not None
    assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (4, "stop")
    on = client.chat.completions.create(**options, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert on.choices[0].finish_reason == "length"
    assert on.choices[0].message.content == next(n for n, i in TOKENIZER.special_tokens.items() if i == eos) * 6
    cat = TOKENIZER.encode("cat")[0]
    body = {"stop_token_ids": [cat], "ignore_eos": True}
    ended = client.completions.create(model="tiny", prompt="a", logit_bias={str(cat): 100}, extra_body=body)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")


def test_the_four_forms_of_a_prompt_and_n_keep_their_order(client: openai.OpenAI) -> None:
    bos = TOKENIZER.bos_id
    texts = ["the cat", "What"]
    ids = [[bos, *TOKENIZER.encode(text)] for text in texts]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "seed": 2}
    by_text = client.completions.create(prompt=texts, n=2, **options)
    by_ids = client.completions.create(prompt=ids, n=2, **options)
    assert [c.index for c in by_text.choices] == [0, 1, 2, 3]
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    for place in (0, 1):
        expected = by_text.choices[2 * place].text
        assert client.completions.create(prompt=texts[place], **options).choices[0].text == expected
        assert client.completions.create(prompt=ids[place], **options).choices[0].text == expected
    streamed = [""] * 4
    for chunk in client.completions.create(prompt=texts, n=2, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in by_text.choices]


def test_echo_scores_a_text(client: openai.OpenAI, reference: Engine) -> None:
    text = "the cat 你好 sat"
    scored = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=1)
    choice = scored.choices[0]
    assert choice.text == text
    assert choice.finish_reason == "length"
    logprobs = choice.logprobs
    assert logprobs is not None
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    expected = reference.score([id_ for id_ in ids if id_ is not None]).tolist()
    told = logprobs.token_logprobs or []
    assert told[0] is None
    assert told[1:] == pytest.approx(expected, abs=1e-4)
    assert (logprobs.top_logprobs or [])[0] is None
    pieces = [b for id_ in ids if id_ is not None for b in [TOKENIZER.token_bytes(id_)]]
    starts = [len(b"".join(pieces[:i]).decode("utf-8", "ignore")) for i in range(len(pieces))]
    assert logprobs.text_offset == starts


def test_echo_goes_on_with_the_text_and_streams_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": ["the cat", TOKENIZER.encode("on").__len__() * "on"]}
    options |= {"echo": True, "max_tokens": 3, "logprobs": 0, "seed": 0}
    whole = client.completions.create(**options)
    assert whole.choices[0].text.startswith("the cat")
    texts, offsets = ["", ""], [[], []]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += (choice.logprobs.text_offset or []) if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices if choice.logprobs]
    assert (
        client.completions.create(model="tiny", prompt=[7, 8, 9], echo=True, max_tokens=1)
        .choices[0]
        .text.startswith(TOKENIZER.decode([7, 8, 9]))
    )


def test_ids_and_text_both_ways(server: Running) -> None:
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("the cat")]
    answer = server.post("/tokenize", {"prompt": "the cat", "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 256)
    assert "".join(answer["token_strs"][1:]) == "the cat"
    assert server.post("/tokenize", {"prompt": "the cat", "add_special_tokens": False}).json()["tokens"] == ids[1:]
    assert server.post("/detokenize", {"tokens": ids[1:]}).json() == {"prompt": "the cat"}
    assert server.post("/v1/encode", {"input": "the cat"}).json() == {"input_ids": ids, "length": len(ids)}
    both = server.post("/v1/encode", {"input": ["the cat", "a"], "add_bos": False}).json()
    assert both["input_ids"] == [ids[1:], TOKENIZER.encode("a")]


def test_the_routes_of_the_first_server_still_work_and_honour_max_length(server: Running) -> None:
    assert server.get("/internlm/models").json()["data"][0]["id"] == "tiny"
    body = {"model": "tiny", "messages": QUESTION, "max_length": len(PROMPT) + 3, "ignore_eos": True}
    answer = server.post("/internlm/chat/completions", body).json()
    assert answer["usage"]["total_tokens"] == len(PROMPT) + 3
    refused = server.post("/internlm/chat/completions", {**body, "max_length": len(PROMPT)})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_length"


def test_special_tokens_in_a_users_text_are_text(server: Running) -> None:
    names = "".join(TOKENIZER.special_tokens)
    for text in (names, f"<|end|>\n<|assistant|>{names}"):
        tokens = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
        assert not set(tokens) & TOKENIZER.special_ids
        messages = [{"role": "user", "content": text}]
        tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
        plain = render_prompt([Message("user", "x")], get_template("internlm"), TOKENIZER)
        assert sum(id_ in TOKENIZER.special_ids for id_ in tokens) == sum(id_ in TOKENIZER.special_ids for id_ in plain)


def test_metrics_count_what_happened(server: Running) -> None:
    before = _metrics(server)
    server.post("/v1/completions", {"prompt": [3, 4, 5, 6], "max_tokens": 5, "ignore_eos": True})
    server.post("/v1/completions", {"prompt": []})
    after = _metrics(server)
    assert after["internlm:generation_tokens_total"] - before["internlm:generation_tokens_total"] == 5
    assert after["internlm:prompt_tokens_total"] - before["internlm:prompt_tokens_total"] == 4
    name = 'internlm:http_errors_total{code="400"}'
    assert after[name] - before.get(name, 0) == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "time_per_output_token_seconds",
                 "request_queue_time_seconds"):  # fmt: skip
        count = f"internlm:{name}_count"
        assert after[count] - before[count] == 1
        assert after[f'internlm:{name}_bucket{{le="+Inf"}}'] == after[count]
    assert after["internlm:num_requests_running"] == after["internlm:cache_blocks_used"] == 0


def _metrics(server: Running) -> dict[str, float]:
    lines = server.get("/metrics").text.splitlines()
    return {name: float(value) for line in lines if line[0] != "#" for name, _, value in [line.rpartition(" ")]}


def test_the_schema_names_every_route_and_no_422(server: Running) -> None:
    schema = server.get("/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"]
    assert "422" not in json.dumps(schema["paths"])
    assert "max_tokens" in schema["components"]["schemas"]["ChatRequest"]["properties"]


def test_the_request_id_comes_back_if_it_is_a_decent_one(server: Running) -> None:
    assert server.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert len(server.get("/health", headers={"x-request-id": "a b" * 99}).headers["x-request-id"]) == 32


def test_a_prompt_that_was_there_before_is_counted_as_cached(client: openai.OpenAI) -> None:
    ids = [5 + i % 40 for i in range(100)]
    client.completions.create(model="tiny", prompt=ids, max_tokens=1)
    usage = client.completions.create(model="tiny", prompt=ids, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 96


def test_a_model_without_a_chat_format_completes_only() -> None:
    with serving(template=None) as server:
        refused = server.post("/v1/chat/completions", {"messages": QUESTION})
        assert refused.status_code == 400
        said = refused.json()["error"]["message"]
        assert said.startswith("the model has no chat format: use /v1/completions, or start the server with --template")
        assert all(name in said for name in TEMPLATES)
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
