"""Tokens on disk, memory-mapped: a folder of flat files that is complete or absent.

    OUT/00000.tokens      ids of all documents end to end, little-endian, uint16 up to 65,536 ids, else uint32
        00000.offsets     int64 [S + 1], where each document starts; the last is the number of tokens
        00000.mask        uint8 per token, 1 = trained on; only where some token is not
        tokenizer/        the vocabulary the ids belong to
        manifest.json     meta: format, vocabulary, and per shard tokens, documents, bytes of text

Documents are counted through all shards. A folder that takes the name of the one that was opened is not read: a run
would go on with other data, and its checkpoints would say that it was the old.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from internlm import storage
from internlm.errors import DataError

KIND = "shards"
FORMAT = 1
_MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class ShardFacts:
    """What the manifest says of one shard."""

    name: str
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text."""
    trained_tokens: int
    sha256: dict[str, str] = field(default_factory=dict)
    """Of its files by name; the manifest has them itself."""

    def files(self, dtype: np.dtype[Any]) -> dict[str, int]:
        """Return the names of the shard's files and their sizes in bytes."""
        files = {f"{self.name}.tokens": self.tokens * dtype.itemsize, f"{self.name}.offsets": 8 * (self.documents + 1)}
        return files if self.trained_tokens == self.tokens else {**files, f"{self.name}.mask": self.tokens}

    def are_whole(self, folder: Path, dtype: np.dtype[Any]) -> bool:
        """Return whether all files are there in full length."""
        paths = [(folder / name, size) for name, size in self.files(dtype).items()]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Return the narrowest type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes one shard's files, over those of one that did not finish."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype_for(vocab_size)
        (folder / f"{name}.mask").unlink(missing_ok=True)
        self._tokens = _File(folder / f"{name}.tokens")
        self._mask: _File | None = None
        self._offsets = array("q", [0])
        self._trained_tokens = self._bytes = 0

    def add(self, ids: list[int], mask: list[bool] | None, text_bytes: int) -> None:
        """Append one document; the mask says which ids are trained on, None: all."""
        self._tokens.write(np.asarray(ids, dtype=self.dtype).tobytes())
        if self._mask is None and mask is not None and not all(mask):  # all before is trained on
            self._mask = _File(self.folder / f"{self.name}.mask")
            self._mask.write(b"\1" * self._offsets[-1])
        if self._mask is not None:
            self._mask.write(b"\1" * len(ids) if mask is None else bytes(mask))
        self._offsets.append(self._offsets[-1] + len(ids))
        self._trained_tokens += len(ids) if mask is None else sum(mask)
        self._bytes += text_bytes

    def close(self) -> ShardFacts:
        """See the files onto the disk, and say what went in."""
        offsets = _File(self.folder / f"{self.name}.offsets")
        offsets.write(np.asarray(self._offsets, dtype="<i8").tobytes())
        files = [file for file in (self._tokens, offsets, self._mask) if file is not None]
        hashes = {file.path.name: file.close() for file in files}
        tokens, documents = self._offsets[-1], len(self._offsets) - 1
        return ShardFacts(self.name, tokens, documents, self._bytes, self._trained_tokens, hashes)


class _File:
    """A file that is hashed while it is written, as `HashedFile` is, without threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._hash = open(path, "wb"), hashlib.sha256()  # noqa: SIM115  closed by close()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)

    def close(self) -> str:
        """See the file onto the disk, and return its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()


