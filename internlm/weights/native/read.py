"""Training checkpoints of InternLM v0.2 and InternEvo, read from any tensor × pipeline × zero layout.

    if is_one("runs/7b"):                              # the newest complete checkpoint of a folder of them
        config = read_config("runs/7b")
        weights = open_weights("runs/7b")              # our names; nothing is read yet
    progress("runs/7b")                                # {"step": 2000, "tokens": 8388608000, …}

Which files and their order: `rank_files`; how they are opened safely: `pickles`; how parts become weights:
`merge`; what they do not say: `fields`, and `overrides` here, which a command line fills from `--set`.
The optimizer's state is read by `optimizer`, and the format is written by `write`.

Not read: FSDP's files, mixtures of experts, reward models. Each is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.weights.load import check
from internlm.weights.native import fields, merge, pickles, rank_files
from internlm.weights.native.merge import Reading
from internlm.weights.native.rank_files import Files, Place, is_one
from internlm.weights.weight import Weight, Weights

__all__ = ["Checkpoint", "is_one", "open_checkpoint", "open_weights", "progress", "read_config"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened: its weights are known and not read."""

    folder: Path
    files: Files
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
    folder = rank_files.find(path, unfinished=said.get("unfinished", False))
    files = rank_files.files(folder)
    shards = {place: _open(file) for place, file in files.places.items()}
    is_weight_parallel = files.is_weight_parallel
    parts = merge.gather(shards, folder, is_weight_parallel=is_weight_parallel)
    stored = _stored(folder)
    if stored is not None and "context_length" not in said and (folder / "config_file.pt").is_file():
        length = fields.trained_length(pickles.load(folder / "config_file.pt"))
        said |= {} if length is None else {"context_length": length}
    config, reading = fields.describe(parts, stored, said, folder, weight_parallel=is_weight_parallel)
    weights = merge.merge(parts, config, reading)
    check(weights, config)
    return Checkpoint(folder, files, shards, config, reading, weights)


def read_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the shape of the model in a checkpoint.

    Raises:
        WeightsError: as `open_checkpoint`.
    """
    return open_checkpoint(path, overrides).config


def open_weights(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Weights:
    """Return the weights of a checkpoint by our names, not read yet.

    Raises:
        WeightsError: as `open_checkpoint`.
    """
    return open_checkpoint(path, overrides).weights


def progress(folder: Path) -> dict[str, Any]:
    """Return how far training had come: step, batch, tokens, skipped steps, learning rate; what is absent is left out.

    Args:
        folder: of one checkpoint, `Checkpoint.folder`.

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
    found: dict[str, Any] = {}
    context = pickles.load(folder / "context.pt") if (folder / "context.pt").is_file() else {}
    if isinstance(context, dict):
        found |= {ours: int(context[theirs]) for theirs, ours in names.items() if theirs in context}
    schedule = pickles.load(folder / "schedulder.pt") if (folder / "schedulder.pt").is_file() else {}
    rates = schedule.get("_last_lr") if isinstance(schedule, dict) else None
    if rates:
        found["learning_rate"] = float(rates[0])
    return found


def _stored(folder: Path) -> dict[str, Any] | None:
    """Return the content of model_config.pt; None where there is none."""
    path = folder / rank_files.CONFIG
    if not path.is_file():
        return None
    stored = pickles.load(path)
    if not isinstance(stored, dict):
        raise WeightsError("holds no dict", where=path, got=type(stored).__name__)
    return stored


def _open(path: Path) -> Weights:
    """Return what a rank's file holds, not read yet."""
    states = pickles.load(path)
    if not isinstance(states, dict) or not all(isinstance(name, str) for name in states):
        raise WeightsError("holds no weights by name", where=path, got=type(states).__name__)
    found: Weights = {}
    for name, tensor in states.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise WeightsError(f"{name} is no plain tensor", where=path, got=type(tensor).__name__)
        found[name] = of_mapped(tensor, name)
    return found


def of_mapped(tensor: Tensor, origin: str) -> Weight:
    """Return a tensor that maps a file as a weight."""
    tensor = tensor.detach()
    return Weight(tuple(tensor.shape), tensor.dtype, lambda: tensor, origin)
