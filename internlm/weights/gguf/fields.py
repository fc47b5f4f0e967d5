"""The shape of a model as the fields of a GGUF file, both ways.

    describe(writer, config)          # llama.block_count, llama.rope.freq_base, …
    read_config(header)               # and back

Fields are float32 there; they are read as the shortest number that becomes the same float32: 0.00001.

Where a rotary scaling goes as a table, a field of ours beside it says which one it is: a table alone is read as that of
Llama 3.1. Either way the table must be the one of what is read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internlm.config import encode
from internlm.errors import WeightsError
from internlm.model.config import DynamicScaling, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig, YarnScaling
from internlm.model.rope import frequencies, yarn_attention
from internlm.weights.gguf.header import Header, library
from internlm.weights.load import decoded

logger = logging.getLogger(__name__)

READABLE = ("llama", "qwen2", "qwen3", "qwen3moe")
"""llama.cpp's names of the architectures that can be read."""
ROPE_TABLE = "rope_freqs.weight"
"""The tensor of factors on the wavelengths of all pairs."""
SCALING = "internlm.rope.scaling"
"""Our field that says in JSON which scaling a table is of."""
NEUTRAL: Mapping[str, tuple[float, ...]] = {
    ".attention.causal": (True,),
    ".attention.clamp_kqv": (0,),
    ".attention.max_alibi_bias": (0,),
    ".attention.output_scale": (0, 1),
    ".attention.scale": (0,),
    ".attention.sliding_window": (0,),
    ".attention.temperature_length": (0,),
    ".attention.temperature_scale": (0,),
    ".attn_logit_softcapping": (0,),
    ".embedding_scale": (0, 1),
    ".expert_gating_func": (0, 1),  # softmax
    ".expert_group_count": (0, 1),
    ".expert_weights_norm": (True,),
    ".expert_weights_scale": (0, 1),
    ".final_logit_softcapping": (0,),
    ".logit_scale": (0, 1),
    ".residual_scale": (0, 1),
    ".rope.dimension_sections": (),
    ".rope.scale_linear": (0, 1),
    ".rope.scaling.alpha": (0, 1),
    ".rope.scaling.yarn_attn_factor": (1,),
    ".rope.scaling.yarn_log_multiplier": (0,),
    ".router_logit_softcapping": (0,),
    ".use_parallel_residual": (False,),
}
"""Fields of what this decoder does not have, and the values that change nothing."""


def architecture(config: ModelConfig) -> str:
    """Return llama.cpp's name of the architecture that a model is written as.

    Raises:
        WeightsError: it has none.
    """
    if config.experts is not None and not config.experts.normalize:
        raise WeightsError("llama.cpp weighs a token's experts so that they sum to 1", where="model.experts.normalize")
    if not config.qk_norm:
        return "llama"
    missing = {"qkv_bias": config.qkv_bias, "output_bias": config.output_bias, "rope": needs_table(config.rope)}
    for name in (name for name, is_missing in missing.items() if is_missing):
        problem = "llama.cpp has norms of queries and keys without biases, and without tables of rotary factors"
        raise WeightsError(problem, where=f"model.{name}")
    return "qwen3" if config.experts is None else "qwen3moe"


