"""The real step of a run, on one process that stands for any rank of any number: no data, no memory, no network.

    step = dry_run(load("recipes/pretrain/internlm-7b-1024gpus.yaml").value, rank=1023, world_size=1024)
    step.exchanges[128, 8, "all-reduce"]        # among 128 ranks, 8 apart: (35, 3660974080), calls and bytes of tensors

All is as in a run, but that tensors know their shapes only, the process group answers nothing, rows are full and of one
document, experts are chosen equally often, and whatever is asked of a number (is it finite? how many tokens?) is
answered with 1. Operators are the CPU's: attention takes the path for whole rows, and blocks are not compiled. The
second step is the one that counts: the first also sets up.

That ranks wait for each other in vain, or compute wrong numbers, cannot be seen here. It takes each pipeline stage, and
the last rank beside the first, to see a step whole.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from internlm import ranks
from internlm.compat import groups
from internlm.compat.groups import local
from internlm.cost import traffic
from internlm.data.batch import Batch
from internlm.data.loader import Loader
from internlm.errors import ConfigError
from internlm.model.config import ModelConfig
from internlm.optim.optimizer import Optimizer
from internlm.parallel import expert
from internlm.parallel.apply import Parallel, Setting
from internlm.parallel.mesh import Layout, Mesh
from internlm.recipe import Recipe, setting_of
from internlm.train.metrics import Meter
from internlm.train.step import Stepper

KINDS: dict[str, traffic.Kind] = {
    "allgather_base": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall_base": "all-to-all",
    "send": "send",
}


@dataclass(frozen=True)
class DryStep:
    """What one rank did in a step."""

    exchanges: traffic.Exchanges
    weights: int
    """Elements of the weights that the rank keeps."""
    updated: int
    """Elements that it updates, with optimizer states."""


def dry_run(recipe: Recipe, rank: int = 0, world_size: int = 1) -> DryStep:
    """Take two steps of a run as one of its ranks and return what the second did.

    Raises:
        ConfigError: the layout, the batch and the model do not fit each other.
    """
    if world_size == 1 and not recipe.parallel.offload:  # offloading is done by what spreads a model over ranks
        return _dry_run(recipe)
    groups.join_fake_group(rank, world_size)
    try:
        return _dry_run(recipe)
    finally:
        groups.leave_fake_group()


def _dry_run(recipe: Recipe) -> DryStep:
    shape, layout = shape_of(recipe), Layout.of(recipe.parallel, ranks.world_size())
    setting, fake = _setting(recipe, shape, layout), groups.fake_tensors()
    with _Immaterial(fake):
        parallel = Parallel(shape, recipe.parallel, setting)
    for part in parallel.parts:
        expert.assume_even(part)
    optim = recipe.optim
    if optim.state_dtype == "int8":  # its codes are looked up by value; nothing else about the step differs
        optim = replace(optim, state_dtype="bfloat16")
    size = (setting.micro_rows * setting.micro_batches, setting.seq_len)
    zeros, places = torch.zeros(size, dtype=torch.int64), torch.arange(size[1]).expand(size)
    batch = Batch(zeros, zeros, places, zeros, torch.ones(size), zeros[:, 0], ("nothing",))  # all are trained on
    recorder = Recorder(parallel.mesh)
    with fake, _Affirmative(), recorder:
        stepper = Stepper(
            config=recipe.train,
            schedule=recipe.schedule,
            parallel=parallel,
            objective=recipe.objective,
            optimizer=Optimizer(optim, parallel.owned_parameters()),
            loader=cast(Loader, SimpleNamespace(config=recipe.data, next_batch=lambda rows: batch)),
            meter=_Unmetered(parallel, batch.sources, 1.0),
        )
        stepper.step()
        recorder.clear()
        stepper.step()
    held = [parameter for _, parameter in parallel.named_parameters()]
    weights, updated = (sum(part.numel() for part in map(local, some)) for some in (held, stepper.parameters))
    return DryStep(recorder.exchanges, weights, updated)


def run_of(recipe: Recipe, world_size: int) -> traffic.Run:
    """Return what the closed form of a recipe's traffic needs to know.

    Raises:
        ConfigError: the layout, the batch and the model do not fit each other, or the closed form does not hold.
    """
    shape, parallel, layout = shape_of(recipe), recipe.parallel, Layout.of(recipe.parallel, world_size)
    setting = _setting(recipe, shape, layout)
    for where, is_beyond in (
        ("model.experts", shape.experts is not None),
        ("objective", not recipe.objective.is_linear),
        ("optim.kind", recipe.optim.kind == "muon"),
    ):
        if is_beyond:
            raise ConfigError("is beyond the closed form of traffic", where=where, do="Count a step with `dry_run`.")
    return traffic.Run(
        model=shape,
        seq_len=setting.seq_len,
        micro_rows=setting.micro_rows,
        micro_batches=setting.micro_batches,
        **vars(layout),
        sequence=parallel.sequence,
        zero=parallel.zero,
        sliced=parallel.optimizer == "all" and layout.replicate > 1,
        plain=not parallel.offload,
        schedule=parallel.schedule,
        stages_per_rank=parallel.stages_per_rank,
        recompute=parallel.recompute.kind,
        recompute_ratio=parallel.recompute.ratio,
        dtype_bytes=setting.dtype.itemsize,
    )


def shape_of(recipe: Recipe) -> ModelConfig:
    """Return the shape of a recipe's model; raise ConfigError where it says only from which weights to start."""
    if recipe.model is None:
        raise ConfigError("is needed to plan a run whose weights are not here", where="model")
    return recipe.model


