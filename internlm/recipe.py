"""The root of a recipe: it composes the sections, each of which lives beside the code that reads it.

loaded = load("recipes/quickstart/pretrain.yaml", ["optim.lr=1e-3"])
trainer = prepare(loaded.value)
trainer.fit()
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from internlm import __version__, config, ranks, runtime, storage
from internlm.checkpoint import store
from internlm.checkpoint.source import Source, open_source
from internlm.checkpoint.store import Checkpoint, CheckpointConfig
from internlm.config import Loaded, Origins, Tree, section
from internlm.cost import hardware
from internlm.cost.flops import causal_pairs, training_flops
from internlm.data.loader import DataConfig, Loader
from internlm.errors import ConfigError, InternLMError, StorageError
from internlm.log import quantity
from internlm.model.config import ModelConfig
from internlm.model.presets import preset
from internlm.optim.optimizer import AdamWConfig, OptimConfig, Optimizer
from internlm.optim.schedule import ScheduleConfig
from internlm.parallel.apply import Parallel, Setting
from internlm.parallel.mesh import Layout, ParallelConfig
from internlm.runtime import RuntimeConfig
from internlm.text.tokenizer import Tokenizer
from internlm.train.budget import TrainConfig
from internlm.train.evaluate import EvaluateConfig, Evaluator
from internlm.train.loss_scale import LossScale
from internlm.train.objective import Objectives
from internlm.train.objectives.lm import LanguageModeling
from internlm.train.profile.windows import ProfileConfig
from internlm.train.trainer import Trainer
from internlm.train.watch.alerts import Alerts, AlertsConfig
from internlm.train.watch.goodput import Goodput
from internlm.train.watch.spikes import SpikeConfig, Spikes
from internlm.train.watch.trackers import TrackConfig, open_trackers
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
    """Return what `--dry-run` prints: every value with its origin, and the sizes that follow from them."""
    recipe = loaded.value
    shape = recipe.model or _source(recipe.init_from).config
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
    trouble = _trouble(recipe, shape)
    return "\n".join(lines + ([] if trouble is None else ["", f"would not start here: {trouble}"]))


def _trouble(recipe: Recipe, shape: ModelConfig) -> str | None:
    """Return why a run would not start here, as far as that can be told without a model."""
    try:
        device = runtime.resolve_device(recipe.runtime)
        layout = Layout.of(recipe.parallel, ranks.world_size())
        loader = Loader(recipe.data, 0, layout.data)
        _check_fit(recipe, shape, loader, None if recipe.init_from is None else _source(recipe.init_from))
        setting_of(recipe, shape, layout, device)
    except InternLMError as error:
        return str(error)
    return None


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
    found = versions()
    ranks.agree(config.encode(recipe) | {"versions": {name: v for name, v in found.items() if name != "python"}})
    device = runtime.resolve_device(recipe.runtime)
    if recipe.parallel.offload:
        ranks.join_alone()
    run, rank = Path(recipe.run), ranks.rank()
    layout = Layout.of(recipe.parallel, ranks.world_size())
    loader = Loader(recipe.data, layout.data_rank(rank), layout.data)
    if rank == 0:
        storage.hold(run)
        if recipe.checkpoint.folder is not None and isinstance(folder := recipe.checkpoint.of(run), Path):
            storage.hold(folder)  # another run may name the same
    goodput = Goodput(run if rank == 0 else None)
    begun = _newest_of(run, recipe)
    start = _source(recipe.init_from) if begun is None and recipe.init_from is not None else None
    shape = recipe.model or (begun or start or _source(recipe.init_from)).config
    _check_fit(recipe, shape, loader, start)
    setting = setting_of(recipe, shape, layout, device)
    _check_memory(recipe, shape, layout, setting)
    parallel = _model(recipe, shape, setting, start, begun is not None)
    peak = hardware.peak_flops(runtime.device_name(device), str(setting.dtype).removeprefix("torch."))
    trainer = Trainer(
        run=run,
        config=recipe.train,
        schedule=recipe.schedule,
        checkpoints=recipe.checkpoint,
        evaluation=recipe.evaluate,
        parallel=parallel,
        objective=recipe.objective,
        optimizer=Optimizer(recipe.optim, parallel.owned_parameters()),
        loader=loader,
        evaluator=Evaluator(recipe.evaluate, recipe.data, Tokenizer.load(loader.tokenizer_path)),
        device=device,
        peak_flops=peak or runtime.measure_peak(device, setting.dtype),
        facts={"recipe": config.encode(recipe), "versions": found},
        scale=LossScale.of(setting.dtype),
        spikes=Spikes(recipe.spikes),
        profile=recipe.profile,
        alerts=alerts,
        goodput=goodput,
        watching=recipe.watch,
    )
    runtime.seed(recipe.seed)
    if begun is not None:
        trainer.resume(begun)
        logger.info("resuming %s at step %d of %d", begun.path, begun.step, recipe.train.total_steps)
        changed = _differences(begun.meta.get("recipe", {}), config.encode(recipe))
        if changed:
            told = "; ".join(f"{path} {before} → {now}" for path, before, now in changed)
            logger.info("changed since that checkpoint: %s", told)
    if rank == 0:
        if begun is None or begun.step < recipe.train.total_steps:  # else no step is taken with it
            storage.write_text(run / "recipe.yaml", config.dump(recipe))
        storage.write_text(run / "versions.json", json.dumps(found, indent=1) + "\n")
        trainer.trackers += open_trackers(run, trainer.progress.step, recipe.track, trainer.facts)
    _announce(trainer, setting.dtype, "measured" if peak is None else "data sheet")
    return trainer


def _model(recipe: Recipe, shape: ModelConfig, setting: Setting, start: Source | None, is_begun: bool) -> Parallel:
    """Return the model, with the weights of `start` or random ones; of a run that was begun, to be filled by it."""
    parallel = Parallel(shape, recipe.parallel, setting)
    if start is not None:
        parallel.load(start.tensors())
        logger.info("weights from %s", start.path)
    elif not is_begun:
        parallel.initialize(recipe.seed)
    return parallel


def setting_of(recipe: Recipe, shape: ModelConfig, layout: Layout, device: torch.device) -> Setting:
    """Return what the model of a recipe is made for.

    Raises:
        ConfigError: the layout, the batch and the model do not fit each other.
    """
    length = recipe.data.seq_len
    micro_rows, rows = recipe.train.micro_rows(length, layout.data), recipe.train.batch_tokens // length
    layout.check(recipe.parallel, shape, length, rows, micro_rows)
    return Setting(
        device=device,
        dtype=runtime.resolve_dtype(recipe.runtime, device),
        attention=recipe.runtime.attention,
        compile=recipe.runtime.compile,
        seq_len=length,
        micro_rows=micro_rows,
        micro_batches=rows // layout.data // micro_rows,
    )


def versions() -> dict[str, str]:
    """Return the versions a run depends on, and the commit of the code when it runs from a checkout."""
    found = {"internlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    where = Path(__file__).parents[1]
    if not (where / ".git").exists():
        return found  # installed: a repository further up is someone else's
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, timeout=5)
        if commit.returncode == 0:
            found["commit"] = commit.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass  # no git: the version says what it can
    return found


_ELSEWHERE = {
    "max_steps": "The length of a run is train.tokens.",
    "epochs": "The length of a run is train.tokens.",
    "batch_size": "The size of a step is train.batch_tokens.",
    "learning_rate": "It is optim.lr.",
    "lora": "No recipe trains adapters yet.",
}
"""Keys that other programs have, and where to look here."""


def _expand(tree: Tree, origins: Origins) -> None:
    """Write out what a recipe says in short."""
    _expand_preset(tree, origins)
    _expand_start(tree, origins)
    for side in ("train", "validation"):
        sources = (tree.get("data") or {}).get(side)
        if isinstance(sources, dict):  # without those of a base that are taken back
            tree["data"][side] = {name: source for name, source in sources.items() if source is not None}


def _expand_start(tree: Tree, origins: Origins) -> None:
    """Fill a model of which a part is given with the shape of the weights that the run starts from."""
    model, start = tree.get("model"), tree.get("init_from")
    required = {field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING}
    if not isinstance(model, dict) or not isinstance(start, str) or required <= model.keys():
        return
    base: Tree = config.encode(_source(start).config)
    for key, value in base.items():
        for path in [f"model.{key}", *(f"model.{key}.{sub}" for sub in _keys(value))]:
            origins.setdefault(path, f"weights of {start}")
    config.merge(base, {}, model, {})
    tree["model"] = base


def _expand_preset(tree: Tree, origins: Origins) -> None:
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    name = model.pop("preset")
    origin = f"preset {name}"
    origins.pop("model.preset", None)
    base: Tree = json.loads(json.dumps(preset(str(name))))
    config.merge(base, {}, model, {})
    tree["model"] = base
    for key in preset(str(name)):
        for path in [f"model.{key}", *(f"model.{key}.{sub}" for sub in _keys(base[key]))]:
            origins.setdefault(path, origin)


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _newest_of(run: Path, recipe: Recipe) -> Checkpoint | None:
    """Return the checkpoint this run goes on from, or None for a fresh folder."""
    folder = recipe.checkpoint.of(run)
    begun, damaged = store.newest(folder), store.damaged(folder)
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
    if not recipe.checkpoint.resume:
        raise ConfigError(
            "the run folder holds a run and checkpoint.resume is false", where=recipe.run, do="Choose another `run`."
        )
    before = store.open_checkpoint(begun)
    kind = before.meta.get("recipe", {}).get("optim", {}).get("kind", recipe.optim.kind)
    if kind != recipe.optim.kind:
        do = "Choose another `run`; its init_from can name this one."
        raise ConfigError(f"the run was begun with {kind}", where="optim.kind", got=recipe.optim.kind, do=do)
    wanted = recipe.model or before.config
    differing = _as_models(before.config, wanted, _LOSSES)
    if differing:
        raise ConfigError(
            f"the run folder holds a run of another model ({'; '.join(differing)})",
            where=recipe.run,
            do="Choose another `run`, or give the old values back.",
        )
    return before


_LOSSES = ("experts.balance_loss", "experts.z_loss")
"""Fields of a model that say how it is trained, not what it is."""


def _as_models(there: ModelConfig, here: ModelConfig, free: tuple[str, ...]) -> list[str]:
    """Return what differs between two models, in words; fields that are free, and all below them, may differ."""
    return [
        f"{path}: {old} there, {new} here"
        for path, old, new in _differences(config.encode(there), config.encode(here))
        if not any(f"{path}.".startswith(f"{name}.") for name in free)
    ]


def _differences(old: Tree, new: Tree, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the paths at which both say something, and not the same, with what they say."""
    found: list[tuple[str, Any, Any]] = []
    for key in (key for key in new if key in old and old[key] != new[key]):
        before, now = old[key], new[key]
        if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
            found += _differences(before, now, f"{prefix}{key}.")
        else:
            found.append((prefix + key, before, now))
    return found


