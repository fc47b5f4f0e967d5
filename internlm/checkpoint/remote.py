"""A folder or file in a store that fsspec reaches, such as S3: few operations, each tried again when the store fails.

    (Remote("s3://bucket/run") / "x.bin").write([b"head", memoryview(tensor)])     # → SHA-256; uploaded in parts

A failure of the connection or of the server is a warning and another try, later each time; a refusal is an error at
once. Whatever is not known because the store does not answer raises `Unreachable`, so that nobody takes silence for an
empty folder. Where the store is and who may use it is the business of its client.

Limits: one connection for each rank that writes; a file that fails is uploaded again from its beginning, once the
client's own tries for a part are used up. Parts of uploads that were killed are left to the store's life-cycle rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from internlm import storage
from internlm.errors import ConfigError, StorageError, install_command

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
FIRST_WAIT_S = 1.0
"""Before the second try; it doubles with each."""
PATIENCE_S = 600.0
"""After so long there is no other try: the next checkpoint waits for this one, and the training for both."""
BLOCK = 2**24
"""Bytes of a part, up and down; S3 wants at least 5 MiB of every one but the last."""
_MOST_PARTS = 9_000
"""S3 takes 10,000."""
_REFUSED = (PermissionError, NotImplementedError, TypeError, ValueError, LookupError, AssertionError, ImportError)
_LATER = (408, 425, 429)
"""Answers of 4xx that ask for another try."""
_dice = random.SystemRandom()
"""Not Python's own stream, which belongs to the training."""
_systems: dict[tuple[int, str], Any] = {}
"""fsspec's file systems of this process, by process and protocol: they do not survive a fork."""


class Unreachable(StorageError):
    """A store refused, or did not answer: what lies in it is not known."""


