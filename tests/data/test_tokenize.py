"""Files → samples → shards."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from internlm.data import formats
from internlm.data.formats import Conversation, Document, Piece, cut_lines, read_documents, read_piece, read_samples
from internlm.data.shards import Shards
from internlm.data.tokenize import Options, tokenize
from internlm.errors import DataError, StorageError
from internlm.text.chat import Message, render
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "the quick brown fox", "naïve café 東京 🎉", "a", "x = [1, 2, 3]\n" * 40]
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


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
        ("a.jsonl", '{"body": "x", "id": 1}\n', r"a\.jsonl:1: has no key 'text'; allowed: body, id\. .*--text-key"),
        ("a.jsonl", '["x"]\n', r"a\.jsonl:1: a record is a JSON object, not list"),
        ("a.jsonl", '{"messages": []}\n', r"a\.jsonl:1: 'messages' is not a list of at least one"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1, message 0: a message is an object with"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [1]}]}\n', r"message 0: 'content' is list"),
        ("a.json", '{"text": "x"}', r"a\.json: a \.json file holds a list"),
        ("a.json", '[{"text": "x"}, ', r"a\.json: the JSON is cut short"),
    ],
)
def test_damaged_input_names_file_line_and_next_step(tmp_path: Path, name: str, content: str, match: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        list(read_samples(path))


def test_other_encodings_name_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8: .* at byte 3"):
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
        pieces = cut_lines(path, target)
        texts = [s.text.split()[0] for p in pieces for s in read_piece(p, None, "text") if isinstance(s, Document)]
        assert texts == [str(i) for i in range(300)]
        lines = path.read_bytes().split(b"\n")
        for piece in pieces:
            assert path.read_bytes()[piece.start :].startswith(lines[piece.first_line - 1])


def documents_of(path: Path, tokenizer: Tokenizer) -> list[str]:
    shards = Shards.open(path)
    return [tokenizer.decode(shards.document(i)[0].tolist()) for i in range(shards.num_documents)]


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"text": f"{i}: {TEXTS[i % 5]}"} for i in range(400)])


def test_documents_have_one_bos_and_one_eos_and_come_back(
    corpus: Path, tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    meta = tokenize([corpus], tmp_path / "out", Options(str(tokenizer_path)), workers=1)
    shards = Shards.open(tmp_path / "out")
    assert shards.num_documents == 400
    assert shards.num_bytes == sum(len(json.loads(line)["text"].encode()) for line in corpus.open())
    assert meta["fingerprint"] == Tokenizer.load(tmp_path / "out" / "tokenizer").fingerprint
    for i in range(400):
        ids = shards.document(i)[0].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1
        assert tokenizer.decode(ids[1:-1]) == f"{i}: {TEXTS[i % 5]}"


def test_the_result_does_not_depend_on_the_number_of_workers(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    for workers in (1, 3):
        tokenize([corpus], tmp_path / f"w{workers}", Options(str(tokenizer_path)), workers=workers, unit_bytes=5000)
    assert content(tmp_path / "w1") == content(tmp_path / "w3")


def test_conversations_carry_the_templates_mask(tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "talk.jsonl", [TALK])
    tokenize([path], tmp_path / "out", Options(str(tokenizer_path), template="internlm"), workers=1)
    ids, mask = Shards.open(tmp_path / "out").document(0)
    messages = (Message("user", "hi"), Message("assistant", "hello"))
    wanted = render(messages, get_template("internlm"), tokenizer)
    assert mask is not None
    assert (ids.tolist(), mask.astype(bool).tolist()) == wanted
    with pytest.raises(DataError, match=r"holds conversations.*--template"):
        tokenize([path], tmp_path / "none", Options(str(tokenizer_path)), workers=1)


def test_a_killed_run_goes_on_with_what_was_complete(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    options = Options(str(tokenizer_path))
    tokenize([corpus], tmp_path / "whole", options, workers=1, unit_bytes=3000)
    code = f"""
        import os, signal
        from internlm.data import tokenize as t
        made = t._tokenise_unit
        def dying(job):
            if job[1] == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return made(job)
        t._tokenise_unit = dying
        t.tokenize([{str(corpus)!r}], {str(tmp_path / "out")!r}, t.Options({str(tokenizer_path)!r}), workers=1,
                   unit_bytes=3000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.unfinished").glob("*.tokens")}
    assert len(kept) == 4
    (tmp_path / "out.unfinished" / "00004.tokens").write_bytes(b"half")  # a unit without its card
    tokenize([corpus], tmp_path / "out", options, workers=1, unit_bytes=3000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    for name, stamp in kept.items():  # the complete units were moved, not made again
        assert (tmp_path / "out" / name).stat().st_mtime_ns == stamp
    assert not (tmp_path / "out.unfinished").exists()


def test_changed_options_do_not_reuse_old_units(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "x"}, {"txt": "y"}])
    with pytest.raises(DataError, match="has no key 'text'"):
        tokenize([corpus, bad], tmp_path / "out", Options(str(tokenizer_path)), workers=1, unit_bytes=3000)
    assert not (tmp_path / "out").exists()
    time.sleep(0.01)
    corpus.write_text(corpus.read_text().replace("quick", "QUICK"))
    write_jsonl(bad, [{"text": "x"}])
    tokenize([corpus, bad], tmp_path / "out", Options(str(tokenizer_path)), workers=1, unit_bytes=3000)
    texts = documents_of(tmp_path / "out", Tokenizer.load(tokenizer_path))
    assert any("QUICK" in text for text in texts)
    assert not any("quick" in text for text in texts)


