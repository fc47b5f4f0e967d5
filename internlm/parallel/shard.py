"""Hybrid Zero: weights, gradients and optimizer states in parts, on torch's `fully_shard`, with one policy for traffic.

A block's weights are gathered from the ranks of its shard axis (one node, usually) before use, and its gradients are
added over the same ranks, each keeping its part; over the replicate axis (between nodes) only those parts are added,
once per step. What is kept in between is `parallel.zero`; what that costs is written in `internlm.cost.traffic`.

Weights are kept and reduced in fp32, and computed with in `dtype`. Losses are divided by the token count of the whole
step before backward, so gradients are summed, never averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from internlm.compat.groups import is_sharded, local
from internlm.model.moe import mixtures
from internlm.model.transformer import Transformer
from internlm.parallel import optimizer_shard
from internlm.parallel.mesh import Mesh, ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard


def shard(model: Transformer, mesh: Mesh, config: ParallelConfig, dtype: torch.dtype) -> None:
    """Cut the weights of a model, or of a pipeline stage, over the shard axis, in place.

    Its matrices may be cut over the tensor axis. `dtype`: in which weights are gathered and products made.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.offload else OffloadPolicy()
    # What crosses replicas is the all-reduce of torch, or the two halves of it in `optimizer_shard`.
    sliced = optimizer_shard.applies(config, mesh.layout)
    axes = mesh.world["shard"] if sliced else mesh.world["replicate", "shard"]

    def cut(module: nn.Module, over: DeviceMesh, again: bool) -> Any:
        place = functools.partial(_placed, ranks=over["shard"].size())
        return fully_shard(
            module,
            mesh=over,
            reshard_after_forward=again,
            shard_placement_fn=place,
            mp_policy=precision,
            offload_policy=offload,
        )

    # torch runs no gather between a pipeline's forward and backward.
    again = config.zero == "3" and mesh.layout.pipeline == 1
    if mesh.experts is not None:
        for mixture in mixtures(model).values():  # over the ranks that hold the same experts
            cut(mixture.experts, mesh.experts["replicate", "shard"], again)
    blocks = [cut(block, axes, again) for block in model.blocks.values()]
    if not model.config.tie_embeddings:
        for end in (model.embedding, model.head):
            if end is not None:
                cut(end, axes, again)
    cut(model, axes, False)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum, and nothing is scaled
    if not model.config.tie_embeddings and is_sharded(model.embedding):
        # Else torch gathers ahead of it what was used before: the head of the micro-batch before, for nobody.
        model.embedding.set_modules_to_backward_prefetch([model.embedding])
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(_gathered(blocks[index + 1 : index + 1 + config.prefetch]))
        block.set_modules_to_backward_prefetch(_gathered(blocks[max(0, index - config.prefetch) : index][::-1]))


def begin_backward(model: nn.Module, config: ParallelConfig, *, is_last: bool) -> None:
    """Say what the next backward leaves behind: nothing but gradients in the step's last, what `zero` says before.

    A model that was not cut is left alone.
    """
    slices = optimizer_shard.of(model)
    if not is_sharded(model):
        return
    model.set_is_last_backward(is_last)
    model.set_requires_gradient_sync(is_last or config.zero != "1")
    model.set_requires_all_reduce(is_last)  # after the line above, which sets this too
    model.set_reshard_after_backward(is_last or config.zero not in ("1", "2"))
    if slices is not None:
        slices.is_last = is_last


def finish_backward(model: nn.Module) -> None:
    """Complete the gradients after the step's last backward."""
    slices = optimizer_shard.of(model)
    if slices is not None:
        slices.finish_backward()


def _placed(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Return along which dim a weight is cut; None: the first. Too few experts for the ranks are cut by outputs."""
    if parameter.ndim < 3:
        return None
    from torch.distributed.tensor import Shard

    experts, outputs, _ = local(parameter).shape
    return Shard(1) if experts % ranks and outputs % ranks == 0 else None


def _gathered(blocks: list[FSDPModule]) -> list[FSDPModule]:
    """Return blocks and what gathers weights of its own in them."""
    return [module for block in blocks for module in sharded_modules(block)]


def sharded_modules(model: Any) -> Iterator[FSDPModule]:
    """Yield every module that gathers weights of its own."""
    return (module for module in model.modules() if is_sharded(module))
