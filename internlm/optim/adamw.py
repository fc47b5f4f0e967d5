"""AdamW (Loshchilov and Hutter 2019), whose two moments take 8, 4 or 2 bytes per parameter; the arithmetic is in fp32.

bfloat16    A moment that moves by less than half a unit in its last place would stand still, so it is rounded up or
            down at random, with the probabilities that keep its mean. The randomness is a function of the step and the
            parameter's place in the optimizer: a run that is resumed goes on bit by bit.

int8        Blocks of 256 neighbours share a scale, their largest magnitude, and every entry is one of 256 fractions of
            it that lie densest near zero (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, sec. 2).
            Of the second moment the root is kept, which has half as many decades to cover, and what is not zero never
            becomes zero: a parameter's step is otherwise divided by nothing.

Measured by the tests: a tiny language model ends within 0.1% of the loss of fp32 states.
Limits: exact resume for int8 needs roots of the second moment above 1e-19 (their squares are what a checkpoint holds),
and the layout it was saved in, as blocks lie elsewhere in another; first moments below 1e-38 are zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from internlm.compat.groups import local
from internlm.compat.kernels import fused_adamw
from internlm.optim import Group, Updater

StateDtype = Literal["float32", "bfloat16", "int8"]

BLOCK = 256
"""Entries that share a scale: one outlier spoils the resolution of so many, and scales cost 4 / 256 byte each."""
SLAB = 1 << 24
"""Entries updated at once: fp32 copies of both moments are held for these only (a multiple of BLOCK)."""


@dataclass(frozen=True)
class Rule:
    """The numbers of one update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """The update's number, from 1."""


def update(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, rule: Rule) -> None:
    """Take one AdamW step, in place. All fp32 and of one shape; mean and square are the two moments."""
    mean.lerp_(grad, 1 - rule.beta1)
    square.mul_(rule.beta2).addcmul_(grad, grad, value=1 - rule.beta2)
    root = square.sqrt().div_(math.sqrt(1 - rule.beta2**rule.step)).add_(rule.eps)
    weight.mul_(1 - rule.lr * rule.weight_decay)
    weight.addcdiv_(mean, root, value=-rule.lr / (1 - rule.beta1**rule.step))


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return fp32 x in bf16, each entry one of its two neighbours, nearer ones more often; inf and nan stay."""
    noise = torch.empty(x.shape, dtype=torch.int32, device=x.device).random_(0, 1 << 16, generator=generator)
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).bfloat16()  # the bits of a GPU's nan are 0x7fffffff: a carry makes it -0


@functools.cache
def fractions(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 256 fractions, rising, fp32, and the 255 bounds between them.

    A decade 10^-k gets 2^(6 - k) equal steps if signed, else 2^(7 - k): a byte has a sign, k zeros, a one, and what is
    left says where between 0.1 and 1 of the decade. And 0, and the ends.
    """
    positive = [
        10.0**-zeros * (0.1 + 0.9 * (place + 0.5) / count)
        for zeros in range(7)
        for count in [1 << ((6 if signed else 7) - zeros)]
        for place in range(count)
    ]
    # The ends are exact, so that encoding what was decoded changes nothing; the smallest negative one makes room.
    values = [*positive, 0.0, 1.0] + ([-1.0, *(-x for x in positive[:-1])] if signed else [])
    table = torch.tensor(sorted(values), dtype=torch.float32, device=device)
    assert len(table) == 256, "a code is a byte"
    return table, (table[1:] + table[:-1]) / 2


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 and of the shape [n] of x, and scales [n / 256, rounded up] of x, fp32.

    A block without normal numbers becomes zero: dividing by its scale would say nothing.
    """
    _, bounds = fractions(signed, x.device)
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    scales = scales.masked_fill(scales < torch.finfo(torch.float32).tiny, 0)
    shares = blocks / scales.masked_fill(scales == 0, math.inf)[:, None]
    codes = torch.bucketize(shares, bounds, out_int32=True)
    if not signed:
        codes = torch.where((shares > 0) & (codes == 0), 1, codes)  # the first of these fractions is 0
    return codes.to(torch.uint8).view(-1)[: len(x)], scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return fp32 [n] from codes [n] and scales."""
    table, _ = fractions(signed, codes.device)
    shares = table[codes.int()]
    return shares * scales.repeat_interleave(BLOCK)[: len(codes)]


