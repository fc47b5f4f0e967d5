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
