"""What a trainer asks of a loss, and the one list of kinds.

An objective is a section of the recipe with three pure functions. It returns sums, never means: the trainer divides by
the count of the whole step, over all micro-batches and ranks, so that a loss does not depend on how a step was cut.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from internlm.data.batch import Batch
from internlm.model.heads import TokenOutputs
from internlm.train.objectives.lm import LanguageModeling


class Objective(Protocol):
    """The functions that the trainer calls, in this order, for every micro-batch."""

    @property
    def is_linear(self) -> bool:
        """Whether the loss is linear in log-probabilities, so that the head needs no product more for its gradient."""

    def count(self, batch: Batch) -> Tensor:
        """Return this micro-batch's share of the denominator, a scalar known before forward."""

    def coefficients(self, batch: Batch) -> Tensor | None:
        """Return d loss / d logp [B, T], known before forward, of a linear loss; of another None."""

    def loss(self, outputs: TokenOutputs, batch: Batch) -> Tensor:
        """Return the sum over this micro-batch, a scalar with a gradient."""


Objectives = LanguageModeling
"""Every kind, told apart by `kind`."""
