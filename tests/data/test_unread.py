"""Inputs that are not read: tables, pages, what is no text, what lies elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm.data.formats import Document, find_files, read_samples
from internlm.errors import DataError, InternLMError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", "is a table, which is not read. Write it as .jsonl, .* pandas: read_csv"),
        ("a.tsv.gz", r"is a table, which is not read. .* read_csv\(FILE, sep='\\t'\)"),
        ("A.PARQUET", "is a table, which is not read. .* read_parquet"),
        ("a.arrow", "is a table, which is not read. Write it as .jsonl, one row a line.$"),
        ("a.xlsx", "is a table, which is not read"),
        ("a.pdf", "holds pages, which are not read. Save it as plain text"),
        ("a.docx", "holds pages, which are not read"),
    ],
)
def test_tables_and_pages_are_refused_by_name_and_left_out_of_folders_with_a_warning(
    name: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(b"PAR1 all of it ASCII")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match=message):
        list(read_samples(tmp_path / name))
    assert caplog.text == ""
    assert [sample.text for sample in read_samples(tmp_path) if isinstance(sample, Document)] == ["text"]
    assert f"1 files of other kinds are left out, such as {tmp_path / name}" in caplog.text


def test_what_is_no_text_never_becomes_a_document(tmp_path: Path) -> None:
    for name in ("a.bin", "a.txt"):
        (tmp_path / name).write_bytes(b"ELF\0\1\2")
        with pytest.raises(
            DataError, match=rf"{name}: holds zero bytes, which no text in UTF-8 does\. If it is UTF-16"
        ):
            list(read_samples(tmp_path / name))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tatsu-lab/alpaca", r"`hf download tatsu-lab/alpaca --repo-type dataset --local-dir DIR`, then give DIR"),
        (
            "https://huggingface.co/datasets/a/b",
            r"`hf download a/b --repo-type dataset --local-dir DIR`, then give DIR",
        ),
        ("https://example.com/x.jsonl", r"^https://example.com/x.jsonl: is an address, and nothing is downloaded here"),
    ],
)
def test_what_would_have_to_be_downloaded_is_refused_with_the_way_to_get_it(given: str, message: str) -> None:
    with pytest.raises(InternLMError, match=message):
        find_files([given])
