"""The bytes of files, unpacked by their ending (.gz, .zst); one that is cut short never passes for whole."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from internlm.errors import DataError, install_command

PACKED = (".gz", ".zst")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacking it by its ending; raise DataError where it cannot be read, is damaged or cut short."""
    try:
        with _open(path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"is damaged: {error}", where=path, do="Copy or download it again.") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from error


def _open(path: Path) -> IO[bytes]:
    packing = path.suffix.lower()
    if packing in PACKED and not path.stat().st_size:
        raise EOFError("the file is empty")  # nothing packed takes no bytes; the libraries take it for an empty text
    if packing == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if packing == ".zst":
        return io.BufferedReader(_Zstandard(path), 1 << 17)
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """The unpacked bytes of a .zst file of any number of frames.

    The library's own reader takes a file that ends inside a frame for a whole one.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed by close()
        try:
            import zstandard
        except ImportError:
            raise DataError("zstandard is needed to read it", where=path, do=install_command("data")) from None
        self._library = zstandard
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return how many bytes went in, 0 at the end."""
        while not self._unpacked:
            self._packed = self._packed or self._file.read(1 << 14)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(self._packed))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
