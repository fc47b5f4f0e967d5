"""The axes of a run: which rank holds what, and which groups it talks to.

Ranks are counted with the pipeline outermost and tensor innermost, so that the axes that talk most are neighbours:

    rank = (((pipeline · R + replicate) · S + shard) · C + context) · T + tensor

    pipeline    blocks are split over stages
    replicate   whole copies of what the other axes hold; gradients are summed over them
    shard       weights, gradients and optimizer states are cut in S · C parts (context ranks hold parts too)
    context     a row's tokens are split; the ranks of one row see the same rows
    tensor      matrices are split; the ranks of one row see the same tokens

    8 GPUs, replicate 2, shard 4:   rows go to 8 ranks; weights are gathered inside {0..3} and {4..7}; gradients are
                                    reduced inside those, and then over {0,4} {1,5} {2,6} {3,7}
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from internlm.config import or_number, require, require_positive, section
from internlm.errors import ConfigError
from internlm.model.config import ModelConfig
from internlm.parallel import float8
from internlm.parallel.recompute import RecomputeConfig


@section
class ParallelConfig:
    """How a run is spread over ranks. Sizes multiply to the number of ranks."""

    pipeline: int = 1
    """Stages that the blocks are split into."""
    replicate: int = 1
    """Copies of the sharded model; one per node is usual (Hybrid Zero). Gradients cross them once per step."""
    shard: int = 0
    """Ranks that weights, gradients and optimizer states are cut over; 0 takes all ranks that are left."""
    context: int = 1
    """Ranks that a row's tokens are split over."""
    tensor: int = 1
    """Ranks that each matrix is split over."""
    expert: int = 1
    """Of the shard and context ranks, neighbours that hold the experts of a block together. With model.experts."""
    sequence: bool = True
    """With tensor > 1: between the matrices, tokens are split over the tensor ranks instead of repeated."""
    async_tensor: bool = False
    """With sequence: send tokens in pieces, while the products with earlier ones are made. On GPUs of one machine, with
    runtime.compile. Written after torch's rules and checked on graphs; not yet run on several GPUs."""
    zero: Annotated[Literal["1", "2", "2-gather", "3"], or_number()] = "2"
    """What is kept between uses, from least traffic to least memory. 1: gathered weights and whole gradients, for the
    whole step. 2: gathered weights for the whole step, gradients in parts. 2-gather: weights are gathered once per
    micro-batch. 3: weights are gathered for each use."""
    prefetch: int = 1
    """Blocks whose weights are gathered ahead of their use."""
    optimizer: Literal["shard", "all"] = "shard"
    """Ranks that optimizer states are cut over: as the weights, or over all replicas too."""
    offload: bool = False
    """Keep weights, gradients and optimizer states in the memory of the CPU, and update there."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble", "zbv"] = "1f1b"
    """Order of the micro-batches in the pipeline."""
    stages_per_rank: int = 1
    """Stages of each pipeline rank: at least 2 for interleaved, 2 for zbv, 1 for the others."""
    float8: bool = False
    """Make the products of the blocks' linear layers in 8-bit floating point; compile the blocks with it."""
    recompute: RecomputeConfig = RecomputeConfig()
    """What is computed again in backward instead of kept."""

    def __post_init__(self) -> None:
        require_positive(self, "parallel", "pipeline", "replicate", "context", "tensor", "expert", "stages_per_rank")
        require(self, "parallel", ("shard", "prefetch"), lambda number: number >= 0, "must be 0 or more")
        least, most = {"interleaved": (2, 99), "zbv": (2, 2), "zero-bubble": (1, 99)}.get(self.schedule, (1, 1))
        if not least <= self.stages_per_rank <= most:
            raise ConfigError(
                f"does not fit parallel.schedule {self.schedule}",
                where="parallel.stages_per_rank",
                got=self.stages_per_rank,
                allowed=[str(least) if least == most else f"{least} or more"],
            )