def _source(init_from: str | None) -> Source:
    """Open the weights that a run starts from."""
    if init_from is not None:
        storage.require_here(init_from, where="init_from")
    if init_from is None or not ("://" in init_from or Path(init_from).is_dir()):
        raise ConfigError("no such folder", where="init_from", got=init_from)
    return open_source(init_from)


def _check_fit(recipe: Recipe, shape: ModelConfig, loader: Loader, start: Source | None) -> None:
    """Check that data and model belong together, and the weights to start from with them.

    Raises:
        ConfigError: naming the numbers that differ.
    """
    if loader.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the data's tokenizer has {loader.vocab_size} ids", where="model.vocab_size", got=shape.vocab_size
        )
    if recipe.data.seq_len > shape.context_length and shape.rope.scaling is None:
        raise ConfigError(
            f"is longer than model.context_length {shape.context_length}",
            where="data.seq_len",
            got=recipe.data.seq_len,
            do="Raise model.context_length or shorten the rows.",
        )
    if start is not None:
        _check_start(start, shape, loader)


def _check_memory(recipe: Recipe, shape: ModelConfig, layout: Layout, setting: Setting) -> None:
    """Check that a model can be trained on this machine at all. Activations, and what comes and goes, are not counted.

    A rank keeps its part of the weights and gradients (8 bytes a parameter) and of the optimizer's moments, on the CPU
    with `parallel.offload`; and unless `parallel.zero` is 3, all the weights of its stage in the dtype of products.

    Raises:
        ConfigError: naming both sizes.
    """
    parallel, optim = recipe.parallel, recipe.optim
    cut = layout.shard * layout.context
    moments = {"float32": 8, "bfloat16": 4, "int8": 2}[optim.state_dtype]
    if optim.kind == "muon":  # one for matrices
        moments = min(moments, 4)
    copies = layout.replicate if parallel.optimizer == "all" else 1
    parts = layout.pipeline * layout.tensor
    own = shape.num_parameters / parts
    experts = shape.num_layers * (shape.feed_forward_parameters if shape.experts else 0) / parts
    is_gathered = (cut > 1 or parallel.offload) and (parallel.zero != "3" or layout.pipeline > 1)
    states, gathered = (
        own * (8 + moments / copies) / cut,
        (own - experts + experts / parallel.expert) * setting.dtype.itemsize * is_gathered,
    )
    home = torch.device("cpu") if parallel.offload else setting.device
    held = {home: states}
    held[setting.device] = held.get(setting.device, 0) + gathered
    for device, needed in held.items():
        there = runtime.peak_memory_bytes(device)[1]
        if there and needed > there:
            raise ConfigError(
                f"training {quantity(shape.num_parameters)} parameters takes more than {needed / 2**30:.0f} GiB and "
                f"{device} has {there / 2**30:.0f} GiB",
                where="model",
                do='Use more ranks, parallel.zero "3", parallel.offload, or optim.state_dtype bfloat16.',
            )


