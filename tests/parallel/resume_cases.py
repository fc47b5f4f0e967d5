"""What the ranks of the tests of resuming run; `cases.py` offers them too."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from internlm import config
from internlm import recipe as recipes
from internlm.checkpoint import listing, store
from internlm.checkpoint.place import Place
from internlm.data.batch import Batch
from internlm.errors import InternLMError
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.recipe import Recipe
from internlm.text.tokenizer import Tokenizer
from internlm.train.trainer import Trainer
from tests.models import save_checkpoint
from tests.parallel.optimizer_cases import whole

__all__ = ["go_on", "newest_seen", "save_and_go_on", "save_around_a_validation", "save_parts"]


def save_and_go_on(tree: dict[str, Any], before: int, after: int) -> dict[str, Any]:
    """Train some steps, save in the background, and go on as if nothing had happened; see `go_on`."""
    trainer = recipes.prepare(config.decode(Recipe, tree))
    for _ in range(before):
        trainer.stepper.step()
    trainer.save(wait=False)
    result = _steps(trainer, after)
    trainer.saver.finish()
    return result


def go_on(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """Go on with a run.

    Returns:
        The step it began at; losses; digests of the rows of each step that this rank saw; where the data then stood;
        the weights.
    """
    return _steps(recipes.prepare(config.decode(Recipe, tree)), steps)


def newest_seen(tree: dict[str, Any]) -> tuple[int, str, str]:
    """Train a run with two checkpoints, then let rank 1 see an older listing, no such checkpoint, and another one.

    Returns:
        The step from which the run goes on; the errors of the other two.
    """
    recipe = config.decode(Recipe, tree)
    recipes.prepare(recipe).fit()
    folder = recipe.checkpoint.of(Path(recipe.run))
    older = store.open_checkpoint(folder / listing.name_of(1))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(listing, "newest", lambda folder: older.path)
        step = recipes.prepare(recipe).progress.step
    return step, _refused(folder, listing, "is_checkpoint", False), _refused(folder, store, "open_checkpoint", older)


def _refused(folder: Place, module: ModuleType, name: str, seen: object) -> str:
    """Return the error where a function returns something else on rank 1."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(module, name, lambda path: seen)
        with pytest.raises(InternLMError) as error:
            store.open_newest(folder)
    return str(error.value)


def _steps(trainer: Trainer, steps: int) -> dict[str, Any]:
    rows: list[set[str]] = []
    draw = trainer.stepper.loader.next_batch

    def drawn(count: int) -> Batch:
        batch = draw(count)
        whole_rows = zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        rows.append({hashlib.sha256(repr(row).encode()).hexdigest() for row in whole_rows})
        return batch

    trainer.stepper.loader.next_batch = drawn  # type: ignore[method-assign]
    begun = trainer.progress.step
    losses = [trainer.stepper.step()["train/step_loss"] for _ in range(steps)]
    return {
        "step": begun,
        "loss": losses,
        "rows": rows,
        "position": trainer.stepper.loader.state_dict(),
        "weights": {name: whole(parameter) for name, parameter in trainer.parallel.named_parameters()},
    }


def save_around_a_validation(tree: dict[str, Any]) -> list[str]:
    """Save, validate, and save again; return both folders."""
    trainer = recipes.prepare(config.decode(Recipe, tree))
    folders = []
    for _ in range(2):
        trainer.stepper.step()
        folders.append(str(trainer.save()))
        trainer.evaluator.evaluate(trainer.parallel, final=True)
    return folders


def save_parts(shape: dict[str, Any], path: str, folder: str) -> None:
    """Write a checkpoint of random weights and as many states, of which each rank holds a part.

    Args:
        shape: of the model.
        path: of the checkpoint.
        folder: where its tokenizer lies.
    """
    model = ModelConfig(**shape)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Tensor] = {}
    for name, parameter in build(model, 0).named_parameters():
        own = parameter.detach().chunk(dist.get_world_size())[dist.get_rank()]
        for slot in ("model.{}", "optim.{}.exp_avg", "optim.{}.exp_avg_sq"):
            state[slot.format(name)] = DTensor.from_local(own, mesh, [Shard(0)])
    save_checkpoint(Path(path), state, model, Tokenizer.load(Path(folder) / "tokenizer"), {"step": 7})