class Coordinates(NamedTuple):
    """Where a rank stands on each axis; their order is that of the ranks, outermost first."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int


Axis = Literal["pipeline", "replicate", "shard", "context", "tensor"]


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes, checked against a number of ranks."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Layout:
        """Return the sizes for a number of ranks; `shard` 0 becomes what is left.

        Raises:
            ConfigError: they do not multiply to `world_size`.
        """
        sizes = {axis: getattr(config, axis) for axis in Coordinates._fields}
        product = math.prod(size or 1 for size in sizes.values())
        if world_size % product or (config.shard and world_size != product):
            raise _misfit(sizes, product, world_size)
        return cls(**sizes | {"shard": config.shard or world_size // product})

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(vars(self).values())

    @property
    def data(self) -> int:
        """Number of ranks that see different rows."""
        return self.replicate * self.shard

    def coordinates(self, rank: int) -> Coordinates:
        """Return where a rank stands."""
        places = {}
        for axis in reversed(Coordinates._fields):
            rank, places[axis] = divmod(rank, getattr(self, axis))
        return Coordinates(**places)

    def data_rank(self, rank: int) -> int:
        """Return which share of the rows a rank sees, 0 … data − 1."""
        at = self.coordinates(rank)
        return at.replicate * self.shard + at.shard

    def check(
        self, config: ParallelConfig, model: ModelConfig, seq_len: int, micro_rows: int, micro_batches: int
    ) -> None:
        """Check that a model and its batches can be cut so, before anything is allocated.

        Rows of a micro-batch, and micro-batches of a step, are those of one rank.

        Raises:
            ConfigError: every reason why not, with the numbers.
        """
        problems = []

        def divides(axis: str, size: int, what: str, number: int) -> None:
            if number % size:
                problems.append(f"parallel.{axis} {size} does not divide {what} {number}")

        for name in ("num_heads", "num_kv_heads", "ffn_size", "vocab_size"):
            divides("tensor", self.tensor, f"model.{name}", getattr(model, name))
        divides("context", self.context, "data.seq_len", seq_len)
        if config.sequence and not seq_len % self.context:
            divides("tensor", self.tensor, "the tokens of a context rank", seq_len // self.context)
        if config.float8:
            problems += self._float8_problems(model, micro_rows * (seq_len // self.context))
        problems += self._expert_problems(config, model)
        problems += self._pipeline_problems(config, model, micro_batches)
        if problems:
            raise ConfigError("; ".join(problems), where="layout")

    def _float8_problems(self, model: ModelConfig, tokens: int) -> list[str]:
        """Return the dims of this rank's products, forward and backward, that an 8-bit one cannot have."""
        heads = {"model.num_heads": model.num_heads, "model.num_kv_heads": model.num_kv_heads}
        dims = {f"{name} × model.head_dim / tensor": n * model.head_dim // self.tensor for name, n in heads.items()}
        dims |= {"model.hidden_size": model.hidden_size, "model.ffn_size / tensor": model.ffn_size // self.tensor}
        dims["the tokens of a micro-batch on a rank"] = tokens
        needs = f"parallel.float8 needs multiples of {float8.MULTIPLE}"
        return [f"{needs}, and {what} is {n}" for what, n in dims.items() if n % float8.MULTIPLE]

    def _expert_problems(self, config: ParallelConfig, model: ModelConfig) -> Iterator[str]:
        size = config.expert
        if model.experts is None:
            if size > 1:
                yield "parallel.expert needs a model with experts (model.experts)"
            return
        if config.optimizer == "all" and self.replicate > 1:
            yield "parallel.optimizer all does not cut the states of experts: leave it at shard"
        if model.experts.count % size:
            yield f"parallel.expert {size} does not divide model.experts.count {model.experts.count}"
        if self.shard * self.context % size:
            yield f"parallel.expert {size} does not divide shard {self.shard} × context {self.context} ranks"
            return
        own, ranks = model.experts.count // size, self.shard * self.context // size
        if own < ranks and (model.ffn_size // self.tensor % ranks or model.hidden_size % ranks):
            yield (
                f"{own} experts cannot be cut over the {ranks} ranks that hold the same ones, neither one by one nor "
                f"along model.ffn_size {model.ffn_size} and model.hidden_size {model.hidden_size}: choose another "
                "parallel.expert"
            )

    def _pipeline_problems(self, config: ParallelConfig, model: ModelConfig, micro_batches: int) -> Iterator[str]:
        if self.pipeline == 1:
            return
        stages = self.pipeline * config.stages_per_rank
        if model.num_layers < stages:
            yield f"{stages} pipeline stages have only {model.num_layers} layers (model.num_layers)"
        if model.tie_embeddings:
            yield "model.tie_embeddings needs the first and the last stage to be one: parallel.pipeline is 1"
        if micro_batches < self.pipeline:
            yield f"a pipeline of {self.pipeline} needs as many micro-batches per step, and there are {micro_batches}"
        if config.schedule in ("zero-bubble", "zbv") and config.recompute.kind in ("full", "operators"):
            yield (
                f"parallel.schedule {config.schedule} parts the backward of weights from that of inputs, and with "
                f"parallel.recompute {config.recompute.kind} each would compute the block again"
            )
        if config.schedule == "interleaved" and micro_batches % self.pipeline:
            yield f"interleaved: {micro_batches} micro-batches are no multiple of pipeline {self.pipeline}"
        rounds = max(1, micro_batches // self.pipeline)
        if config.schedule == "zero-bubble" and micro_batches % rounds:
            which = f"{rounds} rounds of pipeline {self.pipeline}"
            yield f"zero-bubble: {micro_batches} micro-batches do not divide over {which}"


def _misfit(sizes: dict[str, int], product: int, world_size: int) -> ConfigError:
    """Return the error for sizes, of that product, that do not make a number of ranks."""
    named = [name for name, size in sizes.items() if size > 1 or (name == "shard" and size)]
    total = " × ".join(f"{name} {sizes[name]}" for name in named)
    equals = f" = {product}" if len(named) > 1 else ""
    keys = ", ".join(f"parallel.{name}" for name in named)
    if sizes["shard"]:
        start, needs = product, f"exactly {_ranks(product)}"
        change = f"is {world_size} (shard 0 takes the ranks that are left)"
    else:
        start, needs = max(1, round(world_size / product)) * product, f"a multiple of {product} ranks"
        change = f"divides {world_size}"
    return ConfigError(
        f"{total}{equals} needs {needs}, and this run has {_ranks(world_size)}",
        where="parallel",
        do=f"Start {_ranks(start)} (internlm launch --nproc), or set {keys} so that the product {change}.",
    )


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


class Mesh:
    """The groups of this rank, for one layout of all ranks. Every rank must build it, in the same order.

    `expert`: ranks that hold the experts of a block together.
    """

    def __init__(self, layout: Layout, device_type: str, expert: int = 1) -> None:
        assert dist.get_world_size() == layout.world_size, "the layout was made for this world"
        self.layout, self.rank = layout, dist.get_rank()
        self.at = layout.coordinates(self.rank)
        sizes = (layout.pipeline, layout.replicate, layout.shard * layout.context, layout.tensor)
        self.world = init_device_mesh(device_type, sizes, mesh_dim_names=("pipeline", "replicate", "shard", "tensor"))
        """Weights live on ["replicate", "shard"], and on "tensor"."""
        self._rows: DeviceMesh | None = None
        if layout.context > 1:
            rows = (layout.pipeline, layout.data, layout.context, layout.tensor)
            self._rows = init_device_mesh(device_type, rows, mesh_dim_names=("pipeline", "data", "context", "tensor"))
        self.experts: DeviceMesh | None = None
        """The same ranks, with those that hold all experts together as an axis; None where each rank does."""
        if expert > 1:
            apart = (*sizes[:2], sizes[2] // expert, expert, layout.tensor)
            names = ("pipeline", "replicate", "shard", "expert", "tensor")
            self.experts = init_device_mesh(device_type, apart, mesh_dim_names=names)

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """Return this rank's group on an axis; "shard" has the context ranks in it."""
        if axis == "context":
            assert self._rows is not None, "there is a context axis only where it is longer than 1"
            return self._rows.get_group("context")
        return self.world.get_group(axis)

    @property
    def reports(self) -> bool:
        """Whether this rank is the one of those with equal outputs whose numbers count: context and tensor 0."""
        return self.at.context == 0 and self.at.tensor == 0
