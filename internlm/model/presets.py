"""Shapes by name, as differences from the defaults. `model: {preset: internlm-7b}` in a recipe starts from one.

InternLM's feed-forward is 256 · ceil(floor(8/3 · hidden) / 256): 11008 for the 7B, 13824 for the 20B. The released 7B
has biases on all four attention matrices, the released 20B has none.
"""

from __future__ import annotations

from typing import Any

from internlm.errors import ConfigError, did_you_mean

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
    # Toys: the shapes of the tests, the quickstart and the CPU benchmark.
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
        raise ConfigError(
            "no such preset", where="model.preset", got=name, allowed=PRESETS, do=did_you_mean(name, PRESETS)
        )
    return PRESETS[name]
