"""How deep a model fits a device, told before anything is allocated.

The real step of ours (`internlm.plan.dryrun`), and forward and backward of the peer, run on tensors that know their
shapes only, while the bytes of all storages that are alive are added up. Weights, gradients, activations, optimizer
states and temporary tensors are counted; the context of the driver, the workspaces of libraries and holes in the
allocator's pool are not: RESERVE_GIB is left for them. Attention is counted as SDPA, compiled blocks as eager ones
(they keep less), 8-bit products by their plain stand-ins.

Limit: an estimate. A run that is out of memory all the same starts again with fewer blocks, and says so.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator
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

    def see(self, value: Any) -> None:
        """Count a tensor's storage, once, until it is freed."""
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
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
    counted = _ours(case) if case.library == "ours" else _peer(case)
    return counted / 2**30 + RESERVE_GIB


def depth(case: Case, available_gib: float, needed: Callable[[Case], float] = needed_gib) -> tuple[int, float]:
    """Return the most blocks up to the preset's that fit, 0 if none does, and what they take in GiB.

    What is needed is a maximum of lines in the depth. A line through one depth that fits and one that does not lies
    above it between them, so the search ends after a few counts, each verified.
    """
    most = case.shape.num_layers
    low, high = 1, most
    low_gib, high_gib = needed(case.at(low)), needed(case.at(high))
    if low_gib > available_gib:
        return 0, low_gib
    while high_gib > available_gib and high - low > 1:
        slope = (high_gib - low_gib) / (high - low)
        middle = low + math.floor((available_gib - low_gib) / slope)
        middle = min(max(middle, low + 1), high - 1)
        middle_gib = needed(case.at(middle))
        if middle_gib > available_gib:
            high, high_gib = middle, middle_gib
        elif low == middle or needed(case.at(middle + 1)) > available_gib:
            return middle, middle_gib
        else:
            low, low_gib = middle, middle_gib
    return (high, high_gib) if high_gib <= available_gib else (low, low_gib)


def _ours(case: Case) -> float:
    """Return the bytes that a step of ours takes at most."""
    from internlm import config
    from internlm.plan import dryrun
    from internlm.recipe import Recipe

    ledger = Ledger()

    class Recorder(dryrun.Recorder):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            torch.utils._pytree.tree_map(ledger.see, args)  # weights, which were made before
            out = super().__torch_dispatch__(operator, types, args, kwargs)
            torch.utils._pytree.tree_map(ledger.see, out)
            return out

    with tempfile.TemporaryDirectory() as folder:
        recipe = config.decode(Recipe, recipe_tree(case, Path(folder)) | {"runtime": {"dtype": case.dtype}})
    with _as_on_a_gpu(), mock.patch.object(dryrun, "Recorder", Recorder):
        dryrun.dry_run(recipe)
    if case.states == "int8":  # counted as bf16
        return ledger.peak - 2 * case.shape.num_parameters
    return ledger.peak


def _peer(case: Case) -> float:
    """Return the bytes that forward, backward and the optimizer states of a peer take at most."""
    from gpu_peers import build_llama, llama_loss

    from internlm import compat

    ledger = Ledger()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator is torch.ops.aten._local_scalar_dense.default:
                return 1
            out = operator(*args, **(kwargs or {}))
            torch.utils._pytree.tree_map(ledger.see, out)
            return out

    with _as_on_a_gpu(), compat.fake_tensors(), Recorder():
        model = build_llama(case, torch.device("cpu"))
        ids = torch.zeros(case.micro_rows, case.seq_len, dtype=torch.int64)
        llama_loss(model, ids, case).backward()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return ledger.peak + 2 * parameters


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let linear layers take the product that autocast knows: the CPU's own is made in fp32."""
    from internlm import compat

    with mock.patch.object(compat, "has_onednn_linear", lambda: False):
        yield
