"""Folders that are complete or absent: what a later step trusts (shards, a checkpoint, an export).

    with writing("runs/a/step-10", kind="checkpoint") as folder:   # runs/a/step-10.partial-<pid>
        (folder.path / "x.bin").write_bytes(...)
    #  fsync every file → manifest.json (sizes, SHA-256) → fsync folder → rename → fsync parent

A crash before the rename leaves a `.partial-*` folder that nobody reads and the next writer of the same name removes.
What took the name meanwhile stays: the writer fails then, and leaves what it wrote complete under `.finished-*`.

Limits: local file systems with atomic rename. POSIX has none over an existing folder, so `replace` moves the old one
aside first; a crash between the two renames leaves it under `.replaced-<pid>`.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.errors import StorageError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_MARK = re.compile(r"[0-9]{1,7}|r[0-9a-f]{16}")
"""What follows there: a process, or what the content depends on. Other such names are people's."""


@dataclass
class Writing:
    """A folder being written: files go under `path`, facts for the readers into `meta`."""

    path: Path
    meta: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of files where it is known from writing; the others are read once more."""


@contextlib.contextmanager
def writing(target: str | Path, kind: str, *, replace: bool = False, resume: str | None = None) -> Iterator[Writing]:
    """Yield a folder that becomes `target` when the block ends well, and vanishes when it does not.

    With `resume`, a block that was cut short (killed, interrupted, disk full) leaves its folder to the next one that
    gives the same text. Files in it must then appear under their names only when complete.

    Args:
        target: its final name.
        kind: what it holds, such as "shards"; `read_manifest` asks for it again.
        replace: whether an existing folder of the same kind may be replaced; other content never is.
        resume: says everything that the content depends on; None: always from the beginning.

    Raises:
        StorageError: the target exists, or does at the end, or the disk is full. Nothing complete was touched then.
    """
    target = Path(os.path.realpath(target))  # `.` has a name then, and a link stays one
    check_free(target, kind, replace=replace)
    mark = str(os.getpid()) if resume is None else "r" + hashlib.sha256(resume.encode()).hexdigest()[:16]
    partial = target.with_name(f"{target.name}.partial-{mark}")
    with disk.explained(f"writing {target}"):
        remove_leftovers(target, kept=partial)
        partial.mkdir(parents=True, exist_ok=resume is not None)
    lock = None if resume is None else _lock(partial, target)
    try:
        with disk.explained(f"writing {target}"):
            folder = Writing(partial)
            yield folder
            finish(folder, kind)
            put_if_free(partial, target, kind, replace=replace)
    except BaseException as error:
        if resume is None or not isinstance(error, KeyboardInterrupt | StorageError):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def check_free(target: str | Path, kind: str, *, replace: bool = False) -> None:
    """Check that `target` may be written.

    Raises:
        StorageError: it exists; with `replace`, is no complete folder of this kind, or holds more than was written.
    """
    target = Path(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_complete(target, kind):
        raise StorageError("exists and was not written by this step", where=target, do="Choose another name.")
    if not replace:
        raise StorageError("exists already", where=target, do="Choose another name, or pass --force to replace it.")
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if others := sorted(files - {MANIFEST, *hashes(target)}):
        what = f"holds files that were added to it, and would be lost: {', '.join(others[:5])}"
        raise StorageError(what, where=target, do="Move them elsewhere, or choose another name.")


def finish(folder: Writing, kind: str) -> None:
    """Bring a written folder to the disk, and its manifest."""
    partial = folder.path
    files = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(partial).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": folder.hashes.get(name) or disk.sha256(path)}
        disk.fsync(path)
    (partial / MANIFEST).write_text(manifest_text(kind, folder.meta, files), encoding="utf-8")
    disk.fsync(partial / MANIFEST)
    for path in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
        disk.fsync(path)


def put_if_free(folder: Path, target: Path, kind: str, *, replace: bool) -> None:
    """Give a folder with a manifest its final name, unless something took that while it was written.

    Raises:
        StorageError: as `check_free`. The folder is kept then, under a name that nothing cleans up.
    """
    try:
        check_free(target, kind, replace=replace)
    except StorageError as error:
        kept = tempfile.mkdtemp(prefix=f"{target.name}.finished-", dir=target.parent)
        os.rename(folder, kept)
        raise StorageError(f"{error} What was written is complete: {kept}") from error
    put(folder, target)


def put(folder: Path, target: Path) -> None:
    """Give a folder with a manifest its final name; what has that name goes."""
    aside = None
    if target.exists():
        aside = target.with_name(f"{target.name}.replaced-{os.getpid()}")
        os.rename(target, aside)
    try:
        os.rename(folder, target)
    except BaseException:
        if aside is not None:
            os.rename(aside, target)
        raise
    disk.fsync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def manifest_text(kind: str, meta: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    """Return the content of a manifest; `files`: `bytes` and `sha256` by name."""
    manifest = {"format": FORMAT_VERSION, "kind": kind, "meta": meta, "files": files}
    manifest["digest"] = _digest(manifest)
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def read_manifest(path: str | Path, kind: str) -> dict[str, Any]:
    """Return the `meta` of a complete folder.

    Raises:
        StorageError: the folder is missing, was not finished, is of another kind or format, or a file of it is gone or
            of another size. Contents are compared only by `verify`.
    """
    path = Path(path)

    def size(name: str) -> int | None:
        file = path / name
        return file.stat().st_size if file.is_file() else None

    return check_manifest(_load_manifest(path), kind, size, path)


def check_manifest(
    manifest: dict[str, Any], kind: str, size_of: Callable[[str], int | None], where: object
) -> dict[str, Any]:
    """Return the `meta` of a manifest that fits its folder; errors as of `read_manifest`.

    `size_of` returns the bytes of a file of the folder; None: there is none.
    """
    if manifest.get("kind") != kind:
        raise StorageError("holds something else", where=where, got=manifest.get("kind"), allowed=[kind])
    if manifest.get("format") != FORMAT_VERSION:
        raise StorageError(
            "was written in another format version", where=where, got=manifest.get("format"), allowed=[FORMAT_VERSION]
        )
    if not _is_well_formed(manifest):
        raise StorageError("its manifest.json says what cannot be", where=where, do="Write or copy it again.")
    for name, facts in manifest["files"].items():
        size = size_of(name)
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, not {facts['bytes']}"
            raise StorageError(f"file {name} {found}", where=where, do="The folder is damaged: write or copy it again.")
    return manifest["meta"]


def verify(path: str | Path, first: int = 0, every: int = 1, *, of: Callable[[str], bool] | None = None) -> None:
    """Read files of a complete folder and compare their SHA-256 with the manifest.

    Only every so manieth, from the `first` on: processes share the work. `of`: whether a file of this name is read.

    Raises:
        StorageError: naming the first file that differs.
    """
    path = Path(path)
    manifest = _load_manifest(path)
    read_manifest(path, manifest.get("kind", ""))
    for name in list(filter(of, manifest["files"]))[first::every]:
        with disk.explained(f"reading {path}"):
            found = disk.sha256(path / name)
        if found != manifest["files"][name]["sha256"]:
            raise StorageError(
                f"file {name} is damaged (its SHA-256 differs)", where=path, do="Write or copy it again."
            )


def hashes(path: str | Path) -> dict[str, str]:
    """Return name → SHA-256 of every file of a complete folder, from its manifest."""
    return {name: facts["sha256"] for name, facts in _load_manifest(Path(path))["files"].items()}


def stamp(path: str | Path) -> tuple[int, int, int] | None:
    """Return what differs when another folder has taken the name of this complete one; None: there is none."""
    try:
        found = os.stat(Path(path) / MANIFEST)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def is_complete(path: str | Path, kind: str) -> bool:
    """Return whether `path` is a complete folder of this kind."""
    try:
        read_manifest(path, kind)
    except StorageError:
        return False
    return True


def remove_leftovers(target: Path, kept: Path | None = None) -> None:
    """Delete what crashed writers of `target` left beside it, but not `kept`."""
    for state in ("partial", "replaced") if target.exists() else ("partial",):
        start = f"{target.name}.{state}-"
        for path in target.parent.glob(f"{glob.escape(start)}*"):
            mark = path.name.removeprefix(start)
            if path != kept and _MARK.fullmatch(mark) and not _is_in_use(path, mark):
                shutil.rmtree(path, ignore_errors=True)


def _lock(partial: Path, target: Path) -> int:
    """Claim a folder that several processes may go on with, until the returned descriptor is closed.

    Raises:
        StorageError: another process works in it.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError("another process writes it right now", where=target, do="Wait for it, or stop it.") from None
    except OSError:
        pass  # a file system without locks: as good as it gets
    return descriptor


