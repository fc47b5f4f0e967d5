"""Training checkpoints of InternLM v0.2 and InternEvo, read from any tensor × pipeline × zero layout.

    if is_one("runs/7b"):
        found = open_checkpoint("runs/7b")     # the newest complete checkpoint of a folder of them
        found.config, found.weights            # our names; nothing is read yet
        progress(found.folder)                 # {"step": 2000, "tokens": 8388608000, …}

What files do not say: `overrides`, which a command line fills from `--set`.

    runs/7b/                        given: the newest complete one is taken
      1000/  2000/                  checkpoints by step
      snapshot/0  snapshot/1        written in turn
    runs/7b/2000/
      model_tp{t}_pp{p}.pt          tensor rank t of pipeline stage p
      model_tp{t}_wp{w}_pp{p}.pt    InternEvo with weight parallelism
      2000.step                     written last: the mark of a complete checkpoint

Limit: the old trainer overwrites a snapshot folder with its mark in it: one that was killed there can leave files of
two steps that look complete. Not read: FSDP's files, mixtures of experts, reward models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.weights import pickles
from internlm.weights import weight as lazy
from internlm.weights.load import check
from internlm.weights.native import fields, merge
from internlm.weights.native.merge import Place, Reading
from internlm.weights.weight import Weights

_SHOWN = 8
"""Missing files that an error lists; a file of an odd name may make them many."""
_MODEL = re.compile(r"model_tp(\d+)(?:_wp(\d+))?_pp(\d+)\.pt")
_FSDP = re.compile(r"model_tp\d+_pp\d+_(?:dp|zo)\d+\.pt")
_TRAINER = ("optimizer_", "topo_", "context.pt", "schedulder.pt", "sampler.pt", "config_file.pt")
"""Files of the trainer, not of the tools that make checkpoints from Transformers folders."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened: its weights are known and not read."""

    folder: Path
    shards: dict[Place, Weights]
    """What each rank's file holds, by the names in it, in its order."""
    config: ModelConfig
    reading: Reading
    weights: Weights
    """By our names."""


