r"""How the learning rate moves: warm-up, then one of four courses; a pure function of how far the run is.

1 |  /‾‾‾‾\___          cosine, linear: from 1 to `final_ratio` at the end
| /         \__       wsd: 1 until the last `decay_ratio` of the run, then down in a straight line
0 |/_____________|      constant: 1
"""

from __future__ import annotations

import logging
import math
from typing import Literal

from internlm.config import require, section
from internlm.errors import ConfigError
from internlm.log import warn_once

logger = logging.getLogger(__name__)


@section
class ScheduleConfig:
    """Course of the learning rate."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course after the warm-up."""
    warmup_ratio: float = 0.01
    """Share of the run in which the rate rises in a straight line from 0."""
    final_ratio: float = 0.1
    """Rate at the end, as a share of the peak."""
    decay_ratio: float = 0.2
    """wsd only: share of the run in which the rate falls."""

    def __post_init__(self) -> None:
        names = ("warmup_ratio", "final_ratio", "decay_ratio")
        require(self, "schedule", names, lambda share: 0 <= share <= 1, "must lie between 0 and 1")
        if self.kind == "wsd" and self.warmup_ratio + self.decay_ratio > 1 + 1e-9:
            raise ConfigError(
                "begins before the warm-up is over", where="schedule.decay_ratio", got=self.decay_ratio,
                allowed=[f"at most 1 - schedule.warmup_ratio = {1 - self.warmup_ratio:g}"],
            )  # fmt: skip
        idle = {"decay_ratio": self.kind != "wsd", "final_ratio": self.kind == "constant"}
        for name, has_no_effect in idle.items():
            if has_no_effect and getattr(self, name) != getattr(ScheduleConfig, name):
                warn_once(logger, f"schedule.{name} has no effect with schedule.kind {self.kind}")


def rate(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of the next step, as a share of the peak; `step`: how many were taken so far."""
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    left = max(1, total_steps - warmup)
    done = min(1.0, (step + 1 - warmup) / left)  # the last step is taken at exactly final_ratio
    if config.kind == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * done))
    elif config.kind == "linear":
        fall = 1 - done
    elif config.kind == "wsd":
        fall = min(1.0, (1 - done) * left / max(1, round(config.decay_ratio * total_steps)))
    else:
        return 1.0
    return config.final_ratio + (1 - config.final_ratio) * fall
