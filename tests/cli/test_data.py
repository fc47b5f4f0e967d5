"""What `internlm data` writes, and does not write over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm.cli import main
from internlm.text.training import train_bpe


def test_an_export_replaces_a_file_only_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_bpe(["some text"], 300).save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("some text")
    shards, out = str(tmp_path / "shards"), tmp_path / "notes.jsonl"
    made = ["data", "tokenize", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer"), "--out", shards]
    assert main([*made, "--workers", "1"]) == 0
    out.write_text("years of work")
    assert main(["data", "export", shards, "--out", str(out)]) == 1
    assert f"{out}: exists already. Choose another name, or pass --force" in capsys.readouterr().err
    assert out.read_text() == "years of work"
    assert main(["data", "export", shards, "--out", str(out), "--force"]) == 0
    assert json.loads(out.read_text()) == {"text": "some text"}


def test_an_export_of_documents_beside_conversations_gives_the_documents_as_they_were(tmp_path: Path) -> None:
    train_bpe(["some text"], 300).save(tmp_path / "tokenizer")
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    source, out = tmp_path / "a.jsonl", tmp_path / "back.jsonl"
    source.write_text(json.dumps({"text": "some text"}) + "\n" + json.dumps(talk) + "\n")
    made = ["data", "tokenize", str(source), "--tokenizer", str(tmp_path / "tokenizer"), "--template", "internlm"]
    assert main([*made, "--out", str(tmp_path / "shards"), "--workers", "1"]) == 0
    assert main(["data", "export", str(tmp_path / "shards"), "--out", str(out)]) == 0
    assert [json.loads(line)["text"] for line in out.open()] == [
        "some text",
        "<|bos|><|user|>hi<|end|><|assistant|>yo<|end|>",
    ]


def test_a_vocabulary_counts_a_file_that_is_given_twice_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("hello " * 100)
    made = ["tokenizer", "train", str(file), str(tmp_path), str(file), "--vocab-size", "270"]
    assert main([*made, "--out", str(tmp_path / "t")]) == 0
    assert "600 bytes of training text" in capsys.readouterr().out