def open_checkpoint(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open a checkpoint, or the newest complete one of a folder of them.

    Args:
        path: the folder.
        overrides: what the user says about it (`fields.OVERRIDES`).

    Raises:
        WeightsError: it is incomplete, damaged, unsafe or of a kind that is not read, or something must be said.
    """
    said = fields.settings(overrides)
    folder = find(path, unfinished=said.get("unfinished", False))
    files, is_weight_parallel = model_files(folder)
    shards = {
        place: lazy.of_tensors(pickles.tensors_of(pickles.load(file), file).items()) for place, file in files.items()
    }
    parts = merge.gather(shards, folder, is_weight_parallel=is_weight_parallel)
    path = folder / fields.CONFIG
    stored = pickles.load(path) if path.is_file() else None
    if path.is_file() and not isinstance(stored, dict):
        raise WeightsError("holds no dict", where=path, got=type(stored).__name__)
    if stored is not None and "context_length" not in said and (folder / "config_file.pt").is_file():
        length = fields.trained_length(pickles.load(folder / "config_file.pt"))
        said |= {} if length is None else {"context_length": length}
    config, reading = fields.describe(parts, stored, said, folder, weight_parallel=is_weight_parallel)
    weights = merge.merge(parts, config, reading)
    check(weights, config)
    return Checkpoint(folder, shards, config, reading, weights)


def progress(folder: Path) -> dict[str, Any]:
    """Return how far training of a `Checkpoint.folder` had come; what is absent is left out.

    Raises:
        WeightsError: a file of it is damaged or unsafe.
    """
    names = {
        "step_count": "step",
        "batch_count": "batch",
        "num_consumed_tokens": "tokens",
        "num_consumed_samples_in_epoch": "samples_in_epoch",
        "inf_nan_skip_batches": "skipped_steps",
    }
    context, schedule = (
        pickles.load(folder / name) if (folder / name).is_file() else {} for name in ("context.pt", "schedulder.pt")
    )
    found: dict[str, Any] = {}
    if isinstance(context, dict):
        found |= {ours: int(context[theirs]) for theirs, ours in names.items() if theirs in context}
    if isinstance(schedule, dict) and (rates := schedule.get("_last_lr")):
        found["learning_rate"] = float(rates[0])
    return found


def is_one(path: str | Path) -> bool:
    """Return whether a folder is such a checkpoint, or holds some."""
    return bool(_checkpoints(Path(path)))


def find(path: str | Path, *, unfinished: bool = False) -> Path:
    """Return the checkpoint folder that `path` means: itself, or the newest complete one in it.

    Raises:
        WeightsError: there is none, or none that is complete, and `unfinished` ones will not do.
    """
    path = Path(path)
    found = _checkpoints(path)
    if not found:
        raise WeightsError("holds no checkpoint: no file model_tp0_pp0.pt", where=path)
    complete = [folder for folder in found if unfinished or _is_complete(folder)]
    if not complete:
        names = ", ".join(str(folder) for folder in found[:4])
        raise WeightsError(
            f"has no file {{step}}.step, which is written when all others are: saving was cut short in {names}",
            where=path,
            do="Take an earlier checkpoint, or read it as it is with --set unfinished=true.",
        )
    return max(complete, key=_step)  # of equal steps the first: numbered folders are sorted before snapshots


def model_files(folder: Path) -> tuple[dict[Place, Path], bool]:
    """Return the model files of a checkpoint folder, and whether they are cut over weight ranks.

    Raises:
        WeightsError: a rank's file is missing, or they are of a kind that cannot be read.
    """
    names = sorted(file.name for file in folder.iterdir())
    if any(name.startswith("model_moe_") for name in names):
        raise WeightsError("has a mixture of experts of the old framework, which is not read", where=folder)
    if any(_FSDP.fullmatch(name) for name in names):
        raise WeightsError(
            "was written with FSDP: each file holds pieces of tensors that only the processes of that run can join",
            where=folder,
            do="Load it in the old framework and save it with zero1.fsdp=False.",
        )
    matches = [match for match in map(_MODEL.fullmatch, names) if match]
    is_weight_parallel = any(match[2] for match in matches)
    if is_weight_parallel and not all(match[2] for match in matches):
        raise WeightsError("mixes files with and without weight parallelism", where=folder)
    places = {Place(int(m[3]), int(m[1]), int(m[2] or 0)): folder / m[0] for m in matches}
    if absent := list(islice(_absent(places, is_weight_parallel), _SHOWN)):
        raise WeightsError(f"is not whole: {', '.join(absent)} missing", where=folder, do="Copy it again.")
    return dict(sorted(places.items())), is_weight_parallel


def _absent(places: Collection[Place], is_weight_parallel: bool) -> Iterator[str]:
    """Yield what is missing of ranks below those that are there."""
    stages, tensor, weight = (1 + max(ranks) for ranks in zip(*places, strict=True))
    for stage in range(stages):
        if not is_weight_parallel:
            yield from (f"model_tp{t}_pp{stage}.pt" for t in range(tensor) if Place(stage, t) not in places)
            continue
        # Tensor and weight ranks count the same processes: not every pair has a file.
        here = [place for place in places if place.stage == stage]
        for name, size, ranks in (("wp", weight, {p.weight for p in here}), ("tp", tensor, {p.tensor for p in here})):
            yield from (f"a file of {name}{rank} in pp{stage}" for rank in range(size) if rank not in ranks)


def _checkpoints(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    if _holds_model(path):
        return [path]
    inside = [*path.iterdir(), *(path / "snapshot" / name for name in "01")]
    return sorted(folder for folder in inside if folder.is_dir() and _holds_model(folder))


def _holds_model(folder: Path) -> bool:
    return any(_MODEL.fullmatch(file.name) or _FSDP.fullmatch(file.name) for file in folder.glob("model_tp*.pt"))


def _step(folder: Path) -> int:
    """Return the step that a folder's marks say; -1 without one."""
    steps = [int(file.stem) for file in folder.glob("*.step") if file.stem.isdecimal()]
    return max(steps, default=-1)


def _is_complete(folder: Path) -> bool:
    """Return whether everything was written: tools that convert leave no mark, and write model_config.pt last."""
    if _step(folder) >= 0:
        return True
    is_trainers = any(file.name.startswith(_TRAINER) for file in folder.iterdir())
    return (folder / fields.CONFIG).is_file() and not is_trainers
