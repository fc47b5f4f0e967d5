"""Fill a model from a stream of (name, tensor), strictly: every parameter once, nothing left over.

    model = empty(config)                          # no memory yet
    fill(model, tensors(checkpoint.weights()))     # one tensor in memory at a time beside the model

    model = read_model(config, checkpoint.weights(), pack="fp16")      # packed while it is read

Packed while it is read, a model takes the memory of its packed weights, and that of one block, or the head, in the
dtype that it is packed from: a block is packed as soon as its last weight is there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from internlm.errors import WeightsError, did_you_mean
from internlm.model import quant
from internlm.model.config import ModelConfig
from internlm.model.layers import Block
from internlm.model.quant import Kind
from internlm.model.transformer import Transformer, empty
from internlm.weights import weight as lazy
from internlm.weights.weight import Weights

_SHOWN = 8
"""Complaints that one error lists."""


@functools.lru_cache(maxsize=16)  # a conversion asks several times, and for every weight that is cut
def shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """Return the shape of every parameter by name, in the model's order; a tied head is not listed."""
    return MappingProxyType({name: parameter.shape for name, parameter in empty(config).named_parameters()})


def read_model(
    config: ModelConfig,
    weights: Weights,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    pack: Kind | None = None,
) -> Transformer:
    """Return a model with its weights, read one by one once all are known to be there.

    Args:
        config: shape of the model.
        weights: names as in the model, in any order.
        dtype: of the weights before they are packed; None: as stored.
        device: where they go.
        pack: form of the linear layers, on a CPU.

    Raises:
        WeightsError: as `check`, before anything is read, and `lazy.read`.
        EngineError: the layers cannot be packed.
    """
    check(weights, config)
    if pack is not None:  # files may mix the weights of blocks, and those begun would all be held
        weights = {name: weights[name] for name in shapes(config)}
    return load_model(config, lazy.tensors(weights), dtype=dtype, device=device, pack=pack)


def load_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    pack: Kind | None = None,
) -> Transformer:
    """Return a model with its weights, brought to the device one by one.

    Args:
        config: shape of the model.
        tensors: names as in the model.
        dtype: of the weights before they are packed; None: as they come.
        device: where they go.
        pack: form of the linear layers, on a CPU.

    Raises:
        WeightsError, EngineError: as `fill`.
    """
    model = empty(config)
    # A copy: what is read may map a file, which must stay replaceable under a running process.
    fill(model, ((name, tensor.to(device, dtype, copy=True)) for name, tensor in tensors), pack)
    return model


@torch.no_grad()
def fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]], pack: Kind | None = None) -> None:
    """Give every parameter its value, in place.

    A parameter on the meta device takes the tensor itself, without a copy; any other is copied into.
    The head of a tied model may be in the stream or not; it is the embedding either way.

    Args:
        model: built by `empty`, or one that has weights already.
        tensors: names as in the model.
        pack: as `quant.pack`, each block and the head as soon as its weights are there; None: nothing is packed.

    Raises:
        WeightsError: tensors are missing, left over, given twice or of another shape; what came before is filled.
        EngineError: as `quant.pack`; what came before is filled and packed.
    """
    check = Check({name: parameter.shape for name, parameter in model.named_parameters()}, model.config.tie_embeddings)
    packing = None if pack is None else _Packing(model, pack)
    for name, tensor in tensors:
        if not check.accepts(name, tensor.shape):
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        parameter = module.get_parameter(key)
        if parameter.is_meta:
            setattr(module, key, nn.Parameter(tensor.detach(), requires_grad=parameter.requires_grad))
        else:
            parameter.copy_(tensor)
        if name == "embedding.weight" and model.config.tie_embeddings:
            model.head.weight = model.embedding.get_parameter("weight")
        if packing is not None:
            packing.came(name)
    check.finish()
    if pack is not None:
        model.float().requires_grad_(False)


class _Packing:
    """Packs each part of a model whose weights are all there.

    Args:
        model: not packed yet.
        kind: of packed weights.
    """

    def __init__(self, model: Transformer, kind: Kind) -> None:
        self.model, self.kind = model, kind
        self.missing: dict[str, set[str]] = {}
        """Weights by the part that waits for them."""
        for name, _ in model.named_parameters():
            self.missing.setdefault(_part(name), set()).add(name)

    def came(self, name: str) -> None:
        """Take note of a weight, and pack what it was the last of."""
        part = _part(name)
        self.missing[part].discard(name)
        if self.missing[part]:
            return
        if part == "head" or (part == "embedding" and self.model.config.tie_embeddings):
            quant.pack_head(self.model.head, self.kind)
        elif isinstance(block := self.model.get_submodule(part), Block):
            quant.pack_block(block, self.kind)


def _part(name: str) -> str:
    """Return which part of a model a parameter belongs to: `embedding`, `blocks.0`, …, `norm`, `head`."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def check(weights: Weights, config: ModelConfig) -> None:
    """Check that weights, not read yet, are those of a model.

    Raises:
        WeightsError: some are missing, left over or of another shape.
    """
    found = Check(shapes(config), config.tie_embeddings)
    for name, weight in weights.items():
        found.accepts(name, torch.Size(weight.shape))
    found.finish()


class Check:
    """Compares a stream of weights with what a model needs.

    Args:
        needed: shape of every weight by name, a tied head not listed.
        tied: whether `head.weight` is the embedding and may come along.
    """

    def __init__(self, needed: Mapping[str, torch.Size], tied: bool) -> None:
        self.needed, self.tied = needed, tied
        self.seen: set[str] = set()
        self.complaints: list[str] = []

    def accepts(self, name: str, shape: torch.Size) -> bool:
        """Return whether the weight is to be used; what is wrong with it is kept for `finish`."""
        if self.tied and name == "head.weight":
            return False
        if name not in self.needed:
            advice = did_you_mean(name, self.needed)
            self.complaints.append(f"{name} is left over" + (f" ({advice})" if advice else ""))
        elif name in self.seen:
            self.complaints.append(f"{name} came twice")
        elif shape != self.needed[name]:
            self.complaints.append(f"{name} is {tuple(shape)}, not {tuple(self.needed[name])}")
            self.seen.add(name)
        else:
            self.seen.add(name)
            return True
        return False

    def finish(self) -> None:
        """Say everything that was wrong.

        Raises:
            WeightsError: something was, or a weight never came.
        """
        complaints = self.complaints + [f"{name} is missing" for name in self.needed if name not in self.seen]
        if complaints:
            more = len(complaints) - _SHOWN
            listed = "; ".join(complaints[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise WeightsError(f"weights do not fit the model: {listed}")
