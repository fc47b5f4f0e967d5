"""From a shape to this rank's part of a model: every transformation, in the one order in which they compose.

    pipeline split → float8 → tensor → context → experts → recompute → compile → shard → memory and weights

Without a process group nothing is done and the model is a plain one. Whole copies alone (`replicate`, nothing else)
stay plain models whose gradients are summed. What only some layouts need is imported where they need it: torch's
pipelines and DTensors take more than a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.compat import groups
from internlm.compat.groups import begin, local
from internlm.cost.flops import stage_layers
from internlm.errors import ConfigError
from internlm.model.config import ModelConfig
from internlm.model.moe import SideLosses, mixtures
from internlm.model.transformer import Transformer, empty, give_memory, initial
from internlm.parallel import context, float8, optimizer_shard
from internlm.parallel.mesh import Layout, Mesh, ParallelConfig
from internlm.parallel.microbatch import Runner
from internlm.parallel.recompute import recompute
from internlm.parallel.replicate import Replicas
from internlm.parallel.shard import shard, sharded_modules
from internlm.runtime import AttentionPath
from internlm.weights.load import Check, shapes

if TYPE_CHECKING:
    from internlm.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class Setting:
    """What a model is made for."""

    device: torch.device
    dtype: torch.dtype
    """Of matrix products."""
    attention: AttentionPath
    """Path of attention, see `model.attention`."""
    compile: bool
    """Whether blocks are compiled."""
    seq_len: int
    """Tokens per row."""
    micro_rows: int
    """Rows of a micro-batch."""
    micro_batches: int
    """Per step."""


class Parallel:
    """This rank's part of a model, and what it needs to run with the others.

    `parts` have memory, and no values until `initialize` or `load`.
    """

    def __init__(self, shape: ModelConfig, config: ParallelConfig, setting: Setting) -> None:
        self.shape, self.config, self.device = shape, config, setting.device
        is_alone = not dist.is_initialized()
        self.layout = Layout.of(config, 1 if is_alone else dist.get_world_size())
        self.mesh = mesh = None if is_alone else Mesh(self.layout, setting.device.type, config.expert)
        self.parts = self._split(setting)
        if config.async_tensor:
            _check_async(config, setting)
        sliced = optimizer_shard.applies(config, self.layout)
        copies_only = self.layout.replicate == self.layout.world_size and not config.offload and not sliced
        is_plain = mesh is None or copies_only
        for part in self.parts:
            if config.float8:
                float8.convert(part)
            if mesh is not None and self.layout.tensor > 1:
                from internlm.parallel import tensor

                if config.async_tensor:
                    groups.fuse_collectives(mesh.group("tensor"))
                tensor.cut(part, mesh.world["tensor"], sequence=config.sequence)
            if mesh is not None and self.layout.context > 1:
                context.spread(part, mesh.group("context"))
            if mesh is not None and shape.experts is not None:
                from internlm.parallel import expert

                expert.spread(part, mesh)
            recompute(part, config.recompute)
            if setting.compile:
                for block in part.blocks.values():
                    block.compile()
            if mesh is not None and not is_plain:
                shard(part, mesh, config, setting.dtype)
            for mixture in mixtures(part).values():
                mixture.sides = SideLosses(mixture.config.count, setting.device)
            if is_plain:
                give_memory(part, setting.device)
            else:
                part.to_empty(device="cpu" if config.offload else setting.device)
                if shape.tie_embeddings:
                    part.tie()  # to_empty makes two tensors of the shared one
            if mesh is not None and sliced:
                optimizer_shard.Slices(part, mesh, config.prefetch)
        replicas = None if mesh is None or not copies_only else Replicas(self.parts[0], mesh.group("replicate"))
        # A sharded model gathers its weights in `dtype`; a plain one keeps them in fp32.
        low = is_plain and setting.dtype != torch.float32
        # Without its cache: that keeps a copy of every weight through forward, where recompute wants none kept.
        autocast = torch.autocast(setting.device.type, setting.dtype, cache_enabled=False) if low else None
        self.run = Runner(self.parts, config, mesh, replicas, self._pipeline(setting), autocast)

    def named_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Yield the parameters of all parts as they lie between steps; names are those of the whole model."""
        for part in self.parts:
            for module in sharded_modules(part):
                module.reshard()  # a validation leaves them gathered
            slices = optimizer_shard.of(part)
            if slices is not None:
                slices.settle()
            yield from part.named_parameters()

    def owned_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Yield what this rank updates, with its gradients: the parameters, or slices of them of the same names."""
        for part in self.parts:
            yield from (optimizer_shard.of(part) or part).named_parameters()

    def share(self) -> None:
        """Bring what this rank has updated to the others. Every rank must call it, after the optimizer's step."""
        for part in self.parts:
            slices = optimizer_shard.of(part)
            if slices is not None:
                slices.gather()

    def initialize(self, seed: int) -> None:
        """Fill every parameter from its name and the seed: the same start in any layout."""
        for name, parameter in self.named_parameters():
            place(parameter, initial(self.shape, name, parameter.shape, seed))

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Fill every parameter from a stream of whole tensors, of which each rank takes its part.

        Raises:
            WeightsError: tensors are missing, left over, given twice or of another shape.
        """
        own = dict(self.named_parameters())
        check = Check(shapes(self.shape), self.shape.tie_embeddings)
        for name, value in tensors:
            if check.accepts(name, value.shape) and name in own:  # others are another stage's
                place(own[name], value)
        check.finish()

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return 0 if self.mesh is None else self.mesh.rank

    @property
    def counts(self) -> bool:
        """Whether this rank is the one of those that compute the same losses whose numbers count."""
        return self.run.has_loss and (self.mesh is None or self.mesh.reports)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one of those that see the same rows that counts them."""
        return self.mesh is None or (self.mesh.reports and self.mesh.at.pipeline == 0)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        if self.run.replicas is not None:
            self.run.replicas.zero()
            return
        for part in self.parts:
            part.zero_grad()
        for _, parameter in self.owned_parameters():
            parameter.grad = None

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all ranks. Every rank must call it."""
        if self.mesh is None:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def _split(self, setting: Setting) -> list[Transformer]:
        """Return this rank's stages, on the meta device."""
        if self.layout.pipeline == 1 or self.mesh is None:
            return [empty(self.shape, setting.attention)]
        count = self.layout.pipeline * self.config.stages_per_rank
        layers = stage_layers(self.shape, count, setting.seq_len)
        from internlm.parallel import pipeline

        parts = []
        for stage in pipeline.stages_of(self.config, self.mesh.at.pipeline):
            parts.append(empty(self.shape, setting.attention))
            pipeline.take(parts[-1], stage, layers)
        return parts

    def _pipeline(self, setting: Setting) -> Pipeline | None:
        if self.layout.pipeline == 1 or self.mesh is None:
            return None
        from internlm.parallel import pipeline

        return pipeline.Pipeline(self.parts, self.config, self.mesh.group("pipeline"), setting)


def _check_async(config: ParallelConfig, setting: Setting) -> None:
    """Check that there is something that sends tokens in pieces.

    Raises:
        ConfigError: naming what is missing.
    """
    needed = {
        "parallel.tensor over 1": config.tensor > 1,
        "parallel.sequence": config.sequence,
        "runtime.compile": setting.compile,
        "a CUDA device": setting.device.type == "cuda",
    }
    missing = [name for name, is_there in needed.items() if not is_there]
    if missing:
        raise ConfigError(f"needs {' and '.join(missing)}", where="parallel.async_tensor")


@torch.no_grad()
def place(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or this rank's part of it, into a parameter. No rank talks to another."""
    own = local(parameter)
    for dim, (first, count) in enumerate(zip(begin(parameter), own.shape, strict=True)):
        value = value.narrow(dim, first, count)
    own.copy_(value)
