"""Weights to read, whatever their format: a run, a checkpoint, or a Transformers folder.

source = open_source("runs/a")            # its newest complete checkpoint
model = source.model(torch.float32)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internlm.checkpoint import store
from internlm.errors import StorageError
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer
from internlm.text.tokenizer import Tokenizer
from internlm.weights import transformers
from internlm.weights.load import load_model
from internlm.weights.talk import Talk, read_talk


@dataclass(frozen=True)
class Source:
    """Weights, opened."""

    path: Path
    config: ModelConfig
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Reads them, one at a time, by our names."""
    talk: Talk

    def model(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Return the model with its weights, brought there one by one; `dtype` None: as stored."""
        return load_model(self.config, self.tensors(), dtype=dtype, device=device)


def open_source(path: str | Path) -> Source:
    """Open a run, a checkpoint or a Transformers folder.

    Raises:
        StorageError: it is none of these.
        WeightsError, TokenizerError: its model or tokenizer is of a kind that is not known.
    """
    path = Path(path)
    if store.is_checkpoint(path) or store.newest(path) is not None:
        found = store.open_checkpoint(path)
        tokenizer = None if found.tokenizer_path is None else Tokenizer.load(found.tokenizer_path)
        return Source(found.path, found.config, found.tensors, Talk(tokenizer, found.template))
    if not (path / "config.json").is_file():
        raise StorageError(
            "is no model" if path.exists() else "no such folder",
            where=path,
            do="Give a run or a checkpoint of `internlm train`, or a Transformers folder.",
        )
    return Source(path, transformers.read_config(path), lambda: transformers.read_tensors(path), read_talk(path))
