"""`internlm train RECIPE [key=value …]`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internlm.recipe import Recipe
    from internlm.train.trainer import Trainer

DESCRIPTION = """Train a model from a recipe.

  internlm train recipes/quickstart/pretrain.yaml
  internlm train recipes/quickstart/pretrain.yaml optim.lr=1e-3 run=runs/other
  internlm train recipes/pretrain/internlm-7b.yaml --dry-run

A run that was stopped goes on from its newest complete checkpoint when the same command is given again. On several
ranks it is started by `internlm launch`, torchrun or srun. What the keys of a recipe mean: docs/recipe.md.

SIGTERM, SIGUSR1, Ctrl-C or a file RUN/stop: it saves at the end of the step and ends, with exit code 75, 75, 130 or 0;
a second signal ends it at once."""

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key and its value in YAML")
    parser.add_argument("--dry-run", action="store_true", help="print every value with its origin, and the sizes; stop")


def advise(unknown: list[str], words: list[str]) -> str:
    """Return how an option that `train` lacks is written here: as one of `launch`, or a key of a recipe."""
    import difflib

    from internlm.cli import launch

    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    name, _, value = word.partition("=")
    if not value:
        following = words[words.index(word) + 1 :]
        value = following[0] if following and not following[0].startswith("-") else "VALUE"
    known = launch.option_names()
    longer = [own for own in known if name.startswith(own)]  # torchrun's --nproc-per-node
    meant = (longer or difflib.get_close_matches(name, known, n=1, cutoff=0.8) or [""])[0]
    if meant == "--dry-run":
        return f"Did you mean {meant!r}?"
    if meant:
        return f"{meant} belongs to launch and stands before train: internlm launch {meant} {value} train RECIPE …"
    return f"Keys of a recipe are written without dashes: {name.lstrip('-')}={value}"


def run(arguments: argparse.Namespace) -> int:
    """Train, or print what would be trained."""
    from internlm import ranks, runtime

    if arguments.dry_run:
        from internlm import recipe as recipes

        print(recipes.describe(recipes.load(arguments.recipe, arguments.overrides)))
        return 0
    runtime.tune_allocator(wants_allocator(arguments))
    with ranks.joined():
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from internlm import ranks
    from internlm import recipe as recipes

    recipe = ranks.together(lambda: recipes.load(arguments.recipe, arguments.overrides)).value
    trainer = recipes.prepare(recipe)
    with trainer.alerts.failing():
        return _fit(trainer, recipe)


def _fit(trainer: Trainer, recipe: Recipe) -> int:
    from internlm import ranks
    from internlm.checkpoint import listing
    from internlm.compat import groups
    from internlm.train.stop import EXIT_CODES, Stopped

    groups.limit_waits(recipe.runtime.timeout_s)
    if (recipe.watch.stall_s or 0) >= recipe.runtime.timeout_s and ranks.world_size() > 1:
        logger.warning("warning: watch.stall_s has no effect: runtime.timeout_s, which names no rank, comes first")
    kept, made = recipe.checkpoint.keep_every_tokens, recipe.checkpoint.every_steps
    each = (made or 0) * recipe.train.batch_tokens
    if kept is not None and kept <= each:
        logger.warning("warning: checkpoint.keep_every_tokens %d keeps them all: one is made every %d", kept, each)
    if trainer.progress.step >= recipe.train.total_steps:
        trainer.retain()  # what the process before may have been killed in
        logger.info("%s is finished: %d steps taken", recipe.run, trainer.progress.step)
        return 0
    try:
        trainer.fit()
    except Stopped as stopped:
        logger.info("stopped at step %d; the same command goes on from there", trainer.progress.step)
        if ranks.world_size() > 1:
            ranks.ignore_ends()
        return EXIT_CODES[stopped.reason]
    except KeyboardInterrupt:
        newest = listing.newest(recipe.checkpoint.of(trainer.run))
        goes_on = "starts over: no checkpoint yet" if newest is None else f"goes on from {newest}"
        logger.info("stopped at step %d; the same command %s", trainer.progress.step, goes_on)
        raise
    logger.info("done: %s (checkpoints/, metrics.jsonl, loss.png, recipe.yaml)", Path(recipe.run))
    return 0


def wants_allocator(arguments: argparse.Namespace) -> bool:
    """Return `runtime.allocator` without importing torch, which would be paid twice."""
    from internlm import config
    from internlm.errors import InternLMError

    try:
        tree = config.read_tree(arguments.recipe, arguments.overrides)
    except InternLMError:
        return False  # the full load will say what is wrong, without a restart
    section = tree.get("runtime") or {}
    if not isinstance(section, dict):
        return False
    return not (section.get("allocator") is False or section.get("device") == "cuda")
