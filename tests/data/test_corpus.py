"""The embedded corpus of the running Python."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from internlm.data import corpus
from internlm.data.formats import Document
from internlm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corpus") / "c"
    return folder, corpus.build(folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_it_is_megabytes_of_real_text_near_the_wanted_share(built: tuple[Path, dict[str, Any]]) -> None:
    facts = built[1]
    assert facts["bytes"]["train"] > 5_000_000
    share = facts["bytes"]["validation"] / sum(facts["bytes"].values())
    assert 0.04 < share <= 0.05
    sources = {line["source"] for line in lines(built[0] / "train.jsonl")}
    assert {"docstrings:math", "textwrap.py"} & sources
    assert any(source.startswith("topic:") for source in sources)
    assert not any("/test/" in source or source.startswith("test/") for source in sources)


def test_train_and_validation_share_no_module(built: tuple[Path, dict[str, Any]]) -> None:
    modules = [
        {corpus.module_of(Document("", line["source"])) for line in lines(built[0] / f"{side}.jsonl")}
        for side in ("train", "validation")
    ]
    assert not modules[0] & modules[1]
    assert modules[1] == set(built[1]["held_out"])


def test_the_same_seed_gives_the_same_files_and_another_another_split(
    built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = list(corpus.library())
    written = [line["source"] for side in ("train", "validation") for line in lines(built[0] / f"{side}.jsonl")]
    assert sorted(document.source for document in documents) == sorted(written), "it is read the same"
    assert corpus.choose_modules(documents, 0.05, 1) == set(built[1]["held_out"])
    monkeypatch.setattr(corpus, "library", lambda: iter(documents[::8]))
    facts = [corpus.build(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("again", 1), ("other", 2))]
    assert len(list((tmp_path / "one").glob("*.jsonl"))) == 6
    for path in (tmp_path / "one").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert facts[0] == facts[1]
    assert facts[0]["held_out"] != facts[2]["held_out"]


def test_at_least_five_hundred_names_are_asked_about_and_each_has_one_module(
    built: tuple[Path, dict[str, Any]],
) -> None:
    facts = lines(built[0] / "facts.jsonl")
    assert 500 <= len(facts) <= corpus.MAX_NAMES
    assert len({fact["name"] for fact in facts}) == len(facts)
    assert max([fact["module"] for fact in facts].count(fact["module"]) for fact in facts) < len(facts) / 50
    assert not {fact["module"].split(".")[0] for fact in facts} & set(built[1]["held_out"])


def test_answers_are_true(built: tuple[Path, dict[str, Any]]) -> None:
    """Import the modules that are safe to import and look."""
    safe = {"textwrap", "collections", "fractions", "statistics", "calendar", "shlex", "string", "csv", "bisect"}
    checked = 0
    for fact in lines(built[0] / "facts.jsonl"):
        if fact["module"] in safe:
            found = getattr(importlib.import_module(fact["module"]), fact["name"])
            assert found.__module__.lstrip("_") == fact["module"]
            checked += 1
    assert checked >= 5


def test_questions_come_in_three_kinds_as_conversations(built: tuple[Path, dict[str, Any]]) -> None:
    facts = {fact["name"]: fact["module"] for fact in lines(built[0] / "facts.jsonl")}
    asked = lines(built[0] / "questions-module.jsonl")
    assert len(asked) == len(facts)
    for line in asked:
        question, answer = (message["content"] for message in line["messages"])
        assert facts[question.removeprefix("In which module is ").removesuffix("?")] == answer
    for kind, start in (("purpose", "What does "), ("signature", "What is the signature of ")):
        found = lines(built[0] / f"questions-{kind}.jsonl")
        assert len(found) > 200
        assert all(line["messages"][0]["content"].startswith(start) for line in found)
        assert all(0 < len(line["messages"][1]["content"]) <= 120 for line in found)


def test_definitions_are_read_without_importing() -> None:
    text = '''
__all__ = ["shout", "Box"]
raise SystemExit("never run")
def shout(text: str, *, times: int = 2) -> str:
    """Say it loud. And again."""
def hidden(): pass
class Box:
    """A box."""
    def __init__(self, size=3): pass
'''
    document = Document(text, "loud.py")
    found = corpus.unambiguous([document], set())
    assert [(d.name, d.summary, d.signature) for d in found] == [
        ("shout", "Say it loud.", "shout(text, *, times=2)"),
        ("Box", "A box.", "Box(size=3)"),
    ]
    twice = [document, Document("def shout(): pass", "other.py")]
    assert [d.name for d in corpus.unambiguous(twice, set())] == ["Box"]
    assert corpus.unambiguous([document], {"loud"}) == []


def test_a_python_without_sources_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="has 0 library sources"):
        corpus.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compression_is_bits_per_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "ab" * 5000}) + "\n")
    found = corpus.compression(path)
    assert set(found) == {"gzip -9", "xz -9e"}
    assert all(0 < bits < 0.2 for bits in found.values())


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 2, float("nan"), 1e-9])
def test_a_share_that_leaves_a_side_empty_is_refused(
    ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "library", lambda: iter([Document(f"x = {i}\n", f"m{i}.py") for i in range(100)]))
    with pytest.raises(ConfigError, match="validation ratio"):
        corpus.build(tmp_path / "out", validation_ratio=ratio)
    assert not (tmp_path / "out").exists()


def test_broken_links_of_a_distribution_are_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"m{i}.py").write_text("x = 1\n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    sources = [document.source for document in corpus.library() if document.source.endswith(".py")]
    assert len(sources) == 100
