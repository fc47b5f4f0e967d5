"""Fill a model from a stream of (name, tensor), strictly: every parameter once, nothing left over.

model = empty(config)                      # no memory yet
fill(model, tensors(checkpoint.weights()))     # one tensor in memory at a time beside the model
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from internlm.errors import WeightsError, did_you_mean
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer
from internlm.weights.weight import Weights

_SHOWN = 8
"""Complaints that one error lists."""


def empty(config: ModelConfig) -> Transformer:
    """Return a model without memory (on the meta device), for `fill`."""
    with torch.device("meta"):
        return Transformer(config)


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of every parameter by name, in the model's order; a tied head is not listed."""
    return {name: parameter.shape for name, parameter in empty(config).named_parameters()}


def load_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Transformer:
    """Return a model with its weights, brought to the device one by one.

    Args:
        config: shape of the model.
        tensors: names as in the model.
        dtype: of the weights; None: as they come.
        device: where they go.

    Raises:
        WeightsError: as `fill`.
    """
    model = empty(config)
    # A copy: what is read may map a file, which must stay replaceable under a running process.
    fill(model, ((name, tensor.to(device, dtype, copy=True)) for name, tensor in tensors))
    return model


@torch.no_grad()
def fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Give every parameter its value, in place.

    A parameter on the meta device takes the tensor itself, without a copy; any other is copied into.
    The head of a tied model may be in the stream or not; it is the embedding either way.

    Args:
        model: built by `empty`, or one that has weights already.
        tensors: names as in the model.

    Raises:
        WeightsError: tensors are missing, left over, given twice or of another shape; what came before is filled.
    """
    check = Check({name: parameter.shape for name, parameter in model.named_parameters()}, model.config.tie_embeddings)
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
    check.finish()


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

    def __init__(self, needed: dict[str, torch.Size], tied: bool) -> None:
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