def _is_in_use(partial: Path, mark: str) -> bool:
    """Return whether another process writes it right now: who ends last is refused, or replaces."""
    if mark.isdigit():
        return int(mark) != os.getpid() and _is_alive(int(mark))
    try:
        os.close(_lock(partial, partial))
    except (OSError, StorageError) as error:
        return isinstance(error, StorageError)
    return False


def _load_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise StorageError("no such folder", where=path)
    return load_manifest(lambda: (path / MANIFEST).read_text(encoding="utf-8"), path)


def load_manifest(read: Callable[[], str], where: object) -> dict[str, Any]:
    """Return the manifest of a folder from its text.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    try:
        manifest = json.loads(read())
    except (FileNotFoundError, NotADirectoryError):
        what = "has no manifest.json: it was not finished, or is something else"
        raise StorageError(what, where=where, do="Write it again.") from None
    except (OSError, ValueError, RecursionError) as error:
        advice = "Permission is missing." if isinstance(error, PermissionError) else "Write it again."
        raise StorageError(f"manifest.json cannot be read: {error}", where=where, do=advice) from error
    if not isinstance(manifest, dict):
        raise StorageError("holds something else: its manifest.json is not ours", where=where)
    if manifest.pop("digest", None) not in (None, _digest(manifest)):  # None: it is of before there were digests
        raise StorageError("manifest.json is damaged (its SHA-256 differs)", where=where, do="Write or copy it again.")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _is_well_formed(manifest: dict[str, Any]) -> bool:
    """Return whether a manifest has its parts, and names files inside its folder only."""
    files = manifest.get("files")
    return (
        isinstance(manifest.get("meta"), dict)
        and isinstance(files, dict)
        and all(isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys() for facts in files.values())
        and not any(Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name for name in files)
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
