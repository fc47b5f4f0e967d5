"""Files → samples: what each container and kind of record gives, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from internlm.data import formats
from internlm.data.formats import (
    Conversation,
    Document,
    Piece,
    cut,
    find_files,
    read_documents,
    read_piece,
    read_samples,
)
from internlm.data.tokenize import Options, tokenize
from internlm.errors import DataError
from internlm.text.chat import Message
from tests.data.conftest import TALK, write_jsonl


def test_every_container_gives_its_samples(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    lines = write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}, TALK])
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as file:
        file.write(lines.read_bytes())
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines.read_bytes()))
    (tmp_path / "e.json").write_text(json.dumps([{"text": "four"}]))
    (tmp_path / "ignored.bin").write_bytes(b"\0\1")
    talk = Conversation((Message("user", "hi"), Message("assistant", "hello")))
    three = Document("three")
    assert list(read_samples(tmp_path)) == [
        Document("one\n\ntwo", str(tmp_path / "a.txt")), three, talk, three, talk, three, talk, Document("four"),
    ]  # fmt: skip
    assert [d.text for d in read_documents(lines)] == ["three", "hi", "hello"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": "cut in ha', r"a\.jsonl:2: the JSON is cut short.*--on-error skip"),
        ("a.jsonl", '{"text": "ok"}\n\n{oops}\n', r"a\.jsonl:3: is not JSON: .* at column 2"),
        ("a.jsonl", '{"text": 3}\n', r"a\.jsonl:1: 'text' is int, not a string"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', r"a\.jsonl:1: has no key 'text'; its keys: body, id\. .*--text-key"),
        ("a.jsonl", '["x"]\n', r"a\.jsonl:1: a record is a JSON object, not list\. A file that is one list is named"),
        ("a.jsonl", '{"messages": []}\n', r"a\.jsonl:1: 'messages' is empty"),
        ("a.jsonl", '{"messages": {}}\n', r"a\.jsonl:1: 'messages' is dict, not a list"),
        (
            "a.jsonl",
            '{"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            r"a\.jsonl:1: message 1: no such role \(got 'human'\); allowed: system, user, assistant, tool",
        ),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: message 1: a message is an object with"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [1]}]}\n', r"message 1: 'content' is list"),
        ("a.jsonl", '{"text": "x"}}\n', r"a\.jsonl:1: is not JSON: Extra data at column 14"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: is JSON that cannot be read: maximum recursion depth"),
        ("a.jsonl", '{"text": "x", "n": ' + "1" * 5000 + "}", r"a\.jsonl:1: is JSON that cannot be read: Exceeds"),
        ("a.json", '{"text": "x"}', r"a\.json: a \.json file holds a list"),
        ("a.json", '[{"text": "x"}, ', r"a\.json: the JSON is cut short.* Mend the file, or pass --on-error skip"),
        ("a.json", '\n{"text": "x"}\n{"text": "y"}\n', r"a\.json: holds one JSON object a line\. Name .* \.jsonl\.$"),
        ("a.json", '{"text": "x"}\n{"te', r"a\.json: holds one JSON object a line"),
    ],
)
def test_damaged_input_names_file_line_and_next_step(tmp_path: Path, name: str, content: str, match: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        list(read_samples(path))


def test_other_encodings_name_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8: .* at byte 3\. Write it in UTF-8, such as with `iconv"):
        list(read_samples(tmp_path / "a.txt"))


def test_skipping_bad_records_is_asked_for_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"te\n{"text": 2}\n{"text": "three"}\n')
    with caplog.at_level("WARNING"):
        assert [s.text for s in read_samples(path, on_error="skip") if isinstance(s, Document)] == ["one", "three"]
    assert "2 bad records left out" in caplog.text


def test_pieces_of_a_file_hold_every_line_once_and_know_their_line_numbers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " + "x" * (i % 37)} for i in range(300)])
    for target in (1, 50, 500, 10_000_000):
        pieces = cut(path, None, target)
        texts = [s.text.split()[0] for p in pieces for s in read_piece(p) if isinstance(s, Document)]
        assert texts == [str(i) for i in range(300)]
        lines = path.read_bytes().split(b"\n")
        for piece in pieces:
            assert path.read_bytes()[piece.start :].startswith(lines[piece.first_line - 1])


def test_a_new_format_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.RECORDS, "upper", lambda record, key, where: Document(record["x"].upper()))
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, "upper"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": "abc"}])
    assert list(read_samples(path, "upper")) == [Document("ABC")]
    with pytest.raises(DataError, match="no such format"):
        list(read_piece(Piece(str(path)), "nonsense"))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\r\n{"text": "three"}\r\n')
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf[{"text": "four"}]')
    assert [document.text for document in read_documents(tmp_path)] == ["one\r\n", "two", "three", "four"]


def test_endings_in_capitals_are_known(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "A.JSONL", [{"text": "x"}])
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress((tmp_path / "A.JSONL").read_bytes()))
    assert list(read_samples(tmp_path)) == [Document("x")] * 2


def test_damaged_packed_files_are_named(tmp_path: Path, tokenizer_path: Path) -> None:
    lines = "".join(f'{{"text": "{i * 7919}"}}\n' for i in range(9000)).encode()
    whole = gzip.compress(lines)
    for name, content in (("cut", whole[:-20]), ("garbled", whole[:900] + b"\xff" * 900), ("none", b"no gzip")):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.jsonl\.gz: is damaged"):
            list(read_samples(path, on_error="skip"))
        with pytest.raises(DataError, match=rf"{name}\.jsonl\.gz: is damaged"):
            tokenize([path], tmp_path / "out", Options(str(tokenizer_path)), workers=1)


def test_zstandard_files_are_read_to_their_end_and_refused_when_they_are_cut_short(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"{i * 7919}\n" for i in range(60_000))
    frames = [zstandard.compress(part.encode()) for part in (text[:100_000], "", text[100_000:])]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(skippable + b"".join(frames))
    assert [d.text for d in read_documents(path)] == [text]
    for content in (b"".join(frames)[:-1], frames[0][:-30_000], frames[0] + b"\x28\xb5"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.txt\.zst: is damaged"):
            list(read_documents(path))
    path.write_bytes(b"no zstandard")
    with pytest.raises(DataError, match=r"a\.txt\.zst: is damaged"):
        list(read_documents(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        list(read_piece(Piece(str(tmp_path / "gone.txt"))))


def test_a_given_format_is_followed_whatever_the_ending(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.txt", [{"text": "x"}, {"text": "y"}])
    assert list(read_samples(path, "document")) == [Document("x"), Document("y")]
    path.write_text("plain")
    with pytest.raises(DataError, match=r"a\.txt:1: is not JSON"):
        list(read_samples(path, "messages"))


def test_files_given_twice_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert find_files([tmp_path / "b.txt", tmp_path]) == [tmp_path / "b.txt", tmp_path / "a.txt"]
    assert "1 files were given more than once" in caplog.text


def test_files_left_out_of_a_folder_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.txt", "b.parquet", "c.parquet"):
        (tmp_path / name).write_text(name)
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]
    assert "2 files of other kinds are left out, such as" in caplog.text


def test_folders_behind_links_are_read_once_and_links_in_circles_end(tmp_path: Path) -> None:
    for file in ("in/sub/b.txt", "out/c.txt"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(file)
    (tmp_path / "in" / "a").symlink_to(tmp_path / "in" / "sub")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(tmp_path / "in")
    assert find_files([tmp_path / "in"]) == [tmp_path / "in" / "other" / "c.txt", tmp_path / "in" / "sub" / "b.txt"]


def test_links_to_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]
    assert f"1 files of other kinds are left out, such as {tmp_path / 'b'}" in caplog.text
    for target in ("gone.txt", "c.txt"):
        (tmp_path / "c.txt").symlink_to(tmp_path / target)
        with pytest.raises(DataError, match=r"c\.txt: is a link to nothing\. Put its file there"):
            find_files([tmp_path])
        (tmp_path / "c.txt").unlink()


def test_a_packed_file_without_a_byte_is_damaged(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.txt.zst", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{name}: is damaged: the file is empty\. Copy or download it again"):
            list(read_samples(tmp_path / name, on_error="skip"))


def test_a_file_of_lines_without_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list(read_samples(write_jsonl(tmp_path / "a.jsonl", []))) == []
    assert "a.jsonl: is empty" in caplog.text
