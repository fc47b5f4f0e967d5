"""The root of a recipe: its sections, each of which lives beside the code that reads it.

loaded = load("recipes/quickstart/pretrain.yaml", ["optim.lr=1e-3"])
prepare(loaded.value).fit()
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from internlm import config, disk, ranks, runtime
from internlm.checkpoint import listing, store
from internlm.checkpoint.listing import CheckpointConfig
from internlm.checkpoint.store import Checkpoint
from internlm.config import Loaded, Origins, Tree, section
from internlm.cost.flops import causal_pairs, training_flops
from internlm.cost.hardware import peak_flops
from internlm.data.loader import DataConfig, Loader
from internlm.errors import ConfigError, InternLMError
from internlm.log import quantity
from internlm.model.config import ModelConfig
from internlm.model.presets import preset
from internlm.optim.optimizer import AdamWConfig, OptimConfig, Optimizer
from internlm.optim.schedule import ScheduleConfig
from internlm.parallel.apply import Parallel, Setting
from internlm.parallel.mesh import Layout, ParallelConfig
from internlm.runtime import RuntimeConfig
from internlm.source import Source
from internlm.train import start
from internlm.train.evaluate import EvaluateConfig, Evaluator
from internlm.train.metrics import Meter
from internlm.train.objective import LanguageModeling, Objectives
from internlm.train.profile.windows import ProfileConfig
from internlm.train.step import LossScale, Stepper, TrainConfig
from internlm.train.trainer import Trainer
from internlm.train.watch.alerts import Alerts, AlertsConfig
from internlm.train.watch.goodput import Goodput
from internlm.train.watch.spikes import SpikeConfig, Spikes
from internlm.train.watch.trackers import PRIVATE, TrackConfig, open_trackers
from internlm.train.watch.watchdog import WatchConfig

logger = logging.getLogger(__name__)


@section
class Recipe:
    """Everything that decides a training run."""

    run: str
    """Folder of the run: checkpoints, metrics, plot, the resolved recipe."""
    seed: int = 1
    """Decides the random start of the weights; the order of the data has its own, `data.seed`."""
    model: ModelConfig | None = None
    """Shape of the model, or `{preset: NAME, …}`. May be left out with `init_from`."""
    init_from: str | None = None
    """Weights to start from: a run, a checkpoint, or a Transformers folder. None: a random start."""
    data: DataConfig
    """Sources and packing."""
    objective: Objectives = LanguageModeling()
    """What is minimised."""
    train: TrainConfig
    """Length and cut of the run."""
    optim: OptimConfig = AdamWConfig()
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of the learning rate."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is spread over ranks."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Validation."""
    spikes: SpikeConfig = SpikeConfig()
    """Losses that jump."""
    profile: ProfileConfig = ProfileConfig()
    """Steps that are looked at closely."""
    watch: WatchConfig = WatchConfig()
    """Runs that stand still."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Training state on disk."""
    track: TrackConfig = TrackConfig()
    """Where metrics go besides metrics.jsonl."""
    alerts: AlertsConfig = AlertsConfig()
    """Who is told what happens."""
    runtime: RuntimeConfig = RuntimeConfig()
    """The machine."""

    def __post_init__(self) -> None:
        if self.model is None and self.init_from is None:
            raise ConfigError("is required unless init_from is given", where="model")
        if self.evaluate.every_steps is not None and not self.data.validation:
            raise ConfigError("there is nothing to validate: data.validation is empty", where="evaluate.every_steps")
        if not self.run:
            raise ConfigError("must name a folder", where="run", got=self.run)
        if not 0 <= self.seed < 2**63:
            raise ConfigError("must lie in [0, 2^63)", where="seed", got=self.seed)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Loaded[Recipe]:
    """Read a recipe; `model.preset` is replaced by the fields it stands for.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    return config.load(Recipe, path, overrides, expand=_expand, elsewhere=_ELSEWHERE)


def describe(loaded: Loaded[Recipe]) -> str:
    """Return what `--dry-run` prints: every value with its origin, and the sizes that follow."""
    recipe = loaded.value
    shape = _shape(recipe)
    train = recipe.train
    per_token = training_flops(shape, 1, causal_pairs(recipe.data.seq_len) / recipe.data.seq_len)
    lines = [
        config.explain(loaded),
        "",
        f"parameters        {shape.num_parameters:,} ({quantity(shape.num_parameters)})",
        *([f"met by a token    {shape.active_parameters:,}"] if shape.experts else []),
        f"tokens per step   {train.batch_tokens:,}",
        f"steps             {train.total_steps:,}",
        f"tokens            {train.total_steps * train.batch_tokens:,}",
        f"operations        {per_token * train.total_steps * train.batch_tokens:.3g} "
        f"({per_token:.3g} per token, full rows)",
    ]
    try:
        device = runtime.resolve_device(recipe.runtime)
        _check(recipe, Loader(recipe.data), device)
    except InternLMError as error:
        lines += ["", f"would not start here: {error}"]
    return "\n".join(lines)


def _shape(recipe: Recipe) -> ModelConfig:
    """Return the shape of the model; a run that was begun has it when `init_from` is gone."""
    if recipe.model is not None:
        return recipe.model
    begun = listing.newest(recipe.checkpoint.of(Path(recipe.run)))
    return (start.source(recipe.init_from) if begun is None else store.open_checkpoint(begun)).config


class _Checked(NamedTuple):
    """What a run begins with."""

    begun: Checkpoint | None
    weights: Source | None
    shape: ModelConfig
    setting: Setting


def _check(recipe: Recipe, loader: Loader, device: torch.device) -> _Checked:
    """Check all that can be checked before a model is built; a dry run calls it too. Raises as `prepare`."""
    layout = Layout.of(recipe.parallel, ranks.world_size())
    run = Path(recipe.run)
    begun = start.newest(run, recipe.checkpoint)
    if begun is not None:
        start.check_begun(begun, run, recipe.model, recipe.optim)
    weights = start.source(recipe.init_from) if begun is None and recipe.init_from is not None else None
    shape = recipe.model or (begun or weights or start.source(recipe.init_from)).config
    start.check_fit(shape, loader, weights)
    setting = setting_of(recipe, shape, layout, device)
    start.check_memory(shape, recipe.parallel, layout, recipe.optim, setting)
    return _Checked(begun, weights, shape, setting)


def prepare(recipe: Recipe) -> Trainer:
    """Build everything a run needs, in its folder, and continue it if it was begun.

    Precedence of the start: the newest complete checkpoint of the run; else `init_from`; else random weights.

    Raises:
        InternLMError: the ranks differ, a path is missing, parts do not fit each other, or the folder holds another
            run, or another process works in it.
    """
    alerts = ranks.together(lambda: Alerts.open(recipe.alerts, Path(recipe.run), ranks.rank()))
    with alerts.failing():
        return _prepare(recipe, alerts)


def _prepare(recipe: Recipe, alerts: Alerts) -> Trainer:
    found = runtime.versions()
    ranks.agree(config.encode(recipe) | {"versions": {name: v for name, v in found.items() if name != "python"}})
    device = runtime.resolve_device(recipe.runtime)
    if recipe.parallel.offload:
        ranks.join_alone()
    run, rank = Path(recipe.run), ranks.rank()
    layout = Layout.of(recipe.parallel, ranks.world_size())
    loader = Loader(recipe.data, layout.data_rank(rank), layout.data)
    if rank == 0:
        disk.hold(run)
        if recipe.checkpoint.folder is not None and isinstance(folder := recipe.checkpoint.of(run), Path):
            disk.hold(folder)  # another run may name the same
    goodput = Goodput(run if rank == 0 else None)
    checked = _check(recipe, loader, device)
    begun, dtype = checked.begun, checked.setting.dtype
    parallel = _model(recipe, checked)
    peak = peak_flops(runtime.device_name(device), runtime.dtype_name(dtype))
    meter = Meter(parallel, loader.sources, peak or runtime.measure_peak(device, dtype))
    trainer = Trainer(
        run=run,
        stepper=Stepper(
            config=recipe.train,
            schedule=recipe.schedule,
            parallel=parallel,
            objective=recipe.objective,
            optimizer=Optimizer(recipe.optim, parallel.owned_parameters()),
            loader=loader,
            meter=meter,
            scale=LossScale.of(dtype),
            spikes=Spikes(recipe.spikes),
            goodput=goodput,
        ),
        evaluator=Evaluator(recipe.evaluate, loader),
        checkpoints=recipe.checkpoint,
        watching=recipe.watch,
        profile=recipe.profile,
        alerts=alerts,
        facts={"recipe": config.encode(recipe), "versions": found},
    )
    runtime.seed(recipe.seed)
    if begun is not None:
        trainer.resume(begun)
        logger.info("resuming %s at step %d of %d", begun.path, begun.step, recipe.train.total_steps)
        changed = config.changes(begun.meta.get("recipe", {}), config.encode(recipe))
        if changed:
            told = "; ".join(
                path if f"{path}.".startswith(PRIVATE) else f"{path} {before} → {now}" for path, before, now in changed
            )
            logger.info("changed since that checkpoint: %s", told)
    if rank == 0:
        if begun is None or begun.step < recipe.train.total_steps:  # else no step is taken with it
            disk.write_text(run / "recipe.yaml", config.dump(recipe))
        disk.write_json(run / "versions.json", found)
        trainer.trackers += open_trackers(run, trainer.progress.step, recipe.track, trainer.facts)
    _announce(trainer, dtype, "measured" if peak is None else "data sheet")
    return trainer


def _model(recipe: Recipe, checked: _Checked) -> Parallel:
    """Return the model, with the given weights or random ones; a run that was begun fills it."""
    parallel = Parallel(checked.shape, recipe.parallel, checked.setting)
    if checked.weights is not None:
        parallel.load(checked.weights.tensors())
        logger.info("weights from %s", checked.weights.path)
    elif checked.begun is None:
        parallel.initialize(recipe.seed)
    return parallel


def setting_of(recipe: Recipe, shape: ModelConfig, layout: Layout, device: torch.device) -> Setting:
    """Return what the model of a recipe is made for.

    Raises:
        ConfigError: the layout, the batch and the model do not fit each other.
    """
    length = recipe.data.seq_len
    micro_rows = recipe.train.micro_rows(length, layout.data)
    micro_batches = recipe.train.batch_tokens // length // layout.data // micro_rows
    layout.check(recipe.parallel, shape, length, micro_rows, micro_batches)
    return Setting(
        device=device,
        dtype=runtime.resolve_dtype(recipe.runtime, device),
        attention=recipe.runtime.attention,
        compile=recipe.runtime.compile,
        seq_len=length,
        micro_rows=micro_rows,
        micro_batches=micro_batches,
    )


_ELSEWHERE = {
    "max_steps": "The length of a run is train.tokens.",
    "epochs": "The length of a run is train.tokens.",
    "batch_size": "The size of a step is train.batch_tokens.",
    "learning_rate": "It is optim.lr.",
    "lora": "No recipe trains adapters yet.",
}
"""Keys of other programs, and where to look here."""


def _expand(tree: Tree, origins: Origins) -> None:
    """Write out what a recipe says in short: a preset, and the rest of a model that is given in part."""
    if isinstance(model := tree.get("model"), dict) and "preset" in model:
        name = str(model.pop("preset"))
        origins.pop("model.preset", None)
        _fill(tree, origins, copy.deepcopy(preset(name)), f"preset {name}")
    model, weights = tree.get("model"), tree.get("init_from")
    required = {field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING}
    if isinstance(model, dict) and isinstance(weights, str) and not required <= model.keys():
        _fill(tree, origins, config.encode(start.source(weights).config), f"weights of {weights}")
    for side in ("train", "validation"):
        sources = (tree.get("data") or {}).get(side)
        if isinstance(sources, dict):  # without those of a base that are taken back
            tree["data"][side] = {name: source for name, source in sources.items() if source is not None}


def _fill(tree: Tree, origins: Origins, base: Tree, origin: str) -> None:
    """Lay the model of a recipe over another, in place."""
    for path, _ in config.leaves(base, "model."):
        origins.setdefault(path, origin)
    config.merge(base, {}, tree["model"], {}, [ModelConfig])
    tree["model"] = base


def _announce(trainer: Trainer, dtype: torch.dtype, peak_origin: str) -> None:
    model, recipe = trainer.parallel.shape, trainer.config
    if trainer.parallel.mesh is not None:
        sizes = vars(trainer.parallel.layout).items()
        logger.info("%d ranks: %s", ranks.world_size(), " × ".join(f"{name} {n}" for name, n in sizes if n > 1))
    logger.info(
        "model %s parameters | %d steps of %s tokens | %s, %s, dense peak %.3g TFLOPS (%s) | attention %s",
        quantity(model.num_parameters),
        recipe.total_steps,
        quantity(recipe.batch_tokens),
        runtime.device_name(trainer.parallel.device),
        runtime.dtype_name(dtype),
        trainer.meter.peak_flops / 1e12,
        peak_origin,
        trainer.parallel.parts[0].attention_path,
    )
