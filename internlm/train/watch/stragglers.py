"""Ranks that are slower than the others: what each did itself in a step, without what it waited for others.

All ranks take a step in the same time, as they wait for each other. So a look is taken at the steps that are traced
anyway (`train.trace_every_steps`), where the waiting is known, and travels in the sum that such a step makes:

    own  = the step's time − waiting for other ranks (something is exchanged and nothing computed) − waiting for data
    data = waiting for the loader per step, as a mean since the look before: such waits come in bursts
    a rank's time = own + data

A rank is compared with the median of those of its pipeline stage (of an even number, the lower of the two in the
middle), since stages differ by design. One that is `RATIO` times slower in `LOOKS` looks in a row is named in a
warning, once until it has been fast again.
"""

from __future__ import annotations

import math
import socket
import statistics
from collections import Counter

import torch
from torch import Tensor

from internlm import ranks
from internlm.parallel.mesh import Layout

RATIO = 1.5
LOOKS = 3


class Stragglers:
    """What the looks of a run found. Every rank has one."""

    def __init__(self, layout: Layout) -> None:
        self.stages = [layout.coordinates(rank).pipeline for rank in range(layout.world_size)]
        self._hosts: list[str] | None = None
        self._slow: Counter[int] = Counter()
        """Looks in a row in which a rank was slow."""
        self._data_s, self._steps = 0.0, 0
        """At the look before."""

    def row(self, figures: list[float], data_s: float, steps: int) -> Tensor:
        """Return what this rank adds to the sum over all ranks: a table [ranks, 4] with its own row filled in.

        Args:
            figures: communication, waiting in it, and the step's time without waiting for data; NaN where unknown.
            data_s, steps: seconds waited for data so far, and steps taken.
        """
        waited = (data_s - self._data_s) / max(1, steps - self._steps)
        self._data_s, self._steps = data_s, steps
        table = torch.zeros(len(self.stages), 4, dtype=torch.float64)
        table[ranks.rank()] = torch.tensor([*figures, waited])
        return table

    def look(self, table: Tensor) -> tuple[dict[str, float], str | None]:
        """Return metrics of a look, from the rows [ranks, 4] of all, and on rank 0 a warning if there is a reason."""
        if self._hosts is None:
            self._hosts = ranks.gather(socket.gethostname())
        communication, waiting, wall, data = table.t().tolist()
        metrics = {"perf/comm_s": statistics.fmean(communication), "perf/comm_wait_s": statistics.fmean(waiting)}
        if math.isnan(metrics["perf/comm_wait_s"]):
            return metrics, None
        own = [max(0.0, step - wait) for step, wait in zip(wall, waiting, strict=True)]
        ratios = self._ratios([a + b for a, b in zip(own, data, strict=True)])
        slowest = max(ratios, key=lambda rank: ratios[rank])
        metrics |= {"ranks/slowest_rank": float(slowest), "ranks/slowest_ratio": ratios[slowest]}
        named = []
        for rank, ratio in ratios.items():
            self._slow[rank] = self._slow[rank] + 1 if ratio > RATIO else 0
            if self._slow[rank] == LOOKS:
                named.append(
                    f"rank {rank} on {self._hosts[rank]} takes {ratio:.1f} × the median of its peers: "
                    f"{own[rank]:.3g} s of its own in a step, {data[rank]:.3g} s of waiting for data"
                )
        return metrics, "; ".join(named) if named and ranks.rank() == 0 else None

    def _ratios(self, spent_s: list[float]) -> dict[int, float]:
        """Return of every rank its time over the median of its pipeline stage."""
        ratios: dict[int, float] = {}
        for stage in set(self.stages):
            members = [rank for rank, at in enumerate(self.stages) if at == stage]
            median = statistics.median_low(spent_s[rank] for rank in members)
            ratios |= {rank: spent_s[rank] / median if median > 0 else 1.0 for rank in members}
        return ratios
