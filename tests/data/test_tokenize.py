"""Samples → shards."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from internlm import disk, storage
from internlm.cli import main
from internlm.data import tokenize as module
from internlm.data.shards import Shards
from internlm.data.tokenize import Options, tokenize
from internlm.errors import DataError, StorageError
from internlm.text.chat import Message, render
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import SPECIAL_TOKENS, train_bpe
from tests.data.conftest import TALK, TEXTS, Make, write_jsonl
from tests.processes import CONTEXT, forked

SHA256 = disk.sha256


def test_shards_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS] + [TALK] + [{"text": "after"}])
    train_bpe(TEXTS, 300).save(tmp_path / "tokenizer")
    read: list[str] = []
    monkeypatch.setattr(disk, "sha256", lambda path: read.append(Path(path).name) or SHA256(path))
    options = Options(str(tmp_path / "tokenizer"), template="internlm")
    tokenize([source], tmp_path / "out", options, workers=1)
    assert not [name for name in read if name.startswith("0000")]
    monkeypatch.undo()
    storage.verify(tmp_path / "out")
    assert (tmp_path / "out" / "00000.mask").read_bytes()[:9] == b"\1" * 9, "all documents before the conversation"


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


def tokenize_and_die(corpus: Path, out: Path, options: Options) -> None:
    make = module._tokenize_unit

    def dying(work: Any, index: int, *rest: Any) -> Any:
        if index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(work, index, *rest)

    module._tokenize_unit = dying
    tokenize([corpus], out, options, workers=1, unit_bytes=3000)


def test_a_killed_run_goes_on_with_what_was_complete(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    options = Options(str(tokenizer_path))
    tokenize([corpus], tmp_path / "whole", options, workers=1, unit_bytes=3000)
    killed = CONTEXT.Process(target=tokenize_and_die, args=(corpus, tmp_path / "out", options))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.unfinished").glob("*.tokens")}
    assert len(kept) == 4
    (tmp_path / "out.unfinished" / "00004.tokens").write_bytes(b"half")  # a unit without its card
    tokenize([corpus], tmp_path / "out", options, workers=1, unit_bytes=3000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    for name, stamp in kept.items():  # the complete units were moved, not made again
        assert (tmp_path / "out" / name).stat().st_mtime_ns == stamp
    assert not (tmp_path / "out.unfinished").exists()


def test_changed_input_is_not_taken_from_old_units(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
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


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # Python ignores the signal: the write fails


def test_a_full_disk_loses_nothing_that_was_written(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the system refuses the write in the same place."""
    options = Options(str(tokenizer_path))
    tokenize([corpus], tmp_path / "old", options, workers=1)
    before = content(tmp_path / "old")

    command = ["data", "tokenize", str(corpus), "--tokenizer", str(tokenizer_path)]
    command += ["--out", str(tmp_path / "old"), "--workers", "1", "--force"]
    done = forked(*command, hook=limit_files)
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


def test_the_command_line_tokenizes_inspects_and_exports(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    made = ["data", "tokenize", str(corpus), "--tokenizer", str(tokenizer_path), "--out", out]
    done = forked(*made, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "400 documents" in done.stdout
    shown = forked("data", "inspect", out, "--document", "1")
    assert "documents    400" in shown.stdout
    assert "⟦<|bos|>1: the quick brown fox<|eos|>⟧" in shown.stdout
    assert forked("data", "inspect", out, "--document", "400").returncode == 1
    wrong = forked(*made, "--workers", "-3")
    assert (wrong.returncode, "-3 is not 1 or more" in wrong.stderr) == (2, True)
    back = str(tmp_path / "deeper" / "back.jsonl")
    assert forked("data", "export", out, "--out", back).returncode == 0
    assert Path(back).read_text() == "".join(
        json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in corpus.open()
    )


def test_a_file_read_as_text_is_one_document_however_long(tokenizer_path: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}] * 900)
    meta = tokenize([path], tmp_path / "out", Options(str(tokenizer_path), format="text"), workers=1, unit_bytes=5000)
    assert sum(shard["documents"] for shard in meta["shards"]) == 1


