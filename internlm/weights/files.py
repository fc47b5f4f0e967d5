"""Weight files of a Transformers folder: safetensors, written as a stream; safetensors and `.bin` read lazily.

    {"x": Weight, "y": Weight}  →  model-00001-of-00002.safetensors, …, model.safetensors.index.json

A safetensors file is a header (8 bytes of length, JSON) and the tensors' bytes, one after the other. The header follows
from shapes and dtypes, so that memory holds one tensor; the library's own writer takes all of a file at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internlm import disk, storage
from internlm.errors import WeightsError
from internlm.hashed_file import HashedFile
from internlm.text.tokenizer import VOCABULARY_FILES
from internlm.weights import weight as lazy
from internlm.weights.pickles import AGAIN, open_bins
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
Done = Callable[[int], None]
"""Is told the bytes of each tensor that was written or found."""
_POINTER = b"version https://git-lfs"
"""How the text begins that git keeps in the place of a large file."""


def _plan(weights: Weights, max_bytes: int) -> dict[str, Weights]:
    """Return the files that hold weights, none larger than `max_bytes` unless one tensor is."""
    groups: list[Weights] = []
    held = 0
    for name, weight in weights.items():
        if not groups or held + weight.nbytes > max_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = weight
        held += weight.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def write(folder: storage.Writing, weights: Weights, max_bytes: int, done: Done) -> None:
    """Write weights as safetensors files of bounded size, with the index where there are several.

    Raises:
        WeightsError: a value is not finite in the dtype it is written in, or a source cannot be read.
    """
    shards = _plan(weights, max_bytes)
    for name, held in shards.items():
        write_file(folder, name, held, done, _write_shard)
    if len(shards) > 1:
        where = {name: shard for shard, held in shards.items() for name in held}
        index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": where}
        disk.write_json(folder.path / INDEX, index)


def write_file(
    folder: storage.Writing, name: str, weights: Weights, done: Done, write: Callable[[Path, Weights, Done], str]
) -> None:
    """Write a file with `write`, which returns its SHA-256; one that is there was written by an interrupted export."""
    path = folder.path / name
    if path.exists():
        done(sum(weight.nbytes for weight in weights.values()))
        return
    beside = path.with_suffix(".unfinished")
    with disk.explained(f"writing {path}"):
        folder.hashes[name] = write(beside, weights, done)
        os.replace(beside, path)


def header(parts: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[bytes, list[int], int]:
    """Return the head of a safetensors file of such tensors, where each begins, and the file's bytes."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for name, shape, dtype in parts:
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        described[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + start for start in ends[:-1]], len(head) + ends[-1]


def _write_shard(path: Path, weights: Weights, done: Done) -> str:
    with one_thread(), HashedFile(path) as file:
        file.write(header((name, weight.shape, weight.dtype) for name, weight in weights.items())[0])
        for name, weight in weights.items():
            _write_weight(file, name, weight)
            done(weight.nbytes)
        return file.sha256()


