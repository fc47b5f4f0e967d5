"""What the ranks of the optimizer's tests run; `cases.py` offers them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from internlm import config
from internlm import recipe as recipes
from internlm.compat import groups
from internlm.compat.groups import local
from internlm.optim import muon
from internlm.parallel import optimizer_shard
from internlm.recipe import Recipe
from internlm.train.trainer import Trainer

__all__ = ["bytes_held", "count_traffic", "train_and_save", "train_one_matrix_at_once", "wait_order"]


def whole(tensor: Tensor) -> np.ndarray:
    """Return all of a tensor. Every rank that holds a part must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().numpy().copy()


def train_and_save(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """Go on with a run, or begin it, and write a checkpoint.

    Returns:
        Losses; all weights and optimizer states, whole; bytes of the states that this rank holds; validation.
    """
    trainer = recipes.prepare(config.decode(Recipe, tree))
    losses = [trainer.stepper.step()["train/step_loss"] for _ in range(steps)]
    trainer.save()
    return {
        "loss": losses,
        "weights": {name: whole(p) for name, p in trainer.parallel.named_parameters()},
        "states": {name: whole(value) for name, value in trainer.stepper.optimizer.named_state().items()},
        "bytes": bytes_of(trainer),
        "valid": trainer.evaluator.evaluate(trainer.parallel, final=True),
    }


def bytes_of(trainer: Trainer) -> int:
    """Return the bytes of the optimizer's states that this rank holds."""
    parts = trainer.stepper.optimizer.parts
    held = [value for part in parts for slots in part.state.values() for value in slots.values()]
    return sum(part.numel() * part.element_size() for part in map(local, held))


def bytes_held(tree: dict[str, Any]) -> int:
    """Return `bytes_of` a run before its first step."""
    return bytes_of(recipes.prepare(config.decode(Recipe, tree)))


def train_one_matrix_at_once(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """As `train_and_save`; Muon's batches have room for nothing, so that each rank makes one product at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "BATCH", 0)
        return train_and_save(tree, steps)


def count_traffic(tree: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the collectives between replicas in a step: kind, and elements that a rank gives."""
    trainer = recipes.prepare(config.decode(Recipe, tree))
    assert trainer.parallel.mesh is not None
    replicas, seen = trainer.parallel.mesh.group("replicate"), []
    trainer.stepper.step()  # the first is like the others, but for what torch sets up

    def counted(kind: str, function: Any, size: Callable[..., int]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if replicas in (*arguments, *options.values()):
                seen.append((kind, size(*arguments)))
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted("all-reduce", dist.all_reduce, lambda x, *_: x.numel()))
        patch.setattr(
            groups, "reduce_scatter", counted("reduce-scatter", groups.reduce_scatter, lambda out, x, *_: x.numel())
        )
        patch.setattr(groups, "all_gather", counted("all-gather", groups.all_gather, lambda out, x, *_: x.numel()))
        trainer.stepper.step()
    return seen


class LoggedStream(torch.cpu.Stream):
    """A stream whose events are objects, and who waits for which is written down."""

    log: ClassVar[list[tuple[str, Any, Any]]] = []

    def record_event(self) -> Any:
        event = object()
        self.log.append(("recorded", self, event))
        return event

    def wait_event(self, event: Any) -> None:
        self.log.append(("waited", self, event))


def wait_order(tree: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return, for the forward after an update: who waits for which group of weights, and which module has run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "Stream", LoggedStream)
        products = LoggedStream()
        patch.setattr(torch.cpu, "_current_stream", products)
        trainer = recipes.prepare(config.decode(Recipe, tree))
        trainer.stepper.step()
        slices = optimizer_shard.of(trainer.model)
        assert slices is not None
        done = {group.done: str(number) for number, group in enumerate(slices.groups)}
        assert None not in done
        names = {products: "products", groups.weight_stream(trainer.model): "gathers"}
        for name, module in trainer.model.named_modules():
            if isinstance(module, FSDPModule):
                run = ("ran", name or "model", None)
                trainer.model.get_submodule(name).register_forward_hook(
                    lambda *_, run=run: LoggedStream.log.append(run)
                )
        LoggedStream.log.clear()
        trainer.stepper.step()
        found = []
        for kind, who, event in LoggedStream.log:
            if kind == "ran":
                found.append(("", "has run", who))
            elif kind == "waited" and event in done and who in names:
                found.append((names[who], "waits for", done[event]))
    return found
