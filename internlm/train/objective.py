"""What a trainer asks of a loss, and every kind of it.

An objective is a section of the recipe with three pure functions. It returns sums, never means: the trainer divides by
the count of the whole step, over all micro-batches and ranks, so that a loss does not depend on how a step was cut.

    lm      loss = Σ weight · (−logp + z_loss · logz²)        count = Σ weight

Language modelling serves pre-training and tuning on conversations alike: what is trained is what has weight.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from internlm.config import require, section
from internlm.data.batch import Batch
from internlm.model.heads import TokenOutputs


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


@section
class LanguageModeling:
    """Next-token prediction."""

    kind: Literal["lm"] = "lm"
    z_loss: float = 0.0
    """Weight of logz², which keeps logits from drifting (PaLM, Chowdhery et al. 2022, §5). Not 0 costs one more matrix
    product in the head, because the loss is then no longer linear in log-probabilities."""

    def __post_init__(self) -> None:
        require(self, "objective", ("z_loss",), lambda weight: weight >= 0, "must be finite and not negative")

    @property
    def is_linear(self) -> bool:
        """Whether the loss is linear in log-probabilities: without `z_loss`."""
        return self.z_loss == 0

    def count(self, batch: Batch) -> Tensor:
        """Return the sum of weights."""
        return batch.weights.sum()

    def coefficients(self, batch: Batch) -> Tensor | None:
        """Return −weights [B, T], or None with `z_loss`."""
        return -batch.weights if self.is_linear else None

    def loss(self, outputs: TokenOutputs, batch: Batch) -> Tensor:
        """Return the sum over this micro-batch."""
        if outputs.weighted is not None:
            return outputs.weighted
        return (batch.weights * (self.z_loss * outputs.logz.square() - outputs.logp)).sum()


Objectives = LanguageModeling
"""Every kind, told apart by `kind`."""
