"""How answers end: in time, too late, with a call, not at all; what is told of them is the same every time."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import pytest

from internlm.infer.client import Client
from internlm.infer.request import Chance, Delta, Finished
from internlm.serve.api import asked as ask
from internlm.serve.api.asked import Served
from internlm.serve.api.metrics import Histogram
from internlm.serve.api.replies import Reply
from internlm.serve.api.schema import ChatRequest, CompletionRequest
from internlm.serve.api.structure import Grammars
from internlm.serve.api.tooling import CallReader, tools_of
from internlm.weights.talk import Talk
from tests.processes import until
from tests.serve.servers import TOKENIZER, Running, scripted, serving, slow_engine

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER: list[Any] = [{"role": "user", "content": "What?"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
CALLED = {"messages": USER, "tools": TOOLS, "parallel_tool_calls": False, "logprobs": True}


def completion_reply(**fields: Any) -> Reply:
    """Return the reply to a completion request, before its first delta."""
    served = Served(slow_engine(), Talk(TOKENIZER, "internlm"), ("tiny",))
    return Reply(served, ask.ask_completion(served, CompletionRequest(**fields), Grammars(served.engine).known))


def choice(server: Running, body: Any) -> Any:
    answer = server.post(COMPLETE, body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_could_not_be_scored_in_time_is_told_as_far_as_it_was(stream: bool) -> None:
    ids = list(range(1, 100))
    body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "timeout": 0.1}
    with serving(slow_engine(pause=0.06, step_tokens=16)) as server:
        if stream:
            said = server.post(COMPLETE, {**body, "stream": True}).text.split("\n\n")
            assert said[-2:] == ["data: [DONE]", ""]
            chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in said[:-2]]
            found, reason = chunks[0]["logprobs"], chunks[-1]["finish_reason"]
        else:
            whole = choice(server, body)
            found, reason = whole["logprobs"], whole["finish_reason"]
    assert reason == "timeout"
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == len(ids)
    assert found["token_logprobs"][-1] is None


@pytest.mark.parametrize("finished", ["abort", "timeout", "length"])
def test_tokens_whose_text_is_held_back_are_told_when_an_answer_is_cut_off(finished: Finished) -> None:
    reply = completion_reply(prompt="a", logprobs=1)
    token = TOKENIZER.encode("the")[0]
    assert reply.chunks(0, Delta(0, [token], "", logprobs=[Chance(token, -0.5)])) == []
    reply.chunks(0, Delta(0, [], "", finished))
    (found,) = reply.whole()["choices"]
    assert found["logprobs"]["token_logprobs"] == [-0.5]


def test_tokens_of_a_prompt_that_were_found_are_counted_once_for_several_answers() -> None:
    reply = completion_reply(prompt="the cat", n=3)
    for index in range(3):
        reply.add(0, Delta(0, [5], "a", "length", index, cached=2))
    assert reply.usage["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize(("finished", "told"), [("length", "length"), ("timeout", "timeout"), ("stop", "tool_calls")])
def test_a_call_before_the_end_does_not_hide_that_the_answer_was_cut_off(finished: Finished, told: str) -> None:
    reader = CallReader(tools_of(ChatRequest(messages=USER, tools=TOOLS), "chatml"))
    reader.add(CALL + "\nand", finished=True)
    assert len(reader.message()["tool_calls"]) == 1
    assert reader.reason(finished) == told


def test_a_stream_ends_the_engines_work_once_its_call_is_whole() -> None:
    with serving(scripted(CALL + "the cat" * 40)) as server:
        server.engine.pause = 0.005
        assert "tool_calls" in server.post(CHAT, {**CALLED, "stream": True}).text
        assert until(lambda: server.metrics.ended["abort"] == 1), "the rest is not written"


def test_what_comes_after_the_last_call_counts_nowhere() -> None:
    with serving(scripted(CALL + "the cat" * 40)) as server:
        found: Counter[tuple[int, int]] = Counter()
        for _ in range(5):
            answer = server.post(CHAT, CALLED).json()
            found[answer["usage"]["completion_tokens"], len(answer["choices"][0]["logprobs"]["content"])] += 1
    ((written, scored),) = found
    assert written == scored <= len(TOKENIZER.encode(CALL))


def test_prompts_of_which_one_too_many_is_refused_leave_none_behind() -> None:
    engine = slow_engine(pause=0.01, batch=2)
    with serving(engine, max_waiting=1) as server:
        long = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}
        first = threading.Thread(target=server.post, args=(COMPLETE, long))
        first.start()
        assert until(lambda: server.worker.stats.running == 1)
        refused = server.post(COMPLETE, {**long, "prompt": ["b", "c", "d"]})
        assert refused.status_code == 429
        assert until(lambda: server.metrics.ended["abort"] == 2), "the two that were taken end too"
        first.join()
        assert server.metrics.ended["length"] == 1


def test_a_value_at_a_bound_counts_under_it() -> None:
    histogram = Histogram("a", "b", (1.0, 2.0))
    histogram.observe(1.0)
    assert 'a_bucket{le="1"} 1' in histogram.lines()


def test_a_server_of_this_machine_is_reached_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens
    with serving() as server:
        assert Client(server.url).models() == ["tiny", "alias"]
