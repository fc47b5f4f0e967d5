"""What HashedFile writes is what it was given, through the page cache and past it."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from internlm.hashed_file import HashedFile


@pytest.fixture(params=["as the system can", "through the cache", "a disk of larger blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that take direct writes, file systems that know none, and ones that find ours too small."""
    monkeypatch.setattr(HashedFile, "PIECE", 2**13)
    if request.param == "through the cache":
        monkeypatch.delattr("os.O_DIRECT", raising=False)
    if request.param == "a disk of larger blocks":
        write, calls = os.write, []

        def refuses_once(file: int, content: memoryview) -> int:
            calls.append(len(content))
            if len(calls) == 3:
                raise OSError(errno.EINVAL, "Invalid argument")
            return write(file, content)

        monkeypatch.setattr("os.write", refuses_once)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_size_come_out_as_they_went_in(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    source = tmp_path / "source"
    source.write_bytes(dice.randbytes(60_000))
    expected, shown = b"", b""
    with HashedFile(tmp_path / "out") as file:
        for _ in range(dice.randrange(1, 12)):
            size = dice.choice([0, 1, 7, 8, 4096, 2**13, dice.randrange(40_000)])
            if dice.random() < 0.5:
                piece = dice.randbytes(size)
                file.write(piece)
            else:
                start = dice.randrange(20_000)
                piece, seen = source.read_bytes()[start : start + size], []
                file.copy(source, start, size, lambda part, seen=seen: seen.append(bytes(part)), unit=8)
                assert all(len(part) % 8 == 0 for part in seen[:-1])
                shown += b"".join(seen)
                assert shown.endswith(piece)
            expected += piece
        digest = file.sha256()
    assert (tmp_path / "out").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


def test_a_read_that_gives_less_than_asked_splits_no_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, path: Path, *_: object, **__: object) -> None:
            self.file = os.open(path, os.O_RDONLY)

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.file)

        def fileno(self) -> int:
            return self.file

        def seek(self, at: int) -> None:
            os.lseek(self.file, at, os.SEEK_SET)

        def readinto(self, place: memoryview) -> int:
            part = os.read(self.file, min(len(place), 7))
            place[: len(part)] = part
            return len(part)

    (tmp_path / "source").write_bytes(bytes(range(240)))
    sizes: list[int] = []
    with HashedFile(tmp_path / "out") as file:
        monkeypatch.setattr("internlm.disk.open", Slow, raising=False)
        file.copy(tmp_path / "source", 0, 240, lambda piece: sizes.append(len(piece)), unit=8)
        file.sha256()
    assert all(size % 8 == 0 for size in sizes)
    assert (tmp_path / "out").read_bytes() == bytes(range(240))


def test_a_source_that_ends_too_early_is_said(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    with HashedFile(tmp_path / "out") as file, pytest.raises(EOFError, match="2 bytes too early"):
        file.copy(tmp_path / "source", 1, 4, lambda piece: None)


def test_a_write_that_fails_is_raised_and_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: int, content: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", fails)
    with HashedFile(tmp_path / "out") as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(HashedFile.PIECE * HashedFile.BUFFERS * 4))
    with HashedFile(tmp_path / "out") as file:
        file.write(b"end")
        with pytest.raises(OSError, match="No space left"):
            file.sha256()
