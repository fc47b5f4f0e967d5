"""What the ranks of a test run. Results go through pipes: plain values and numpy arrays."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

from internlm import config
from internlm import recipe as recipes
from internlm.errors import ConfigError
from internlm.model.moe import grouped_product
from internlm.parallel import collectives, tensor
from internlm.parallel.expert import Dispatch
from internlm.parallel.mesh import Layout
from internlm.parallel.microbatch import Runner
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from internlm.train.trainer import Trainer
from tests.parallel.optimizer_cases import *  # noqa: F403
from tests.parallel.optimizer_cases import whole
from tests.parallel.resume_cases import *  # noqa: F403
from tests.parallel.traffic_cases import *  # noqa: F403
from tests.parallel.watch_cases import *  # noqa: F403

with contextlib.suppress(ConfigError):
    config.decode(Recipe, {})  # the reader of recipes is made once, and not in each fork


def each(*calls: tuple[Any, ...]) -> list[Any]:
    """Return what other cases return, run one after the other in one process group: torch plans its layout once.

    Args:
        calls: name and arguments of each.
    """
    return [globals()[name](*arguments) for name, *arguments in calls]


def train(tree: dict[str, Any], steps: int, broken: str | None = None) -> dict[str, Any]:
    """Train a recipe for some steps; return losses, norms, the first step's gradients and the last weights.

    Args:
        tree: the recipe; its run is continued when it has a checkpoint.
        steps: how many.
        broken: a mistake to make, see `BROKEN`.
    """
    with contextlib.ExitStack() as stack:
        if broken is not None:
            stack.enter_context(BROKEN[broken]())
        return _train(recipes.prepare(config.decode(Recipe, tree)), steps)


def _train(trainer: Trainer, steps: int) -> dict[str, Any]:
    gradients: dict[str, np.ndarray] = {}
    update = trainer.stepper.optimizer.step

    def keep(rate: float) -> None:
        if not gradients:
            for name, parameter in trainer.parallel.owned_parameters():
                assert parameter.grad is not None
                gradients[name] = whole(parameter.grad)
        update(rate)

    trainer.stepper.optimizer.step = keep  # type: ignore[method-assign]
    metrics = [trainer.stepper.step() for _ in range(steps)]
    return {
        "loss": [m["train/step_loss"] for m in metrics],
        "norm": [m["optim/grad_norm"] for m in metrics],
        "gradients": gradients,
        "weights": {name: whole(p) for name, p in trainer.parallel.named_parameters()},
        "meter": trainer.meter.read(),
        "valid": trainer.evaluator.evaluate(trainer.parallel, final=True),
        "threads": torch.get_num_threads(),
    }


def norms_of_parts() -> Any:
    """Take a norm weight's gradient over a rank's own tokens for that over all (as if it were averaged later)."""
    return mock.patch.object(tensor.Tokens, "whole", [Replicate()])


def averaged_head_norms() -> Any:
    """Average the gradients of the norms of heads over tensor ranks, which have different heads, in place of a sum."""
    plain = tensor.HeadNorm.normalise

    def normalise(self: tensor.HeadNorm, x: Tensor, weight: Tensor) -> Tensor:
        ranks = dist.get_world_size(self.tokens.group)
        return plain(self, x, weight / ranks + weight.detach() * (1 - 1 / ranks))

    return mock.patch.object(tensor.HeadNorm, "normalise", normalise)


def means_of_micro_batches() -> Any:
    """Divide each micro-batch by its own count and the number of micro-batches."""
    plain = Runner.train

    def train(self: Runner, batches: Any, loss: Any, token_share: Tensor | None = None) -> Tensor:
        total = sum(float(b.weights.sum()) for b in batches)
        return plain(self, batches, lambda h, b: loss(h, b) * total / (len(batches) * b.weights.sum()), token_share)

    return mock.patch.object(Runner, "train", train)


def same_rows() -> Any:
    """Give all replicas the same rows."""
    return mock.patch.object(Layout, "data_rank", lambda self, rank: self.coordinates(rank).shard)


def gathered_gradients() -> Any:
    """Give context ranks the whole gradient of what they collected, so that it counts several times."""
    return mock.patch.object(collectives, "collect", collectives.gather)


BROKEN = {
    f.__name__: f for f in (norms_of_parts, averaged_head_norms, means_of_micro_batches, same_rows, gathered_gradients)
}


def everybody_chooses(expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Send every row to one of four experts, two on each of two ranks.

    Returns:
        Results and gradients of the rows, gradients of this rank's weights; results and gradients of doing it alone.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 6, 8, generator=generator)
    x = torch.randn(5, 8, generator=generator).requires_grad_()
    ends = torch.tensor([0 if number < expert else 5 for number in range(4)], dtype=torch.int32)
    own = weights[2 * dist.get_rank() :][:2].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    out = Dispatch(group)(x, ends, lambda rows, stops: grouped_product(rows, own, stops))
    out.square().sum().backward()
    assert x.grad is not None
    assert own.grad is not None
    alone = x.detach().clone().requires_grad_()
    wanted = alone @ weights[expert].t()
    wanted.square().sum().backward()
    assert alone.grad is not None
    return out.detach().numpy(), x.grad.numpy(), own.grad.numpy(), (wanted.detach().numpy(), alone.grad.numpy())


def fit(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Train a recipe to its end; return the lines of its metrics file."""
    trainer = recipes.prepare(config.decode(Recipe, tree))
    trainer.fit()
    return read_metrics(trainer.run / "metrics.jsonl")
