"""Parameters into groups, groups into optimizers, all behind one small object.

Groups by role, decided by name and shape (`role`):

    matrix      weights inside blocks, stacked ones too     decayed
    table       embedding and head                          decayed only if asked
    vector      norms and biases                            never decayed

`Optimizer.named_state` names every state tensor after its parameter, so that a checkpoint does not depend on order, and
moments of any `state_dtype` can be continued in any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from internlm.compat.groups import is_parted, local
from internlm.config import default_kind, require, section
from internlm.errors import ConfigError, WeightsError
from internlm.optim import Group, Updater
from internlm.optim.adamw import AdamW, CompactAdamW, StateDtype
from internlm.optim.muon import Muon

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Role = Literal["matrix", "table", "vector"]


@section
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices inside blocks."""
    decay_tables: bool = False
    """Whether embedding and head are decayed too."""
    table_lr_ratio: float = 1.0
    """Learning rate of embedding and head, as a multiple of `lr`."""
    state_dtype: StateDtype = "float32"
    """Of AdamW's two moments: 8, 4 or 2 bytes per parameter. Norms and biases, and Muon's momentum, stay float32."""

    def __post_init__(self) -> None:
        names = ("lr", "weight_decay", "table_lr_ratio")
        require(self, "optim", names, lambda number: number >= 0, "must be at least 0")
        # At 0 the row of an id that never occurred becomes 0 / 0.
        require(self, "optim", ("eps",), lambda eps: eps > 0, "must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("must lie in [0, 1)", where="optim.betas", got=self.betas)

    @property
    def moment_bytes(self) -> int:
        """What is kept of a parameter from step to step, besides itself, in bytes."""
        return {"float32": 8, "bfloat16": 4, "int8": 2}[self.state_dtype]


@section
class MuonConfig(AdamWConfig):
    """Muon for the matrices inside blocks, AdamW with the same fields for the rest."""

    kind: Literal["muon"] = "muon"  # type: ignore[assignment]
    momentum: float = 0.95
    """Decay of Muon's momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "optim", ("momentum",), lambda momentum: 0 <= momentum < 1, "must lie in [0, 1)")

    @property
    def moment_bytes(self) -> int:
        """As for AdamW; of matrices, which are nearly all, one moment in float32, whatever `state_dtype` is."""
        return 4


OptimConfig = Annotated[AdamWConfig | MuonConfig, pydantic.Field(discriminator="kind"), default_kind("adamw")]


def role(name: str, parameter: Tensor) -> Role:
    """Return what a parameter is, from its name and shape."""
    if parameter.ndim < 2:
        return "vector"
    return "matrix" if name.startswith("blocks.") else "table"


class Optimizer:
    """The updaters, one to three, of named parameters, fp32, plain or DTensors. What needs no gradient is left out."""

    def __init__(self, config: AdamWConfig | MuonConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.lr = config.lr
        """Peak learning rate."""
        self.names: dict[Tensor, str] = {p: name for name, p in parameters if p.requires_grad}
        """Of every parameter that is updated."""
        groups: dict[Role, Group] = {
            "matrix": Group([], config.lr, config.weight_decay),
            "table": Group([], config.lr * config.table_lr_ratio, config.weight_decay * config.decay_tables),
            "vector": Group([], config.lr, 0.0),
        }
        for parameter, name in self.names.items():
            groups[role(name, parameter)].parameters.append(parameter)
        groups = {kind: group for kind, group in groups.items() if group.parameters}
        self.parts: list[Updater] = []
        """Each parameter is in one of them."""
        if isinstance(config, MuonConfig) and "matrix" in groups:
            self.parts.append(Muon([groups.pop("matrix")], config.momentum))
        if config.state_dtype != "float32":
            compact = [groups.pop(kind) for kind in list(groups) if kind != "vector"]
            if compact:
                self.parts.append(CompactAdamW(compact, config.betas, config.eps, config.state_dtype))
        if groups:
            self.parts.append(AdamW(list(groups.values()), config.betas, config.eps))

    def step(self, rate: float) -> None:
        """Update the parameters with `rate` times each group's peak learning rate."""
        for part in self.parts:
            part.step(rate)

    def named_state(self) -> dict[str, Tensor]:
        """Return every state tensor as `<parameter name>.<slot>`; those of int8 are copies, in fp32 and on the CPU."""
        return {
            f"{self.names[parameter]}.{slot}": value
            for part in self.parts
            for parameter, slots in part.state.items()
            for slot, value in (part.decoded(parameter) if isinstance(part, CompactAdamW) else slots).items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over new values of all the tensors of `named_state`, which were filled in place."""
        for part in self.parts:
            if isinstance(part, CompactAdamW):
                for parameter in part.state:
                    name = self.names[parameter]
                    part.restore(parameter, {slot: state[f"{name}.{slot}"] for slot in ("exp_avg", "exp_avg_sq")})


@torch.no_grad()
def squared_norm(parameters: Iterable[nn.Parameter], ranks: int = 1) -> Tensor:
    """Return this rank's share of the squared L2 norm of all gradients, fp64: summed over all ranks it is the square.

    What several ranks hold alike is shared between them; `ranks` hold a parameter that is a plain tensor.

    Raises:
        WeightsError: no parameter has a gradient.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise WeightsError("no parameter has a gradient", do="Check that something in the batch is trained on.")
    shares = [1 / (_copies(grad) if is_parted(grad) else ranks) for grad in grads]
    norms = torch.stack(torch._foreach_norm(list(map(local, grads)), dtype=torch.float32)).double()
    return (norms.square() * norms.new_tensor(shares)).sum()


@torch.no_grad()
def scale_to_norm(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float, divisor: float = 1.0) -> None:
    """Scale all gradients, in place, so that their global norm is at most `limit`; not if the norm is not finite.

    A limit of 0 or infinity leaves them alone. By `divisor` they are divided besides; `norm` is that after it.
    """
    if limit <= 0 and divisor == 1:
        return
    scale = torch.ones_like(norm)
    if limit > 0:
        scale = torch.where(norm.isfinite(), (limit / (norm + 1e-6)).clamp(max=1.0), scale)
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, (scale / divisor).float().to(grads[0].device))  # with parallel.offload on the CPU


def _copies(tensor: DTensor) -> int:
    """Return how many ranks hold the same part of a tensor."""
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())
