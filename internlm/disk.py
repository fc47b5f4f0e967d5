"""What is done to a disk: small files that are old or new and never a part, claims on folders, errors in words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from internlm.errors import InternLMError, StorageError

logger = logging.getLogger(__name__)

LOCK = "lock"
_held: dict[Path, IO[str]] = {}
"""Lock files of the folders this process holds."""


@contextlib.contextmanager
def beside(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield where to write a file that becomes `path` when the block ends well, and vanishes when it does not.

    `durable`: whether it is on the disk before it has its name; what is written every few seconds need not be.

    Raises:
        StorageError: it cannot be written; `path` is as it was.
    """
    path = Path(os.path.realpath(path))
    draft = path.with_name(f"{path.name}.partial-{os.getpid()}")  # who looks for the ending finds whole files only
    with explained(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            if durable:
                fsync(draft)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_text(path: str | Path, text: str, *, durable: bool = True) -> None:
    """Write a small file whole, or not at all, as `beside`."""
    with beside(path, durable=durable) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, *, durable: bool = True) -> None:
    """Write a small JSON file, laid out for people, as `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", durable=durable)


def read_json(path: str | Path, error: type[InternLMError] = StorageError) -> dict[str, Any]:
    """Return the object that a JSON file holds; an empty one where there is no file.

    Raises:
        InternLMError: of the kind `error`: it cannot be read, or holds no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"cannot be read: {problem}", where=path, do="Copy the file again.") from problem
    return content


def hold(folder: str | Path) -> None:
    """Claim `folder` for this process until it ends, however it ends.

    Raises:
        StorageError: another process holds it.
    """
    path = Path(folder).resolve() / LOCK
    if path in _held:
        return
    with explained(f"opening {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  open as long as the process lives
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise StorageError(
            f"another process works in this folder ({holder or 'it just started'})",
            where=folder,
            do="Wait for it, stop it, or choose another folder.",
        ) from None
    except OSError as error:
        logger.warning("warning: %s cannot be locked (%s): start no second process in it", folder, error.strerror)
    with explained(f"writing {path}"):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _held[path] = file


def require_space(path: str | Path, needed_bytes: int, what: str) -> None:
    """Check that the file system of `path` has room for `needed_bytes`; raise StorageError with both numbers."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise StorageError(
            f"{what} needs {needed_bytes / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left",
            where=path,
            do="Free some space, or write elsewhere.",
        )


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn errors of the operating system inside the block into a StorageError that says what was being done."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "The disk is full: free some space. What was complete before is untouched.",
            errno.EDQUOT: "Your disk quota is used up. What was complete before is untouched.",
            errno.EFBIG: "The file size limit was reached. What was complete before is untouched.",
            errno.EACCES: "Permission is missing.",
            errno.EROFS: "The file system is read-only.",
        }.get(error.errno or 0)
        place = f" ({error.filename})" if error.filename else ""
        raise StorageError(f"failed while {doing}: {error.strerror or error}{place}", do=advice) from error


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
