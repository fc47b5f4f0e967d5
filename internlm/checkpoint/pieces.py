"""Tensors in pieces: the files that hold the tensors of a checkpoint, and the index that says where each lies.

    tensors.json                      dtype and shape of every tensor, and file, place and extent of each of its pieces
    tensors/model-00003.safetensors   weights from rank 3: a whole one under its name, a piece as `name@offset,offset`
    tensors/state-00003.safetensors   what else it wrote, such as moments: who wants the model does not read them

Whoever reads needs neither torch.distributed nor the layout that wrote: a tensor, or a rank's part of it, is put
together from its pieces. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.place import Place, read_into
from internlm.errors import StorageError
from internlm.weights.files import DTYPES, NAMES, as_bytes

INDEX = "tensors.json"
FOLDER = "tensors"
MODEL = "model."
"""How the names of weights begin."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, in one file."""

    file: str
    """Under the checkpoint's folder."""
    start: int
    """Where its bytes begin."""
    offsets: tuple[int, ...]
    """Where it begins in the tensor."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """They cover it, and do not overlap."""


Index = dict[str, Entry]
"""The tensors of a checkpoint by name."""


def file_of(name: str, rank: int) -> str:
    """Return the file into which a rank writes a tensor of this name."""
    return f"{FOLDER}/{'model' if name.startswith(MODEL) else 'state'}-{rank:05d}.safetensors"


def is_tensors(file: str) -> bool:
    """Return whether a file of a checkpoint holds tensors; the folder may have a suffix."""
    return file.partition("/")[0].partition("-")[0] == FOLDER


def moved(index: Index, suffix: str) -> Index:
    """Return an index whose files lie in a folder with this suffix."""

    def file(piece: Piece) -> str:
        return piece.file.replace(FOLDER, FOLDER + suffix, 1)

    return {n: replace(e, pieces=tuple(replace(p, file=file(p)) for p in e.pieces)) for n, e in index.items()}


def dump(index: Index) -> str:
    """Return the text of an index."""
    found = {
        name: {
            "dtype": NAMES[entry.dtype],
            "shape": entry.shape,
            "pieces": [vars(piece) for piece in entry.pieces],
        }
        for name, entry in index.items()
    }
    return json.dumps(found, separators=(",", ":")) + "\n"


def read_index(folder: Place) -> Index:
    """Return the index of a checkpoint folder.

    Raises:
        StorageError: it is missing, cannot be read, or says what cannot be.
    """
    path = folder / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        index = {name: _entry(facts) for name, facts in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"cannot be read: {error}", where=path, do="Copy the checkpoint again.") from error
    for name, entry in index.items():
        held = sum(math.prod(piece.shape) for piece in entry.pieces)
        if held != math.prod(entry.shape):
            raise StorageError(f"tensor {name} has {math.prod(entry.shape)} values, its pieces {held}", where=path)
    return index


def _entry(facts: dict[str, Any]) -> Entry:
    """Return an entry from JSON; what does not fit raises one of the errors that `read_index` catches."""
    shape = _extent(facts["shape"])
    pieces = []
    for piece in facts["pieces"]:
        file, offsets, extent = Path(piece["file"]), _extent(piece["offsets"]), _extent(piece["shape"])
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"{file} lies outside of the folder")
        if len(offsets) != len(shape) or any(
            first + count > size for first, count, size in zip(offsets, extent, shape, strict=True)
        ):
            raise ValueError(f"a piece at {offsets} of shape {extent} lies outside of {shape}")
        pieces.append(Piece(str(file), _extent([piece["start"]])[0], offsets, extent))
    return Entry(DTYPES[facts["dtype"]], shape, tuple(pieces))


def _extent(numbers: list[Any]) -> tuple[int, ...]:
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{numbers} are no sizes")
    return tuple(numbers)


def read(folder: Place, entry: Entry) -> Tensor:
    """Return a tensor, put together from its pieces.

    Raises:
        StorageError: a file is missing or too short.
    """
    if len(entry.pieces) == 1:
        return _read_piece(folder, entry.pieces[0], entry.dtype)
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    fill(whole, (0,) * whole.ndim, folder, entry)
    return whole


def fill(part: Tensor, begin: tuple[int, ...], folder: Place, entry: Entry) -> None:
    """Fill a part of a tensor that begins at such a place in it. Rows of pieces that lie elsewhere are not read.

    Raises:
        StorageError: a file is missing or too short.
    """
    for piece in entry.pieces:
        firsts = [max(pair) for pair in zip(begin, piece.offsets, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(begin, part.shape, piece.offsets, piece.shape, strict=True)]
        if any(first >= end for first, end in zip(firsts, ends, strict=True)):
            continue
        rows = slice(firsts[0] - piece.offsets[0], ends[0] - piece.offsets[0]) if firsts else None
        source, target = _read_piece(folder, piece, entry.dtype, rows), part
        for dim, (first, end) in enumerate(zip(firsts, ends, strict=True)):
            source = source.narrow(dim, first - piece.offsets[dim] if dim else 0, end - first)
            target = target.narrow(dim, first - begin[dim], end - first)
        target.copy_(source)


def _read_piece(folder: Place, piece: Piece, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
    """Return a piece [*piece.shape], or these rows of it."""
    start, shape = piece.start, piece.shape
    if rows is not None:
        start += rows.start * math.prod(shape[1:]) * dtype.itemsize
        shape = (rows.stop - rows.start, *shape[1:])
    tensor = torch.empty(shape, dtype=dtype)
    read_into(folder / piece.file, start, as_bytes(tensor))
    return tensor
