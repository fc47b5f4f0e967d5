"""Files of `torch.save`, written as a stream: one tensor in memory, where PyTorch's own writer holds all of a file.

    write(path, {"model.norm.weight": Weight, …})       # torch.load(path) gives {"model.norm.weight": tensor, …}

Such a file is a zip archive, not compressed: a pickle that says which storage has which dtype and form, and the bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from internlm.errors import WeightsError
from internlm.hashed_file import HashedFile
from internlm.weights import files
from internlm.weights import weight as lazy
from internlm.weights.files import Done
from internlm.weights.weight import Weights

_STORAGES: dict[torch.dtype, Any] = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ALIGNMENT = 64
"""Storages begin at multiples of this, as PyTorch's, so that they can be mapped."""
_FULL = 2**32 - 1
"""In a field of 32 bits: the value is in an extra field of 64."""


def write(path: Path, weights: Weights, done: Done = lambda n: None) -> str:
    """Write a file that `torch.load` gives as a dict of tensors, and return its SHA-256.

    Raises:
        WeightsError: a value is not finite in the dtype it is written in, or a dtype is not one of _STORAGES.
    """
    pickled = _pickled(weights)
    with HashedFile(path) as file:
        archive = _Archive(file)
        archive.add("data.pkl", memoryview(pickled))
        archive.add("byteorder", memoryview(b"little"))
        for number, (name, weight) in enumerate(weights.items()):
            tensor = files.require_finite(name, lazy.read(name, weight))
            archive.add(f"data/{number}", files.as_bytes(tensor))
            done(weight.nbytes)
        archive.add("version", memoryview(b"3\n"))
        archive.finish()
        return file.sha256()


class _Archive:
    """The zip archive. Python's `zipfile` goes to 64 bits at 2 GiB already, which PyTorch before 2 takes for damage."""

    def __init__(self, file: HashedFile) -> None:
        self.file, self.at, self.entries = file, 0, 0
        self.directory = b""

    def add(self, name: str, content: memoryview) -> None:
        """Append an entry."""
        path = f"archive/{name}".encode()
        size, crc = content.nbytes, zlib.crc32(content)
        # Fields: version, flags, method (none), time, date (1980-01-01), checksum, sizes; then the length of the name.
        common = struct.pack("<HHHHHIIIH", 45, 0, 0, 0, 33, crc, min(size, _FULL), min(size, _FULL), len(path))
        long = struct.pack("<HHQQ", 1, 16, size, size) if size >= _FULL else b""
        padding = -(self.at + 30 + len(path) + len(long) + 4) % _ALIGNMENT
        extra = long + b"FB" + struct.pack("<H", padding) + bytes(padding)
        offsets = ([size, size] if size >= _FULL else []) + ([self.at] if self.at >= _FULL else [])
        far = struct.pack(f"<HH{len(offsets)}Q", 1, 8 * len(offsets), *offsets) if offsets else b""
        place = struct.pack("<HHHHII", len(far), 0, 0, 0, 0, min(self.at, _FULL))
        self.directory += b"PK\1\2" + struct.pack("<H", 45) + common + place + path + far
        self._write(b"PK\3\4" + common + struct.pack("<H", len(extra)) + path + extra)
        self._write(content)
        self.entries += 1

    def finish(self) -> None:
        """Append the list of entries."""
        start, size, count = self.at, len(self.directory), self.entries
        self._write(self.directory)
        if start >= _FULL or count >= 0xFFFF:
            sizes = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
            self._write(b"PK\6\6" + sizes + b"PK\6\7" + struct.pack("<IQI", 0, self.at, 1))
        short = min(count, 0xFFFF)
        self._write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, short, short, size, min(start, _FULL), 0))

    def _write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self.at += len(content)


class _Storage(tuple[Any, ...]):
    """How the pickle refers to the bytes of a tensor: "storage", class, key, device, elements."""


class _Stored(NamedTuple):
    """Stands for a tensor in the pickle."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())  # no hooks


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        """Return the reference for a storage."""
        return tuple(obj) if isinstance(obj, _Storage) else None


def _pickled(weights: Weights) -> bytes:
    stored = {}
    for number, (name, weight) in enumerate(weights.items()):
        if weight.dtype not in _STORAGES:
            raise WeightsError("cannot be written", where=name, got=str(weight.dtype), allowed=_STORAGES)
        size = weight.nbytes // weight.dtype.itemsize
        reference = _Storage(("storage", _STORAGES[weight.dtype], str(number), "cpu", size))
        stored[name] = _Stored(reference, weight.shape)
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(stored)
    return text.getvalue()