def test_a_conversation_that_cannot_be_rendered_is_named_or_skipped(
    tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = {"messages": TALK["messages"][:1]}
    path = write_jsonl(tmp_path / "a.jsonl", [TALK, half, TALK])
    options = Options(str(tokenizer_path), template="internlm")
    with pytest.raises(DataError, match=r"a\.jsonl:2: message 1: a conversation to train on ends with"):
        tokenize([path], tmp_path / "out", options, workers=1)
    write_jsonl(path, [TALK, half, {"messages": 3}, TALK])
    tokenize([path], tmp_path / "out", dataclasses.replace(options, on_error="skip"), workers=1)
    assert Shards.open(tmp_path / "out").num_documents == 2
    assert "a.jsonl: 2 bad records left out" in caplog.text


def test_a_template_without_a_conversation_is_told_and_not_recorded(
    tokenizer_path: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenize([corpus], tmp_path / "out", Options(str(tokenizer_path), template="internlm"), workers=1)
    assert "template internlm has no effect" in caplog.text
    assert Shards.open(tmp_path / "out").template is None


def fail_at_the_end(inputs: list[Path], out: Path, options: Options, unit_bytes: int = 1) -> None:
    """Leave finished units behind: those of the inputs."""
    bad = out.parent / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        tokenize([*inputs, bad], out, options, workers=1, unit_bytes=unit_bytes)
    assert list(out.with_name(out.name + ".unfinished").glob("*.json"))


@pytest.mark.parametrize(("name", "keep_bytes"), [("00000.mask", None), ("00000.tokens", 4), ("00000.offsets", 8)])
def test_a_unit_whose_files_are_gone_or_short_is_made_again(
    name: str, keep_bytes: int | None, tokenizer_path: Path, tmp_path: Path
) -> None:
    talk = write_jsonl(tmp_path / "talk.jsonl", [TALK] * 3)
    options = Options(str(tokenizer_path), template="internlm")
    tokenize([talk], tmp_path / "whole", options, workers=1, unit_bytes=1)
    fail_at_the_end([talk], tmp_path / "out", options)
    file = tmp_path / "out.unfinished" / name
    if keep_bytes is None:
        file.unlink()
    else:
        os.truncate(file, keep_bytes)
    tokenize([talk], tmp_path / "out", options, workers=1, unit_bytes=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_nothing_of_an_older_run_gets_into_new_units(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    talk = write_jsonl(tmp_path / "talk.jsonl", [TALK] * 3)
    fail_at_the_end([talk], tmp_path / "out", Options(str(tokenizer_path), template="internlm"))
    unfinished = tmp_path / "out.unfinished"
    assert (unfinished / "00000.mask").exists()
    (unfinished / "00000.json.partial-1").write_text("of a killed writer")
    tokenize([corpus], tmp_path / "out", Options(str(tokenizer_path)), workers=1)
    tokenize([corpus], tmp_path / "fresh", Options(str(tokenizer_path)), workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    assert Shards.open(tmp_path / "out").document(0)[1] is None


@pytest.mark.parametrize(
    ("before", "after"), [({"text_key": "a"}, {"text_key": "b"}), ({"template": "internlm"}, {"template": "chatml"})]
)
def test_changed_options_do_not_reuse_old_units(before: Any, after: Any, tmp_path: Path) -> None:
    names = [*SPECIAL_TOKENS, "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>"]
    train_bpe(TEXTS, 310, names).save(tmp_path / "t")
    records = [{"a": "one", "b": "two"}] if "text_key" in before else [TALK]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    fail_at_the_end([path], tmp_path / "out", Options(str(tmp_path / "t"), **before))
    for name in ("out", "fresh"):
        tokenize([path], tmp_path / name, Options(str(tmp_path / "t"), **after), workers=1, unit_bytes=1)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_other_roles_of_the_same_vocabulary_do_not_reuse_old_units(
    tokenizer_path: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tokenizer_path, tmp_path / "t")
    fail_at_the_end([corpus], tmp_path / "out", Options(str(folder)), 5000)
    roles = folder / "tokenizer_config.json"
    roles.write_text(json.dumps(json.loads(roles.read_text()) | {"eos_token": "<|end|>"}))
    tokenize([corpus], tmp_path / "out", Options(str(folder)), workers=1, unit_bytes=5000)
    tokenizer = Tokenizer.load(folder)
    assert Shards.open(tmp_path / "out").document(0)[0][-1] == tokenizer.special("<|end|>") == tokenizer.eos_id


def test_the_output_may_lie_inside_the_input(tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "out.raw").mkdir(parents=True)
    for kept in (folder / "a.txt", folder / "out.raw" / "b.txt"):
        kept.write_text("kept")
    options = Options(str(tokenizer_path))
    fail_at_the_end([folder], folder / "out", options)
    (folder / "bad.jsonl").unlink()
    for _ in range(2):
        tokenize([folder], folder / "out", options, workers=1, replace=True)
        assert Shards.open(folder / "out").num_documents == 2


def test_a_killed_worker_is_explained(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from internlm.data import tokenize as t
        if __name__ == "__mp_main__":
            t._work_on = lambda job: os.kill(os.getpid(), signal.SIGKILL)
        if __name__ == "__main__":
            from internlm.errors import DataError
            try:
                t.tokenize([{str(corpus)!r}], {str(tmp_path / "out")!r}, t.Options({str(tokenizer_path)!r}), workers=2,
                           unit_bytes=9000)
            except DataError as error:
                print(error)
    """
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert "a worker process was killed" in done.stdout, done.stderr
    assert "fewer --workers" in done.stdout


def test_documents_without_a_token_are_exported_and_shown(
    make_shards: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Shards of other makers may have them."""
    x = tokenizer.encode("x")
    shards, back = make_shards([x, []]), tmp_path / "back.jsonl"
    tokenizer.save(shards.tokenizer_path)
    out = str(shards.path)
    assert main(["data", "export", out, "--out", str(back)]) == 0
    assert back.read_text() == '{"text": "x"}\n{"text": ""}\n'
    assert main(["data", "inspect", out, "--document", "1"]) == 0
    assert [p.name for p in tmp_path.glob("back*")] == ["back.jsonl"]


def test_documents_without_text_are_left_out_and_counted_once_however_often_a_run_is_given(
    tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("a.py", ""), ("b.py", "x"), ("c.py", " \n"), ("d.py", "y")):
        (tmp_path / "in" / name).write_text(text)
    write_jsonl(tmp_path / "in" / "e.jsonl", [{"text": ""}, {"text": "z"}])
    options = Options(str(tokenizer_path))
    fail_at_the_end([tmp_path / "in"], tmp_path / "out", options)
    assert "without text" not in caplog.text
    units = [tokenize([tmp_path / "in"], tmp_path / name, options, workers=1, unit_bytes=1) for name in ("out", "new")]
    assert units[0] == units[1]
    assert caplog.text.count("warning: 3 documents without text left out") == 2, "once by each run"
    texts = documents_of(tmp_path / "out", Tokenizer.load(tokenizer_path))
    assert texts == ["<|bos|>x<|eos|>", "<|bos|>y<|eos|>", "<|bos|>z<|eos|>"]
    with pytest.raises(DataError, match="the input holds no documents"):
        tokenize([tmp_path / "in" / "a.py"], tmp_path / "none", options, workers=1)


def test_two_runs_do_not_write_the_same_output(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    code = "import sys; from internlm import disk; disk.hold(sys.argv[1]); print(); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "out.unfinished")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StorageError, match="another process works in this folder"):
            tokenize([corpus], tmp_path / "out", Options(str(tokenizer_path)), workers=1)
    tokenize([corpus], tmp_path / "out", Options(str(tokenizer_path)), workers=1)