def _write_weight(file: HashedFile, name: str, weight: Weight) -> None:
    """Append the bytes of a weight to a file; what lies in another file as it is, is copied from there.

    Raises:
        WeightsError: it holds a value that is not finite, or cannot be read.
    """
    if weight.place is not None and weight.nbytes:
        path, start = weight.place

        def look(piece: memoryview) -> None:
            require_finite(name, torch.frombuffer(piece, dtype=weight.dtype))

        try:
            file.copy(path, start, weight.nbytes, look, unit=weight.dtype.itemsize)
        except EOFError as error:
            raise WeightsError(f"cannot be read: {error}", where=name, do=AGAIN) from error
        return
    flat = lazy.read(name, weight).contiguous().reshape(-1)
    for piece in flat.split(HashedFile.PIECE // flat.element_size()):  # looked at and written from the cache
        file.write(as_bytes(require_finite(name, piece)))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread inside the block: others would keep the hashing from its core."""
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
    """Return whether a tensor holds neither infinities nor NaN, in one pass."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)  # NaN goes through
    return bool(low.isfinite() & high.isfinite())


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that is to be written; raise WeightsError where it holds infinities or NaN."""
    if not is_finite(tensor):
        do = "Export as float32 or bfloat16, or train anew."
        raise WeightsError(f"is not finite as {tensor.dtype}", where=name, do=do)
    return tensor


def open_folder(folder: Path) -> Weights:
    """Return the weights of a Transformers folder under their names there, not read yet; safetensors before `.bin`.

    Raises:
        WeightsError: there are no weight files, or one is missing or damaged.
    """
    for single, index in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):
        if (folder / single).is_file():  # before an index, as Transformers has it
            return open_files([folder / single])[folder / single]
        if (folder / index).is_file():
            return _open_indexed(folder, folder / index)
    raise WeightsError(f"holds neither {SINGLE} nor {INDEX}, nor {BIN_SINGLE} or {BIN_INDEX}", where=folder)


def require_fetched(path: Path) -> None:
    """Raise WeightsError where a file, or what is read of a folder, is the pointer that git-lfs leaves in its place."""
    forms = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*.gguf")  # of the first alone, if there is
    found = next(filter(None, (sorted(path.glob(form)) for form in forms)), []) if path.is_dir() else [path]
    vocabularies = [path / name for name in VOCABULARY_FILES if (path / name).is_file()]
    for file in (*found, *vocabularies[:1]):
        if not file.is_file():
            continue
        with disk.explained(f"reading {file}"), file.open("rb") as opened:
            is_pointer = opened.read(len(_POINTER)) == _POINTER
        if is_pointer:
            do = "In its folder: `git lfs pull`; or download the file itself."
            raise WeightsError("is a pointer of git-lfs, not the file: that was never fetched", where=file, do=do)


def open_files(paths: list[Path]) -> dict[Path, Weights]:
    """Return the weights of files, told by their names' end, not read yet.

    Raises:
        WeightsError: one is missing or damaged, or has a dtype that is not known; a `.bin` file would run code.
    """
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
        raise WeightsError(f"cannot be read: {error}", where=index, do=AGAIN) from error
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise WeightsError("names a file outside of its folder", where=index, got=file, do="Do not trust it.")
    opened = open_files(list(files.values()))
    weights: Weights = {}
    for file, path in files.items():
        found = opened[path]
        for name in found:  # those that the index leaves out too: its reader says what they are
            if name not in where and name in weights:
                first = next(other for other in files if name in opened[files[other]])
                what = f"does not say which {name} counts: {first} and {file} have one"
                raise WeightsError(what, where=index, do=AGAIN)
            if where.get(name, file) == file:
                weights[name] = found[name]
    for name, file in where.items():
        if name not in opened[files[file]]:
            raise WeightsError(f"{file} has no tensor {name}, which the index says", where=index, do=AGAIN)
    return weights


def open_safetensors(path: Path) -> Weights:
    """Return the weights of a safetensors file; otherwise as `open_files`."""
    try:
        opened = safe_open(path, framework="pt")
        starts = _starts(path)
        found: Weights = {}
        for name in opened.keys():  # noqa: SIM118  not a dict
            part = opened.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in DTYPES:
                raise WeightsError("has a dtype that cannot be read", where=f"{path}: {name}", got=dtype)
            reader = partial(_read, path, opened, name)
            found[name] = Weight(tuple(part.get_shape()), DTYPES[dtype], reader, name, (path, starts[name]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"cannot be read: {error}", where=path, do=AGAIN) from error
    return found


def _starts(path: Path) -> dict[str, int]:
    """Return where each tensor of a file begins that the library has checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + facts["data_offsets"][0] for name, facts in header.items() if name != "__metadata__"}


def _read(path: Path, opened: Any, name: str) -> Tensor:
    try:
        return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot be read: {error}", where=path, do=AGAIN) from error
