"""What ranks hold in parts and exchange, their groups and launcher; groups and tensors that `plan` only pretends."""

from __future__ import annotations

import datetime
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.compat import replaced

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# `torch.distributed.tensor` takes most of a second, which a run on one device need not wait for; where it was never
# imported nothing is of its kinds.


def is_parted(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> TypeGuard[FSDPModule]:
    """Return whether `fully_shard` was applied to a module."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(model, module.FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares memory with it; a plain one itself."""
    return tensor.to_local() if is_parted(tensor) else tensor


def begin(tensor: Tensor) -> tuple[int, ...]:
    """Return where this rank's part begins in a tensor, as `torch.distributed.checkpoint` asks it."""
    return tuple(tensor.__create_chunk_list__()[0].offsets) if is_parted(tensor) else (0,) * tensor.ndim


def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    """Fill `out` with the x of all ranks of a group, one after the other along dim 0. Renamed in 2.13."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, x, group=group)


def reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    """Fill `out` with this rank's part along dim 0 of the sum of x over a group. Renamed in 2.13."""
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, x, group=group)


def traced_gather(x: Tensor, group: Any, dim: int) -> Tensor:
    """Return the x of all ranks joined along a dim, in the form that inductor fuses with products."""
    from torch.distributed import _functional_collectives as functional

    gathered = getattr(functional, "all_gather_single", functional.all_gather_tensor)
    return gathered(x.contiguous(), dim, group)


def traced_scatter(x: Tensor, group: Any, dim: int) -> Tensor:
    """Return this rank's part along a dim of the sum of x over a group, in the form that inductor fuses."""
    from torch.distributed import _functional_collectives as functional

    scattered = getattr(functional, "reduce_scatter_single", functional.reduce_scatter_tensor)
    return scattered(x, "sum", dim, group)


def fuse_collectives(group: Any) -> None:
    """Make inductor run the gathers and scatters of a group in pieces, beside the products before or after them.

    Private names of torch's asynchronous tensor parallelism; from 2.13 on the first call only warns.
    """
    import torch._inductor.config as inductor
    from torch.distributed import _symmetric_memory

    _symmetric_memory.enable_symm_mem_for_group(group.group_name)
    inductor._micro_pipeline_tp = True


def shards(placement: Any, dim: int) -> bool:
    """Return whether a placement cuts a dim. torch's strided placement is private, and in 2.13 not a Shard."""
    return not placement.is_replicate() and not placement.is_partial() and placement.dim == dim


def shard_inside(dim: int, parts: int) -> Any:
    """Return the placement of a mesh axis that cuts each of the `parts` equal parts that later axes cut a dim into."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    return Shard(dim) if parts == 1 else _StridedShard(dim, split_factor=parts)


def weight_stream(model: Any) -> Any:
    """Return the stream on which `fully_shard` reads weights to gather them; None where that is not known.

    The public `set_post_optim_event` knows one event for the whole model.
    """
    context = getattr(model._get_fsdp_state(), "_comm_ctx", None)
    return getattr(context, "all_gather_copy_in_stream", None)


def limit_waits(seconds: float) -> None:
    """Set how long an exchange may take in every group of this process: groups inherit it from no other."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def abort_groups() -> None:
    """Give up every group of this process without waiting for other ranks, who may never come."""
    from torch.distributed import distributed_c10d as c10d

    c10d._abort_process_group()


def launcher_agent(make: Callable[..., Any]) -> AbstractContextManager[None]:
    """Let torch's launcher use, inside the block, another agent for its ranks."""
    return replaced(importlib.import_module("torch.distributed.launcher.api"), "LocalElasticAgent", make)


def flight_record() -> bytes | None:
    """Return the last exchanges of this process as torch recorded them, for `torchfrtrace`; None where it does not.

    CPU builds before 2.13 lack the name. Some 2000 exchanges, unless TORCH_FR_BUFFER_SIZE says else.
    """
    c10d = getattr(torch._C, "_distributed_c10d", None)
    dump = getattr(c10d, "_dump_fr_trace", None) or getattr(c10d, "_dump_nccl_trace", None)
    return None if dump is None else bytes(dump())


def join_fake_group(rank: int, world_size: int) -> None:
    """Start a process group of which only this rank is there: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def leave_fake_group() -> None:
    """End it, with what torch remembers about its meshes, whose names the next group would use again."""
    from torch.distributed.tensor import DTensor

    dist.destroy_process_group()
    getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)()
    propagator = getattr(getattr(DTensor, "_op_dispatcher", None), "sharding_propagator", None)
    getattr(getattr(propagator, "propagate_op_sharding", None), "cache_clear", lambda: None)()


def fake_tensors() -> Any:
    """Return the mode in which operators work out shapes only; it takes real tensors too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def exchange_of(operator: Any, arguments: tuple[Any, ...]) -> tuple[str, str, Tensor | None] | None:
    """Return what an operator of the dispatcher sends between ranks: (operation, name of the group, tensor).

    The tensor is the whole one: what an all-gather makes, what the others are given. None for every other operator.
    """
    namespace, _, name = operator.name().partition("::")
    if namespace == "_c10d_functional" and name == "all_reduce":
        return "all_reduce", arguments[2], arguments[0]
    if namespace != "c10d" or name in ("monitored_barrier_", "barrier"):
        return None
    group = next((a for a in arguments if isinstance(a, torch.ScriptObject)), None)
    assert group is not None, f"{name} has a group"
    first = arguments[0][0] if isinstance(arguments[0], list | tuple) else arguments[0]
    whole = arguments[1] if name == "_reduce_scatter_base_" else first
    return name.strip("_"), dist.ProcessGroup.unbox(group).group_name, whole