@dataclass(frozen=True)
class Remote:
    """A folder or a file in a store."""

    url: str
    """Without a slash at the end."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The folder it lies in."""
        return Remote(self.url.rpartition("/")[0])

    def names(self) -> list[str]:
        """Return what lies directly in this folder; nothing where there is no such folder."""
        try:
            found = self._try("listing", lambda system, path: system.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rpartition("/")[2] for name in found} - {""})

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below this folder, by its name from here."""

        def find(system: Any, path: str) -> dict[str, int]:
            found = system.find(path, detail=True)
            return {name[len(path) :].lstrip("/"): facts["size"] for name, facts in found.items()}

        try:
            return self._try("listing", find)
        except FileNotFoundError:
            return {}

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content of a small file.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._try("reading", lambda system, path: system.cat_file(path)).decode(encoding)

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fill a buffer with the bytes from `start` on, at most `BLOCK` at once; return how many there were.

        Raises:
            FileNotFoundError: there is no such file.
        """
        done = 0
        while done < len(buffer):
            first, last = start + done, start + min(done + BLOCK, len(buffer))
            part = self._read(first, last)
            buffer[done : done + len(part)] = part
            done += len(part)
            if len(part) < last - first:
                break
        return done

    def _read(self, first: int, last: int) -> bytes:
        return self._try("reading", lambda system, path: system.cat_file(path, start=first, end=last))

    def sha256(self, size: int) -> str:
        """Return the SHA-256 of the first `size` bytes, read in parts."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, BLOCK)))
        for start in range(0, size, BLOCK):
            count = self.read_into(start, buffer[: size - start])
            digest.update(buffer[:count])
        return digest.hexdigest()

    def write(self, buffers: Sequence[bytes | memoryview]) -> str:
        """Upload a file that consists of these buffers; return its SHA-256. Memory holds a few parts of it.

        Raises:
            Unreachable: it could not be, or there is no such bucket.
        """
        size = sum(map(len, buffers))
        block = max(BLOCK, -(-size // _MOST_PARTS))

        def upload(system: Any, path: str) -> str:
            digest = hashlib.sha256()
            file = system.open(path, "wb", block_size=block)
            try:
                for buffer in buffers:
                    for start in range(0, len(buffer), block):
                        part = memoryview(buffer)[start : start + block]
                        digest.update(part)
                        file.write(part)
                file.close()
            except BaseException:
                _abandon(file)
                raise
            return digest.hexdigest()

        try:
            return self._try("uploading", upload)
        except FileNotFoundError as error:
            raise Unreachable(
                f"cannot be written: {_said(error)}", where=self, do="Is there such a bucket? It is not made here."
            ) from error

    def unlink(self, tries: int = TRIES) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._try("removing", lambda system, path: system.rm_file(path), tries)

    def remove(self, tries: int = TRIES) -> None:
        """Remove a folder with all that is in it; its manifest goes first, so that nobody reads a part."""
        (self / storage.MANIFEST).unlink(tries)
        with contextlib.suppress(FileNotFoundError):
            self._try("removing", lambda system, path: system.rm(path, recursive=True), tries)

    def _try(self, doing: str, work: Callable[[Any, str], T], tries: int = TRIES) -> T:
        """Return what work on fsspec's file system and path returns, tried again when the store fails.

        Raises:
            FileNotFoundError: as `work`.
            Unreachable: the store refused, or failed each time.
        """
        begun = time.monotonic()
        for number in range(1, tries + 1):
            try:
                system = _system(self.url.partition("://")[0])
                return work(system, system._strip_protocol(self.url))
            except (FileNotFoundError, ConfigError):
                raise
            except Exception as error:  # every client has errors of its own
                refused, advice = _judge(error)
                if refused or number == tries or time.monotonic() - begun > PATIENCE_S:
                    how = "was refused" if refused else f"failed {number} times" if number > 1 else "failed"
                    raise Unreachable(f"{doing} {how}: {_said(error)}", where=self, do=advice) from error
                wait = FIRST_WAIT_S * 2 ** (number - 1) * (0.5 + _dice.random())
                then = f"try {number + 1} of {tries} in {wait:.1f} s"
                logger.warning("warning: %s: %s failed (%s); %s", self, doing, _said(error), then)
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def check_known(url: str) -> None:
    """Check that a store can be used here.

    Raises:
        ConfigError: the URL holds a password, is of an unknown kind, or the kind's package is missing.
    """
    protocol, _, rest = url.partition("://")
    before, at, _ = rest.partition("/")[0].rpartition("@")
    if at and ":" in before:
        raise ConfigError(
            "a password does not belong into a URL, which is logged and saved",
            where=f"{protocol}://…@{rest.rpartition('@')[2]}",
            do="Give it to the store's client: environment, or its configuration files.",
        )
    _system(protocol)


def _system(protocol: str) -> Any:
    """Return fsspec's file system. It keeps no listings: other processes write too."""
    import fsspec  # type: ignore[import-untyped]

    key = os.getpid(), protocol
    if key not in _systems:
        more = {"auto_mkdir": True} if protocol == "local" else {}
        try:
            _systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **more)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"cannot be used: {_said(error)}",
                where=f"{protocol}://",
                do=f"For s3: {install_command('remote')}; for others the package that fsspec names.",
            ) from error
    return _systems[key]


def _abandon(file: Any) -> None:
    """Give up an upload, with the parts that the store holds of it."""
    with contextlib.suppress(Exception):  # the store may be gone, or the client has no such thing
        file.discard()
    with contextlib.suppress(AttributeError):
        file.closed = True  # or it would be completed, cut short, when Python collects it


def _judge(error: BaseException) -> tuple[bool, str]:
    """Return whether another try is useless, and what to do."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    status = next(filter(None, map(_status, chain)), None)
    if any("Credentials" in type(one).__name__ for one in chain):
        return True, "Give this machine credentials for the store, by environment, role or configuration file."
    if isinstance(error, PermissionError) or status in (401, 403):
        return True, "May these credentials list, read, write and delete there?"
    if isinstance(error, _REFUSED) or (status is not None and 400 <= status < 500 and status not in _LATER):
        return True, "Check the address, and the endpoint that the store's client is configured with."
    return False, "Is the store up, and its endpoint right? What was complete there is untouched."


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)  # botocore's
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(error, "status", getattr(error, "code", None))
    return found if isinstance(found, int) else None


def _said(error: BaseException) -> str:
    """Return what an error says, on one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
