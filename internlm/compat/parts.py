"""What ranks hold in parts, told from plain tensors and modules without importing it.

`torch.distributed.tensor` takes most of a second, which a run on one device need not wait for; where it was never
imported nothing is of its kinds.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


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
