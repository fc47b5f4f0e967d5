"""AdamW (Loshchilov and Hutter 2019) with moments in fp32: one kernel for all parameters of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from internlm.compat.groups import local
from internlm.compat.kernels import fused_adamw
from internlm.optim import Group, Updater


class AdamW(Updater):
    """AdamW. A parameter's state is `step`, fp32 [], and `exp_avg` and `exp_avg_sq` of its shape and placement."""

    def __init__(self, groups: list[Group], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups)
        self.betas, self.eps = betas, eps

    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where the kernel reads it
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, rate: float = 1.0) -> None:
        """Update every parameter that has a gradient, with `rate` times its group's learning rate."""
        for group in self.groups:
            parameters = [parameter for parameter in group.parameters if parameter.grad is not None]
            if parameters:
                states = [self.state[parameter] for parameter in parameters]
                steps, means, squares = ([s[slot] for s in states] for slot in ("step", "exp_avg", "exp_avg_sq"))
                torch._foreach_add_(steps, 1)
                grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
                weights, grads, means, squares = (list(map(local, x)) for x in (parameters, grads, means, squares))
                numbers = {"lr": group.lr * rate, "eps": self.eps, "weight_decay": group.weight_decay}
                fused_adamw(weights, grads, means, squares, steps, beta1=self.betas[0], beta2=self.betas[1], **numbers)
