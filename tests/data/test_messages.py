"""Conversations with tools: how they are read, and that a model learns what it will hear in serving."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from internlm import log
from internlm.data.formats import Conversation, read_documents, read_samples
from internlm.data.shards import Shards
from internlm.data.tokenize import Options, tokenize
from internlm.errors import DataError
from internlm.serve.api.schema import ChatRequest
from internlm.serve.api.tooling import CallReader, tools_of, turns_of
from internlm.text.chat import Message, ToolCall, render_prompt
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.tools import Tool
from internlm.text.training import train_bpe

Record = dict[str, Any]
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
NOW = {"type": "function", "function": {"name": "now", "description": None, "parameters": None}}


def call(id_: str, name: str, arguments: object) -> Record:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def says(role: str, content: str | None, **keys: object) -> Record:
    return {"role": role, "content": content, **keys}


TALK: Record = {
    "messages": [
        says("developer", "Be exact."),
        says("user", "2 + 3, and then?"),
        says("assistant", "One moment.", tool_calls=[call("a", "add", '{"a":2, "b": "三"}')]),
        says("tool", "5 <tool_call>", tool_call_id="a"),
        says("assistant", None, reasoning_content="Now the time.", tool_calls=[call("b", "now", {"zone": "上海"})]),
        says("tool", '{"hour": 7}', tool_call_id="b"),
        says("assistant", "It is 5, at 7."),
        says("user", "Thanks."),
        says("assistant", "Not at all."),
    ],
    "tools": [ADD, NOW],
}
ONE = {**TALK, "parallel_tool_calls": False}
SEVERAL: Record = {
    "messages": [
        says("user", "Both?"),
        says("assistant", "", tool_calls=[call("a", "add", {}), call("b", "now", '{"n": [1, {"x": "}"}]}')]),
        says("tool", "noon", tool_call_id="b"),
        says("tool", "0", tool_call_id="a"),
        says("assistant", "0, noon."),
    ],
    "tools": [ADD, NOW],
}


def write(path: Path, *records: Record) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    names = ["<s>", "</s>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    names += ["<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names += ["<|action_start|>", "<|action_end|>", "<|plugin|>"]
    return train_bpe(["What is the sum? One and one are two."] * 3, 300, names)


def test_tools_calls_and_results_are_read(tmp_path: Path) -> None:
    (sample,) = read_samples(write(tmp_path / "a.jsonl", ONE))
    assert isinstance(sample, Conversation)
    assert sample.messages[2:6] == (
        Message("assistant", "One moment.", calls=(ToolCall("a", "add", '{"a":2, "b": "三"}'),)),
        Message("tool", "5 <tool_call>", call_id="a"),
        Message("assistant", "", calls=(ToolCall("b", "now", '{"zone": "上海"}'),), thought="Now the time."),
        Message("tool", '{"hour": 7}', call_id="b"),
    )
    assert sample.messages[0] == Message("system", "Be exact.")
    assert sample.tools == (Tool("add", "Adds.", {"type": "object"}), Tool("now"))
    assert not sample.parallel
    (bare,) = read_samples(write(tmp_path / "b.jsonl", {**TALK, "tools": [ADD["function"], NOW["function"]]}))
    assert isinstance(bare, Conversation)
    assert (bare.tools, bare.parallel) == (sample.tools, True)


def test_a_content_of_several_texts_is_one(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}]
    messages = [{"role": "user", "content": parts}, says("assistant", "5")]
    (sample,) = read_samples(write(tmp_path / "a.jsonl", {"messages": messages}))
    assert isinstance(sample, Conversation)
    assert sample.messages[0] == Message("user", "2 + 3?")
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(DataError, match=r"message 1: 'content' is list"):
        list(read_samples(write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": [image]}]})))


def test_all_that_is_said_counts_and_trains_a_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ONE)
    (sample,) = read_samples(path)
    texts = [document.text for document in read_documents(path)]
    assert "" not in texts
    assert {"One moment.", "Now the time.", '{"zone": "上海"}', "5 <tool_call>"} < set(texts)
    assert any('"Adds."' in text for text in texts)
    assert sample.num_bytes == sum(len(text.encode()) for text in texts)


def with_turn(turn: object) -> Record:
    return {"messages": [says("user", "x"), turn, says("assistant", "x")], "tools": [ADD]}


def calling(**changes: object) -> Record:
    return with_turn(says("assistant", "", tool_calls=[{**call("a", "add", "{}"), **changes}]))


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (with_turn(says("assistant", None)), r"message 2: 'content' is NoneType, not a string"),
        (with_turn(says("user", None, tool_calls=[call("a", "add", "{}")])), r"message 2: 'content' is NoneType"),
        (with_turn(says("assistant", "", tool_calls={"a": 1})), r"message 2: 'tool_calls' is dict, not a list"),
        (calling(type="retrieval"), r"message 2, call 1: a tool or call is an object .* Only functions"),
        (calling(function=[]), r"message 2, call 1: a tool or call is an object"),
        (calling(function={"name": "add"}), r"message 2, call 1: .*'arguments' that are a JSON object.* write \"{}\""),
        (calling(function={"arguments": "{}"}), r"message 2, call 1: a call has a 'name'"),
        (calling(function={"name": "add", "arguments": [1]}), r"call 1: a call has a 'name', and 'arguments'"),
        (calling(function={"name": "sub", "arguments": "{}"}), r"message 2: calls a tool .*'sub'.*allowed: add\. Add"),
        (calling(id=7), r"message 2, call 1: the 'id' of a call is int"),
        (with_turn(says("tool", "x", tool_call_id=7)), r"message 2: 'tool_call_id' is int"),
        (with_turn(says("assistant", "", function_call={"name": "add"})), r"message 2: .*older form.*'tool_calls'"),
        (with_turn(says("function", "5", name="add")), r"message 2: .*older form"),
        ({**TALK, "functions": [ADD["function"]]}, r"functions is of OpenAI's older form"),
        ({**TALK, "tools": json.dumps([ADD])}, r"'tools' is str, not a list.*JSON list"),
        ({**TALK, "tools": ["add"]}, r"tool 1: a tool or call is an object"),
        ({**TALK, "tools": [ADD, {"type": "function", "function": {}}]}, r"tool 2: 'name' of a tool is NoneType"),
        ({**TALK, "tools": [{"name": "a b"}]}, r"tool 1: .*a tool's name is 1 to 64"),
        ({**TALK, "tools": [{"name": "add", "parameters": "{}"}]}, r"'parameters' of a tool is str, not an object"),
        ({**TALK, "tools": [ADD, NOW, ADD]}, r"two tools have one name"),
        ({**TALK, "tools": []}, r"message 3: calls a tool that 'tools' does not name"),
        (with_turn(says("assistant", "y", weight=0.5)), r"message 2: 'weight' is neither 0 nor 1 \(got '0\.5'\)"),
        (with_turn(says("assistant", "y", weight=False)), r"message 2: 'weight' is neither 0 nor 1"),
        ({"messages": [says("user", "x"), says("assistant", "y", weight=0)]}, r"no answer is trained on.* Drop the"),
        ({**TALK, "parallel_tool_calls": "no"}, r"'parallel_tool_calls' is neither true nor false"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(record: Record, match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", SEVERAL, record)
    with pytest.raises(DataError, match=r"a\.jsonl:2.*" + match):
        list(read_samples(path))


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([says("user", "x"), says("tool", "5"), says("assistant", "y")], "message 2: a tool's result without a call"),
        (SEVERAL["messages"][:3] + SEVERAL["messages"][4:], "message 2: each call needs one result"),
        (
            calling(function={"name": "add", "arguments": "{'a': 1}"})["messages"][:2],
            "message 2: the arguments of add are no JSON",
        ),
    ],
)
def test_calls_and_results_that_do_not_belong_together_are_told_with_their_line(
    messages: list[Record], match: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    path = write(tmp_path / "a.jsonl", TALK, {"messages": messages, "tools": [ADD, NOW]})
    with pytest.raises(DataError, match=r"a\.jsonl:2: " + match):
        tokenize([path], tmp_path / "out", Options(str(tmp_path), template="internlm"), workers=1)


def test_keys_without_effect_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_warned", set())
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    record = {"messages": [says("user", "x", name="Ann"), says("assistant", "y", name="Bo")], "tools": [strict]}
    list(read_samples(write(tmp_path / "a.jsonl", record, record)))
    assert [warned.getMessage() for warned in caplog.records] == [
        "warning: 'name' of a message of role user has no effect",
        "warning: 'name' of a message of role assistant has no effect",
        "warning: 'strict' of a tool has no effect",
    ]


@pytest.mark.parametrize("template", ["internlm-v1.0", "internlm-v1.1", "internlm2", "internlm", "chatml", "llama3"])
def test_an_answer_of_weight_0_is_context(template: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    options = Options(str(tmp_path / "t"), template=template)
    turns = [dict(turn) for turn in TALK["messages"]]
    for number, weight in ((2, 0), (4, 1), (6, 0)):
        turns[number]["weight"] = weight
    path = write(tmp_path / "a.jsonl", TALK, {**TALK, "messages": turns})
    tokenize([path], tmp_path / "out", options, workers=1)
    (ids, mask), (weighed_ids, weighed) = (Shards.open(tmp_path / "out").document(number) for number in (0, 1))
    assert mask is not None
    assert weighed is not None
    assert ids.tolist() == weighed_ids.tolist()
    spans = re.findall(r"0+|1+", "".join(map(str, mask)))
    answers = [number for number, span in enumerate(spans) if "1" in span]
    assert len(answers) == 4
    for number in (answers[0], answers[2]):
        spans[number] = "0" * len(spans[number])
    assert "".join(map(str, weighed)) == "".join(spans)


def test_weights_that_a_template_cannot_tell_apart_are_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    turns = [*SEVERAL["messages"], says("user", "And?"), says("assistant", "No.", weight=0)]
    path = write(tmp_path / "a.jsonl", {**SEVERAL, "messages": turns})
    tokenize([path], tmp_path / "one", Options(str(tmp_path / "t"), template="internlm"), workers=1)
    with pytest.raises(DataError, match=r"a\.jsonl:1: has an answer of weight 0, and several calls .* one by one"):
        tokenize([path], tmp_path / "two", Options(str(tmp_path / "t"), template="internlm-v1.1"), workers=1)


def test_thoughts_have_no_effect_but_in_react_and_that_is_told(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_warned", set())
    tokenizer.save(tmp_path)
    path = write(tmp_path / "a.jsonl", TALK)
    with caplog.at_level(logging.WARNING):
        tokenize([path], tmp_path / "one", Options(str(tmp_path), template="internlm-v1.1"), workers=1)
        assert "thoughts" not in caplog.text
        tokenize([path], tmp_path / "two", Options(str(tmp_path), template="internlm"), workers=1)
    assert "the tool format hermes does not write thoughts" in caplog.text


@pytest.mark.parametrize("record", [TALK, ONE, SEVERAL], ids=["one by one", "one at most", "several"])
@pytest.mark.parametrize("template", ["internlm-v1.0", "internlm-v1.1", "internlm2", "internlm", "chatml", "llama3"])
def test_what_is_learned_is_the_prompt_and_the_answer_of_serving(
    record: Record, template: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    is_react = template.startswith("internlm-v")
    if is_react and record is SEVERAL:
        record = {**record, "messages": [*record["messages"][:1], *one_by_one(record["messages"][1:])]}
    tokenizer.save(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", record)
    tokenize([path], tmp_path / "out", Options(str(tmp_path / "tokenizer"), template=template), workers=1)
    tokens, trained = Shards.open(tmp_path / "out").document(0)
    assert trained is not None
    ids, mask = [int(id_) for id_ in tokens], [bool(flag) for flag in trained]
    learned = [False] * len(ids)
    for number, message in enumerate(record["messages"]):
        if message["role"] != "assistant":
            continue
        asked = {**record, "messages": [as_sent(message) for message in record["messages"][:number]]}
        body = ChatRequest.model_validate({"model": "m", **asked})
        use = tools_of(body, template)
        turns = use.format.render_history(turns_of(body.messages), use.tools, use.parallel)
        prompt = render_prompt(turns, get_template(template), tokenizer)
        assert ids[: len(prompt)] == prompt
        end = mask.index(False, len(prompt)) if False in mask[len(prompt) :] else len(mask)
        learned[len(prompt) : end] = [True] * (end - len(prompt))
        reader = CallReader(use)
        reader.add(tokenizer.decode(ids[len(prompt) : end - 1]), finished=True)
        read = reader.message()
        said, thought = message["content"] or "", message.get("reasoning_content", "")
        if is_react and message.get("tool_calls"):
            said, thought = "", said or thought
        assert (read["content"] or "") == said
        assert read.get("reasoning_content", "") == (thought if is_react else "")
        made = [(call["function"]["name"], call["function"]["arguments"]) for call in read.get("tool_calls", [])]
        assert made == [(call["function"]["name"], text(call)) for call in message.get("tool_calls", [])]
    assert mask == learned


def text(call: Record) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def as_sent(message: Record) -> Record:
    """Return a message as a client sends it: it has the arguments as the text that it was given."""
    if "tool_calls" not in message:
        return message
    calls = [call(made["id"], made["function"]["name"], text(made)) for made in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def one_by_one(messages: list[Record]) -> list[Record]:
    """Return the calls of the first message as messages of their own, each with its result."""
    first, *rest = messages
    results = {message["tool_call_id"]: message for message in rest if message["role"] == "tool"}
    turns = [turn for made in first["tool_calls"] for turn in ({**first, "tool_calls": [made]}, results[made["id"]])]
    return [*turns, *(message for message in rest if message["role"] != "tool")]
