"""Weights that hold several of ours, cut and joined: InternLM2's `wqkv`, and Transformers' `gate_up_proj` of experts.

    wqkv           [K, H/K + 2, E] · hidden     for each key head: the queries that share it, the key, the value
    gate_up_proj   [X, 2, F] · hidden           for each expert: gate, up

Both are groups, and in each group the rows of one weight after those of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Size, Tensor, cat

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.weights import weight as lazy
from internlm.weights.families.names import is_stacked
from internlm.weights.load import shapes
from internlm.weights.weight import Weight


def cut(weight: Weight, names: list[str], config: ModelConfig) -> list[Weight]:
    """Return the weights of ours that one of theirs holds.

    Args:
        weight: theirs.
        names: ours, in the order in which they lie in each group.
        config: shape of the model.

    Raises:
        WeightsError: it is of another shape.
    """
    parts, groups = _shapes(names, config), _groups(names, config)
    whole = _whole(parts)
    if weight.shape != whole:
        raise WeightsError(f"is {weight.shape}, not {whole}", where=weight.origin)
    rows = [_rows(shape, groups) for shape in parts]

    def take(number: int) -> Callable[[Tensor], Tensor]:
        return lambda t: t.reshape(groups, sum(rows), -1).split(rows, 1)[number].reshape(parts[number])

    weight = lazy.shared(weight, len(names))
    return [weight.turned(parts[n], take(n), f"[{name.split('.')[-2]}]") for n, name in enumerate(names)]


def join(weights: list[Weight], names: list[str], config: ModelConfig) -> Weight:
    """Return one weight of theirs from those of ours that it holds; arguments as in `cut`."""
    parts, groups = _shapes(names, config), _groups(names, config)
    whole = _whole(parts)

    def together(tensors: list[Tensor]) -> Tensor:
        grouped = [t.reshape(groups, _rows(t.shape, groups), -1) for t in tensors]
        return cat(grouped, 1).reshape(whole)

    return lazy.joined(weights, whole, together)


def _shapes(names: list[str], config: ModelConfig) -> list[Size]:
    """Return the shapes of weights of a block, biases that the model has not included."""
    known = shapes(replace(config, num_layers=1, qkv_bias=True))
    return [known[".".join(["blocks", "0", *name.split(".")[2:]])] for name in names]


def _groups(names: list[str], config: ModelConfig) -> int:
    if is_stacked(names[0]):
        assert config.experts is not None, "only a model with experts has stacked weights"
        return config.experts.count
    return config.num_kv_heads


def _rows(shape: Size, groups: int) -> int:
    """Return the rows that a weight has in each group."""
    return math.prod(shape) // groups // (shape[-1] if len(shape) > 1 else 1)


def _whole(parts: list[Size]) -> tuple[int, ...]:
    """Return the shape of the weight that holds these: their rows are added up."""
    dim = max(0, len(parts[0]) - 2)
    return tuple(sum(p[dim] for p in parts) if i == dim else size for i, size in enumerate(parts[0]))
