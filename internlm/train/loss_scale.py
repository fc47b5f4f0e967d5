"""The factor that keeps float16 gradients from becoming zero, found while training (Micikevicius et al. 2018).

    loss · scale → backward → gradients / scale        not finite: skip the step, halve the scale
                                                       2,000 good steps in a row: double it

With every other dtype the scale is 1 and stays so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FIRST = 2.0**16
GROWTH_STEPS = 2000
"""Good steps after which a larger scale is tried."""
LEAST = 1.0
"""A model whose gradients overflow at this scale is broken: such steps count as skipped."""


@dataclass
class LossScale:
    """The scale of a run; saved with its progress."""

    value: float = 1.0
    """What losses are multiplied by before backward, and gradients divided by after: a power of two."""
    good_steps: int = 0
    """Since the last change."""
    is_dynamic: bool = False
    """Whether steps change it."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """Return the scale a run in this dtype begins with."""
        return cls(FIRST, 0, True) if dtype == torch.float16 else cls()

    def update(self, is_finite: bool) -> bool:
        """Learn how a step went; return whether it failed for no other reason than too large a scale.

        `is_finite` is about sums over all ranks: one rank's overflow is everybody's, and scales never part.
        """
        if not self.is_dynamic:
            return False
        if is_finite:
            self.good_steps += 1
            if self.good_steps == GROWTH_STEPS:
                self.value, self.good_steps = self.value * 2, 0
            return False
        was = self.value
        self.value, self.good_steps = max(LEAST, was / 2), 0
        return was > LEAST
