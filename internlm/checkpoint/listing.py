"""The checkpoints of a run: which there are, which is the newest, which are kept.

    RUN/checkpoints/step-00001200/     `store` says what is in one

`checkpoint.folder` names another place for them, such as `s3://bucket/run`. A run looks in that very folder; what
people name, a run, its folder of checkpoints or one of them, goes through `folder_of` first, once.
Nothing here reads a tensor, or needs torch: `internlm monitor` and `internlm checkpoints` start at once.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from internlm import disk
from internlm.checkpoint import place
from internlm.checkpoint.place import Place
from internlm.checkpoint.remote import Remote, Unreachable
from internlm.config import require_positive, section
from internlm.errors import ConfigError, StorageError, did_you_mean
from internlm.log import warn_once

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)$")


@section
class CheckpointConfig:
    """When training state is written, and how much of it is kept."""

    folder: str | None = None
    """Where checkpoints lie: a path, or an fsspec URL such as `s3://bucket/run`. None: `checkpoints` in the run."""
    every_steps: int | None = None
    """Steps between two checkpoints; None: only at the end."""
    keep_last: int = 2
    """How many of the newest are kept. The newest complete one is never removed."""
    keep_every_tokens: int | None = None
    """Of every so many tokens, the first checkpoint is kept for ever. None: of none."""
    keep_best: str | None = None
    """Name of a metric, such as `valid/loss/held_out`, that is measured at steps of checkpoints: the one where it is
    lowest is kept. None: none."""
    background: bool = True
    """Whether the run goes on while a checkpoint is written; a copy of the state is then held in memory."""
    resume: bool = True
    """Whether a run folder with a checkpoint is continued; false: such a folder is an error."""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint", "every_steps", "keep_last", "keep_every_tokens")
        if self.folder is not None:
            if not self.folder or re.match(r"\w{2,}:/?(?!/)", self.folder):
                raise ConfigError(
                    "must be a path, or a URL with ://",
                    where="checkpoint.folder",
                    got=self.folder,
                    do="A path whose name has a colon can begin with ./",
                )
            place.at(self.folder)  # says what is wrong with it

    def of(self, run: Path) -> Place:
        """Return where the checkpoints of a run lie."""
        return run / "checkpoints" if self.folder is None else place.at(self.folder)


def is_checkpoint(path: str | Place) -> bool:
    """Return whether `path` is a complete checkpoint."""
    return place.is_complete(place.at(path))


def folder_of(named: str | Place) -> Place:
    """Return the folder of checkpoints that a user means: that of a run, by its recipe or in it, or the one named."""
    run = place.at(named)
    with disk.explained(f"looking for checkpoints in {run}"):
        if isinstance(run, Remote):
            return run / "checkpoints" if "checkpoints" in run.names() else run
        try:
            folder = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["checkpoint"]["folder"]
        except (OSError, ValueError, yaml.YAMLError, TypeError, LookupError):
            folder = None  # no run of ours, or one from before there was such a key
        if folder is not None:
            return place.at(str(folder))
        return run / "checkpoints" if (run / "checkpoints").is_dir() else run


def newest(folder: Place) -> Place | None:
    """Return the newest complete checkpoint in a folder of them, or None."""
    return next((path for path in reversed(_steps(folder)) if is_checkpoint(path)), None)


def listed(folder: Place) -> list[Place]:
    """Return the complete checkpoints in a folder of them, oldest first."""
    return [path for path in _steps(folder) if is_checkpoint(path)]


def damaged(folder: Place) -> list[Place]:
    """Return the checkpoints in a folder of them that are newer than the newest complete one, oldest first.

    What an interrupted upload left is not damaged: it never was a checkpoint.
    """
    damaged: list[Place] = []
    for path in reversed(_steps(folder)):
        if is_checkpoint(path):
            break
        damaged += [] if place.is_unfinished(path) else [path]
    return damaged[::-1]


@dataclass(frozen=True)
class Found:
    """A checkpoint folder, complete or not."""

    path: Place
    step: int
    bytes: int
    meta: dict[str, Any]
    """Empty where the manifest cannot be read."""
    problem: str | None
    """What is wrong with it."""


def survey(named: str | Place, *, verify: bool = False) -> list[Found]:
    """Return all checkpoint folders of a run, oldest first; with `verify` every file is compared with its checksum.

    `named` is a run, its folder of checkpoints, or one of them; a path or a URL.

    Raises:
        Unreachable: they lie in a store that does not answer.
    """
    found = []
    one = place.at(named)
    for path in _steps(folder_of(one)) or ([one] if _STEP.fullmatch(one.name) and place.names(one) else []):
        meta: dict[str, Any] = {}
        problem, size = None, 0
        try:
            with disk.explained("reading it"):
                size = sum(place.sizes(path).values())
                meta = place.read_manifest(path)
                if verify:
                    place.verify(path)
        except Unreachable:
            raise
        except StorageError as error:
            if isinstance(path, Path) and not path.exists():
                continue  # a run that goes on has just removed it
            problem = str(error).removeprefix(f"{path}: ")
        found.append(Found(path, int(path.name.rpartition("-")[2]), size, meta, problem))
    return found


def _steps(folder: Place) -> list[Place]:
    """Return the checkpoints in a folder of them, complete or not, oldest first."""
    with disk.explained(f"looking for checkpoints in {folder}"):
        found = {int(match[1]): folder / name for name in place.names(folder) if (match := _STEP.fullmatch(name))}
    return [found[step] for step in sorted(found)]


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def retain(folder: Place, config: CheckpointConfig) -> None:
    """Remove the checkpoints that need not be kept; what is newer than the newest complete one is not touched."""
    complete = [(path, place.read_manifest(path)) for path in listed(folder)]
    if not complete:
        return
    last = [path for path, _ in complete[-config.keep_last :]]
    kept = set(last)
    if config.keep_every_tokens is not None:
        firsts: dict[int, Place] = {}
        for path, meta in complete:
            firsts.setdefault(meta.get("tokens", 0) // config.keep_every_tokens, path)
        kept |= {path for number, path in firsts.items() if number}
    if config.keep_best is not None:
        values = {path: _measured(meta, config.keep_best) for path, meta in complete}
        rated = {path: value for path, value in values.items() if math.isfinite(value)}
        if rated:
            kept.add(min(rated, key=lambda path: rated[path]))
        else:
            _tell_unrated(config.keep_best, complete[-1][1].get("metrics", {}))
    for path in _steps(folder):
        if path == last[0]:
            return
        if path in kept:
            continue
        place.remove(path)


def _measured(meta: dict[str, Any], name: str) -> float:
    """Return a metric of a checkpoint's own weights; NaN where it was measured at other steps only."""
    is_own = meta.get("measured_at", {}).get(name) == meta.get("step")
    return float(meta["metrics"][name]) if is_own and name in meta.get("metrics", {}) else math.nan


def _tell_unrated(name: str, known: dict[str, float]) -> None:
    """Warn of a metric by which nothing is kept; of one of a validation, when there was one."""
    kind = name.partition("/")[0]
    if math.isfinite(known.get(name, math.nan)):
        warn_once(
            logger,
            f"checkpoint.keep_best keeps nothing so far: {name} was measured at steps without a checkpoint. "
            "Let both come at the same steps: checkpoint.every_steps, evaluate.every_steps, train.log_every_steps.",
        )
    elif known and name not in known and (kind != "valid" or any(other.startswith("valid/") for other in known)):
        alike = [other for other in known if other.startswith(f"{kind}/")] or list(known)
        advice = did_you_mean(name, alike) or f"There are: {', '.join(sorted(alike))}"
        warn_once(logger, f"checkpoint.keep_best has no effect: nothing is measured as {name}. {advice}")
