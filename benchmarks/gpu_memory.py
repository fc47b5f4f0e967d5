"""How deep a model fits a device, told before anything is allocated.

The real step of ours (`internlm.plan.dryrun`), and forward and backward of the peer, run on tensors that know their
shapes only, while the bytes of all storages that are alive are added up. Weights, gradients, activations, optimizer
states and temporary tensors are counted; the context of the driver, the workspaces of libraries and holes in the
allocator's pool are not: RESERVE_GIB is left for them. Attention is counted as SDPA, compiled blocks as eager ones
(they keep less), 8-bit products as those in bf16 (they keep less too).

Limit: an estimate. A run that is out of memory all the same starts again with fewer blocks, and says so.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_cases import Case, recipe_tree
from torch.utils._python_dispatch import TorchDispatchMode

RESERVE_GIB = 4.0
CARD_GIB = 79.1
"""What an 80 GB H100 shows; taken where there is no GPU to ask."""


class Ledger:
    """Bytes of the storages that are alive, and their most."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self.known: set[int] = set()

    def see(self, value: Any) -> Any:
        """Count the storages of tensors, in lists and tuples too, once each until they are freed; return the value."""
        if isinstance(value, torch.Tensor):
            if value.device.type != "meta":
                self._count(value.untyped_storage())
        elif isinstance(value, list | tuple):
            for part in value:
                self.see(part)
        return value

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def needed_gib(case: Case) -> float:
    """Return the memory that a step of a case takes, in GiB, RESERVE_GIB included."""
    of_one_kind = replace(case, name=case.library, micro_batches=min(case.micro_batches, 2))
    counted = _ours(of_one_kind) if case.library == "ours" else _peer(of_one_kind)
    # States are there all the time: a smaller dtype takes off what it saves.
    saved = {"float32": 0, "bfloat16": 4, "int8": 6}[case.states] * case.shape.num_parameters
    return (counted - saved) / 2**30 + RESERVE_GIB


def depth(
    case: Case, available_gib: float, most: int, needed: Callable[[Case], float] = needed_gib
) -> tuple[int, float]:
    """Return the most blocks, `most` or fewer, that fit, and what they take in GiB; 0 blocks: one is too many already.

    What is needed is a maximum of rising lines in the depth. The line through a depth that fits and one that does not
    lies above it between them: where it says that a depth fits, it does, and a few counts find the last one.
    """
    low, high, high_gib = 1, most, needed(case.at(most))
    if high_gib <= available_gib:
        return high, high_gib
    low_gib = needed(case.at(low))
    if low_gib > available_gib:
        return 0, low_gib
    while high - low > 1:
        middle = low + math.floor((available_gib - low_gib) * (high - low) / (high_gib - low_gib))
        middle = min(max(middle, low + 1), high - 1)
        middle_gib = needed(case.at(middle))
        if middle_gib > available_gib:
            high, high_gib = middle, middle_gib
        else:
            low, low_gib = middle, middle_gib
    return low, low_gib


def common_depth(cases: list[Case], available_gib: float) -> tuple[int, dict[str, float]]:
    """Return the most blocks with which all cases fit, and what each takes with them in GiB.

    Cases that differ only in what is not counted share a count. Peers come first: they are counted fastest.
    """
    kinds = {(case.library, case.states): case for case in cases if case.library != "torchtitan"}
    ordered = sorted(kinds.values(), key=lambda case: case.library == "ours")
    most = cases[0].shape.num_layers
    for case in ordered:
        most, gib = depth(case, available_gib, most)
        if most == 0:
            return 0, {case.name: gib}
    taken = {(case.library, case.states): needed_gib(case.at(most)) for case in ordered}
    return most, {case.name: taken[key] for case in cases if (key := (case.library, case.states)) in taken}


@functools.cache
def _ours(case: Case) -> int:
    """Return the bytes that a step of ours takes at most, with fp32 states and products in bf16."""
    from internlm import config
    from internlm.optim.optimizer import Optimizer
    from internlm.plan import dryrun
    from internlm.recipe import Recipe

    ledger = Ledger()

    class Recorder(dryrun.Recorder):
        def clear(self) -> None:
            if ledger.peak:  # the first step is done, and the second would hold no more
                raise _Counted
            super().clear()

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ledger.see(args)  # weights, which were made before
            return ledger.see(super().__torch_dispatch__(operator, types, args, kwargs))

    tree = recipe_tree(case, Path("nowhere")) | {"runtime": {"dtype": case.dtype}}
    recipe = config.decode(Recipe, tree)
    # The update works in small pieces, hence holds hardly more than the step before it, and takes longest to count.
    with (
        _as_on_a_gpu(),
        mock.patch.object(dryrun, "Recorder", Recorder),
        mock.patch.object(Optimizer, "step", return_value=None),
        contextlib.suppress(_Counted),
    ):
        dryrun.dry_run(recipe)
    return ledger.peak


class _Counted(Exception):
    """Ends a dry run early."""


@functools.cache
def _peer(case: Case) -> int:
    """Return the bytes that forward, backward and the optimizer states of a peer take at most."""
    from gpu_peers import build_llama, llama_loss

    from internlm.compat import groups

    ledger = Ledger()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator is torch.ops.aten._local_scalar_dense.default:
                return 1
            return ledger.see(operator(*args, **(kwargs or {})))

    with _as_on_a_gpu(), groups.fake_tensors(), Recorder():
        model = build_llama(case, torch.device("cpu"))
        ids = torch.zeros(case.micro_rows, case.seq_len, dtype=torch.int64)
        for _ in range(case.micro_batches):
            llama_loss(model, ids, case).backward()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return ledger.peak + 2 * parameters


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let linear layers take the product that autocast knows: the CPU's own is made in fp32."""
    from internlm.compat import kernels

    with mock.patch.object(kernels, "has_onednn_linear", return_value=False):
        yield
