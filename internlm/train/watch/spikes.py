"""Loss spikes: a step whose loss lies far above those before it.

    losses of the steps before ─→ median of the last, spread ─→ z of this loss = (loss − median) / spread
                                                                z > limit: a spike, known before the update is made

The spread is that of a normal distribution whose neighbours differ as the window's do, by the median: neither a few
wild losses nor a loss that falls steeply moves it. The median is that of the last quarter of the window. A spike joins
the window as well: where the level of the loss itself has moved, the median follows.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from internlm.config import require, require_positive, section

_LEAST_SPREAD = 0.005
"""Of the median: a loss that hardly moves has no spread to speak of."""


@section
class SpikeConfig:
    """What is done about loss spikes."""

    policy: Literal["off", "warn", "skip_data", "rollback"] = "warn"
    """`off`, `warn`, `skip_data` (no update of such a step) or `rollback` (to the newest checkpoint, past the data)."""
    z: float = 8.0
    """How many spreads above the median of the window a loss is a spike."""
    window: int = 128
    """Steps that are looked back on."""
    least: int = 32
    """Steps before the first judgement."""
    most_rollbacks: int = 5
    """More in one run are warnings only."""

    def __post_init__(self) -> None:
        require_positive(self, "spikes", "z", "window")
        require(self, "spikes", ("least",), lambda steps: steps >= 2, "must be at least 2: one loss has no neighbour")


@dataclass
class Spikes:
    """The losses of a run's last steps."""

    config: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.config.window)

    def add(self, loss: float) -> float | None:
        """Take the loss of a step; return its z where that makes it a spike."""
        found = None
        if self.config.policy != "off" and len(self.losses) >= min(self.config.least, self.config.window):
            z = self.z(loss)
            found = z if z > self.config.z else None
        self.losses.append(loss)
        return found

    def z(self, loss: float) -> float:
        """Return how many spreads a loss lies above the median of those before."""
        losses = list(self.losses)
        median = statistics.median(losses[-max(self.config.window // 4, 1) :])
        distance = statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))
        return (loss - median) / max(1.4826 / math.sqrt(2) * distance, _LEAST_SPREAD * abs(median), 1e-12)
