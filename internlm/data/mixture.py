"""Weighted sources: which source gives the next row, decided by counting, not by chance.

Row i goes to the source that is furthest behind its share, weight · (i + 1) − rows taken, so after any number of rows
every source is near its share. The whole state is how many rows each source has given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from internlm.config import section
from internlm.errors import ConfigError


@section
class SourceConfig:
    """One source of training or validation data."""

    path: str
    """Folder of shards, from `internlm data tokenize`."""
    weight: float | None = None
    """Share of the rows, relative to the other sources' weights. None for all: in proportion to their tokens."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ConfigError("must be a positive number", where=f"weight of {self.path}", got=self.weight)


class Mixture:
    """Draws source after source."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Start before the first row; weights are relative."""
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self.taken = [0] * len(weights)

    def draw(self) -> tuple[int, int]:
        """Return (source, how many rows it has given before) of the next row."""
        rows = sum(self.taken) + 1
        behind = [share * rows - taken for share, taken in zip(self.shares, self.taken, strict=True)]
        source = behind.index(max(behind))
        self.taken[source] += 1
        return source, self.taken[source] - 1
