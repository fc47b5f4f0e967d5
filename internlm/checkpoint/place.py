"""A folder on a disk or in a store, and how a checkpoint comes to lie there complete or not at all.

    folder = at("s3://bucket/run")                 # a path, or file://…, gives a pathlib.Path
    draft = draft_of(folder / "step-00000100", "a1b2c3d4.1")
    sha256 = draft.write("tensors/x", [buffer])    # each rank
    draft.commit(beside, meta, files)              # one rank, when all have written

                  on a disk                                in a store
    draft         a folder beside                          the folder itself; files of ranks under a mark of the draft
    visible by    a rename                                 manifest.json, written last, once a listing shows every size
    over another  it is moved aside                        its manifest goes first

Limits: two runs must not write into one folder. On a disk `disk.hold` sees to that, in a store nobody.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm import disk, storage
from internlm.checkpoint.remote import Remote, Unreachable, check_known
from internlm.errors import StorageError
from internlm.hashed_file import HashedFile

KIND = "checkpoint"
"""What the manifests here say."""
_PROBE = b"written to see whether checkpoints can be\n"
_DRAFT, _ASIDE = re.compile(r"step-\d+\.partial-[0-9a-f]+\.\d+"), re.compile(r"step-\d+\.replaced-\d+")
"""Names that a save gives: people name folders like this too, and theirs are not cleared."""

Place = Path | Remote
"""Both have `name`, `parent`, `/` and `read_text`."""
Facts = dict[str, dict[str, Any]]
"""`bytes` and `sha256` of files by name."""


def at(where: str | Place) -> Place:
    """Return the place that a path or an fsspec URL names; `file://` is a path.

    Raises:
        ConfigError: nothing here reaches such a URL, or it holds a password.
    """
    if not isinstance(where, str):
        return where
    protocol, mark, rest = where.partition("://")
    if not mark or protocol == "file":
        return Path(rest if mark else where)
    check_known(where)
    return Remote(where.rstrip("/"))


def names(folder: Place) -> list[str]:
    """Return what lies directly in a folder; nothing where there is no such folder."""
    if isinstance(folder, Remote):
        return folder.names()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def sizes(folder: Place) -> dict[str, int]:
    """Return the bytes of every file below a folder, by its name from there."""
    if isinstance(folder, Remote):
        return folder.sizes()
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def read_into(file: Place, start: int, buffer: memoryview) -> None:
    """Fill a buffer with the bytes of a file from `start` on.

    Raises:
        StorageError: the file is missing or too short.
    """
    try:
        if isinstance(file, Remote):
            done = file.read_into(start, buffer)
        else:
            with open(file, "rb") as opened:
                opened.seek(start)
                done = opened.readinto(buffer)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or 'no such file'}", where=file) from error
    if done < len(buffer):
        missing = len(buffer) - done
        raise StorageError(f"ends {missing} bytes too early", where=file, do="Copy the checkpoint again.")


def read_manifest(folder: Place) -> dict[str, Any]:
    """Return the `meta` of a complete checkpoint.

    Raises:
        Unreachable: the store does not say.
        StorageError: it is not complete, or is something else.
    """
    return storage.read_manifest(folder, KIND) if isinstance(folder, Path) else _remote_manifest(folder)["meta"]


def _remote_manifest(folder: Remote) -> dict[str, Any]:
    manifest = storage.load_manifest((folder / storage.MANIFEST).read_text, folder)
    storage.check_manifest(manifest, KIND, folder.sizes().get, folder)
    return manifest


def is_complete(folder: Place) -> bool:
    """Return whether a folder is a complete checkpoint.

    Raises:
        Unreachable: the store does not say, or who asks may not read it. It must not be taken for an empty one: the run
            would go back, or start over.
    """
    try:
        read_manifest(folder)
    except Unreachable:
        raise
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):
            raise Unreachable("may not be read", where=folder, do="Permission is missing.") from error
        return False
    return True


def verify(folder: Place, first: int = 0, every: int = 1, *, of: Callable[[str], bool] | None = None) -> None:
    """Read the files of a complete checkpoint and compare their SHA-256, as `storage.verify` does.

    Raises:
        StorageError: naming the first file that differs.
    """
    if isinstance(folder, Path):
        storage.verify(folder, first, every, of=of)
        return
    files = _remote_manifest(folder)["files"]
    for name in list(filter(of, files))[first::every]:
        try:
            found = (folder / name).sha256(files[name]["bytes"])
        except FileNotFoundError:
            found = ""
        if found != files[name]["sha256"]:
            what = f"file {name} is damaged (its SHA-256 differs)"
            raise StorageError(what, where=folder, do="Write or copy it again.")


def is_unfinished(folder: Place) -> bool:
    """Return whether a folder is what an interrupted upload leaves; on a disk that has another name."""
    return isinstance(folder, Remote) and storage.MANIFEST not in folder.names()


def remove(folder: Place) -> None:
    """Remove a checkpoint. A removal that is cut short leaves something nobody reads."""
    if isinstance(folder, Remote):
        folder.remove()
        return
    (folder / storage.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def fetched(folder: Place) -> Path:
    """Return a folder on a disk with the files of this one; a copy lives as long as this process."""
    if isinstance(folder, Path):
        return folder
    copy = Path(_copies().name, str(len(os.listdir(_copies().name))))
    for name, size in folder.sizes().items():
        content = bytearray(size)
        read_into(folder / name, 0, memoryview(content))
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    return copy


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="internlm-")


def clear(folder: Place) -> list[str]:
    """Remove what interrupted saves left in a folder of checkpoints, and return its names; one run works in a folder.

    Besides is found out whether the folder can be written: better now than at the first checkpoint.

    Raises:
        StorageError: it cannot; or the store does not answer.
    """
    name = "probe"  # always, so that one which a kill left is written over, and goes
    if isinstance(folder, Path):
        with disk.explained(f"writing a first file into {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(_PROBE)
            (folder / name).unlink()
        return _clear(folder)
    (folder / name).write([_PROBE])
    (folder / name).unlink()
    left = [name for name in folder.names() if name.startswith("step-") and is_unfinished(folder / name)]
    for name in left:
        (folder / name).remove()
    return left


def _clear(folder: Path) -> list[str]:
    """Do so on a disk. A checkpoint that was moved aside comes back."""
    left = [name for name in names(folder) if _DRAFT.fullmatch(name)]
    for name in left:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in filter(_ASIDE.fullmatch, names(folder)):
        aside, target = folder / name, folder / name.rpartition(".replaced-")[0]
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
    return left


class Draft(Protocol):
    """A checkpoint that ranks write together, and that nobody reads before it is committed."""

    suffix: str
    """Of the names of sub-folders that ranks write into."""
    look_every_s: float
    """How often to look what the others say."""

    def write(self, name: str, buffers: Sequence[bytes | memoryview]) -> str:
        """Write a file; return its SHA-256."""

    def say(self, rank: int, word: str) -> None:
        """Leave a short text for the rank that commits."""

    def said(self) -> dict[int, str]:
        """Return the texts that were left since the last call, by rank."""

    def beside(self) -> contextlib.AbstractContextManager[Path]:
        """Give a folder on a disk, for the small files of the rank that commits."""

    def commit(self, beside: Path, meta: dict[str, Any], files: Facts) -> None:
        """Make the checkpoint visible: with the files of the ranks, whose facts these are, and those beside them."""

    def discard(self) -> None:
        """Remove what was written, as far as that is possible; called instead of `commit`, or when it failed."""


def draft_of(target: Place, mark: str) -> Draft:
    """Return the draft of a checkpoint; `mark`: the same on all ranks, and never used before."""
    return _Upload(target, mark) if isinstance(target, Remote) else _Folder(target, mark)


def _word(rank: int) -> str:
    return f"word-{rank:05d}.json"


class _Folder:
    suffix = ""
    look_every_s = 0.05

    def __init__(self, target: Path, mark: str) -> None:
        self.target, self.path = target, target.with_name(f"{target.name}.partial-{mark}")

    def write(self, name: str, buffers: Sequence[bytes | memoryview]) -> str:
        path = self.path / name
        with disk.explained(f"writing {self.target}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            room = sum(map(len, buffers)) + (1 << 20)
            disk.require_space(path, room, f"checkpoint {self.target.name}")
            with HashedFile(path) as file:
                for buffer in buffers:
                    file.write(buffer)
                return file.sha256()

    def say(self, rank: int, word: str) -> None:
        disk.write_text(self.path / _word(rank), word)

    def said(self) -> dict[int, str]:
        found = {}
        for name in names(self.path):  # not a glob, which takes a folder that cannot be read for an empty one
            if name.startswith("word-") and name.endswith(".json"):
                found[int(name[5:-5])] = (self.path / name).read_text(encoding="utf-8")
                (self.path / name).unlink()
        return found

    @contextlib.contextmanager
    def beside(self) -> Iterator[Path]:
        with disk.explained(f"writing {self.target}"):
            yield self.path

    def commit(self, beside: Path, meta: dict[str, Any], files: Facts) -> None:
        with disk.explained(f"writing {self.target}"):
            if self.target.is_dir() and not storage.is_complete(self.target, KIND):
                shutil.rmtree(self.target)  # damaged: the run went back to an earlier one and is here again
            hashes = {name: facts["sha256"] for name, facts in files.items()}
            storage.finish(storage.Writing(beside, meta, hashes), KIND)
            storage.put(beside, self.target)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class _Upload:
    """A draft in a store. What belongs to it alone has the mark in its name: another one may lie there already."""

    look_every_s = 0.5

    def __init__(self, target: Remote, mark: str) -> None:
        self.target, self.suffix = target, f"-{mark}"
        self._words = target / f"words-{mark}"
        self._heard: set[str] = set()

    def write(self, name: str, buffers: Sequence[bytes | memoryview]) -> str:
        return (self.target / name).write(buffers)

    def say(self, rank: int, word: str) -> None:
        (self._words / _word(rank)).write([word.encode()])

    def said(self) -> dict[int, str]:
        found = {}
        for name in set(self._words.names()) - self._heard:
            found[int(name[5:-5])] = (self._words / name).read_text()
            self._heard.add(name)
        return found

    @contextlib.contextmanager
    def beside(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="internlm-") as folder:
            yield Path(folder)

    def commit(self, beside: Path, meta: dict[str, Any], files: Facts) -> None:
        (self.target / storage.MANIFEST).unlink()
        for name in sizes(beside):
            content = (beside / name).read_bytes()
            files = files | {name: {"bytes": len(content), "sha256": (self.target / name).write([content])}}
        there = self.target.sizes()
        text = storage.manifest_text(KIND, meta, files)
        storage.check_manifest(json.loads(text), KIND, there.get, self.target)
        (self.target / storage.MANIFEST).write([text.encode()])
        for folder in {name.partition("/")[0] for name in there} - {name.partition("/")[0] for name in files}:
            with contextlib.suppress(Unreachable):  # nobody reads it; it costs its room until the checkpoint goes
                (self.target / folder).remove()

    def discard(self) -> None:
        with contextlib.suppress(Unreachable):  # the next run does it
            for name in self.target.names():
                if name.endswith(self.suffix):
                    (self.target / name).remove(tries=1)