def test_an_error_in_a_worker_ends_the_run_with_its_place(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n' * 500 + '{"text": "ha')
    with pytest.raises(DataError, match=r"a\.jsonl:501: the JSON is cut short"):
        tokenize([path], tmp_path / "out", Options(str(tokenizer_path)), workers=2, unit_bytes=2000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: folder / "gone.txt", "no such file or folder"),
        (lambda folder: (folder / "empty").mkdir() or folder / "empty", "holds no text or JSON files"),
        (lambda folder: write_jsonl(folder / "none.jsonl", []), "the input holds no documents"),
    ],
)
def test_missing_and_empty_input_is_explained(make: Any, match: str, tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        tokenize([make(tmp_path)], tmp_path / "out", Options(str(tokenizer_path)), workers=1)
    assert not (tmp_path / "out").exists()


def test_existing_shards_are_kept_unless_replacing_is_asked_for(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    options = Options(str(tokenizer_path))
    tokenize([corpus], tmp_path / "out", options, workers=1)
    before = content(tmp_path / "out")
    with pytest.raises(StorageError, match="exists already"):
        tokenize([corpus], tmp_path / "out", options, workers=1)
    assert content(tmp_path / "out") == before
    tokenize([corpus], tmp_path / "out", options, workers=1, replace=True)
    assert content(tmp_path / "out") == before


def test_a_full_disk_loses_nothing_that_was_written(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the system refuses the write in the same place."""
    options = Options(str(tokenizer_path))
    tokenize([corpus], tmp_path / "old", options, workers=1)
    before = content(tmp_path / "old")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    command = ["-m", "internlm", "data", "tokenize", str(corpus), "--tokenizer", str(tokenizer_path)]
    command += ["--out", str(tmp_path / "old"), "--workers", "1", "--force"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert "failed while writing" in done.stderr
    assert "Traceback" not in done.stderr
    assert content(tmp_path / "old") == before


def test_text_files_are_documents_and_the_lines_are_kept(
    tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "in" / f"{i}.py").write_text(text)
    tokenize([tmp_path / "in"], tmp_path / "out", Options(str(tokenizer_path)), workers=1)
    assert documents_of(tmp_path / "out", tokenizer) == [f"<|bos|>{text}<|eos|>" for text in TEXTS]


def test_a_new_format_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.RECORDS, "upper", lambda record, key, where: Document(record["x"].upper()))
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, "upper"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": "abc"}])
    assert list(read_samples(path, "upper")) == [Document("ABC")]
    with pytest.raises(DataError, match="no such format"):
        list(read_piece(Piece(str(path)), "nonsense", "text"))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "internlm", *words], capture_output=True, text=True, env=environment)


def test_the_command_line_tokenises_inspects_and_exports(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run("data", "tokenize", str(corpus), "--tokenizer", str(tokenizer_path), "--out", out, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "400 documents" in done.stdout
    shown = run("data", "inspect", out, "--document", "1")
    assert "documents    400" in shown.stdout
    assert "⟦<|bos|>1: the quick brown fox<|eos|>⟧" in shown.stdout
    assert run("data", "inspect", out, "--document", "400").returncode == 1
    back = str(tmp_path / "back.jsonl")
    assert run("data", "export", out, "--out", back).returncode == 0
    assert Path(back).read_text() == "".join(
        json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in corpus.open()
    )
