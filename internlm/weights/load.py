"""Fill a model from a stream of (name, tensor), strictly: every parameter once, nothing left over.

    model = empty(config)                                             # no memory yet
    fill(model, tensors(checkpoint.weights()))                        # one tensor at a time beside the model
    model = read_model(config, checkpoint.weights(), pack="fp16")     # packed while it is read

Packed while it is read, a model takes the memory of its packed weights, and that of one block, or the head, unpacked.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from internlm.config import decode
from internlm.errors import ConfigError, WeightsError, did_you_mean
from internlm.model import quant
from internlm.model.config import ModelConfig
from internlm.model.layers import Block
from internlm.model.quant import Kind
from internlm.model.transformer import Transformer, empty
from internlm.weights import weight as lazy
from internlm.weights.weight import Weights

T = TypeVar("T")
_SHOWN = 8
"""Complaints that one error lists."""


@functools.lru_cache(maxsize=16)  # a conversion asks several times, and for every weight that is cut
def shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """Return the shape of every parameter by name, in the model's order; a tied head is not listed."""
    return MappingProxyType({name: parameter.shape for name, parameter in empty(config).named_parameters()})


def ordered(weights: Weights, config: ModelConfig) -> Weights:
    """Return weights in the model's order; what the model does not know comes last."""
    return {name: weights[name] for name in shapes(config) if name in weights} | weights


def decoded(schema: type[T], tree: Mapping[str, Any], where: Path, what: str = "model") -> T:
    """Return the configuration that a tree of plain values is; raise WeightsError where it is none."""
    try:
        return decode(schema, tree)
    except ConfigError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or error
        raise WeightsError(f"describes no {what}: {problems}", where=where) from None


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
    if pack is not None:  # files may mix blocks, and those begun would all be held
        weights = {name: weights[name] for name in shapes(config)}
    model = empty(config)
    # A copy: what is read may map a file, which must stay replaceable under a running process.
    fill(model, ((name, tensor.to(device, dtype, copy=True)) for name, tensor in lazy.tensors(weights)), pack)
    return model


@torch.no_grad()
def fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]], pack: Kind | None = None) -> None:
    """Give every parameter its value, in place.

    A parameter on the meta device takes the tensor itself, without a copy; any other is copied into.
    The head of a tied model may be in the stream or not; it is the embedding either way. With `pack` each block and the
    head is packed as soon as its weights are there.

    Raises:
        WeightsError: tensors are missing, left over, given twice or of another shape; what came before is filled.
        EngineError: as `quant.pack_block`; what came before is filled and packed.
    """
    check = Check({name: parameter.shape for name, parameter in model.named_parameters()}, model.config.tie_embeddings)
    waiting = Counter(_part(name) for name, _ in model.named_parameters())
    for name, tensor in tensors:
        if not check.accepts(name, tensor.shape):
            continue
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module.get_parameter(key)
        if parameter.is_meta:
            setattr(module, key, nn.Parameter(tensor.detach(), requires_grad=parameter.requires_grad))
        else:
            parameter.copy_(tensor)
        if name == "embedding.weight" and model.config.tie_embeddings:
            model.tie()
        part = _part(name)
        waiting[part] -= 1
        if pack is None or waiting[part]:
            continue
        if part == "head" or (part == "embedding" and model.config.tie_embeddings):
            quant.pack_head(model.head, pack)
        elif isinstance(block := model.get_submodule(part), Block):
            quant.pack_block(block, pack)
    check.finish()
    if pack is not None:
        model.float().requires_grad_(False)


def _part(name: str) -> str:
    """Return the part of a model that a parameter belongs to: `embedding`, `blocks.0`, …, `norm`, `head`."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def check(weights: Weights, config: ModelConfig) -> None:
    """Raise WeightsError unless weights, not read yet, are those of a model."""
    check_shapes(weights, shapes(config), config.tie_embeddings)


def check_shapes(weights: Weights, needed: Mapping[str, torch.Size], tied: bool = False) -> None:
    """Check weights as `Check` does, and raise as its `finish`."""
    found = Check(needed, tied)
    for name, weight in weights.items():
        found.accepts(name, torch.Size(weight.shape))
    found.finish()


class Check:
    """Compares a stream of weights with what a model needs.

    Args:
        needed: shape of every weight by name, a tied head not listed.
        tied: whether `head.weight` is the embedding and may come along.
    """

    def __init__(self, needed: Mapping[str, torch.Size], tied: bool = False) -> None:
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
        """Raise WeightsError with all that was wrong, and the weights that never came."""
        complaints = self.complaints + [f"{name} is missing" for name in self.needed if name not in self.seen]
        if complaints:
            more = len(complaints) - _SHOWN
            listed = "; ".join(complaints[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise WeightsError(f"weights do not fit the model: {listed}")
