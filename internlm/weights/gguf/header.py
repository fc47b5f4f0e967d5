"""What stands before the tensors of a GGUF file, read in one go; tensors are read when they are asked for.

    opened = read_header(path)
    opened.fields["llama.block_count"]          # 32
    opened.tensors["output.weight"].read()      # float32, float16 or bfloat16 as stored; quantised ones as float32

A file is: magic, version, two counts, fields (key, type, value), tensors (name, lengths innermost first, type, offset),
and their bytes, each beginning at a multiple of `general.alignment` (https://github.com/ggml-org/ggml, docs/gguf.md).
The package gguf takes 9 s for 103,168 tokens, this 0.1 s; it is needed for quantised tensors alone.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internlm.errors import UsageError, WeightsError, install_command

MAGIC = b"GGUF"
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""GGML types that are dtypes."""
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def library() -> Any:
    """Return the package gguf; raise UsageError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UsageError("need the package gguf", where="GGUF files", do=install_command("gguf")) from None
    return gguf


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    path: Path
    shape: tuple[int, ...]
    """As in torch, the innermost length last."""
    kind: int
    """GGML type."""
    offset: int
    """Of its bytes in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is read as."""
        return DTYPES.get(self.kind, torch.float32)

    @property
    def plain_bytes(self) -> int:
        """Size where it is not quantised."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            WeightsError: the file ends before it, or its quantisation is not known.
            UsageError: it is quantised, and the package gguf is not installed.
        """
        if self.kind in DTYPES:
            return torch.from_numpy(self._bytes(self.plain_bytes)).view(self.dtype).reshape(self.shape)
        gguf = library()
        try:
            kind = gguf.GGMLQuantizationType(self.kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            rows = self._bytes(math.prod(self.shape) // block * size)
            array = gguf.quants.dequantize(rows.reshape(*self.shape[:-1], -1), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise WeightsError(f"cannot be read: {error}", where=f"{self.path}: {self.name}") from error
        return torch.from_numpy(array).reshape(self.shape)

    def _bytes(self, count: int) -> Any:
        self.check_end(count, self.path.stat().st_size)
        return np.fromfile(self.path, np.uint8, count, offset=self.offset)

    def check_end(self, count: int, size: int) -> None:
        """Raise WeightsError where a file of `size` bytes does not hold `count` of this tensor."""
        if self.offset + count > size:
            raise WeightsError("the file ends before it", where=f"{self.path}: {self.name}", do="Copy the file again.")


@dataclass(frozen=True)
class Header:
    """A file, opened."""

    path: Path
    fields: dict[str, Any]
    """A text stands for lists, such as the tokens."""
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """Open a GGUF file.

    Raises:
        WeightsError: it is missing, damaged, or of another version or byte order.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC:
                raise ValueError("it does not begin with GGUF")
            cursor = _Cursor(data, 4)
            version = cursor.take("I")
            if version not in _VERSIONS:
                raise ValueError(f"its version is {version}, not {' or '.join(map(str, _VERSIONS))}")
            tensors, fields = cursor.take("Q"), cursor.take("Q")
            found = {cursor.text(): cursor.value(cursor.take("I")) for _ in range(fields)}
            listed = [
                (
                    cursor.text(),
                    tuple(cursor.take("Q") for _ in range(cursor.take("I"))),
                    cursor.take("I"),
                    cursor.take("Q"),
                )
                for _ in range(tensors)
            ]
            alignment = found.get("general.alignment", 32)
            start = -(-cursor.at // alignment) * alignment
            size = len(data)
    except (OSError, ValueError, struct.error, ZeroDivisionError, TypeError, RecursionError) as error:
        raise WeightsError(f"cannot be read: {error}", where=path, do="Copy the file again.") from error
    placed = [Stored(name, path, shape[::-1], kind, start + offset) for name, shape, kind, offset in listed]
    for tensor in placed:
        tensor.check_end(tensor.plain_bytes if tensor.kind in DTYPES else 1, size)
    return Header(path, found, {tensor.name: tensor for tensor in placed})


class _Cursor:
    """A place in a file; what lies behind its end is a struct.error or ValueError."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def take(self, form: str) -> Any:
        """Return the number here, and go behind it."""
        value = struct.unpack_from(f"<{form}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        """Return the text here, and go behind it."""
        size = self.take("Q")
        if size > len(self.data) - self.at:
            raise ValueError("it ends inside a text")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        """Return the value here, a text for a list, and go behind it."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("I"), self.take("Q")
            if inner in _SCALARS:
                self.at += count * struct.calcsize(f"<{_SCALARS[inner]}")
            else:
                for _ in range(count):
                    self.value(inner)
            return f"a list of {count}"
        if kind not in _SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        return self.take(_SCALARS[kind])
