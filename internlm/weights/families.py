"""Model families of Transformers: whose config.json and weight names we read, and which we write.

described, theirs = write(ours, config)            # config.json and weights of a LlamaForCausalLM
ours = read(theirs, described, path)                # and back
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.weights import weight as lazy
from internlm.weights.llama_config import from_llama, to_llama
from internlm.weights.load import shapes
from internlm.weights.names import expert_of, from_transformers, is_stacked, to_transformers
from internlm.weights.weight import Weight, Weights


def read_config(fields: dict[str, Any], path: Path) -> ModelConfig:
    """Return the shape that a config.json describes.

    Args:
        fields: its content.
        path: of the file, for errors.

    Raises:
        WeightsError: it is of a family that is not known, or has a part that this decoder has not.
    """
    return from_llama(fields, path)


def read(weights: Weights, fields: dict[str, Any], path: Path) -> Weights:
    """Return a family's weights by our names, in the model's order; what the model does not know comes last.

    Args:
        weights: by the family's names.
        fields: content of config.json.
        path: of the file, for errors.

    Raises:
        WeightsError: a name is not one of the family's, or experts differ in shape.
    """
    # Old exports carry the rotary frequencies, which follow from the config.
    named = {name: weight for name, weight in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    found: dict[str, list[Weight]] = {}  # ours → theirs: one, or one per expert
    for name in sorted(named, key=lambda name: expert_of(name) or 0):
        found.setdefault(from_transformers(name), []).append(named[name])
    order = [name for name in shapes(read_config(fields, path)) if name in found]
    order += [name for name in found if name not in set(order)]
    return {name: _stacked(name, found[name]) if is_stacked(name) else found[name][0] for name in order}


def write(weights: Weights, config: ModelConfig) -> tuple[dict[str, Any], Weights]:
    """Return config.json, without token ids and dtype, and the weights by the names of the family that fits.

    Args:
        weights: by our names, complete.
        config: shape of the model.

    Raises:
        WeightsError: no family can express the shape.
    """
    has_bias = config.qkv_bias or config.output_bias
    described = to_llama(dataclasses.replace(config, qkv_bias=has_bias, output_bias=has_bias))
    theirs: Weights = {}
    for name in shapes(config):
        weight = weights[name]
        if is_stacked(name):
            weight = lazy.shared(weight, weight.shape[0])
            for number in range(weight.shape[0]):
                one = weight.turned(weight.shape[1:], lambda t, number=number: t[number], f"[{number}]")  # type: ignore[misc]
                theirs[to_transformers(name, number)] = one
        else:
            theirs[to_transformers(name)] = weight
    if config.qkv_bias != config.output_bias:
        theirs |= _absent_biases(config, lazy.main_dtype(weights))
    return described, theirs


def _absent_biases(config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Return zeros for the attention biases that Llama has and the model has not."""
    absent = ("wo",) if config.qkv_bias else ("wq", "wk", "wv")
    weights = {}
    for name, shape in shapes(config).items():
        if name.split(".")[-2] in absent:
            weights[to_transformers(name.removesuffix("weight") + "bias")] = lazy.zeros(shape[:1], dtype)
    return weights


def _stacked(name: str, parts: list[Weight]) -> Weight:
    """Return the matrices of all experts as one weight."""
    if len({part.shape for part in parts}) > 1:
        raise WeightsError("the experts differ in shape", where=name)
    return lazy.joined(parts, (len(parts), *parts[0].shape), torch.stack)
