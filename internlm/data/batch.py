"""The Batch: what one forward pass sees.

    row       | the cat sat <eos> <bos> a dog barked <eos> ·  ·  |
    documents |  0   0   0    0     1   1  1     1     1  -1 -1
    positions |  0   1   2    3     0   1  2     3     4   0  0
    labels    | cat sat <eos> ·     a  dog barked <eos> ·  ·  ·
    weights   |  1   1   1    0     1   1  1     1     0   0  0

Documents never see each other; padding is a document of its own, so attention over it does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import itemgetter

import torch
from torch import Tensor


@dataclass
class Batch:
    """Packed rows. int64 [B, T] unless said otherwise."""

    tokens: Tensor
    """Ids; 0 in padding."""
    labels: Tensor
    """The next id of the same document; 0 where there is none."""
    positions: Tensor
    """Place in the document, from 0."""
    documents: Tensor
    """Which document of the row, from 0; −1 in padding."""
    weights: Tensor
    """What the label's loss is multiplied by, float32; 0 where nothing is trained."""
    source: Tensor
    """[B], the row's source, an index into `sources`."""
    sources: tuple[str, ...]
    """Names of all sources of the run."""

    @property
    def num_tokens(self) -> int:
        """Number of labels that are trained on."""
        return int((self.weights > 0).sum())

    @property
    def num_padding(self) -> int:
        """Number of positions that hold nothing."""
        return int((self.documents < 0).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def micro_batches(self, rows: int) -> list[Batch]:
        """Return the batch cut along B into parts of `rows` rows, the last perhaps smaller."""
        return [self._map(itemgetter(slice(i, i + rows))) for i in range(0, len(self.tokens), rows)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "sources"}
        return Batch(**tensors, sources=self.sources)
