"""A weight that is not read yet: what every format is opened into, and written from.

    weights = files.open_folder("llama-folder")          # their names, nothing read
    ours = to_ours(weights, config)                      # our names, still nothing read
    ours["blocks.0.attention.wq.weight"].read()          # now

A format is a function from one dict of weights to another. Renaming, cutting, joining and turning are written once, as
what they do to shapes, and run when a tensor is read: a conversion holds one tensor in memory, never a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from internlm.errors import WeightsError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+(?=\])")


@dataclass(frozen=True)
class Weight:
    """A tensor to be read: its form is known, its values are not."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns the tensor, on the CPU; it may map a file and must not be written to."""
    origin: str = ""
    """Where it comes from, by the names of the source, for people."""
    place: tuple[Path, int] | None = None
    """File and offset where its bytes lie as they are, for whoever copies them; None: only `read` gives them."""

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def turned(self, shape: Sequence[int], turn: Callable[[Tensor], Tensor], note: str = "") -> Weight:
        """Return this weight in another form, of the same dtype; `note` says how, after its origin."""
        return joined([self], shape, lambda parts: turn(parts[0]), note)

    def to(self, dtype: torch.dtype | None) -> Weight:
        """Return this weight in another dtype; None: as it is."""
        if dtype is None or dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype), place=None)


Weights = dict[str, Weight]
"""The weights of a model by name."""


def joined(
    parts: Sequence[Weight], shape: Sequence[int], join: Callable[[list[Tensor]], Tensor], note: str = ""
) -> Weight:
    """Return the weight that `join` makes of several, when it is read.

    Args:
        parts: of one dtype.
        shape: of the result.
        join: takes the tensors of the parts.
        note: how they are joined, after their origin.

    Raises:
        WeightsError: the dtypes differ.
    """
    dtypes = {part.dtype for part in parts}
    origin = _shortened([part.origin for part in parts]) + note
    if len(dtypes) > 1:
        raise WeightsError(f"parts of one weight have several dtypes: {', '.join(map(str, dtypes))}", where=origin)

    def read() -> Tensor:
        return join([part.read() for part in parts])

    return Weight(tuple(shape), parts[0].dtype, read, origin)


def shared(weight: Weight, times: int) -> Weight:
    """Return a weight of which `times` pieces are taken: its tensor is kept from the first read to the last."""
    held: list[Tensor] = []
    taken = 0

    def read() -> Tensor:
        nonlocal taken
        if not held:
            held.append(weight.read())
        taken += 1
        return held.pop() if taken % times == 0 else held[0]

    return replace(weight, read=read)


def of_tensor(tensor: Tensor, origin: str = "") -> Weight:
    """Return a tensor that is in memory as a weight."""
    return Weight(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().to("cpu"), origin)


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Weights:
    """Return named tensors that are in memory, such as `model.named_parameters()`, as weights."""
    return {name: of_tensor(tensor, name) for name, tensor in tensors}


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Weight:
    """Return a weight of zeros that no source has."""
    return Weight(tuple(shape), dtype, lambda: torch.zeros(tuple(shape), dtype=dtype), "(zeros)")


def tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), read one at a time.

    Raises:
        WeightsError: what was read is not what was announced: the source changed, or is damaged.
    """
    for name, weight in weights.items():
        yield name, read(name, weight)


def read(name: str, weight: Weight) -> Tensor:
    """Return the tensor of a weight.

    Raises:
        WeightsError: it has another shape or dtype than announced.
    """
    tensor = weight.read()
    if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
        found = f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise WeightsError(f"was announced as {weight.shape} of {weight.dtype} and came as {found}", where=name)
    return tensor


def main_dtype(weights: Weights) -> torch.dtype:
    """Return the dtype that most elements have."""
    elements: dict[torch.dtype, int] = {}
    for weight in weights.values():
        elements[weight.dtype] = elements.get(weight.dtype, 0) + math.prod(weight.shape)
    return max(elements, key=lambda dtype: elements[dtype])


def table(weights: Weights) -> list[str]:
    """Return lines that say what each weight was made of; weights that differ in numbers alone share one."""
    rows: dict[tuple[str, str, str], int] = {}
    for name, weight in weights.items():
        form = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        row = (_NUMBER.sub("{i}", weight.origin), _NUMBER.sub("{i}", name), form)
        rows[row] = rows.get(row, 0) + 1
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{a:{wide[0]}} → {b:{wide[1]}}  {form}" + (f" × {n}" if n > 1 else "") for (a, b, form), n in rows.items()]


def _shortened(origins: list[str]) -> str:
    """Return several origins as one text; many as first … last."""
    unique = list(dict.fromkeys(origins))
    return " + ".join(unique) if len(unique) <= 3 else f"{unique[0]} … {unique[-1]} ({len(unique)})"
