"""What a run measures: sums on the device during a step, one flat dict per logged step, one JSON line per dict.

Of the names and units: `train/loss` and `valid/loss/<source>` are nats per token, `train/step_loss` is that of the one
step, `train/accuracy` the share of labels that were the most probable token; `perf/mfu` is useful operations over the
device's dense peak, `perf/hfu` the same with what is computed again; `mem/peak_gib` is of the rank with the most,
`goodput/<phase>` the share of the run's wall time. Of a traced step: `perf/comm_s` (something is exchanged),
`perf/comm_wait_s` (and nothing computed meanwhile), `ranks/slowest_ratio` (the time of `ranks/slowest_rank` over the
median). With experts: `moe/balance` (1 where all are chosen alike), `moe/z`, `moe/busiest_expert` (how often the most
chosen expert of any layer was chosen, over the mean of its layer).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internlm import disk, runtime
from internlm.cost import flops
from internlm.data.batch import Batch
from internlm.log import duration, quantity
from internlm.model.heads import TokenOutputs
from internlm.parallel.apply import Parallel
from internlm.parallel.recompute import chosen

Metrics = dict[str, float]


class Meter:
    """Adds up a window of steps. Tensors stay on the device until `read`, which waits for it once."""

    def __init__(self, parallel: Parallel, sources: tuple[str, ...], peak_flops: float) -> None:
        self.parallel, self.sources, self.peak_flops = parallel, sources, peak_flops
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        # Columns: Σ −logp·weight, Σ weight, Σ correct·weight; one row per source.
        self.sums = torch.zeros(len(self.sources), 3, dtype=torch.float64, device=self.parallel.device)
        self.tokens = 0
        self.flops = self.recomputed = 0.0
        self.steps = 0
        self.data_wait_s = 0.0
        for sides in self.parallel.run.sides.values():
            sides.clear()
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, outputs: TokenOutputs, batch: Batch) -> None:
        """Count one micro-batch. Rows that are not finite are left out: their step is skipped and hides no other."""
        if not self.parallel.counts:
            return
        weights = batch.weights
        rows = torch.stack([-outputs.logp * weights, weights, outputs.correct * weights], -1).sum(1)  # [B, 3]
        rows = rows.where(rows.isfinite().all(-1, keepdim=True), 0.0)
        self.sums.index_add_(0, batch.source, rows.double())

    def add_batch(self, batch: Batch) -> None:
        """Count tokens and useful arithmetic of a step's batch that is still on the CPU."""
        if not self.parallel.leads:
            return
        self.tokens += batch.tokens.numel()
        pairs = sum(flops.causal_pairs(n) for n in document_lengths(batch.documents.numpy()))
        tokens = batch.tokens.numel() - batch.num_padding
        self.flops += flops.training_flops(self.parallel.shape, tokens, pairs)
        again = self.parallel.config.recompute
        if again.kind == "full":
            share = len(chosen(self.parallel.shape.num_layers, again.ratio)) / self.parallel.shape.num_layers
            self.recomputed += flops.recomputed_flops(self.parallel.shape, tokens, pairs, share)

    def _choices(self) -> Tensor:
        """Return a row per layer: how often each of its experts was chosen, Σ balance, Σ z, tokens; 0 if elsewhere."""
        shape = self.parallel.shape
        rows = self.sums.new_zeros(shape.num_layers, shape.experts.count + 3 if shape.experts else 0)
        for layer, sides in self.parallel.run.sides.items():
            rows[layer] = sides.counts
        return rows

    def read(self) -> Metrics:
        """Return the window's figures, over all ranks. Every rank must call it."""
        peaks = self.sums.new_zeros(self.parallel.layout.world_size)
        peaks[self.parallel.rank] = runtime.peak_memory_bytes(self.parallel.device)[0]
        own = [self.sums, self._choices(), self.sums.new_tensor([self.tokens, self.flops, self.recomputed]), peaks]
        totals = self.parallel.total(torch.cat([part.flatten() for part in own])).cpu()  # waits
        spent = max(time.perf_counter() - self.started, 1e-9)
        sums, choices, rates, peaks = (
            part.view(like.shape) for part, like in zip(totals.split([part.numel() for part in own]), own, strict=True)
        )
        tokens, operations, recomputed = (rates / self.parallel.layout.world_size).tolist()
        loss, weight, correct = sums.sum(0).tolist()
        weight, peak = weight or math.nan, self.peak_flops or math.nan
        metrics = {
            "train/loss": loss / weight,
            "train/accuracy": correct / weight,
            "perf/tokens_per_s_per_device": tokens / spent,
            "perf/tflops": operations / spent / 1e12,
            "perf/mfu": operations / spent / peak,
            "perf/hfu": (operations + recomputed) / spent / peak,
            "perf/step_s": spent / max(1, self.steps),
            "perf/data_wait_s": self.data_wait_s / max(1, self.steps),
            "mem/peak_gib": float(peaks.max()) / 2**30,
        }
        metrics |= _choice_metrics(choices)
        if len(self.sources) > 1:
            for name, (source_loss, source_weight, _) in zip(self.sources, sums.tolist(), strict=True):
                if source_weight:
                    metrics[f"train/loss/{name}"] = source_loss / source_weight
        return metrics


