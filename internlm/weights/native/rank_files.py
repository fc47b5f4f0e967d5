"""Which files make up a checkpoint of InternLM v0.2 or InternEvo.

    runs/7b/                        given: the newest complete one is taken
      1000/  2000/                  checkpoints by step
      snapshot/0  snapshot/1        written in turn
    runs/7b/2000/
      model_tp{t}_pp{p}.pt          tensor rank t of pipeline stage p
      model_tp{t}_wp{w}_pp{p}.pt    InternEvo with weight parallelism
      2000.step                     written last: the mark of a complete checkpoint

Limit: the old trainer overwrites a snapshot folder without removing its mark first. One that was killed there can leave
files of two steps that look complete; numbered folders cannot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from internlm.errors import WeightsError

CONFIG = "model_config.pt"
_SHOWN = 8
"""Missing files that an error lists; a file of an odd name may make them many."""
_MODEL = re.compile(r"model_tp(\d+)(?:_wp(\d+))?_pp(\d+)\.pt")
_FSDP = re.compile(r"model_tp\d+_pp\d+_(?:dp|zo)\d+\.pt")
_TRAINER = ("optimizer_", "topo_", "context.pt", "schedulder.pt", "sampler.pt", "config_file.pt")
"""Files that the trainer writes, and the tools that make checkpoints from Transformers folders do not."""


class Place(NamedTuple):
    """Which part of a model a file holds."""

    stage: int
    """Pipeline stage."""
    tensor: int
    """Rank of tensor parallelism."""
    weight: int = 0
    """Rank of InternEvo's weight parallelism."""


@dataclass(frozen=True)
class Files:
    """The model files of one checkpoint: every rank's, none missing among those that can be known."""

    folder: Path
    places: dict[Place, Path]
    is_weight_parallel: bool

    @property
    def stages(self) -> int:
        """Number of pipeline stages."""
        return 1 + max(place.stage for place in self.places)

    @property
    def tensor(self) -> int:
        """Number of tensor ranks."""
        return 1 + max(place.tensor for place in self.places)


def is_one(path: str | Path) -> bool:
    """Return whether a folder is a checkpoint of InternLM's old training format, or holds some."""
    return bool(_checkpoints(Path(path)))


def find(path: str | Path, *, unfinished: bool = False) -> Path:
    """Return the checkpoint folder that `path` means: itself, or the newest complete one in it.

    Args:
        path: a checkpoint, or a folder of checkpoints by step.
        unfinished: whether a checkpoint without the mark of completeness will do.

    Raises:
        WeightsError: there is none, or none that is complete.
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


def files(folder: Path) -> Files:
    """Return the model files of a checkpoint folder.

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
    found = Files(folder, dict(sorted(places.items())), is_weight_parallel)
    _check(found)
    return found


def _check(found: Files) -> None:
    """Refuse a checkpoint in which a rank's file is missing."""
    stages, tensor = found.stages, found.tensor
    if not found.is_weight_parallel:
        every = (Place(p, t) for p in range(stages) for t in range(tensor))
        missing = (place for place in every if place not in found.places)
        absent = [f"model_tp{place.tensor}_pp{place.stage}.pt" for place in islice(missing, _SHOWN)]
    else:
        # Tensor and weight ranks count the same processes: not every pair has a file.
        weight = 1 + max(place.weight for place in found.places)
        of_stage = {p: [place for place in found.places if place.stage == p] for p in range(stages)}
        absent = [
            f"a file of wp{w} in pp{p}"
            for p in range(stages)
            for w in sorted(set(range(weight)) - {place.weight for place in of_stage[p]})
        ]
        absent += [
            f"a file of tp{t} in pp{p}"
            for p in range(stages)
            for t in sorted(set(range(tensor)) - {place.tensor for place in of_stage[p]})
        ]
    if absent:
        raise WeightsError(
            f"is not whole: {', '.join(absent[:_SHOWN])} missing", where=found.folder, do="Copy it again."
        )


def _checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint folders that `path` is or holds."""
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
    """Return whether everything was written.

    Tools that turn a Transformers folder into a checkpoint write no mark. Their folders hold nothing of the trainer,
    and their model_config.pt is written last and says how many layers there must be.
    """
    if _step(folder) >= 0:
        return True
    is_trainers = any(file.name.startswith(_TRAINER) for file in folder.iterdir())
    return (folder / CONFIG).is_file() and not is_trainers
