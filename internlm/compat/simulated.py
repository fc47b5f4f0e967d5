"""Process groups without processes, tensors without memory, and what operators exchange: for `plan`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
