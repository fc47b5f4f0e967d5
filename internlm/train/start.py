"""What a run starts from, and whether model, data, weights and machine belong together, before anything is built."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from internlm import config, hub, ranks, runtime
from internlm.checkpoint import listing, store
from internlm.checkpoint.listing import CheckpointConfig
from internlm.checkpoint.store import Checkpoint
from internlm.config import Tree
from internlm.cost import memory
from internlm.data.loader import Loader
from internlm.errors import ConfigError, StorageError
from internlm.log import quantity
from internlm.model.config import ModelConfig
from internlm.optim.optimizer import OptimConfig
from internlm.parallel.apply import Setting
from internlm.parallel.mesh import Layout, ParallelConfig
from internlm.source import Source, open_source

logger = logging.getLogger(__name__)

LOSSES = ("experts.balance_loss", "experts.z_loss")
"""Fields of a model that say how it is trained, not what it is."""


def newest(run: Path, checkpoints: CheckpointConfig) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from, the same on all ranks, or None for a fresh folder.

    Raises:
        StorageError: there are checkpoints, and all are damaged; or the ranks see different ones.
        ConfigError: there is one, and the recipe does not want to go on.
    """
    folder = checkpoints.of(run)
    begun = store.open_newest(folder)
    damaged = ranks.together(lambda: listing.damaged(folder) if ranks.rank() == 0 else [])
    if begun is None and damaged:
        raise StorageError(
            "the run's checkpoints are damaged, all of them",
            where=damaged[0].parent,
            do="Copy them again, or remove the folder to start over.",
        )
    for path in damaged:
        logger.warning("warning: %s is damaged and passed over", path)
    if begun is None:
        return None
    if not checkpoints.resume:
        raise ConfigError(
            "the run folder holds a run and checkpoint.resume is false", where=run, do="Choose another `run`."
        )
    return begun


def check_begun(begun: Checkpoint, run: Path, shape: ModelConfig | None, optim: OptimConfig) -> None:
    """Check that a run is still of the model and the optimizer that it was begun with.

    Raises:
        ConfigError: naming what differs.
    """
    kind = begun.meta.get("recipe", {}).get("optim", {}).get("kind", optim.kind)
    if kind != optim.kind:
        do = "Choose another `run`; its init_from can name this one."
        raise ConfigError(f"the run was begun with {kind}", where="optim.kind", got=optim.kind, do=do)
    differing = _as_models(begun.config, shape or begun.config, LOSSES)
    if differing:
        raise ConfigError(
            f"the run folder holds a run of another model ({'; '.join(differing)})",
            where=run,
            do="Choose another `run`, or give the old values back.",
        )


def source(init_from: str | None) -> Source:
    """Open the weights that a run starts from.

    Raises:
        ConfigError: there is no such folder. Else as `open_source`.
    """
    if init_from is not None:
        hub.require_here(init_from, where="init_from")
    if init_from is None or not ("://" in init_from or Path(init_from).is_dir()):
        raise ConfigError("no such folder", where="init_from", got=init_from)
    return open_source(init_from)


def check_fit(shape: ModelConfig, loader: Loader, start: Source | None) -> None:
    """Check that data and model belong together, and the weights to start from with them.

    Of those weights length, rotary base and scaling, and the random start may be others: longer texts are learnt with
    a new rotation, which is logged.

    Raises:
        ConfigError: naming the numbers or the tokenizers that differ.
    """
    own, ids = loader.tokenizer.fingerprint, loader.vocab_size
    if ids > shape.vocab_size:
        raise ConfigError(f"the data's tokenizer has {ids} ids", where="model.vocab_size", got=shape.vocab_size)
    length = loader.config.seq_len
    if length > shape.context_length and shape.rope.scaling is None:
        raise ConfigError(
            f"is longer than model.context_length {shape.context_length}",
            where="data.seq_len",
            got=length,
            do="Raise model.context_length or shorten the rows.",
        )
    if start is None:
        return
    where = f"init_from {start.path}"
    differing = _as_models(start.config, shape, ("context_length", "rope", "init", *LOSSES))
    if differing:
        raise ConfigError("has another shape than `model`: " + "; ".join(differing), where=where)
    old, new = config.encode(start.config)["rope"], config.encode(shape)["rope"]
    if old != new:
        logger.info("rotary positions: %s in %s, %s from now on", _named(old), start.path, _named(new))
    tokenizer = start.talk.tokenizer
    if tokenizer is not None and tokenizer.fingerprint != own:
        raise ConfigError(
            f"was trained with another tokenizer ({tokenizer.fingerprint[:12]}) than the data ({own[:12]})",
            where=where,
            do="Tokenize the data with the tokenizer of those weights.",
        )


def check_memory(
    shape: ModelConfig, parallel: ParallelConfig, layout: Layout, optim: OptimConfig, setting: Setting
) -> None:
    """Check that a model can be trained on this machine at all.

    Raises:
        ConfigError: naming both sizes.
    """
    cut = layout.shard * layout.context
    copies = layout.replicate if parallel.optimizer == "all" else 1
    is_gathered = (cut > 1 or parallel.offload) and (parallel.zero != "3" or layout.pipeline > 1)
    kept = memory.kept(
        shape,
        parts=layout.pipeline * layout.tensor,
        cut=cut,
        experts=parallel.expert,
        moment_bytes=optim.moment_bytes / copies,
        gathered_bytes=setting.dtype.itemsize * is_gathered,
    )
    home = torch.device("cpu") if parallel.offload else setting.device
    held = {home: kept.states}
    held[setting.device] = held.get(setting.device, 0) + kept.gathered
    for device, needed in held.items():
        there = runtime.peak_memory_bytes(device)[1]
        if there and needed > there:
            raise ConfigError(
                f"training {quantity(shape.num_parameters)} parameters takes more than {needed / 2**30:.0f} GiB and "
                f"{device} has {there / 2**30:.0f} GiB",
                where="model",
                do='Use more ranks, parallel.zero "3", parallel.offload, or optim.state_dtype bfloat16.',
            )


def _as_models(there: ModelConfig, here: ModelConfig, free: tuple[str, ...]) -> list[str]:
    """Return what differs between two models, in words; fields that are free, and all below them, may differ."""
    return [
        f"{path}: {old} there, {new} here"
        for path, old, new in config.changes(config.encode(there), config.encode(here))
        if not any(f"{path}.".startswith(f"{name}.") for name in free)
    ]


def _named(rope: Tree) -> str:
    scaling = rope["scaling"] or {"kind": "none"}
    details = [f"{key} {value}" for key, value in scaling.items() if key != "kind" and value is not None]
    return f"base {rope['base']:g} and scaling {' '.join([scaling['kind'], *details])}"