def describe(writer: Any, config: ModelConfig) -> None:
    """Write the fields of a model's shape with a `gguf.GGUFWriter`."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_token)
        writer.add_expert_feed_forward_length(config.ffn_size)
    _describe_rope(writer, config)


def _describe_rope(writer: Any, config: ModelConfig) -> None:
    types = library().RopeScalingType
    scaling, length = config.rope.scaling, config.context_length
    if isinstance(scaling, DynamicScaling) and length > scaling.original_length:
        length = scaling.original_length
        logger.warning("warning: llama.cpp has no dynamic NTK: the file gives %d tokens as its context", length)
    writer.add_context_length(length)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.base)
    if isinstance(scaling, YarnScaling | Llama3Scaling):
        writer.add_rope_scaling_orig_ctx_len(scaling.original_length)
    if isinstance(scaling, LinearScaling):
        writer.add_rope_scaling_type(types.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif isinstance(scaling, YarnScaling):
        _, attention_factor = frequencies(config.rope, config.head_dim)
        if not needs_table(config.rope):
            writer.add_rope_scaling_type(types.YARN)
            writer.add_rope_scaling_factor(scaling.factor)
            attention_factor /= yarn_attention(scaling.factor)  # llama.cpp multiplies by it
        if attention_factor != 1:
            writer.add_rope_scaling_attn_factors(attention_factor)
    if needs_table(config.rope):
        writer.add_string(SCALING, json.dumps(encode(scaling)))


def needs_table(rope: RopeConfig) -> bool:
    """Return whether a scaling has no name that llama.cpp reads: it goes as a table."""
    scaling = rope.scaling
    betas = isinstance(scaling, YarnScaling) and (scaling.beta_fast, scaling.beta_slow) != (32, 1)
    return betas or isinstance(scaling, Llama3Scaling)


def table(config: ModelConfig) -> Tensor:
    """Return the factors that a rotary scaling puts on wavelengths [E/2], in fp32."""
    plain, _ = frequencies(RopeConfig(base=config.rope.base), config.head_dim)
    scaled, _ = frequencies(config.rope, config.head_dim)
    return plain / scaled


def read_config(header: Header) -> ModelConfig:
    """Return the shape that the fields of a file describe.

    Raises:
        WeightsError: they describe something this decoder does not have.
    """
    try:
        return _Fields(header).config()
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:  # a text where a number belongs
        raise WeightsError(f"describes no model: {error}", where=header.path) from error


class _Fields:
    """The fields of a file; those of its architecture by a key with a dot before it."""

    def __init__(self, header: Header) -> None:
        self.path, self.fields, self.tensors = header.path, header.fields, header.tensors
        self.architecture: Any = self.fields.get("general.architecture")
        if self.architecture not in READABLE:
            problem = "this architecture cannot be read"
            raise WeightsError(problem, where=self.path, got=self.architecture, allowed=READABLE)
        if self.value("split.count", 1) > 1:
            raise WeightsError("is one part of several", where=self.path, do="Join them with llama-gguf-split --merge.")

    def value(self, key: str, default: Any = None) -> Any:
        """Return a field, `default` where the file has none."""
        value = self.fields.get(self.architecture + key if key.startswith(".") else key, default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def config(self) -> ModelConfig:
        """Return the shape."""
        self._check()
        experts = self.value(".expert_count", 0)
        tree = {
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "hidden_size": self.value(".embedding_length"),
            "num_layers": self.value(".block_count"),
            "num_heads": self.value(".attention.head_count"),
            "num_kv_heads": self.value(".attention.head_count_kv", 0),
            "head_dim": self.value(".attention.key_length", 0),
            "ffn_size": self.value(".expert_feed_forward_length" if experts else ".feed_forward_length")
            or self.value(".feed_forward_length"),
            "context_length": self.value(".context_length"),
            "norm_eps": self.value(".attention.layer_norm_rms_epsilon"),
            "qkv_bias": "blk.0.attn_q.bias" in self.tensors,
            "output_bias": "blk.0.attn_output.bias" in self.tensors,
            "qk_norm": "blk.0.attn_q_norm.weight" in self.tensors,
            "tie_embeddings": "output.weight" not in self.tensors,
            "rope": {"base": self.value(".rope.freq_base", 10000.0), "scaling": self._scaling()},
        }
        if experts:
            tree["experts"] = {"count": experts, "per_token": self.value(".expert_used_count")}
        config = decoded(ModelConfig, tree, self.path)
        for key in (".attention.value_length", ".rope.dimension_count"):
            if self.value(key, config.head_dim) != config.head_dim:
                problem = f"{key[1:]} must be the width of a head, {config.head_dim}"
                raise WeightsError(problem, where=self.path, got=self.value(key))
        self._check_rope(config)
        return config

    def _check(self) -> None:
        mix = 1 if self.value(".rope.scaling.type") == "yarn" else 0
        for key, neutral in {**NEUTRAL, ".rope.scaling.yarn_ext_factor": (-1, mix)}.items():
            if self.value(key) not in (None, *neutral):
                raise WeightsError(f"{key[1:]} is not supported", where=self.path, got=self.value(key))
        blocks = len({name.split(".")[1] for name in self.tensors if name.startswith("blk.")})
        if self.value(".block_count") != blocks:
            problem = f"says another number of blocks than the {blocks} it holds"
            raise WeightsError(problem, where=self.path, got=self.value(".block_count"))
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise WeightsError("has no table of embeddings", where=self.path)

    def _scaling(self) -> Any:
        kind, factor = self.value(".rope.scaling.type", "linear"), self.value(".rope.scaling.factor", 1.0)
        is_plain = kind == "none" or (kind == "linear" and factor == 1)
        original = self.value(".rope.scaling.original_context_length")
        if ROPE_TABLE in self.tensors:
            if not is_plain:
                raise WeightsError(f"{ROPE_TABLE} and a scaling are not supported at once", where=self.path, got=kind)
            if SCALING in self.fields:
                return json.loads(self.fields[SCALING])
            # A table alone: slow pairs are divided by the factor; the rest is as Llama 3.1 has it.
            factor = self.tensors[ROPE_TABLE].read().max().item()
            return {"kind": "llama3", "factor": factor, "original_length": original or 8192}
        if kind == "yarn":
            attention = self.value(".rope.scaling.attn_factor")
            return {
                "kind": kind,
                "factor": factor,
                "original_length": original or self.value(".context_length"),
                "beta_fast": self.value(".rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self.value(".rope.scaling.yarn_beta_slow", 1.0),
                "attention_factor": None if attention is None else attention * yarn_attention(factor),
            }
        return None if is_plain else {"kind": kind, "factor": factor}

    def _check_rope(self, config: ModelConfig) -> None:
        """Refuse a scale on cos and sin, or a table, that is not the one of the config."""
        if self.value(".rope.scaling.type") != "yarn":
            _, expected = frequencies(config.rope, config.head_dim)
            attention = self.value(".rope.scaling.attn_factor", 1.0)
            if not math.isclose(attention, expected, rel_tol=1e-5):
                problem = f"rope.scaling.attn_factor must be {expected:g} for this rotary scaling"
                raise WeightsError(problem, where=self.path, got=attention)
        if ROPE_TABLE not in self.tensors:
            return
        found, table_there = table(config), self.tensors[ROPE_TABLE].read()
        if found.shape != table_there.shape or not torch.allclose(table_there, found, rtol=1e-3):
            kind = "what the file says" if SCALING in self.fields else "Llama 3.1's"
            raise WeightsError(f"{ROPE_TABLE} is not that of {kind} scaling", where=self.path)
