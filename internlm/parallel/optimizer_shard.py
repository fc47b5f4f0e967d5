"""Optimizer states over more ranks than the weights: each replica updates its slice of the rank's part.

    shard rank 0 of three replicas          replica 0      replica 1      replica 2
    its part of a weight [rows / S, C]      |  C / 3  |    |  C / 3  |    |  C / 3  |     states, update
    after backward                          reduce-scatter over replicas: the slice's gradient, summed
    after the step                          all-gather over replicas: the whole part again

These are the two halves of the all-reduce of gradients, once per step, and leave 1 / R of the optimizer states on each
rank. One collective each way per group of weights that `fully_shard` gathers at once: the first runs inside backward,
the second, on GPUs, on a stream of its own, until the group's weights are needed again.

A slice is a DTensor, [_StridedShard, Shard(0)] or [Shard(1), Shard(0)], so a checkpoint holds whole states by name and
any other layout reads them. A parameter is sliced along its last dim that the other axes cut evenly and that has an
entry for every replica. One that has none (a vector whose length the shard axis does not divide) is kept whole: its
gradient is all-reduced, and every replica makes the same update.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from internlm.compat import groups
from internlm.compat.groups import is_parted, is_sharded
from internlm.compat.groups import local as part_of
from internlm.log import warn_once
from internlm.parallel.mesh import Layout, Mesh, ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Placement

logger = logging.getLogger(__name__)


def applies(config: ParallelConfig, layout: Layout) -> bool:
    """Return whether there are replicas to slice the optimizer states over, and it is asked for."""
    if config.optimizer == "all" and layout.replicate == 1:
        warn_once(logger, "parallel.optimizer all has no effect with parallel.replicate 1")
    return config.optimizer == "all" and layout.replicate > 1


def of(model: nn.Module) -> Slices | None:
    """Return the slices that were made of a model, if they were."""
    return getattr(model, "slices", None)


@dataclass
class Slice:
    """A parameter, and what this replica updates of it."""

    name: str
    parameter: nn.Parameter
    """The rank's part, as `fully_shard` holds it: a DTensor that other replicas hold too."""
    owned: nn.Parameter
    """A DTensor on the replicate axis as well, in memory of its own."""
    dim: int | None
    """Along which replicas part it; None: every replica updates all of it."""
    replicas: int
    place: int

    @property
    def part(self) -> Tensor:
        """This rank's part. `fully_shard` may move it at the first forward, so it is never kept."""
        return _local(self.parameter)

    @property
    def piece(self) -> tuple[int, ...]:
        """Shape of what is sent for each replica: the largest slice."""
        shape = list(self.part.shape)
        if self.dim is not None:
            shape[self.dim] = -(-shape[self.dim] // self.replicas)
        return tuple(shape)

    def cut(self, part: Tensor) -> Tensor:
        """Return the pieces [R, *piece] of a tensor of the part's shape; the last ones are padded."""
        assert self.dim is not None, "only what is parted has pieces"
        length = self.piece[self.dim]
        missing = length * self.replicas - part.shape[self.dim]
        if missing:
            part = F.pad(part, [0, 0] * (part.ndim - 1 - self.dim) + [0, missing])
        return part.unflatten(self.dim, (self.replicas, length)).movedim(self.dim, 0)

    def join(self, pieces: Tensor) -> Tensor:
        """Return the tensor of the part's shape from its pieces [R, *piece]."""
        assert self.dim is not None, "only what is parted has pieces"
        joined = pieces.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        return joined.narrow(self.dim, 0, self.part.shape[self.dim])

    def own(self, piece: Tensor) -> Tensor:
        """Return the piece without its padding, contiguous."""
        return piece[tuple(map(slice, _local(self.owned).shape))].contiguous()

    def refresh(self) -> None:
        """Take the values of the slice from the part: weights may have been loaded, or changed otherwise."""
        _local(self.owned).copy_(self.part if self.dim is None else self.own(self.cut(self.part)[self.place]))

    def give(self, gradient: Tensor | None) -> None:
        """Set the gradient of the slice, and drop that of the part."""
        self.parameter.grad = self.owned.grad = None
        if gradient is not None:
            like: Tensor = self.owned
            assert is_parted(like), "slices are"
            self.owned.grad = _placed(gradient, like, like.device_mesh, list(like.placements))


class Group:
    """The slices of the trainable parameters that one module gathers at once; replicas talk in `group` on `device`."""

    def __init__(self, slices: list[Slice], group: dist.ProcessGroup, device: torch.device) -> None:
        self.slices, self.group, self.device = slices, group, device
        self.cut = [each for each in slices if each.dim is not None]
        self.whole = [each for each in slices if each.dim is None]
        self.sizes = [math.prod(each.piece) for each in self.cut]
        self.streams = torch.get_device_module(device)
        self.waiting = len(slices)
        self.is_due = False
        self.done: torch.Event | None = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Turn the gradients of the parts into the summed gradients of the slices."""
        grads = [each.parameter.grad for each in self.slices]
        if all(grad is None for grad in grads):
            return
        if any(each.part.device.type != self.device.type for each in self.slices):
            # Inside backward torch before 2.13 copies gradients to the CPU without waiting for the copy.
            self.streams.current_stream().synchronize()
        replicas = dist.get_world_size(self.group)
        sent = torch.empty(replicas, sum(self.sizes), device=self.device)
        for each, place in zip(self.cut, sent.split(self.sizes, dim=1), strict=True):
            place.unflatten(1, each.piece).copy_(each.cut(_gradient(each)))
        got = sent.new_empty(sent.shape[1])
        if got.numel():
            groups.reduce_scatter(got, sent.flatten(), self.group)
        del sent
        parts = list(zip(self.cut, got.split(self.sizes), strict=True))
        if self.whole:
            flat = torch.cat([_gradient(each).flatten() for each in self.whole]).to(self.device)
            dist.all_reduce(flat, group=self.group)
            parts += zip(self.whole, flat.split([each.part.numel() for each in self.whole]), strict=True)
        for each, values in parts:
            each.refresh()
            known = each.parameter.grad is not None
            each.give(each.own(values.view(each.piece)).to(each.part.device) if known else None)
        self.is_due = True

    @torch.no_grad()
    def gather(self) -> None:
        """Fill the parts with the slices of all replicas."""
        self.is_due = False
        sent = torch.zeros(sum(self.sizes), device=self.device)
        for each, place in zip(self.cut, sent.split(self.sizes), strict=True):
            own = _local(each.owned)
            place.view(each.piece)[tuple(map(slice, own.shape))].copy_(own)
        got = sent.new_empty(dist.get_world_size(self.group), sent.numel())
        if got.numel():
            groups.all_gather(got.view(-1), sent, self.group)
        for each, pieces in zip(self.cut, got.split(self.sizes, dim=1), strict=True):
            each.part.copy_(each.join(pieces.unflatten(1, each.piece)))
        for each in self.whole:
            each.part.copy_(_local(each.owned))


class Slices:
    """The slices of a model, or of a pipeline stage, that `shard` has cut over the shard axis alone.

    They act on the model from outside: gradients leave in the step's last backward, and come to `owned`. Weights of
    `ahead` groups are gathered ahead of their use.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, ahead: int) -> None:
        self.model, self.ahead = model, ahead
        self.is_last = True
        """Whether the next backward is the step's last, in which gradients leave; a pipeline reduces once per step."""
        device = torch.device(mesh.world.device_type)
        self.streams = torch.get_device_module(device)  # CPUs have streams too, which do nothing
        self.side = self.streams.Stream()
        self.groups: list[Group] = []
        for path, module, parameters in _managed(model):
            slices = [_slice(name, parameter, mesh) for name, parameter in parameters]
            group = Group(slices, mesh.group("replicate"), device)
            self.groups.append(group)
            for each in slices:
                each.parameter.register_post_accumulate_grad_hook(lambda _, group=group: self._came(group))
            module.set_all_reduce_hook(self._keep, stream=self.side)  # what comes after it runs there too
            waits = self._before_forward(len(self.groups) - 1)
            model.get_submodule(path).register_forward_pre_hook(waits, prepend=True)
        model.slices = self  # type: ignore[assignment]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what this rank updates, under the names of the parameters."""
        for group in self.groups:
            for each in group.slices:
                yield each.name, each.owned

    def finish_backward(self) -> None:
        """Send what has not left: groups in which a parameter had no gradient. Replicas must agree on these."""
        for group in self.groups:
            if group.waiting:
                group.reduce()
            group.waiting = len(group.slices)

    def gather(self) -> None:
        """Bring the updated slices to all replicas; on GPUs without waiting for them."""
        self.side.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.side):
            for group in self.groups:
                if group.is_due:
                    group.gather()
                    group.done = self.side.record_event()
        if groups.weight_stream(self.model) is None:
            self.settle()

    def settle(self) -> None:
        """Let the current stream wait until all weights are there."""
        for group in self.groups:
            if group.done is not None:
                self.streams.current_stream().wait_event(group.done)

    def _keep(self, buffer: Tensor) -> None:
        """Keep the memory of a flat gradient from being used again while it is read on this stream."""
        if buffer.device.type != "cpu":
            buffer.record_stream(self.streams.current_stream())

    def _came(self, group: Group) -> None:
        if not self.is_last:
            return
        group.waiting -= 1
        if group.waiting == 0:
            group.reduce()

    def _before_forward(self, number: int) -> Callable[[nn.Module, object], None]:
        """Return a hook that waits for a group's weights, and lets their gathering wait, and that of those after it."""

        def wait(module: nn.Module, inputs: object) -> None:
            stream = groups.weight_stream(self.model)
            for index, group in enumerate(self.groups[number : number + 1 + self.ahead]):
                if group.done is None:
                    continue
                if stream is not None:
                    stream.wait_event(group.done)
                if index == 0:
                    self.streams.current_stream().wait_event(group.done)
                    group.done = None

        return wait


