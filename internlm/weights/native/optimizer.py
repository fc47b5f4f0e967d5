"""The optimizer's state in checkpoints of InternLM v0.2 and InternEvo, by our names and free of their layout.

    state = open_optimizer("runs/7b/2000")
    state["master"]["blocks.0.attention.wq.weight"].read()        # fp32; also "exp_avg" and "exp_avg_sq"

The old optimizer keeps one flat fp32 tensor per parameter group and zero rank, without names. They follow from:

    order     a rank's parameters, as its model file lists them: those of the model's dtype are group `default`, those
              in fp32 group `fp32`; each group sorted by size, largest first, equal sizes in the model's order
    plan      per group and zero rank, what lies in the flat tensor: "{place in that order}_{dim 0}_{dim 1}"

    order  0: head [V, H], 1: embedding [V, H], 2: Wqkv …      plan  [["0_64_16", "3_16_16"], ["1_64_16", "2_48_16"]]
    zero rank 1 is embedding, then Wqkv

Its shapes must be those of the names, and the start and end of each master weight, rounded, those of the weight in the
model file: names that were resolved wrongly do not pass.

Not read: InternEvo's weight parallelism (its head and embedding have groups of their own), FSDP, mixtures of experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.errors import WeightsError
from internlm.weights import pickles
from internlm.weights import weight as lazy
from internlm.weights.load import check
from internlm.weights.native import merge
from internlm.weights.native.merge import Place
from internlm.weights.native.read import Checkpoint, open_checkpoint
from internlm.weights.weight import Weight, Weights

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""fp32 weights, and Adam's two means."""
_FILE = re.compile(r"optimizer_tp(\d+)_pp(\d+)_zo(\d+)\.pt")
_PLAN = "zero_devide_optim_plan"  # spelt as there
_SAMPLE = 64
"""Elements at each end of a weight that are compared."""


def open_optimizer(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Weights]:
    """Return the optimizer's state of a checkpoint by kind and our names, not read yet.

    The means are left out where the checkpoint was saved before the first step. Arguments as of `read.open_checkpoint`.

    Raises:
        WeightsError: there is none, files are missing, or it cannot be told which state is whose.
    """
    checkpoint = open_checkpoint(path, overrides)
    files = _files(checkpoint)
    states: dict[str, dict[Place, Weights]] = {kind: {} for kind in KINDS}
    for place in checkpoint.shards:
        for kind, weights in _of_place(checkpoint, place, files[place]).items():
            states[kind][place] = weights
    found = {}
    for kind, shards in states.items():
        if not shards:
            continue
        if shards.keys() != checkpoint.shards.keys():
            raise WeightsError(f"some ranks have no {kind}", where=checkpoint.folder)
        parts = merge.gather(shards, checkpoint.folder)
        found[kind] = merge.merge(parts, checkpoint.config, checkpoint.reading)
        check(found[kind], checkpoint.config)
    return found


def _files(checkpoint: Checkpoint) -> dict[Place, list[Path]]:
    folder = checkpoint.folder
    names = sorted(file.name for file in folder.glob("optimizer_*.pt"))
    if not names:
        raise WeightsError("holds no optimizer state: it was saved without", where=folder)
    if checkpoint.reading.is_weight_parallel or any("_wp" in name for name in names):
        raise WeightsError("optimizer state of InternEvo's weight parallelism is not read", where=folder)
    matches = [match for match in map(_FILE.fullmatch, names) if match]
    zero = 1 + max((int(match[3]) for match in matches), default=0)
    files = {
        place: [folder / f"optimizer_tp{place.tensor}_pp{place.stage}_zo{rank}.pt" for rank in range(zero)]
        for place in checkpoint.shards
    }
    absent = [file.name for some in files.values() for file in some if not file.is_file()]
    if absent:
        raise WeightsError(f"is not whole: {', '.join(absent[:8])} missing", where=folder, do="Copy it again.")
    return files


def _of_place(checkpoint: Checkpoint, place: Place, files: list[Path]) -> dict[str, Weights]:
    """Return the state of one model file's weights by kind, by the names in it."""
    ranks = [_states(file) for file in files]
    plan = _plan(ranks, files, place)
    groups = ranks[0]["base_optim_states"]["param_groups"]
    named = {name: w for name, w in checkpoint.shards[place].items() if not merge.is_buffer(name)}
    found: dict[str, Weights] = {kind: {} for kind in KINDS}
    for group, rank, names in _slices(named, groups, plan, files[0]):
        sizes = [math.prod(named[name].shape) for name in names]
        for kind, flat in _flats(ranks[rank], group, files[rank]).items():
            if flat.shape != (sum(sizes),):
                raise WeightsError(f"{kind} is not as long as the plan says", where=files[rank])
            for name, piece in zip(names, flat.split(sizes), strict=True):
                found[kind][name] = lazy.of_tensor(piece.view(named[name].shape), name)
        for name in names:
            _compare(name, found["master"][name], named[name], files[rank])
    missing = [name for name in named if name not in found["master"]]
    if missing:
        raise WeightsError(f"the plan has no place for {', '.join(missing[:4])}", where=files[0])
    return {kind: weights for kind, weights in found.items() if weights}


