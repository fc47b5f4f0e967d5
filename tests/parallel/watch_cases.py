"""What the ranks of a test about watching run."""

from __future__ import annotations

import logging
import time
from typing import Any
from unittest import mock

import torch.distributed as dist

from internlm import config, plot, ranks, runtime
from internlm import recipe as recipes
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics


def with_a_slow_rank(tree: dict[str, Any], slow: int, where: str, seconds: float) -> dict[str, Any]:
    """Train a recipe to its end while a rank sleeps in each traced step; return its metrics, warnings and collectives.

    Rank r has used r + 1 GiB of memory.

    Args:
        tree: the recipe.
        slow: the rank.
        where: what it is slow in: `forward` or `data`.
        seconds: how long it sleeps.
    """
    trainer = recipes.prepare(config.decode(Recipe, tree))

    def sleep() -> None:
        if (trainer.progress.step + 1) % trainer.config.trace_every_steps == 0:
            time.sleep(seconds)

    if ranks.rank() == slow and where == "forward":
        forward = trainer.parallel.run.train
        trainer.parallel.run.train = lambda *them: (sleep(), forward(*them))[1]  # type: ignore[method-assign]
    elif ranks.rank() == slow:
        draw = trainer.stepper.loader.next_batch
        trainer.stepper.loader.next_batch = lambda rows: (sleep(), draw(rows))[1]  # type: ignore[method-assign]
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("internlm")
    logger.addHandler(handler)
    counts: list[int] = []
    reduce, take = dist.all_reduce, trainer.stepper.step

    def counted(*arguments: Any, **named: Any) -> Any:
        counts[-1] += 1
        return reduce(*arguments, **named)

    def stepped() -> dict[str, float]:
        counts.append(0)
        return take()

    trainer.stepper.step = stepped  # type: ignore[method-assign]
    try:
        with (
            mock.patch.object(dist, "all_reduce", counted),
            mock.patch.object(plot, "loss_curve"),
            mock.patch.object(runtime, "peak_memory_bytes", return_value=(2**30 * (ranks.rank() + 1), 2**33)),
        ):
            trainer.fit()
    finally:
        logger.removeHandler(handler)
    metrics = read_metrics(trainer.run / "metrics.jsonl") if ranks.rank() == 0 else []
    return {"metrics": metrics, "warnings": warnings, "counts": counts}