def _managed(model: nn.Module) -> list[tuple[str, FSDPModule, list[tuple[str, nn.Parameter]]]]:
    """Return the modules that gather weights, in forward order, by path, each with its own trainable parameters."""
    found: list[tuple[str, FSDPModule, list[tuple[str, nn.Parameter]]]] = []
    claimed: set[nn.Parameter] = set()
    for path, module in reversed(list(model.named_modules())):  # inner ones first
        if is_sharded(module):
            names = model.get_submodule(path).named_parameters(prefix=path)
            own = [(name, p) for name, p in names if p not in claimed]
            claimed.update(p for _, p in own)
            found.append((path, module, [(name, p) for name, p in own if p.requires_grad]))
    return [each for each in reversed(found) if each[-1]]


def _slice(name: str, parameter: nn.Parameter, mesh: Mesh) -> Slice:
    """Return this replica's slice of a parameter; its values come with the first gradient."""
    whole: Tensor = parameter
    assert is_parted(whole), "fully_shard was here"
    axes = whole.device_mesh.mesh_dim_names or ()
    everywhere = mesh.world[("replicate", *axes)]
    replicas, place = mesh.layout.replicate, mesh.at.replicate
    dim, placement = _placement(whole, replicas)
    part = _local(parameter)
    shape = list(part.shape)
    if dim is not None:
        length = -(-part.shape[dim] // replicas)
        shape[dim] = min(length, max(0, part.shape[dim] - place * length))
    own = part.new_zeros(shape)
    placements = [placement, *whole.placements]
    return Slice(name, parameter, nn.Parameter(_placed(own, parameter, everywhere, placements)), dim, replicas, place)


def _placement(parameter: DTensor, replicas: int) -> tuple[int | None, Placement]:
    """Return the dim along which a parameter is sliced, and the placement of it on the replicate axis."""
    from torch.distributed.tensor import Replicate

    sizes = parameter.device_mesh.shape
    for dim in reversed(range(parameter.ndim)):
        cutting = [size for size, p in zip(sizes, parameter.placements, strict=True) if groups.shards(p, dim)]
        parts = math.prod(cutting)
        if parameter.shape[dim] % parts == 0 and parameter.shape[dim] // parts >= replicas:
            return dim, groups.shard_inside(dim, parts)
    return None, Replicate()


def _gradient(each: Slice) -> Tensor:
    grad = each.parameter.grad
    return torch.zeros_like(each.part) if grad is None else _local(grad)


def _local(tensor: Tensor) -> Tensor:
    return part_of(tensor.detach())


def _placed(local: Tensor, whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
