"""The lines that are typed in `internlm chat`, and the file that remembers them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm.serve.chat.lines import InputHistory, state_file


def test_texts_of_several_lines_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "a" / "history"
    history = InputHistory(file)
    for text in ("one", "two\n 你 \u2028", "two\n 你 \u2028", "one"):
        history.add(text)
    assert InputHistory(file).texts == ["one", "two\n 你 \u2028", "one"]
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_two_sessions_write_into_one_file(tmp_path: Path) -> None:
    first, second = InputHistory(tmp_path / "history"), InputHistory(tmp_path / "history")
    first.add("one")
    second.add("two")
    first.add("three")
    assert InputHistory(tmp_path / "history").texts == ["one", "two", "three"]


def test_a_long_file_is_cut_to_its_newest_texts(tmp_path: Path) -> None:
    file = tmp_path / "history"
    file.write_text("".join(f'"{number}"\n' for number in range(2001)))
    file.chmod(0o600)
    assert InputHistory(file).texts == [str(number) for number in range(1001, 2001)]
    assert file.read_text().splitlines() == [f'"{number}"' for number in range(1001, 2001)]
    assert file.stat().st_mode & 0o777 == 0o600


def test_lines_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "history"
    file.write_bytes(b'"one"\n{"x"\n\xff\n3\n[]\n' + b"[" * 100000 + b'\n"two"\n"cut')
    assert InputHistory(file).texts == ["one", "two"]


def test_a_file_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "history", tmp_path, None):
        history = InputHistory(path)
        history.add("one")
        history.add("two")
        assert history.texts == ["one", "two"]
        assert history.path is None
    assert (tmp_path / "file").read_text() == "x"


def test_the_file_lies_in_the_state_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    home = Path("/home/someone/.local/state/internlm/chat_history.jsonl")
    for value, expected in (
        ("/var/state", Path("/var/state/internlm/chat_history.jsonl")),
        ("state", home),
        ("", home),
    ):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert state_file() == expected


def test_what_is_written_is_one_json_text_a_line(tmp_path: Path) -> None:
    InputHistory(tmp_path / "history").add('a\n"b"')
    assert json.loads((tmp_path / "history").read_text()) == 'a\n"b"'


def test_a_file_that_others_could_read_is_the_user_s_alone_from_then_on(tmp_path: Path) -> None:
    file = tmp_path / "history"
    file.write_text('"old"\n')
    file.chmod(0o644)
    InputHistory(file).add("new")
    assert file.stat().st_mode & 0o777 == 0o600
