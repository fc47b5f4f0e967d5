"""Weight files of a Transformers folder: safetensors, written as a stream; safetensors and `.bin` read lazily.

    {"x": Weight, "y": Weight}  →  model-00001-of-00002.safetensors, …, model.safetensors.index.json

The safetensors format is a header (8 bytes of length, JSON) and the tensors' bytes, one after the other. Shapes and
dtypes of lazy weights are known, so the header is written first and each tensor goes to the file as soon as it is read:
memory holds one tensor, however large the file. The library's own writer takes all tensors of a file at once.

What `plan` lays out depends on names, shapes and dtypes alone: a writer that was interrupted finds the files that it
had finished, and goes on with the next one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internlm import storage
from internlm.errors import StorageError, WeightsError
from internlm.hashed_file import HashedFile
from internlm.text.tokenizer import VOCABULARY_FILES
from internlm.weights import weight as lazy
from internlm.weights.bin_files import open_bins
from internlm.weights.weight import Weight, Weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}
"""dtypes by their name there."""
_POINTER = b"version https://git-lfs"
"""How the text begins that git keeps in the place of a large file."""


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name and its weights."""

    name: str
    weights: Weights


def plan(weights: Weights, max_bytes: int) -> list[Shard]:
    """Return the files that hold `weights` in their order, none larger than `max_bytes` unless one tensor is."""
    groups: list[Weights] = []
    held = 0
    for name, weight in weights.items():
        if not groups or held + weight.nbytes > max_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = weight
        held += weight.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    return [Shard(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def require_space(folder: storage.Writing, total_bytes: int, what: str) -> None:
    """Check that the disk has room for an export, what an interrupted one has left of it counted as there.

    Raises:
        StorageError: naming what is missing; a folder with nothing in it is removed.
    """
    there = sum(file.stat().st_size for file in folder.path.iterdir())
    try:
        storage.require_space(folder.path, total_bytes - there, what)
    except StorageError:
        with contextlib.suppress(OSError):  # not empty: the next try goes on with it
            folder.path.rmdir()
        raise


def write(
    folder: storage.Writing, weights: Weights, max_bytes: int, done: Callable[[int], None] = lambda n: None
) -> None:
    """Write weights as safetensors files of bounded size, with the index where there are several.

    A file of the plan that lies in the folder complete is kept: the folder was begun with the same weights.

    Args:
        folder: to write into.
        weights: under the names that the files shall have.
        max_bytes: of tensors in a file.
        done: told the bytes of each tensor that was written or found.

    Raises:
        WeightsError: a value is not finite in the dtype it is written in, or a source cannot be read.
        StorageError: writing failed.
    """
    shards = plan(weights, max_bytes)
    for shard in shards:
        path = folder.path / shard.name
        if path.exists():
            done(sum(weight.nbytes for weight in shard.weights.values()))
            continue
        beside = path.with_suffix(".unfinished")
        with storage.explained(f"writing {path}"), one_thread():
            folder.hashes[shard.name] = _write_shard(beside, shard.weights, done)
            os.replace(beside, path)
    if len(shards) > 1:
        where = {name: shard.name for shard in shards for name in shard.weights}
        index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": where}
        storage.write_json(folder.path / INDEX, index)


def header(parts: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[bytes, list[int], int]:
    """Return the head of a safetensors file of such (name, shape, dtype), where each begins, and the file's bytes."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for name, shape, dtype in parts:
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        described[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + start for start in ends[:-1]], len(head) + ends[-1]


def _write_shard(path: Path, weights: Weights, done: Callable[[int], None]) -> str:
    """Write one file, and return its SHA-256."""
    with HashedFile(path) as file:
        file.write(header((name, weight.shape, weight.dtype) for name, weight in weights.items())[0])
        for name, weight in weights.items():
            write_weight(file, name, weight)
            done(weight.nbytes)
        return file.sha256()


def write_weight(file: HashedFile, name: str, weight: Weight) -> None:
    """Append the bytes of a weight to a file; what lies in another file as it is, is copied from there.

    Raises:
        WeightsError: it holds a value that is not finite, or cannot be read.
    """

    def look(piece: Tensor) -> None:
        if not is_finite(piece):
            raise WeightsError(
                f"is not finite as {weight.dtype}", where=name, do="Export as float32 or bfloat16, or train anew."
            )

    if weight.place is not None and weight.nbytes:
        path, start = weight.place
        try:
            shown = partial(torch.frombuffer, dtype=weight.dtype)
            file.copy(path, start, weight.nbytes, lambda piece: look(shown(piece)), unit=weight.dtype.itemsize)
        except EOFError as error:
            raise WeightsError(f"cannot be read: {error}", where=name, do="Copy the file again.") from error
        return
    flat = lazy.read(name, weight).contiguous().reshape(-1)
    for piece in flat.split(HashedFile.PIECE // flat.element_size()):  # looked at and written from the cache
        look(piece)
        file.write(as_bytes(piece))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread inside the block: those that wait for work would keep the hashing from its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, in memory order; a copy only where it is not contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither infinities nor NaN, in one pass and without a copy of it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)  # NaN goes through
    return bool(low.isfinite() & high.isfinite())


def open_folder(folder: Path) -> Weights:
    """Return the weights of a Transformers folder under their names there, not read yet.

    Safetensors are preferred where there are `.bin` files too.

    Raises:
        WeightsError: there are no weight files, or one is missing or damaged.
    """
    for single, index in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):
        if (folder / single).is_file():  # before an index, as Transformers has it
            return _open_files([folder / single])[folder / single]
        if (folder / index).is_file():
            return _open_indexed(folder, folder / index)
    raise WeightsError(f"holds neither {SINGLE} nor {INDEX}, nor {BIN_SINGLE} or {BIN_INDEX}", where=folder)


def require_fetched(path: Path) -> None:
    """Check that a file, or what is read of a folder, is not the pointer that git-lfs leaves in its place.

    Raises:
        WeightsError: naming the first that is.
    """
    forms = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*.gguf")  # of the first alone, if there is
    found = next(filter(None, (sorted(path.glob(form)) for form in forms)), []) if path.is_dir() else [path]
    vocabularies = [path / name for name in VOCABULARY_FILES if (path / name).is_file()]
    for file in (*found, *vocabularies[:1]):
        if not file.is_file():
            continue
        with storage.explained(f"reading {file}"), file.open("rb") as opened:
            is_pointer = opened.read(len(_POINTER)) == _POINTER
        if is_pointer:
            do = "In its folder: `git lfs pull`; or download the file itself."
            raise WeightsError("is a pointer of git-lfs, not the file: that was never fetched", where=file, do=do)


def _open_files(paths: list[Path]) -> dict[Path, Weights]:
    """Return the weights of files, told by their names' end."""
    for path in paths:
        require_fetched(path)
    bins = open_bins([path for path in paths if path.suffix == ".bin"])
    for path, weights in bins.items():
        for name, weight in weights.items():
            if weight.dtype not in NAMES:
                raise WeightsError("has a dtype that cannot be read", where=f"{path}: {name}", got=str(weight.dtype))
    return {path: bins[path] if path in bins else open_safetensors(path) for path in paths}


def _open_indexed(folder: Path, index: Path) -> Weights:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: folder / file for file in where.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"cannot be read: {error}", where=index, do="Copy it again.") from error
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise WeightsError("names a file outside of its folder", where=index, got=file, do="Do not trust it.")
    opened = _open_files(list(files.values()))
    weights: Weights = {}
    for file, path in files.items():
        found = opened[path]
        for name in found:  # those that the index leaves out too: whoever reads them says what they are
            if name not in where and name in weights:
                first = next(other for other in files if name in opened[files[other]])
                raise WeightsError(
                    f"does not say which {name} counts: {first} and {file} have one", where=index, do="Copy it again."
                )
            if where.get(name, file) == file:
                weights[name] = found[name]
    for name, file in where.items():
        if name not in opened[files[file]]:
            raise WeightsError(f"{file} has no tensor {name}, which the index says", where=index, do="Copy it again.")
    return weights


def open_safetensors(path: Path) -> Weights:
    """Return the weights of a safetensors file, not read yet.

    Raises:
        WeightsError: it is missing, damaged, or has a dtype that is not known.
    """
    problem = "Copy the file again."
    try:
        opened = safe_open(path, framework="pt")
        starts = _starts(path)
        found: Weights = {}
        for name in opened.keys():  # noqa: SIM118  not a dict
            part = opened.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in DTYPES:
                raise WeightsError("has a dtype that cannot be read", where=f"{path}: {name}", got=dtype)
            shape, reader = tuple(part.get_shape()), _Reader(path, opened, name)
            found[name] = Weight(shape, DTYPES[dtype], reader, name, (path, starts[name]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"cannot be read: {error}", where=path, do=problem) from error
    return found


def _starts(path: Path) -> dict[str, int]:
    """Return where each tensor of a safetensors file begins; the library has checked the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + facts["data_offsets"][0] for name, facts in header.items() if name != "__metadata__"}


@dataclass(frozen=True)
class _Reader:
    """Reads one tensor of an open safetensors file."""

    path: Path
    opened: Any
    name: str

    def __call__(self) -> Tensor:
        try:
            return self.opened.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"cannot be read: {error}", where=self.path, do="Copy the file again.") from error
