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

from internlm.config import section
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


class Evaluator:
    """Scores the validation sources of a run."""

    def __init__(self, config: EvaluateConfig, source: DataConfig, tokenizer: Tokenizer) -> None:
        self.config, self.data = config, source
        self.label_bytes = torch.from_numpy(data.label_bytes(tokenizer))

    def __call__(self, model: Transformer, *, final: bool) -> Metrics:
        """Return loss and bits per byte of every validation source; the last validation of a run takes all rows."""
        metrics: Metrics = {}
        limit = None if final else self.config.limit_rows
        for name in self.data.validation:
            started = time.monotonic()
            batches = data.validation_batches(self.data, name, self.config.rows, limit)
            loss, bits = score(model, batches, self.label_bytes)
            metrics |= {f"valid/loss/{name}": loss, f"valid/bits_per_byte/{name}": bits}
            spent = duration(time.monotonic() - started)
            logger.info("validation %s | loss %.4f | %.4f bits per byte | took %s", name, loss, bits, spent)
        return metrics


@torch.no_grad()
def score(model: Transformer, batches: Iterator[Batch], label_bytes: torch.Tensor) -> tuple[float, float]:
    """Return (nats per token, bits per byte) over all batches.

    Args:
        model: scored as it is; a device's autocast applies.
        batches: every label with weight > 0 counts once, whatever its weight.
        label_bytes: [V] UTF-8 bytes that each token stands for.
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
            with autocast(device):
                hidden = model(there.tokens, there.positions, there.documents)
                outputs = model.head(hidden, there.labels, (there.weights > 0).float())
            assert outputs.weighted is not None, "the head was given coefficients"
            nats -= float(outputs.weighted)
            tokens += int(scored.sum())
    finally:
        model.train(was_training)
    return nats / max(1, tokens), nats / math.log(2) / max(1, size)


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> torch.autocast:
    """Return the mixed-precision context of a device: matrix products in bf16 on GPUs, none on CPUs."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
