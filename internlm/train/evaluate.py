"""Validation: loss in nats per token and bits per byte of text, per source.

Bits per byte compares models with different tokenizers, and with gzip: the code length of the text, the end of each
document included, over its UTF-8 bytes. Every token of a source is scored once, in rows of the training length.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import torch

from internlm.config import require_positive, section
from internlm.data.batch import Batch
from internlm.data.loader import Loader, label_bytes
from internlm.log import duration
from internlm.parallel.apply import Parallel
from internlm.train.metrics import Metrics

logger = logging.getLogger(__name__)


@section
class EvaluateConfig:
    """When the validation sources are scored."""

    every_steps: int | None = None
    """Steps between two validations; None: only at the end."""
    rows: int = 16
    """Rows per forward pass."""
    limit_rows: int | None = None
    """Rows per source during training; None: all. The validation at the end always takes all."""

    def __post_init__(self) -> None:
        require_positive(self, "evaluate", "every_steps", "rows", "limit_rows")


class Evaluator:
    """Scores the validation sources of a run."""

    def __init__(self, config: EvaluateConfig, loader: Loader) -> None:
        self.config, self.loader = config, loader
        self.label_bytes = torch.from_numpy(label_bytes(loader.tokenizer))

    def evaluate(self, parallel: Parallel, *, final: bool) -> Metrics:
        """Return loss and bits per byte of every validation source; the last validation of a run takes all rows.

        Every rank must call it; each scores its share of the rows.
        """
        metrics: Metrics = {}
        limit, layout = None if final else self.config.limit_rows, parallel.layout
        for name in self.loader.config.validation:
            started = time.monotonic()
            rows = parallel.run.micro_rows or self.config.rows
            share = None if parallel.mesh is None else (layout.data_rank(parallel.rank), layout.data)
            batches = self.loader.validation_batches(name, rows, limit, share)
            loss, bits = score(parallel, batches, self.label_bytes)
            metrics |= {f"valid/loss/{name}": loss, f"valid/bits_per_byte/{name}": bits}
            spent = duration(time.monotonic() - started)
            logger.info("validation %s | loss %.4f | %.4f bits per byte | took %s", name, loss, bits, spent)
        return metrics


@torch.no_grad()
def score(parallel: Parallel, batches: Iterator[Batch], label_bytes: torch.Tensor) -> tuple[float, float]:
    """Return (nats per token, bits per byte) over all batches of all ranks; NaN where there is nothing to score.

    Args:
        parallel: the model, scored as it is.
        batches: this rank's; every label with weight > 0 counts once, whatever its weight.
        label_bytes: [V] UTF-8 bytes that each token stands for.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=parallel.device)  # nats, tokens, bytes

    def count(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        scored = batch.weights > 0
        outputs = parallel.run.score(hidden, batch.labels, scored.float())
        assert outputs.weighted is not None, "the head was given coefficients"
        sums[0] -= outputs.weighted
        sums[1] += scored.sum()
        sums[2] += label_bytes.to(parallel.device)[batch.labels[scored]].sum()
        return outputs.weighted

    for batch in batches:
        parallel.run.forward([batch.to(parallel.device)], count)
    nats, tokens, size = parallel.total(sums if parallel.counts else torch.zeros_like(sums)).tolist()
    return nats / tokens if tokens else math.nan, nats / math.log(2) / size if size else math.nan
