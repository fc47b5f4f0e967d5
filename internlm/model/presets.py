"""Shapes by name, as differences from the defaults. `model: {preset: internlm-7b}` in a recipe starts from one.

InternLM's feed-forward is 256 · ceil(floor(8/3 · hidden) / 256). The released 7B has biases on all four attention
matrices, the released 20B has none.

Models of others, and InternLM's later ones, are here for their shapes. Contexts are those of the released config.json,
Mistral's the window through which all of its layers look.
"""

from __future__ import annotations

from typing import Any

from internlm.errors import ConfigError

_INTERNLM_START = {"std": 0.006, "embedding_std": 0.0052, "residual": "layer"}
_INTERNLM_7B: dict[str, Any] = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "ffn_size": 11008,
    "context_length": 2048,
    "qkv_bias": True,
    "output_bias": True,
    "init": _INTERNLM_START,
}

_INTERNLM2 = {"vocab_size": 92544, "num_kv_heads": 8, "context_length": 32768, "rope": {"base": 1e6}}
_SEVEN = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "ffn_size": 14336}
_QWEN2 = {"norm_eps": 1e-6, "qkv_bias": True, "rope": {"base": 1e6}}
_QWEN3 = {
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "context_length": 40960,
    "norm_eps": 1e-6,
    "qk_norm": True,
    "rope": {"base": 1e6},
}

PRESETS: dict[str, dict[str, Any]] = {
    "internlm-7b": _INTERNLM_7B,
    "internlm-7b-8k": _INTERNLM_7B | {"context_length": 8192},
    "internlm-20b": {
        "vocab_size": 103168,
        "hidden_size": 5120,
        "num_layers": 60,
        "num_heads": 40,
        "ffn_size": 13824,
        "context_length": 4096,
        "init": _INTERNLM_START,
    },
    "internlm2-1.8b": _INTERNLM2 | {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "ffn_size": 8192},
    "internlm2-7b": _INTERNLM2 | {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "ffn_size": 14336},
    "internlm3-8b": {
        "vocab_size": 128512,
        "hidden_size": 4096,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 2,
        "ffn_size": 10240,
        "context_length": 32768,
        "rope": {"base": 5e7, "scaling": {"kind": "dynamic", "factor": 6.0, "original_length": 32768}},
    },
    "llama2-7b": _SEVEN | {"vocab_size": 32000, "num_kv_heads": 32, "ffn_size": 11008, "context_length": 4096},
    "llama3-8b": _SEVEN | {"vocab_size": 128256, "context_length": 8192, "rope": {"base": 5e5}},
    "mistral-7b": _SEVEN | {"vocab_size": 32000, "context_length": 4096},
    "qwen2.5-0.5b": _QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "ffn_size": 4864,
        "context_length": 32768,
        "tie_embeddings": True,
    },
    "qwen2.5-7b": _QWEN2
    | {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "ffn_size": 18944,
        "context_length": 131072,
    },
    "qwen3-0.6b": _QWEN3
    | {"hidden_size": 1024, "num_layers": 28, "num_heads": 16, "ffn_size": 3072, "tie_embeddings": True},
    "qwen3-4b": _QWEN3
    | {"hidden_size": 2560, "num_layers": 36, "num_heads": 32, "ffn_size": 9728, "tie_embeddings": True},
    "qwen3-8b": _QWEN3 | {"hidden_size": 4096, "num_layers": 36, "num_heads": 32, "ffn_size": 12288},
    # Toys, for tests, the quickstart and the CPU benchmark.
    "toy": {"vocab_size": 256, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 64},
    "toy-8m": {"vocab_size": 4096, "hidden_size": 288, "num_layers": 6, "num_heads": 6, "ffn_size": 768},
    "toy-134m": {"vocab_size": 32000, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "ffn_size": 2048},
}


def preset(name: str) -> dict[str, Any]:
    """Return the fields that a preset sets.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError("no such preset", where="model.preset", got=name, allowed=PRESETS)
    return PRESETS[name]