def _check_start(source: Source, shape: ModelConfig, loader: Loader) -> None:
    """Check that the weights of `init_from` belong to model and data.

    Length, rotary base and scaling, and the random start may be others: longer texts are learnt with a new rotation,
    which is logged.

    Raises:
        ConfigError: naming the numbers or the tokenizers that differ.
    """
    old, new = config.encode(source.config), config.encode(shape)
    differing = _as_models(source.config, shape, ("context_length", "rope", "init", *_LOSSES))
    if differing:
        raise ConfigError("has another shape than `model`: " + "; ".join(differing), where=f"init_from {source.path}")
    if old["rope"] != new["rope"]:
        logger.info("rotary positions: %s in %s, %s from now on", _named(old["rope"]), source.path, _named(new["rope"]))
    tokenizer = source.talk.tokenizer
    if tokenizer is not None and tokenizer.fingerprint != loader.fingerprint:
        raise ConfigError(
            f"was trained with another tokenizer ({tokenizer.fingerprint[:12]}) than the data "
            f"({loader.fingerprint[:12]})",
            where=f"init_from {source.path}",
            do="Tokenise the data with the tokenizer of those weights.",
        )


def _named(rope: Tree) -> str:
    """Return what distinguishes rotary positions, in words."""
    scaling = rope["scaling"] or {"kind": "none"}
    details = [f"{key} {value}" for key, value in scaling.items() if key != "kind" and value is not None]
    return f"base {rope['base']:g} and scaling {' '.join([scaling['kind'], *details])}"


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
        runtime.device_name(trainer.device),
        str(dtype).removeprefix("torch."),
        trainer.peak_flops / 1e12,
        peak_origin,
        trainer.parallel.parts[0].attention_path,
    )
