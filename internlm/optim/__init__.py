"""Optimizers, and schedules. Here is what optimizers have in common: groups of parameters, a state for each, a step.

They are not made from `torch.optim.Optimizer`, whose constructor and step import torch's compiler: more than a second
of every start, for who never compiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Group:
    """Parameters that are updated alike."""

    parameters: list[Tensor]
    """Fp32, plain or DTensors."""
    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled: of lr · this a parameter shrinks in a step."""


class Updater:
    """An optimizer of some parameters, each in one of its groups."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: self.zeros(parameter) for group in groups for parameter in group.parameters
        }
        """Of each parameter, from the start: every checkpoint holds all of it."""

    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        raise NotImplementedError

    def step(self, rate: float = 1.0) -> None:
        """Update every parameter that has a gradient, with `rate` times its group's learning rate."""
        raise NotImplementedError
