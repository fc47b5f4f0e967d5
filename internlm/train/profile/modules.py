"""A table of a model's modules: what each keeps in memory, and how long it takes forward and backward.

docs/performance.md shows one. Two steps make it: in the first bytes are counted, in the second times are taken. Every
figure is a module's own, without that of rows further in, and blocks are summed: columns add up to what this rank has.

- *kept*: what one micro-batch leaves for backward, each memory once, at the module that first keeps it. Parameters do
  not count, gathered ones neither; nor what `recompute` computes again, or offloads.
- *times*: between two marks the clock runs for whatever is innermost. Forward is the call. Backward are the nodes of
  autograd that were made in the call, what is computed again in them, and the sum into the gradient. On a GPU the
  marks are events in its stream. What belongs to no module is listed below the modules: together they are the step.

A compiled block is one row of times: nothing can be marked inside it. What it keeps is unknown, `?`, where some of it
is computed again: to ask would compute it. With tied embeddings the weight belongs to the embedding.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from internlm import compat
from internlm.compat.groups import local
from internlm.optim.optimizer import Optimizer
from internlm.parallel.apply import Parallel

MODEL, REST, MEASURING = "model", "(rest)", "(measuring)"
"""Rows of what no row further in has: the model's own, the step's, and what the table itself costs."""
_SEEN = "internlm"
"""Mark on a node of autograd that belongs to a row already."""


@dataclass
class Row:
    """What a kind of module takes. Sizes in bytes, times in seconds of a step."""

    modules: int = 0
    """How many are summed."""
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept: int = 0
    """By one micro-batch."""
    forward_s: float = 0.0
    backward_s: float = 0.0
    is_timed: bool = False
    """Whether it was called at all."""
    is_known: bool = True
    """Whether all that it keeps is counted."""


@dataclass(frozen=True)
class Place:
    """A module that is watched."""

    row: str
    module: nn.Module
    is_compiled: bool
    is_open: bool
    """Whether what it saves can be seen: no part of it is compiled, and it is in no region that is computed again."""
    is_rerun: bool
    """Whether it, or a part of it, is computed again."""
    keeps_results: bool
    """Whether results of some operators are kept past autograd in it."""


def row_of(path: str, depth: int) -> str:
    """Return the row of a module: `blocks.3.attention.wq` → `blocks.*.attention` at depth 1."""
    names = path.split(".") if path else []
    if names[:1] == ["blocks"]:
        return ".".join(["blocks", "*", *names[2 : 2 + depth]]) if len(names) > 1 else MODEL
    return names[0] if names else MODEL


@dataclass
class ModuleTable:
    """Watches a rank's part of a model for two steps; `depth`: of names below a block that get rows of their own."""

    parallel: Parallel
    optimizer: Optimizer
    depth: int = 1
    rows: dict[str, Row] = field(default_factory=dict)
    step_s: float = 0.0
    """Length of the step in which times were taken."""
    micro_batches: int = 0
    problem: str | None = None
    """Why the figures cannot be trusted."""

    def __post_init__(self) -> None:
        self.places = [place for part in self.parallel.parts for place in self._places(part)]
        for place in self.places:
            row = self._row(place.row)
            row.modules += 1
            row.is_known &= not (place.is_compiled and place.is_rerun)

    def _places(self, part: nn.Module) -> Iterator[Place]:
        compiled = {module for module in part.modules() if compat.is_compiled(module)}
        regions = {module for module in part.modules() if "forward" in vars(module)}  # as `recompute` leaves them
        in_compiled, in_regions = _inside(compiled), _inside(regions)
        keeps_operators = self.parallel.config.recompute.kind == "operators"
        for path, module in part.named_modules():
            is_row = path.count(".") == 0 or (path.startswith("blocks.") and path.count(".") <= 1 + self.depth)
            if not is_row or isinstance(module, nn.ModuleDict) or module in in_compiled:
                continue
            own = set(module.modules())
            is_open = own.isdisjoint(compiled) and module not in in_regions
            is_rerun = path != "" and not own.isdisjoint(regions)
            keeps_results = is_open and is_rerun and keeps_operators
            yield Place(row_of(path, self.depth), module, module in compiled, is_open, is_rerun, keeps_results)

    def _row(self, name: str) -> Row:
        return self.rows.setdefault(name, Row())

    def _home(self, parameter: str) -> Row:
        """Return the row of a parameter: of the innermost module that has one."""
        name = row_of(parameter.rpartition(".")[0], self.depth)
        while name not in self.rows and "." in name:
            name = name.rpartition(".")[0]
        return self._row(name)

    @contextlib.contextmanager
    def _watching(self, around: Callable[..., Any]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for place in self.places:
                stack.enter_context(compat.wrapped_call(place.module, functools.partial(around, place)))
            yield

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        """Note what goes wrong in looking; training does not depend on it."""
        try:
            yield
        except Exception as error:
            self.problem = self.problem or f"{type(error).__name__}: {error}"

    # Bytes.

    @contextlib.contextmanager
    def count_bytes(self) -> Iterator[None]:
        """Count, in the step taken inside, what modules keep."""
        self._storages: set[int] = set()
        self._calls = 0
        with self._watching(self._around_bytes):
            yield
        self.micro_batches = self._calls // len(self.parallel.parts)
        for row in self.rows.values():
            row.kept //= max(1, self.micro_batches)

    def count_states(self) -> None:
        """Count parameters, gradients and states of the optimizer; to be called while gradients are there."""
        own, owned = dict(self.parallel.named_parameters()), dict(self.parallel.owned_parameters())
        with torch.no_grad():
            for name, weight in own.items():
                row = self._home(name)
                row.parameters += _size([weight])
                row.gradients += _size([weight.grad])
                if owned.get(name, weight) is not weight:  # a slice of it, in memory of its own
                    row.optimizer += _size([owned[name]])
                    row.gradients += _size([owned[name].grad])
            for part in self.optimizer.parts:
                for parameter, slots in part.state.items():
                    self._home(self.optimizer.names[parameter]).optimizer += _size(slots.values())

    def _around_bytes(self, place: Place, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if place.module in self.parallel.parts:
            self._storages.clear()  # a new micro-batch
            self._calls += 1
        weights: list[set[int]] = []

        def keep(tensors: list[Tensor]) -> None:
            with self._careful():
                if not weights:  # now, as they may have been gathered for this call
                    weights.append(_storages(place.module.parameters()))
                self._keep(place.row, tensors, weights[0])

        def pack(tensor: Tensor) -> Tensor:
            keep([tensor])
            return tensor

        with contextlib.ExitStack() as stack:
            if place.is_open:
                stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
            if place.keeps_results:
                stack.enter_context(_Results(keep))
            out = call(*args, **named)
        given = _tensors((args, named))
        if place.is_open and place.is_rerun:
            keep(given)  # to begin with again
        with self._careful():
            for node in _made_in(out, given):
                if hasattr(node, "save_for_backward"):  # of a function written in Python
                    kept = _tensors(list(vars(node).values()))  # gradients that were made in forward
                    if place.is_compiled and not place.is_rerun and node.name().startswith("CompiledFunction"):
                        kept += node.saved_tensors
                    keep(kept)
        return out

    def _keep(self, row: str, tensors: Iterable[Tensor], weights: set[int]) -> None:
        with torch.no_grad():
            for tensor in map(local, tensors):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._storages and storage.data_ptr() not in weights:
                    self._storages.add(storage.data_ptr())
                    self._row(row).kept += storage.nbytes()

    # Times.

    @contextlib.contextmanager
    def take_times(self) -> Iterator[Clock]:
        """Take the times of the step inside; yield the clock, for what is no module."""
        clock = Clock(self.parallel.device)
        leaves: dict[Any, list[Any]] = {}
        try:
            with self._watching(functools.partial(self._around_times, clock, leaves)):
                yield clock
        finally:
            for handles in leaves.values():
                for handle in handles:
                    handle.remove()
        with self._careful():
            for (name, is_backward), seconds in clock.read().items():
                row = self._row(name)
                row.is_timed = True
                row.backward_s += seconds * is_backward
                row.forward_s += seconds * (not is_backward)
                self.step_s += seconds

    def _around_times(
        self,
        clock: Clock,
        leaves: dict[Any, list[Any]],
        place: Place,
        call: Callable[..., Any],
        *args: Any,
        **named: Any,
    ) -> Any:
        again = clock.is_backward  # what is computed again
        with clock.running(place.row, again):
            out = call(*args, **named)
        if again:
            return out
        with clock.running(MEASURING, False), self._careful():
            for node in _made_in(out, _tensors((args, named)), leaves):
                handles = [
                    node.register_prehook(lambda _: clock.enter((place.row, True))),
                    node.register_hook(lambda *_: clock.leave((place.row, True))),
                ]
                if _is_leaf(node):  # lives as long as the parameter
                    leaves[node] = handles
        return out

    # Text.

    def as_json(self) -> dict[str, Any]:
        """Return the table as plain values: bytes and seconds."""
        ordered = sorted(self.rows.items(), key=lambda item: item[0].startswith("("))  # last what is no module
        rows = [{"name": name, **asdict(row)} for name, row in ordered]
        total = {key: sum(row[key] for row in rows) for key in _SIZES + _TIMES}
        return {"micro_batches": self.micro_batches, "step_s": self.step_s, "rows": rows, "sum": total}

    def as_text(self) -> str:
        """Return the table as text: MiB and milliseconds."""
        heads = ["parameters", "gradients", "optimizer", "kept", "forward", "backward"]
        lines = [f"{'module (MiB, ms)':<40}" + "".join(f"{head:>12}" for head in heads)]
        found = self.as_json()
        for row in [*found["rows"], {"name": "sum", "modules": 0, "is_timed": True, "is_known": True, **found["sum"]}]:
            title = f"{row['name']} × {row['modules']}" if ".*" in row["name"] else row["name"]
            sizes = "".join(f"{row[key] / 2**20:>12.2f}" for key in _SIZES[:-1])
            sizes += f"{row['kept'] / 2**20:>12.2f}" if row["is_known"] else f"{'?':>12}"
            times = "".join(f"{row[key] * 1e3:>12.2f}" if row["is_timed"] else " " * 12 for key in _TIMES)
            lines.append(f"{title:<40}{sizes}{times}".rstrip())
        lines.append(
            f"{self.micro_batches} micro-batches a step; kept: by one of them; a step took {self.step_s:.3f} s"
        )
        return "\n".join(lines) + "\n"


_SIZES, _TIMES = ("parameters", "gradients", "optimizer", "kept"), ("forward_s", "backward_s")


class Clock:
    """Gives the time between two marks to what was entered last and not left. Keys: a row, and whether in backward.

    On a GPU, marks are events in the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[tuple[str, bool]] = [(REST, False)]
        self.marks: list[tuple[Any, tuple[str, bool]]] = []
        self._mark()

    @property
    def is_backward(self) -> bool:
        """Whether a node of a backward runs."""
        return any(is_backward for _, is_backward in self.open)

    def enter(self, key: tuple[str, bool]) -> None:
        """Begin to count for a key."""
        self.open.append(key)
        self._mark()

    def leave(self, key: tuple[str, bool]) -> None:
        """Count for what was open before the key."""
        for place in reversed(range(1, len(self.open))):
            if self.open[place] == key:
                del self.open[place]
                break
        self._mark()

    @contextlib.contextmanager
    def running(self, row: str, is_backward: bool = False) -> Iterator[None]:
        """Count for a row what runs inside."""
        self.enter((row, is_backward))
        try:
            yield
        finally:
            self.leave((row, is_backward))

    def read(self) -> dict[tuple[str, bool], float]:
        """Return the seconds of every key up to now."""
        self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[tuple[str, bool], float] = defaultdict(float)
        for (begin, key), (end, _) in zip(self.marks, self.marks[1:], strict=False):
            found[key] += begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
        return dict(found)

    def _mark(self) -> None:
        moment: Any
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((moment, self.open[-1]))


class _Results(TorchDispatchMode):
    """Shows what the operators return whose results selective recomputation keeps, which autograd does not see."""

    def __init__(self, show: Callable[[list[Tensor]], None]) -> None:
        super().__init__()
        self.show = show

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        if operator in compat.expensive_operators():
            self.show(_tensors(out))
        return out


def _inside(modules: set[nn.Module]) -> set[nn.Module]:
    """Return what lies below some modules."""
    return {part for module in modules for part in module.modules() if part is not module}


def _is_leaf(node: Any) -> bool:
    return node.name().endswith("AccumulateGrad")


def _made_in(out: Any, given: list[Tensor], leaves: Collection[Any] = ()) -> list[Any]:
    """Return the nodes of autograd between what a call was given and what it returned, each for one call only.

    `leaves`: nodes that sum gradients, which live longer than a call, and are known already.
    """
    walked: set[Any] = {tensor.grad_fn for tensor in given}
    waiting: list[Any] = [tensor.grad_fn for tensor in _tensors(out)]
    found = []
    while waiting:
        node = waiting.pop()
        if node is None or node in walked:
            continue
        walked.add(node)
        if _is_leaf(node):
            if node not in leaves:
                found.append(node)
            continue
        if _SEEN not in node.metadata:
            node.metadata[_SEEN] = True
            found.append(node)
        waiting += [other for other, _ in node.next_functions]
    return found


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def _size(tensors: Iterable[Tensor | None]) -> int:
    return sum(part.numel() * part.element_size() for t in tensors if t is not None for part in [local(t)])


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    with torch.no_grad():
        return {tensor.untyped_storage().data_ptr() for tensor in map(local, tensors)}
