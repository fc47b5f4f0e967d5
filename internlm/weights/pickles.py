"""Files of `torch.save` from strangers, read lazily, and without running anything they ask for.

    weights = open_bins([path])[path]           # a `.bin` of Transformers: shapes and dtypes, nothing read
    weights["model.norm.weight"].read()         # maps the file, gives a view of it
    states = load("model_tp0_pp0.pt")           # of InternLM v0.2: {"model.norm.weight": tensor, …}, mapped, not read

A pickle is a program. Torch's restricted reader (`weights_only`) calls only what builds tensors and plain containers,
and other names are refused. Checkpoints of InternLM v0.2 and InternEvo also name classes of their framework: a dict
subclass arrives as a plain dict, an enum as the text of its value, and no module is imported, ours least of all, which
has the same name.

Files older than torch 1.6 (no zip archive) cannot be mapped: a `.bin` is in memory whole while it is read.
"""

from __future__ import annotations

import logging
import pickle
import struct
import sys
import threading
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.errors import WeightsError, first_line
from internlm.log import warn_once
from internlm.weights.weight import Weight, Weights

logger = logging.getLogger(__name__)

AGAIN = "Copy the file again."
_ZIP = b"PK\x03\x04"


class _Shelf:
    """The one file that is open."""

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

    def read(self, path: Path, name: str) -> Tensor:
        """Return a tensor of a file."""
        tensors = self.open(path)
        if name not in tensors:
            raise WeightsError(f"no longer has {name}: it was replaced", where=path)
        return tensors[name]


def open_bins(paths: list[Path]) -> dict[Path, Weights]:
    """Return the weights of `.bin` files, not read yet; of all of them one is open at a time.

    Raises:
        WeightsError: one is missing or damaged, would run code, or holds something else than tensors.
    """
    shelf = _Shelf()
    found: dict[Path, Weights] = {}
    for path in paths:
        tensors = shelf.open(path)
        base = mapped_at(path, tensors)
        found[path] = {}
        for name, tensor in tensors.items():
            is_plain = tensor.is_contiguous() and tensor.numel() > 0
            place = (path, tensor.data_ptr() - base) if base is not None and is_plain else None
            reader = partial(shelf.read, path, name)
            found[path][name] = Weight(tuple(tensor.shape), tensor.dtype, reader, name, place)
    return found


def _load(path: Path) -> dict[str, Tensor]:
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
        raise WeightsError(f"cannot be read: {_reason(error)}", where=path, do=AGAIN) from error
    return tensors_of(content, path)


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the content of a file that holds named tensors and nothing else; raise WeightsError for any other."""
    if not isinstance(content, dict):
        raise WeightsError("holds no table of tensors", where=path, got=type(content).__name__)
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError("holds something else than named tensors", where=path, got=f"{name}: {type(tensor)}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            got = f"{tensor.layout} on {tensor.device}"
            raise WeightsError("holds a tensor that is not plain", where=f"{path}: {name}", got=got)
    return {name: tensor.detach() for name, tensor in content.items()}


def check_archive(path: Path) -> None:
    """Check that a zip file is not compressed (few bytes may become all of the memory), and of this byte order.

    Mapped numbers of another would be wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            orders = [entry for entry in entries if entry.filename.rpartition("/")[2] == "byteorder"]
            order = archive.read(orders[0]).decode("ascii", "replace") if orders and not packed else sys.byteorder
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise WeightsError(f"cannot be read: {_reason(error)}", where=path, do=AGAIN) from error
    if packed:
        raise WeightsError("is compressed, which torch.save never does", where=path, do="Save it again with torch.")
    if order != sys.byteorder:
        raise WeightsError(
            "is of another byte order", where=path, got=order, allowed=[sys.byteorder], do="Ask for safetensors."
        )


def mapped_at(path: Path, tensors: Mapping[str, Tensor]) -> int | None:
    """Return the address that a zip file is mapped at, None where it is not.

    Torch does not tell; it is the one from which storages lie at the records' offsets. Fewer storages than records
    might fit elsewhere.
    """
    storages = [tensor.untyped_storage() for tensor in tensors.values()]  # a view of no elements has one too
    addresses = sorted({storage.data_ptr() for storage in storages if storage.nbytes()})
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
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
    """Return torch's message without its advice to run the file all the same."""
    text = str(error)
    at = text.find("WeightsUnpickler error:")
    return (text[at:] if at >= 0 else text).partition("\n")[0].strip()


class _Inert:
    """Stands for a class of the framework: called with a value it gives the text of it, else an empty dict."""

    def __new__(cls, *values: object) -> Any:  # never one of this class: nothing can be set on it
        return str(values[0]) if values else {}


def load(path: Path) -> Any:
    """Return the content of a file of `torch.save`; its tensors map the file.

    Raises:
        WeightsError: it names anything but tensors, plain containers and classes of the framework, or is damaged.
    """
    try:
        check_archive(path)
        # Names that are not known to be harmless; the program is not run for them.
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        foreign = [name for name in names if not name.startswith("internlm.")]  # as those of the framework
        if foreign:
            raise WeightsError(
                f"would run {', '.join(foreign)} when it is loaded, and was not read",
                where=path,
                do="A checkpoint needs tensors and plain containers only: do not trust this file.",
            )
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise WeightsError("is missing", where=path) from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError) as error:
        what = f"cannot be read as a file of torch.save: {first_line(error)}"
        raise WeightsError(what, where=path, do=AGAIN) from None
    except (TypeError, AttributeError, AssertionError) as error:
        raise WeightsError(f"holds a program that makes no sense: {error}", where=path, do="Do not trust it.") from None