class Recorder(TorchDispatchMode):
    """Counts what a rank exchanges, by group and kind. It asks the groups, not the layout, which ranks they hold."""

    def __init__(self, mesh: Mesh | None) -> None:
        super().__init__()
        self.groups: dict[str, tuple[int, int]] = {}
        """Name of a group → its size, and the distance of neighbours."""
        if mesh is not None:
            groups = [dist.group.WORLD, *mesh.world.get_all_groups()]
            if mesh.layout.context > 1:
                groups.append(mesh.group("context"))
            if mesh.experts is not None:
                groups += mesh.experts.get_all_groups()
            for group in groups:
                assert group is not None, "a mesh has a process group"
                ranks = dist.get_process_group_ranks(group)
                stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
                assert ranks == list(range(ranks[0], ranks[-1] + 1, stride)), "neighbours are equally far apart"
                self.groups[group.group_name] = len(ranks), stride
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.exchanges: traffic.Exchanges = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        exchange = groups.exchange_of(operator, args)
        if exchange is not None:
            operation, group, tensor = exchange
            assert tensor is not None, "an exchange has a tensor"
            assert group in self.groups, f"{operation} in a group of no axis"
            ranks, stride = self.groups[group]
            if ranks > 1 and operation != "recv":  # what another rank sends
                key = ranks, stride, KINDS[operation]
                calls, size = self.exchanges.get(key, (0, 0))
                self.exchanges[key] = calls + 1, size + tensor.numel() * tensor.element_size()
        else:
            is_known = operator.namespace != "_c10d_functional" or operator.name().endswith("::wait_tensor")
            assert is_known, f"{operator} is not counted"
        return operator(*args, **(kwargs or {}))


class _Affirmative(TorchDispatchMode):
    """Answers what is asked of a number with 1."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        return operator(*args, **(kwargs or {}))


class _Unmetered(Meter):
    """Looks into no batch: tensors have no values."""

    def add_batch(self, batch: Batch) -> None:
        """Do nothing."""


class _Immaterial(TorchDispatchMode):
    """Makes floating-point tensors without memory, and leaves all others, such as those of meshes, real."""

    MAKERS = ("empty_like", "empty", "empty_strided", "zeros", "zeros_like")

    def __init__(self, fake: Any) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        device = kwargs.get("device")
        is_made = operator.overloadpacket.__name__ in self.MAKERS and torch.device(device or "meta").type != "meta"
        with self.fake if is_made and dtype.is_floating_point else contextlib.nullcontext():
            return operator(*args, **kwargs)


def _setting(recipe: Recipe, shape: ModelConfig, layout: Layout) -> Setting:
    """Return what the model is made for: the recipe's dtype on a GPU, and nothing that would look at values."""
    setting = setting_of(recipe, shape, layout, torch.device("cuda"))
    return replace(setting, device=torch.device("cpu"), attention="dense", compile=False)
