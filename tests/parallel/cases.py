"""What the ranks of a test run. Results go through pipes: plain values and numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from internlm import config
from internlm import recipe as recipes
from internlm.recipe import Recipe


def whole(tensor: Tensor) -> np.ndarray:
    """Return all of a tensor. Every rank that holds a part must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy().copy()


def train(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train a recipe for some steps; return losses, norms, the first step's gradients and the last weights."""
    trainer = recipes.prepare(config.decode(Recipe, tree))
    gradients: dict[str, np.ndarray] = {}
    update = trainer.optimizer.step

    def keep(rate: float) -> None:
        if not gradients:
            for name, parameter in trainer.parallel.named_parameters():
                assert parameter.grad is not None
                gradients[name] = whole(parameter.grad)
        update(rate)

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    metrics = [trainer.step() for _ in range(steps)]
    return {
        "loss": [m["train/step_loss"] for m in metrics],
        "norm": [m["optim/grad_norm"] for m in metrics],
        "gradients": gradients,
        "weights": {name: whole(p) for name, p in trainer.parallel.named_parameters()},
        "meter": trainer.meter.read(),
        "valid": trainer.evaluator(trainer.parallel, final=True),
        "threads": torch.get_num_threads(),
    }
