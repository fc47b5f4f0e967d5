"""Whole copies of a model: gradients are summed over ranks in buckets, while backward still runs.

Gradients live in one flat tensor per bucket, of which every `.grad` is a view: nothing is copied to send them. In the
step's last backward a bucket leaves as soon as its last gradient is there; parameters are put in buckets in the reverse
of their order, which is about that in which gradients come.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.cost import traffic


class Replicas:
    """Sums the gradients of a model, which is equal on all ranks of a group, over these."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.group = group
        self.is_last = False
        self.works: list[dist.Work] = []
        self.buckets: list[Tensor] = []
        self.waiting: list[int] = []
        self.sizes: list[int] = []
        for number, members in enumerate(_fill([p for p in model.parameters() if p.requires_grad][::-1])):
            flat = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
            for parameter, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
                parameter.grad = part.view_as(parameter)
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._came(number))
            self.buckets.append(flat)
            self.sizes.append(len(members))

    def _came(self, number: int) -> None:
        if not self.is_last:
            return
        self.waiting[number] -= 1
        if self.waiting[number] == 0:
            work = dist.all_reduce(self.buckets[number], group=self.group, async_op=True)
            assert work is not None, "an asynchronous collective gives a handle"
            self.works.append(work)

    def begin_backward(self, *, is_last: bool) -> None:
        """Say whether the next backward is the step's last, after which gradients are summed."""
        self.is_last = is_last
        self.waiting = list(self.sizes)

    def finish(self) -> None:
        """Wait for the sums; a bucket of which a parameter had no gradient leaves now."""
        for number, waiting in enumerate(self.waiting):
            if waiting:
                dist.all_reduce(self.buckets[number], group=self.group)
        for work in self.works:
            work.wait()
        self.works.clear()

    def zero(self) -> None:
        """Set all gradients to zero, in place: they must stay views of their buckets."""
        torch._foreach_zero_(self.buckets)


def _fill(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    size = traffic.BUCKET_BYTES
    for parameter in parameters:
        if size >= traffic.BUCKET_BYTES or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
