"""What the ranks of the traffic tests run; `cases.py` offers it too."""

from __future__ import annotations

from typing import Any

from internlm import config
from internlm import recipe as recipes
from internlm.cost.traffic import Exchanges
from internlm.plan.dryrun import Recorder
from internlm.recipe import Recipe

__all__ = ["count_exchanges"]


def count_exchanges(tree: dict[str, Any]) -> Exchanges:
    """Return what this rank exchanges in the second step of a real run."""
    trainer = recipes.prepare(config.decode(Recipe, tree))
    trainer.stepper.step()
    with Recorder(trainer.parallel.mesh) as recorder:
        trainer.stepper.step()
    return recorder.exchanges
