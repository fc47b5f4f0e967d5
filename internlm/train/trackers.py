"""Where metrics go besides `metrics.jsonl`: sinks of the same dict, used when their library is installed."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Protocol

from internlm.train.metrics import Metrics

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A sink of metrics."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoard:
    """Event files under RUN/tensorboard; points of steps after `resumed_step`, which come again, are taken back."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write one point per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


def open_trackers(run: Path, resumed_step: int) -> list[Tracker]:
    """Return a sink for each tracking library that is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return []
    return [TensorBoard(run, resumed_step)]