def _states(file: Path) -> dict[str, Any]:
    states = pickles.load(file)
    try:
        groups = states["base_optim_states"]["param_groups"]
        usable = isinstance(states["flat_fp32_weights"], dict) and all(isinstance(g, dict) for g in groups)
    except (KeyError, TypeError, IndexError):
        usable = False
    if not usable:
        raise WeightsError("is not of the old framework's zero optimizer (FSDP's is not read)", where=file)
    return states


def _plan(ranks: list[dict[str, Any]], files: list[Path], place: Place) -> list[list[list[str]]]:
    """Return the partition plan, the same on all zero ranks: [group][zero rank][parameter]."""
    plans = []
    for rank, (states, file) in enumerate(zip(ranks, files, strict=True)):
        plan = states.get(_PLAN)
        beside = sorted(file.parent.glob(f"gpus-*_pp-{place.stage}_tp-{place.tensor}_zo-{rank}.pt"))
        if plan is None and len(beside) == 1:
            plan = pickles.load(beside[0])
        if plan is None:
            raise WeightsError("carries no partition plan, and the state has no names without it", where=file)
        plans.append(plan)
    if any(plan != plans[0] for plan in plans[1:]):
        raise WeightsError("the zero ranks have different partition plans: files of several runs?", where=files[0])
    try:
        return [[[str(text) for text in rank] for rank in group] for group in plans[0]]
    except TypeError:
        raise WeightsError("has a partition plan of another form", where=files[0]) from None


def _slices(
    named: Weights, groups: list[dict[str, Any]], plan: list[list[list[str]]], file: Path
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield which parameters lie in the flat tensor of (group, zero rank)."""
    if len(groups) != len(plan):
        raise WeightsError(f"has {len(groups)} parameter groups and a plan of {len(plan)}", where=file)
    for number, (group, ranks) in enumerate(zip(groups, plan, strict=True)):
        if not any(ranks):
            continue
        label = group.get("name", "default")
        if label not in ("default", "fp32"):
            raise WeightsError(f"its parameter group {label!r} is not known", where=file)
        of_group = [
            name for name, w in named.items() if len(groups) == 1 or (w.dtype == torch.float32) == (label == "fp32")
        ]
        ordered = sorted(of_group, key=lambda name: -math.prod(named[name].shape))  # stable
        expected = ["_".join(map(str, (at, *named[name].shape))) for at, name in enumerate(ordered)]
        planned = [text for rank in ranks for text in rank]
        if sorted(planned) != sorted(expected):
            odd = sorted(set(planned) ^ set(expected))[:4]
            raise WeightsError(f"the plan of group {label!r} is not one of the model file's weights: {odd}", where=file)
        for rank, texts in enumerate(ranks):
            if texts:
                yield number, rank, [ordered[int(text.partition("_")[0])] for text in texts]


def _flats(states: dict[str, Any], group: int, file: Path) -> dict[str, Tensor]:
    try:
        found = {"master": states["flat_fp32_weights"][group]}
        ids = states["base_optim_states"]["param_groups"][group]["params"]
        means = states["base_optim_states"]["state"].get(ids[0], {})
        found |= {kind: means[kind] for kind in KINDS[1:] if kind in means}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise WeightsError(f"has no state of parameter group {group}, which the plan says", where=file) from None
    if len(ids) != 1 or not all(isinstance(flat, Tensor) for flat in found.values()):
        raise WeightsError(f"has a state of another form in parameter group {group}", where=file)
    return {kind: flat.detach() for kind, flat in found.items()}


def _compare(name: str, master: Weight, weight: Weight, file: Path) -> None:
    model, ours = weight.read().reshape(-1), master.read().reshape(-1)
    for part in (slice(0, _SAMPLE), slice(-_SAMPLE, None)):
        if not torch.equal(ours[part].to(model.dtype), model[part]):
            raise WeightsError(
                f"the fp32 weight that the plan gives to {name} is another than the one in the model file",
                where=file,
                do="Model and optimizer are of different steps, or of another framework: train from the weights.",
            )