def _choice_metrics(choices: Tensor) -> Metrics:
    """Return what the experts of all layers did, from `Meter._choices` summed over ranks; nothing without experts.

    Where the backward of weights is parted from that of inputs (zero-bubble, zbv) some layers count nothing.
    """
    if not choices.numel() or not choices[:, -1].any():
        return {}
    choices = choices[choices[:, -1] > 0]
    chosen, sums, tokens = choices.split([choices.shape[1] - 3, 2, 1], 1)
    balance, z = (sums / tokens).mean(0).tolist()
    busiest = (chosen.amax(1) / chosen.mean(1)).max()
    return {"moe/balance": balance, "moe/z": z, "moe/busiest_expert": float(busiest)}


def document_lengths(documents: np.ndarray) -> list[int]:
    """Return the lengths of all documents of a batch [B, T], padding (id −1) left out."""
    changed = np.ones(documents.shape, dtype=bool)
    changed[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begins = np.flatnonzero(changed)
    lengths = np.diff(np.append(begins, documents.size))
    return lengths[documents.reshape(-1)[begins] >= 0].tolist()


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended and flushed, so that a killed run loses nothing."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Open the file; lines of steps after `resumed_step`, which will be taken again, are removed."""
        self.path = path
        self._open(resumed_step)

    def cut(self, step: int) -> None:
        """Remove the lines of steps after this one, which will be taken again."""
        self.close()
        self._open(step)

    def _open(self, step: int) -> None:
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
            disk.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        with disk.explained(f"opening {self.path}"):
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed with the run

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one line; what is not finite becomes null, as JSON has no word for it."""
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
        with disk.explained(f"writing {self.path}"):
            self.file.write(json.dumps({"step": step, **line}) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        with disk.explained(f"writing {self.path}"):
            self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line cut short by a crash is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def step_line(step: int, total: int, metrics: Metrics, memory: int, eta_s: float) -> str:
    """Return the one line that is logged for a step; `memory`: bytes of the device."""
    is_known = math.isfinite(metrics.get("perf/comm_wait_s", math.nan))
    used, size = metrics["mem/peak_gib"], memory / 2**30
    waiting = f" | comm wait {metrics['perf/comm_wait_s']:.3g}s" if is_known else ""
    return (
        f"step {step}/{total} | loss {metrics['train/loss']:.4f} | lr {metrics['optim/lr']:.1e} "
        f"| grad {metrics['optim/grad_norm']:.2f} | {quantity(metrics['perf/tokens_per_s_per_device'])} tok/s/device "
        f"| mfu {metrics['perf/mfu']:.1%} | mem {used:.1f}/{size:.1f} GiB | eta {duration(eta_s)}{waiting}"
    )