def meta(
    shards: list[ShardFacts], *, vocab_size: int, fingerprint: str, bos_id: int | None, eos_id: int | None,
    template: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the manifest's `meta` of a folder of shards."""
    return {
        "format": FORMAT,
        "dtype": dtype_for(vocab_size).str,
        "vocab_size": vocab_size,
        "fingerprint": fingerprint,
        "bos_id": bos_id,
        "eos_id": eos_id,
        "template": template,
        "shards": [{name: fact for name, fact in asdict(shard).items() if name != "sha256"} for shard in shards],
    }


class Shards:
    """A folder of shards, read through memory maps."""

    def __init__(self, path: Path, facts: dict[str, Any], stamp: tuple[int, int, int] | None) -> None:
        self.path, self.facts, self._stamp = path, facts, stamp
        self.shards = [ShardFacts(**shard) for shard in facts["shards"]]
        self.dtype = np.dtype(facts["dtype"])
        self.vocab_size: int = facts["vocab_size"]
        """Number of ids of the tokenizer."""
        self.fingerprint: str = facts["fingerprint"]
        """Of the tokenizer."""
        self.template: str | None = facts["template"]
        """Chat template the documents were rendered with, if they are conversations."""
        self.tokenizer_path = path / "tokenizer"
        self.num_tokens = sum(shard.tokens for shard in self.shards)
        self.num_documents = sum(shard.documents for shard in self.shards)
        self.num_bytes = sum(shard.bytes for shard in self.shards)
        """UTF-8 bytes of all texts."""
        self._first_document = np.cumsum([0] + [shard.documents for shard in self.shards])
        # A map keeps its file open, and a process may open 1,024: a corpus of more shards is opened as it is needed.
        self._files = lru_cache(_MAX_OPEN_SHARDS)(self._open_files)
        self.digest = self._read_digest()
        """16 hexadecimal digits that stand for all files of the shards."""

    @classmethod
    def open(cls, path: str | Path) -> Shards:
        """Open a folder.

        Raises:
            StorageError: it is missing, unfinished or damaged. DataError: it is of another format, or empty.
        """
        path = Path(path)
        stamp = storage.stamp(path)
        facts = storage.read_manifest(path, KIND)
        if facts.get("format") != FORMAT:
            raise DataError("is of another shard format", where=path, got=facts.get("format"), allowed=[FORMAT])
        shards = cls(path, facts, stamp)
        for shard in shards.shards:
            if not shard.are_whole(path, shards.dtype):
                raise DataError(f"shard {shard.name} has not the files of {shard.tokens} tokens", where=path)
        if not shards.num_tokens:
            raise DataError("holds no tokens", where=path)
        return shards if storage.stamp(path) == stamp else cls.open(path)  # replaced just now

    def _read_digest(self) -> str:
        found = storage.hashes(self.path)
        files = [found.get(name, "") for shard in self.shards for name in shard.files(self.dtype)]
        return hashlib.sha256(" ".join(files).encode()).hexdigest()[:16]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64 [S]."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (ids [n], mask [n] or None) of a document, as views of the files."""
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        start, stop = self._offsets[shard][index - self._first_document[shard] :][:2]
        tokens, mask = self._files(shard)
        return tokens[start:stop], None if mask is None else mask[start:stop]

    @cached_property
    def _offsets(self) -> list[np.ndarray]:
        with self._same():
            return [np.fromfile(self.path / f"{shard.name}.offsets", dtype="<i8") for shard in self.shards]

    def _open_files(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        shard = self.shards[index]
        if not shard.tokens:
            return np.zeros(0, self.dtype), None  # numpy refuses to map an empty file
        with self._same():
            tokens = np.memmap(self.path / f"{shard.name}.tokens", self.dtype, "r")
            is_masked = shard.trained_tokens != shard.tokens
            return tokens, np.memmap(self.path / f"{shard.name}.mask", np.uint8, "r") if is_masked else None

    @contextmanager
    def _same(self) -> Iterator[None]:
        """Check that the files that the block opens are of the folder that was opened once."""
        try:
            yield
            stamp = storage.stamp(self.path)  # afterwards: a folder that is the old one now was so before
            if stamp != self._stamp and self._read_digest() != self.digest:
                raise DataError(
                    "holds other data than when this process opened it",
                    where=self.path,
                    do="Put the old data back, or start another run: this one's checkpoints are of the old.",
                )
            self._stamp = stamp
        except OSError as error:
            raise DataError(
                f"cannot be read any more: {error.strerror or error}",
                where=error.filename or self.path,
                do="Put the data back; the same command goes on from the newest checkpoint.",
            ) from error
