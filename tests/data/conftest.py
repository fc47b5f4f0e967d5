"""A small tokenizer, and shards made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from internlm import storage
from internlm.data import shards
from internlm.data.shards import Shards, ShardWriter
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe

TEXTS = ["def add(a, b):\n    return a + b\n", "the quick brown fox", "naïve café 東京 🎉", "a", "x = [1, 2, 3]\n" * 40]
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    folder.mkdir()
    train_bpe(TEXTS, 300).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


Make = Callable[..., Shards]


@pytest.fixture
def make_shards(tmp_path: Path, tokenizer: Tokenizer) -> Make:
    """Return a function that writes documents (id lists, with or without masks) as shards."""

    def make(
        documents: Sequence[list[int]],
        masks: Sequence[list[bool]] | None = None,
        name: str = "s",
        per_shard: int = 3,
        fingerprint: str = "f",
    ) -> Shards:
        with storage.writing(tmp_path / name, shards.KIND) as out:
            facts = []
            for first in range(0, len(documents), per_shard):
                writer = ShardWriter(out.path, f"{len(facts):05d}", 1000)
                for i in range(first, min(first + per_shard, len(documents))):
                    writer.add(documents[i], None if masks is None else masks[i], len(documents[i]))
                facts.append(writer.close())
            out.meta.update(
                shards.meta(facts, vocab_size=1000, fingerprint=fingerprint, bos_id=None, eos_id=None, template=None)
            )
        return Shards.open(tmp_path / name)

    return make
