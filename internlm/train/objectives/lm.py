"""Language modelling: the negative log-probability of the next token, summed over trained tokens.

    loss = Σ weight · (−logp + z_loss · logz²)        divided by Σ weight over the whole step

Serves pre-training and tuning on conversations alike: what is trained is what has weight.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from internlm.config import section
from internlm.data.batch import Batch
from internlm.errors import ConfigError
from internlm.model.heads import TokenOutputs


@section
class LanguageModeling:
    """Next-token prediction."""

    kind: Literal["lm"] = "lm"
    z_loss: float = 0.0
    """Weight of logz², which keeps logits from drifting (PaLM, Chowdhery et al. 2022, §5). Not 0 costs one more matrix
    product in the head, because the loss is then no longer linear in log-probabilities."""

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss < math.inf:
            raise ConfigError("must be finite and not negative", where="objective.z_loss", got=self.z_loss)

    @property
    def is_linear(self) -> bool:
        """Whether the loss is linear in log-probabilities."""
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