def _recalled(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the two moments, fp32 [n], from a state."""
    if "exp_avg" in state:
        return state["exp_avg"].float(), state["exp_avg_sq"].float()
    mean = decode(state["mean"], state["mean_scale"], signed=True)
    return mean, decode(state["root"], state["root_scale"], signed=False).square_()


def _keep(state: dict[str, Tensor], mean: Tensor, square: Tensor) -> None:
    """Put the two moments, fp32 [n], into their codes."""
    for name, values in (("mean", mean), ("root", square.sqrt())):
        codes, scales = encode(values, signed=name == "mean")
        state[name].copy_(codes)
        state[f"{name}_scale"].copy_(scales)


class AdamW(Updater):
    """One kernel for all parameters of a group.

    A parameter's state is `step`, fp32 [], and `exp_avg` and `exp_avg_sq` of its shape and placement.
    """

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


class CompactAdamW(Updater):
    """AdamW with moments in bf16 or int8.

    A parameter's state is `step`, fp32 [] on the CPU, and `exp_avg` and `exp_avg_sq` of its shape and placement; or for
    int8, of the n entries that this rank holds of it, `mean` and `root`, uint8 [n], with `mean_scale` and `root_scale`,
    fp32 [n / 256, rounded up].
    """

    def __init__(
        self, groups: list[Group], betas: tuple[float, float], eps: float, state_dtype: Literal["bfloat16", "int8"]
    ) -> None:
        self.betas, self.eps, self.state_dtype = betas, eps, state_dtype
        super().__init__(groups)

    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        state = {"step": torch.zeros(())}  # on the CPU, where it is read
        if self.state_dtype == "bfloat16":
            return state | {slot: torch.zeros_like(parameter, dtype=torch.bfloat16) for slot in _MOMENTS}
        codes = torch.zeros_like(_flat(parameter), dtype=torch.uint8)
        scales = torch.zeros(-(-len(codes) // BLOCK), device=codes.device)
        return state | {
            "mean": codes,
            "mean_scale": scales,
            "root": torch.zeros_like(codes),
            "root_scale": scales.clone(),
        }

    @torch.no_grad()
    def step(self, rate: float = 1.0) -> None:
        """Update every parameter that has a gradient, with `rate` times its group's learning rate."""
        number = 0
        for group in self.groups:
            for parameter in group.parameters:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                rule = Rule(group.lr * rate, *self.betas, self.eps, group.weight_decay, int(state["step"]))
                weight, grad = _flat(parameter), _flat(parameter.grad)
                for own, part in _slabs(state, len(weight)):
                    mean, square = _recalled(part)
                    update(weight[own], grad[own], mean, square, rule)
                    if self.state_dtype == "int8":
                        _keep(part, mean, square)
                        continue
                    # replicas of a part round it alike
                    generator = torch.Generator(weight.device).manual_seed(rule.step << 20 | number)
                    for slot, values in zip(_MOMENTS, (mean, square), strict=True):
                        part[slot].copy_(round_at_random(values, generator))

    @torch.no_grad()
    def decoded(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter as torch's AdamW has it: `step`, `exp_avg`, `exp_avg_sq`.

        For int8 they are fp32 copies, cut over ranks as the parameter is, but in the CPU's memory: decoded at once, as
        a checkpoint needs them, all states are four times what the GPU has room for.
        """
        state = self.state[parameter]
        if self.state_dtype == "bfloat16":
            return state
        made = {slot: torch.zeros_like(parameter, device="cpu") for slot in _MOMENTS}
        mean, square = (_flat(made[slot]) for slot in _MOMENTS)
        for own, part in _slabs(state, len(mean)):
            for place, values in zip((mean[own], square[own]), _recalled(part), strict=True):
                place.copy_(values)
        return {"step": state["step"], **made}

    @torch.no_grad()
    def restore(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Take over what was loaded into the tensors of `decoded`; they may lie elsewhere."""
        if self.state_dtype == "bfloat16":
            return
        mean, square = (_flat(state[slot]) for slot in _MOMENTS)
        for own, part in _slabs(self.state[parameter], len(mean)):
            device = part["mean"].device
            _keep(part, mean[own].to(device), square[own].to(device))


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _slabs(state: dict[str, Tensor], length: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield stretches of a parameter's [n] entries, each with what the state holds of it, which shares its memory."""
    for start in range(0, length, SLAB):
        own, blocks = slice(start, start + SLAB), slice(start // BLOCK, (start + SLAB) // BLOCK)
        flat = {name: _flat(value) for name, value in state.items() if name != "step"}
        yield own, {name: value[blocks if name.endswith("_scale") else own] for name, value in flat.items()}


def _flat(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, [n], sharing its memory."""
    return local(tensor.detach()).view(-1)
