"""Records of conversations in other forms than OpenAI's: how each is read, and that nothing is misread."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from internlm import log
from internlm.cli import data, main
from internlm.data.formats import FORMATS, Conversation, Document, read_documents, read_samples
from internlm.data.shards import Shards
from internlm.errors import DataError
from internlm.text.chat import Message, render
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer

Record = dict[str, Any]
ASK, SAY = Message("user", "2 + 3?"), Message("assistant", "5")
SYSTEM = Message("system", "Be exact.")
TURNS = [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]
ALPACA = {"instruction": "2 + 3?", "output": "5"}
PLAIN = {"prompt": "2 + 3?", "completion": "5"}
LISTS = {"prompt": [{"role": "user", "content": "2 + 3?"}], "completion": [{"role": "assistant", "content": "5"}]}

TALK = {"messages": [*LISTS["prompt"], *LISTS["completion"]]}


def read(folder: Path, record: Record, **options: Any) -> Any:
    path = folder / "a.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (sample,) = read_samples(path, **options)
    return sample


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": TURNS, "id": "x"}, [ASK, SAY]),
        ({"conversations": TURNS * 2, "system": "Be exact.", "tools": ""}, [SYSTEM, ASK, SAY, ASK, SAY]),
        ({"conversations": [{"from": "system", "value": "Be exact."}, *TURNS]}, [SYSTEM, ASK, SAY]),
        (ALPACA, [ASK, SAY]),
        (ALPACA | {"input": "", "system": None, "history": []}, [ASK, SAY]),
        ({"instruction": "Add.", "input": "2 + 3", "output": "5"}, [Message("user", "Add.\n2 + 3"), SAY]),
        (ALPACA | {"history": [["2 + 3?", "5"]], "system": "Be exact."}, [SYSTEM, ASK, SAY, ASK, SAY]),
        (PLAIN, [ASK, SAY]),
        (PLAIN | {"system": "Be exact."}, [SYSTEM, ASK, SAY]),
        (LISTS, [ASK, SAY]),
    ],
    ids=str,
)  # fmt: skip
def test_each_form_is_read_as_the_same_conversation(record: Record, messages: list[Message], tmp_path: Path) -> None:
    sample = read(tmp_path, record)
    assert isinstance(sample, Conversation)
    assert list(sample.messages) == messages


def test_a_completion_of_messages_may_call_tools(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "add"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    sample = read(tmp_path, LISTS | {"completion": [answer], "tools": [tool]})
    assert [tool.name for tool in sample.tools] == ["add"]
    assert sample.messages[1].calls[0].name == "add"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": []}, "a.jsonl:1: 'conversations' is empty"),
        ({"conversations": [{"role": "user", "content": "a"}]},
         "turn 1: a turn is an object with 'from' and 'value'. A list of"),
        ({"conversations": [TURNS[0], {"from": "function_call", "value": {"name": "f"}}]},
         "turn 2: no such 'from' (got 'function_call'); allowed: human, gpt, system. Calls of tools"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "turn 1: 'from' is list, not a string"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: 'value' is int, not a string"),
        ({"conversations": TURNS, "tools": "[{}]"}, "has 'tools', which would be lost in this form"),
        ({"conversations": TURNS, "images": ["a.png"]}, "has 'images', which would be lost"),
        ({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}, "has 'chosen', which would be lost"),
        (ALPACA | {"input": ["a"]}, "'input' is list, not a string"),
        (ALPACA | {"output": ["good", "bad"]}, "'output' is list, not a string"),
        (ALPACA | {"history": [["a"]]}, "'history' is not a list of pairs"),
        (ALPACA | {"history": [["a", 1]]}, "pair 1 of 'history' is int, not a string"),
        (PLAIN | {"label": False}, "has 'label', which would be lost"),
        (PLAIN | {"history": [["a", "b"]]}, "has 'history', which would be lost"),
        (LISTS | {"label": True}, "has 'label', which would be lost"),
        (LISTS | {"system": "a"}, "has 'system', which would be lost"),
        (TALK | {"label": False}, "a.jsonl:1: has 'label', which would be lost"),
        (TALK | {"kto_tag": True}, "has 'kto_tag', which would be lost"),
        (TALK | {"rejected": "6"}, "has 'rejected', which would be lost"),
        (TALK | {"images": ["a.png"]}, "has 'images', which would be lost"),
        (TALK | {"history": [["a", "b"]]}, "has 'history', which would be lost"),
        (TALK | {"system": "a"}, "has 'system', which would be lost"),
        (LISTS | {"completion": "5"}, "'prompt' is list, not a string"),
        ({"question": "a", "answer": "b"}, "has no key 'text'; its keys: question, answer. Name the key of a document"),
    ],
    ids=str,
)  # fmt: skip
def test_what_would_be_misread_is_an_error(record: Record, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        read(tmp_path, record)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("record", "name"), [(ALPACA, "alpaca"), (PLAIN, "completion"), ({"conversations": TURNS}, "sharegpt")]
)
def test_a_record_that_may_be_a_document_or_a_conversation_is_read_when_it_is_said_which(
    record: Record, name: str, tmp_path: Path
) -> None:
    both = record | {"text": "all of it"}
    with pytest.raises(
        DataError, match=rf"has the keys of document \(text\) and of {name} \(.*--format document or {name}"
    ):
        read(tmp_path, both)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert read(tmp_path, both, format="document") == Document("all of it")
    assert list(read(tmp_path, both, format=name).messages) == [ASK, SAY]
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no key"):
        read(tmp_path, {"text": "x"}, format=name)
    assert [document.text for document in read_documents(tmp_path / "b.jsonl")] == ["all of it"]
    key = next(iter(record))
    with pytest.raises(DataError, match=rf"has the keys of document \({key}\) and of {name} "):
        read(tmp_path, record, text_key=key)


def test_a_record_with_the_keys_of_two_forms_is_an_error_until_it_is_said_which(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"keys of alpaca \(instruction, output\) and of completion .*--format alpaca or"
    ):
        read(tmp_path, ALPACA | {"prompt": "all of it", "completion": "5"})
    assert read(tmp_path, ALPACA | {"messages": [*LISTS["prompt"], *LISTS["completion"]]}).messages == (ASK, SAY)


def test_what_is_trained_on_otherwise_than_elsewhere_or_has_no_effect_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_warned", set())
    with caplog.at_level(logging.WARNING):
        read(tmp_path, {"conversations": [TURNS[0], {**TURNS[1], "mood": "good", "none": None}]})
        read(tmp_path, LISTS | {"prompt": [*LISTS["prompt"], *LISTS["completion"], *LISTS["prompt"]]})
    assert "'mood' of a turn in ShareGPT's form has no effect" in caplog.text
    assert "the assistant's messages of a 'prompt' are trained on as those of its 'completion' are" in caplog.text
    assert "none" not in caplog.text


def test_a_turn_of_weight_0_is_context_in_sharegpts_form_too(tmp_path: Path) -> None:
    worse = {**TURNS[1], "weight": 0}
    sample = read(tmp_path, {"conversations": [TURNS[0], worse, *TURNS], "system": "Be exact."})
    assert (list(sample.messages), sample.context) == ([SYSTEM, ASK, SAY, ASK, SAY], {1})


def test_alpaca_becomes_shards_that_train_the_answer_alone(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ALPACA]))
    words = [
        "data",
        "tokenise",
        str(tmp_path / "a.json"),
        "--tokenizer",
        str(tokenizer_path),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 1
    assert "holds conversations. Name a chat template with --template" in capsys.readouterr().err
    assert main([*words, "--template", "internlm"]) == 0
    assert "here this is written `internlm data tokenize`" in capsys.readouterr().err
    ids, mask = Shards.open(tmp_path / "o").document(0)
    assert mask is not None
    assert (ids.tolist(), mask.tolist()) == render([ASK, SAY], get_template("internlm"), tokenizer)


def test_the_verb_offers_every_format_and_refuses_a_tokenizer_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    for format in FORMATS:
        parser.parse_args(["tokenize", "a", "--tokenizer", "t", "--out", "o", "--format", format])
    assert main(["data", "tokenize", "a.txt", "--tokenizer", "gpt2", "--out", "o"]) == 1
    assert "`hf download gpt2 --local-dir DIR`, then give DIR" in capsys.readouterr().err
