"""`.bin` files, in which models were published before safetensors: pickles that `torch.save` wrote, read lazily.

    weights = open_bin("pytorch_model-00001-of-00008.bin")      # shapes and dtypes, nothing read
    weights["model.norm.weight"].read()                         # maps the file, gives a view of it

A pickle is a program. Torch's restricted reader runs none of it but what makes tensors, and refuses anything else by
name. Of all files of a folder one is mapped at a time; going back to another costs a look at its table of contents.

Limit: files older than torch 1.6 (not a zip archive) cannot be mapped, and are in memory whole while they are read.
"""

from __future__ import annotations

import logging
import pickle
import struct
import sys
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internlm.errors import WeightsError
from internlm.log import warn_once
from internlm.weights.weight import Weight, Weights

logger = logging.getLogger(__name__)

_ZIP = b"PK\x03\x04"
_AGAIN = "Copy the file again."


class _Shelf:
    """The one file that is open, and the tensors in it."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.tensors: dict[str, Tensor] = {}
        self.lock = threading.Lock()

    def open(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors of a file, after closing any other."""
        with self.lock:
            if path != self.path:
                self.path, self.tensors = None, {}
                self.tensors = _load(path)
                self.path = path
            return self.tensors


def open_bin(path: Path) -> Weights:
    """Return the weights of a `.bin` file, not read yet.

    Raises:
        WeightsError: it is missing or damaged, would run code, or holds something else than tensors.
    """
    return open_bins([path])[path]


def open_bins(paths: list[Path]) -> dict[Path, Weights]:
    """Return the weights of several `.bin` files, of which one is open at a time; otherwise as `open_bin`."""
    shelf = _Shelf()
    found: dict[Path, Weights] = {}
    for path in paths:
        tensors = shelf.open(path)
        base = mapped_at(path, tensors)
        found[path] = {}
        for name, tensor in tensors.items():
            is_plain = tensor.is_contiguous() and tensor.numel() > 0
            place = (path, tensor.data_ptr() - base) if base is not None and is_plain else None
            reader = _Reader(shelf, path, name)
            found[path][name] = Weight(tuple(tensor.shape), tensor.dtype, reader, name, place)
    return found


@dataclass(frozen=True)
class _Reader:
    """Reads one tensor of a file."""

    shelf: _Shelf
    path: Path
    name: str

    def __call__(self) -> Tensor:
        tensors = self.shelf.open(self.path)
        if self.name not in tensors:
            raise WeightsError(f"no longer has {self.name}: it was replaced", where=self.path)
        return tensors[self.name]


def _load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped where that can be."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
        if is_zip:
            check_archive(path)
        else:
            warn_once(logger, f"{path} is of a form that cannot be mapped: all of it is in memory while it is read")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"is not only tensors, and nothing in it was run: {_reason(error)}",
            where=path,
            do="Do not trust its source; ask for safetensors.",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"cannot be read: {_reason(error)}", where=path, do=_AGAIN) from error
    if not isinstance(content, dict):
        raise WeightsError("holds no table of tensors", where=path, got=type(content).__name__)
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError("holds something else than named tensors", where=path, got=f"{name}: {type(tensor)}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise WeightsError("holds a tensor that is not plain", where=f"{path}: {name}", got=str(tensor.layout))
    return {name: tensor.detach() for name, tensor in content.items()}


def check_archive(path: Path) -> None:
    """Check that a zip file is what `torch.save` writes: not compressed, and of this machine's byte order.

    Of what is compressed, a few bytes may become all of the memory; of another order, mapped numbers would be wrong.

    Raises:
        WeightsError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            orders = [entry for entry in entries if entry.filename.rpartition("/")[2] == "byteorder"]
            order = archive.read(orders[0]).decode("ascii", "replace") if orders and not packed else sys.byteorder
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise WeightsError(f"cannot be read: {_reason(error)}", where=path, do=_AGAIN) from error
    if packed:
        raise WeightsError("is compressed, which torch.save never does", where=path, do="Save it again with torch.")
    if order != sys.byteorder:
        raise WeightsError(
            "is of another byte order", where=path, got=order, allowed=[sys.byteorder], do="Ask for safetensors."
        )


def mapped_at(path: Path, tensors: Mapping[str, Tensor]) -> int | None:
    """Return the address that a zip file is mapped at, None where it is not.

    Torch does not tell, but the distance of its storages to each other is that of the records in the file: where they
    lie at the records' offsets from one address, that address is it. Fewer storages than records might fit elsewhere.
    """
    storages = [tensor.untyped_storage() for tensor in tensors.values()]  # a view of no elements has one too
    addresses = sorted({storage.data_ptr() for storage in storages if storage.nbytes()})
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in records):
                return None
            starts = []
            for entry in records:
                file.seek(entry.header_offset + 26)  # lengths of name and extra field, which the data follow
                name, extra = struct.unpack("<HH", file.read(4))
                starts.append(entry.header_offset + 30 + name + extra)
    except (zipfile.BadZipFile, OSError, struct.error):
        return None
    if not addresses or not starts:
        return None
    base = addresses[0] - min(starts)
    return base if {address - base for address in addresses} == set(starts) else None


def _reason(error: Exception) -> str:
    """Return what torch's message says, without its advice to run the file all the same."""
    text = str(error)
    at = text.find("WeightsUnpickler error:")
    return (text[at:] if at >= 0 else text).partition("\n")[0].strip()
