import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from internlm import cli, storage
from internlm.errors import ConfigError, DataError, StorageError
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import SPECIAL_TOKENS, report, train_bpe, train_to_folder


def test_special_tokens_come_first_then_the_bytes(small):
    assert [small.special(name) for name in SPECIAL_TOKENS] == list(range(7))
    assert (small.bos_id, small.eos_id, small.pad_id) == (0, 1, 2)
    assert {small.token_bytes(id_) for id_ in range(7, 263)} == {bytes([byte]) for byte in range(256)}
    assert all(len(small.token_bytes(id_)) > 1 for id_ in range(263, 700))
    assert small.vocab_size == 700


def test_the_same_text_gives_the_same_file_in_every_process(small):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from conftest import own_sources; "
        "from internlm.text.training import train_bpe; print(train_bpe(own_sources(), 700).fingerprint)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == small.fingerprint


def test_a_line_end_and_the_indentation_after_it_become_one_token(small):
    pieces = [small.token_bytes(id_) for id_ in small.encode("x):\n        return")]
    assert b":\n        " in pieces


def test_numbers_are_cut_after_three_digits():
    made = train_bpe(["1234567 " * 100], 300)
    assert [made.token_bytes(id_) for id_ in made.encode("1234567")] == [b"123", b"456", b"7"]


def test_no_token_of_a_typed_special_name_is_learned():
    made = train_bpe(["<|end|> " * 500], 300)
    assert made.special_ids.isdisjoint(made.encode("<|end|>"))
    assert made.decode(made.encode("a<|end|>b")) == "a<|end|>b"


def test_a_corpus_too_small_for_the_vocabulary_is_reported(caplog):
    with caplog.at_level(logging.WARNING, logger="internlm"):
        made = train_bpe(["ab ab"], 1000)
    assert made.vocab_size < 1000
    assert f"the vocabulary has {made.vocab_size}" in caplog.text


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="263 or more"):
        train_bpe(["a"], 262)
    assert train_bpe(["a"], 263).vocab_size == 263


def test_a_vocabulary_too_large_for_memory_is_refused():
    with pytest.raises(ConfigError, match="is too large"):
        train_bpe(["a"], 10**10)


@pytest.mark.parametrize("names", [["<a>", "<a>"], ["x"], ["  "]])
def test_special_tokens_that_cannot_be_told_from_text_are_refused(names):
    with pytest.raises(ConfigError, match="special_tokens"):
        train_bpe(["a"], 300, names)


@pytest.mark.parametrize("texts", [[], [""]])
def test_an_empty_corpus_is_refused(texts):
    with pytest.raises(DataError, match="no text"):
        train_bpe(texts, 300)


def test_unpaired_surrogates_do_not_stop_the_training():
    assert train_bpe(["a\ud800b" * 10], 300).vocab_size > 263


def test_the_folder_is_complete_and_is_replaced_only_when_asked(sources, tmp_path):
    made = train_to_folder(sources, tmp_path / "t", 300)
    meta = storage.read_manifest(tmp_path / "t", "tokenizer")
    assert meta == {"vocab_size": 300, "fingerprint": made.fingerprint}
    assert Tokenizer.load(tmp_path / "t") == made
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == SPECIAL_TOKENS[:3]
    with pytest.raises(StorageError, match="exists already"):
        train_to_folder(sources, tmp_path / "t", 300)
    assert train_to_folder(sources, tmp_path / "t", 310, replace=True).vocab_size == 310


def test_the_report_counts_bytes_and_tokens(small):
    texts = ["今天", "return x"]
    ids = [small.encode(text) for text in texts]
    facts = report(small, texts)
    assert facts["documents"] == 2
    assert facts["bytes"] == 6 + 8
    assert facts["tokens"] == len(ids[0]) + len(ids[1])
    assert facts["bytes_per_token"] == pytest.approx(14 / facts["tokens"])
    assert facts["vocabulary_used_ratio"] == pytest.approx(len({*ids[0], *ids[1]}) / 700)
    assert report(small, [])["bytes_per_token"] == 0


def test_the_command_line_trains_and_inspects(sources, tmp_path, capsys):
    pytest.importorskip("internlm.data.formats")
    source = tmp_path / "a.txt"
    source.write_text("\n".join(sources), encoding="utf-8")
    rows = tmp_path / "b.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in sources), encoding="utf-8")
    out = str(tmp_path / "t")
    assert cli.main(["tokenizer", "train", str(source), "--out", out, "--vocab-size", "400"]) == 0
    assert "400 ids" in capsys.readouterr().out
    again = ["tokenizer", "train", str(rows), "--out", out, "--vocab-size", "410", "--text-key", "body"]
    assert cli.main(again) == 1
    assert cli.main([*again, "--force"]) == 0
    assert Tokenizer.load(out).vocab_size == 410


def test_the_command_line_leaves_bad_records_out_when_asked(sources, tmp_path, capsys):
    rows = tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in sources) + '{"te', encoding="utf-8")
    words = ["tokenizer", "train", str(rows), "--out", str(tmp_path / "t"), "--vocab-size", "400"]
    assert cli.main(words) == 1
    assert f"a.jsonl:{len(sources) + 1}: the JSON is cut short" in capsys.readouterr().err
    assert cli.main([*words, "--on-error", "skip"]) == 0
    assert "1 bad records left out" in capsys.readouterr().err


def test_the_command_line_shows_a_tokenizer_and_a_text(small, tmp_path, capsys):
    small.save(tmp_path)
    assert cli.main(["tokenizer", "inspect", str(tmp_path), "--text", "return <|end|>"]) == 0
    shown = capsys.readouterr().out
    assert "700 ids" in shown
    assert "6 <|end|>" in shown
    assert small.fingerprint in shown
    assert f"{small.encode('return')[0]:>8}  72 65 74 75 72 6e" in shown
    assert "the round trip is exact" in shown
    assert cli.main(["tokenizer", "inspect", str(tmp_path / "none")]) == 1
