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
from internlm.data import loader as data
from internlm.data.batch import Batch
from internlm.data.loader import DataConfig
from internlm.log import duration
from internlm.model.transformer import Transformer
from internlm.text.tokenizer import Tokenizer
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
    """Scores the validation sources of a run, with matrix products in `dtype`."""

    def __init__(self, config: EvaluateConfig, source: DataConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
        self.config, self.data, self.dtype = config, source, dtype
        self.label_bytes = torch.from_numpy(data.label_bytes(tokenizer))

    def __call__(self, model: Transformer, *, final: bool) -> Metrics:
        """Return loss and bits per byte of every validation source; the last validation of a run takes all rows."""
        metrics: Metrics = {}
        limit = None if final else self.config.limit_rows
        for name in self.data.validation:
            started = time.monotonic()
            batches = data.validation_batches(self.data, name, self.config.rows, limit)
            loss, bits = score(model, batches, self.label_bytes, self.dtype)
            metrics |= {f"valid/loss/{name}": loss, f"valid/bits_per_byte/{name}": bits}
            spent = duration(time.monotonic() - started)
            logger.info("validation %s | loss %.4f | %.4f bits per byte | took %s", name, loss, bits, spent)
        return metrics


@torch.no_grad()
def score(
    model: Transformer, batches: Iterator[Batch], label_bytes: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Return (nats per token, bits per byte) over all batches; NaN where there is nothing to score.

    Args:
        model: scored as it is.
        batches: every label with weight > 0 counts once, whatever its weight.
        label_bytes: [V] UTF-8 bytes that each token stands for.
        dtype: of the matrix products, as in training.
    """
    nats, tokens, size = 0.0, 0, 0
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            scored = batch.weights > 0
            size += int(label_bytes[batch.labels[scored]].sum())
            there = batch.to(device)
            with autocast(device, dtype):
                hidden = model(there.tokens, there.positions, there.documents)
                outputs = model.head(hidden, there.labels, (there.weights > 0).float())
            assert outputs.weighted is not None, "the head was given coefficients"
            nats -= float(outputs.weighted)
            tokens += int(scored.sum())
    finally:
        model.train(was_training)
    return nats / tokens if tokens else math.nan, nats / math.log(2) / size if size else math.nan


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which matrix products are in `dtype`: bf16, or as the weights are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
