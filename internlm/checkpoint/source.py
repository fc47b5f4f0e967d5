"""Weights to read, whatever their format: a run, a checkpoint, or a Transformers folder.

source = open_source("runs/a")            # its newest complete checkpoint
model = source.model(torch.float32)
"""

from __future__ import annotations

import hashlib
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
from internlm.weights import weight as lazy
from internlm.weights.load import load_model
from internlm.weights.talk import Talk, read_talk
from internlm.weights.weight import Weights


@dataclass(frozen=True)
class Source:
    """Weights, opened."""

    path: Path
    config: ModelConfig
    weights: Callable[[], Weights]
    """Opens them, by our names."""
    talk: Talk

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (our name, tensor), read one at a time."""
        return lazy.tensors(self.weights())

    def state(self) -> str:
        """Return a text that changes when a file of the source does."""
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

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
        return Source(found.path, found.config, found.weights, Talk(tokenizer, found.template))
    if not (path / "config.json").is_file():
        raise StorageError(
            "is no model" if path.exists() else "no such folder",
            where=path,
            do="Give a run or a checkpoint of `internlm train`, or a Transformers folder.",
        )
    return Source(path, transformers.read_config(path), lambda: transformers.open_weights(path), read_talk(path))
