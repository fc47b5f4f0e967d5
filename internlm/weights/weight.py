"""A weight that is not read yet: what every format is opened into, and written from.

    weights = files.open_folder("llama-folder")          # nothing is read yet
    weights["model.norm.weight"].read()

A format is a function from one dict of weights to another; what it does to tensors is done when one is read: a
conversion holds one tensor in memory, never a model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
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
    """Where it comes from, for people."""
    place: tuple[Path, int] | None = None
    """File and offset where its bytes lie as they are; None: only `read` gives them."""

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
    """Return the weight that `join` makes of several, when it is read; `note` says how, after their origin.

    Raises:
        WeightsError: the dtypes differ.
    """
    dtypes = {part.dtype for part in parts}
    origins = list(dict.fromkeys(part.origin for part in parts))
    few = " + ".join(origins)
    origin = (few if len(origins) <= 3 else f"{origins[0]} … {origins[-1]} ({len(origins)})") + note
    if len(dtypes) > 1:
        raise WeightsError(f"parts of one weight have several dtypes: {', '.join(map(str, dtypes))}", where=origin)

    def read() -> Tensor:
        return join([part.read() for part in parts])

    return Weight(tuple(shape), parts[0].dtype, read, origin)


def pairs_apart(weight: Weight, head_dim: int) -> Weight:
    """Return wq or wk, or its bias, with rotary pairs that were neighbours half a head apart."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return weight.turned(weight.shape, turn, " (pairs apart)")


def apart(weight: Weight, groups: int, parts: Sequence[tuple[int, ...]], notes: Sequence[str]) -> list[Weight]:
    """Return the weights of these shapes, whose rows lie one after another in each group; notes: after their origin."""
    rows = [rows_of(shape, groups) for shape in parts]

    def take(number: int) -> Callable[[Tensor], Tensor]:
        return lambda t: t.reshape(groups, sum(rows), -1).split(rows, 1)[number].reshape(parts[number])

    return [weight.turned(shape, take(n), note) for n, (shape, note) in enumerate(zip(parts, notes, strict=True))]


def rows_of(shape: tuple[int, ...], groups: int) -> int:
    """Return the rows that a weight has in each group."""
    return math.prod(shape) // groups // (shape[-1] if len(shape) > 1 else 1)


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
    """Return named tensors that are in memory as weights."""
    return {name: of_tensor(tensor, name) for name, tensor in tensors}


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Weight:
    """Return a weight of zeros that no source has."""
    return Weight(tuple(shape), dtype, lambda: torch.zeros(tuple(shape), dtype=dtype), "(zeros)")


def tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), read one at a time as by `read`."""
    yield from ((name, read(name, weight)) for name, weight in weights.items())


def read(name: str, weight: Weight) -> Tensor:
    """Return the tensor of a weight.

    Raises:
        WeightsError: it has another shape or dtype than announced: the source changed, or is damaged.
    """
    tensor = weight.read()
    if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
        found = f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise WeightsError(f"was announced as {weight.shape} of {weight.dtype} and came as {found}", where=name)
    return tensor


def main_dtype(weights: Weights) -> torch.dtype:
    """Return the dtype that most elements have."""
    elements: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        elements[weight.dtype] += math.prod(weight.shape)
    return elements.most_common(1)[0][0]


def table(weights: Weights) -> list[str]:
    """Return lines that say what each weight was made of; weights that differ in numbers alone share one."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for name, weight in weights.items():
        form = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        rows[_NUMBER.sub("{i}", weight.origin), _NUMBER.sub("{i}", name), form] += 1
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{a:{wide[0]}} → {b:{wide[1]}}  {form}" + (f" × {n}" if n > 1 else "") for (a, b, form), n in rows.items()]
