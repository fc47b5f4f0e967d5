"""The models that are measured, by the names of their presets, and the cut of their steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internlm.model.config import ModelConfig

TOY = "toy-134m"
"""What decodes, is served and is saved on a CPU: a real depth and vocabulary, and more than a cache holds."""
STEPS = {"A": ("toy-8m", 256, 16), "B": (TOY, 512, 4)}
"""What trains on a CPU: preset, tokens of a row, rows of a step."""
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Shape:
    """A model and the cut of its steps, as peers take it: without `internlm`, which their interpreter may not have."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    vocab_size: int
    seq_len: int
    batch_rows: int

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_rows * self.seq_len

    @classmethod
    def of(cls, model: ModelConfig, seq_len: int, batch_rows: int) -> Shape:
        """Return the shape of a model of ours."""
        return cls(
            model.hidden_size, model.num_layers, model.num_heads, model.ffn_size, model.vocab_size, seq_len, batch_rows
        )


def model_of(preset: str, **changes: Any) -> ModelConfig:
    """Return a preset with some fields changed."""
    from internlm import config
    from internlm.model import presets
    from internlm.model.config import ModelConfig

    return config.decode(ModelConfig, presets.preset(preset) | changes)


def step_of(letter: str) -> Shape:
    """Return a shape of `STEPS`."""
    preset, seq_len, batch_rows = STEPS[letter]
    return Shape.of(model_of(preset), seq_len, batch_rows)
