"""Tiny random models for the tests of every room, and weights whose memory is counted."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from internlm.checkpoint.place import Place
from internlm.checkpoint.saver import Beside, Saver
from internlm.errors import StorageError
from internlm.model import quant
from internlm.model.config import ModelConfig
from internlm.model.quant import Kind
from internlm.model.transformer import Transformer, build
from internlm.text.tokenizer import Tokenizer
from internlm.weights.load import shapes
from internlm.weights.weight import Weight, Weights


def roughen(model: nn.Module, scale: float = 0.25, seed: int = 1) -> None:
    """Make the logits and the attention of a model far from flat, and no bias or norm a constant: mistakes show then,
    and what is greedy does not hang on the last bit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)


def random_model(config: ModelConfig, seed: int = 1) -> Transformer:
    """Return a model made rough."""
    model = build(config, seed=0)
    roughen(model, seed=seed)
    return model


def pack(model: Transformer, kind: Kind) -> None:
    """Pack all of a model, in place."""
    for block in model.blocks.values():
        quant.pack_block(block, kind)  # type: ignore[arg-type]
    quant.pack_head(model.head, kind)
    model.float().requires_grad_(False)


def save_checkpoint(
    path: Place, tensors: dict[str, Tensor], model: ModelConfig, tokenizer: Tokenizer | None, meta: dict[str, Any]
) -> None:
    """Write one checkpoint folder, `…/step-<n>`, and return when it is there. Every rank must call it."""
    saver = Saver(path.parent, background=False)
    saver.save(path.name, tensors, Beside(model, tokenizer, meta))
    saved = saver.finish()
    assert saved is not None
    if saved.problem is not None:
        raise StorageError(saved.problem)


class Counted:
    """Weights of a model that are all zero, and know how much of them was in memory at once.

    Args:
        config: shape of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.most = 0
        """Bytes in memory at once, at most."""
        self._alive: list[weakref.ref[Tensor]] = []
        self.weights: Weights = {
            name: Weight(tuple(shape), torch.float32, functools.partial(self._zeros, shape))
            for name, shape in shapes(config).items()
        }

    def _zeros(self, shape: torch.Size) -> Tensor:
        tensor = torch.zeros(shape)
        self._alive.append(weakref.ref(tensor))
        self.most = max(self.most, sum(t.nbytes for ref in self._alive if (t := ref()) is not None))
        return tensor

    def assert_one_by_one(self) -> None:
        """Check that they were read, never more at once than a tensor and what becomes of it."""
        assert 0 < self.most <= 2 * max(weight.nbytes for weight in self.weights.values())
