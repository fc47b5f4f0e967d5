"""The shape of a model, and every count that follows from it.

    ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4, num_heads=4, ffn_size=704).num_parameters   # 4.2 M

One decoder serves every family: the differences are switches here, never a branch on a name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from internlm.config import require, require_positive, section
from internlm.errors import ConfigError


def _require_over(section: Any, place: str, least: int, *names: str) -> None:
    require(section, place, names, lambda number: number > least, f"must be finite and over {least}")


def _require_not_negative(section: Any, place: str, *names: str) -> None:
    require(section, place, names, lambda number: number >= 0, "must be finite and not negative")


@section
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    kind: Literal["linear"] = "linear"
    factor: float
    """How many times longer than trained a text may be."""

    def __post_init__(self) -> None:
        _require_over(self, "model.rope.scaling", 0, "factor")


@section
class DynamicScaling:
    """The base grows with the text once it is longer than trained (dynamic NTK; InternLM's 8k → 16k)."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float = 1.0
    """Further stretch; 1.0 is InternLM's."""
    original_length: int
    """Trained context in tokens; shorter texts are rotated with the plain base."""

    def __post_init__(self) -> None:
        _require_over(self, "model.rope.scaling", 0, "factor")
        require_positive(self, "model.rope.scaling", "original_length")


@section
class YarnScaling:
    """Slow frequencies interpolated, fast ones kept, attention sharpened (Peng et al. 2023, YaRN)."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    """How many times longer than trained a text may be."""
    original_length: int
    """Trained context in tokens."""
    beta_fast: float = 32.0
    """Frequencies with more turns than this over the trained context stay."""
    beta_slow: float = 1.0
    """Frequencies with fewer turns than this are interpolated fully."""
    attention_factor: float | None = None
    """Scale on cos and sin; None: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        _require_over(self, "model.rope.scaling", 0, "factor", "beta_fast", "beta_slow", "attention_factor")
        require_positive(self, "model.rope.scaling", "original_length")
        slow = self.beta_slow
        require(self, "model.rope.scaling", ["beta_fast"], lambda n: n >= slow, f"must not be under beta_slow {slow}")


@section
class Llama3Scaling:
    """Llama 3.1's smooth split between kept and interpolated frequencies."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    """How many times longer than trained a text may be."""
    original_length: int
    """Trained context in tokens."""
    low_frequency_factor: float = 1.0
    """Wavelengths over original_length / this are interpolated fully."""
    high_frequency_factor: float = 4.0
    """Wavelengths under original_length / this stay."""

    def __post_init__(self) -> None:
        _require_over(self, "model.rope.scaling", 0, "factor", "low_frequency_factor", "high_frequency_factor")
        require_positive(self, "model.rope.scaling", "original_length")
        low = self.low_frequency_factor
        what = f"must be over low_frequency_factor {low}"
        require(self, "model.rope.scaling", ["high_frequency_factor"], lambda high: high > low, what)


Scaling = Annotated[LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling, pydantic.Field(discriminator="kind")]


@section
class RopeConfig:
    """Rotary positions, half layout: the first half of a head is rotated against the second."""

    base: float = 10000.0
    """Longest wavelength is 2π · base tokens."""
    scaling: Scaling | None = None
    """How to read texts longer than trained; None: not at all."""

    def __post_init__(self) -> None:
        _require_over(self, "model.rope", 1, "base")


@section
class InitConfig:
    """Random start. Each weight depends on its name and the seed alone, never on layout or order."""

    std: float | None = None
    """Standard deviation of the matrices inside a block; None: 0.5 / sqrt(hidden_size), 0.0078 at 4096."""
    embedding_std: float = 0.02
    """Standard deviation of the embedding, and of the head where it is not tied."""
    residual: Literal["none", "total", "layer"] = "total"
    """What divides the two matrices that write into the residual stream (wo, w_down): nothing, sqrt(2 num_layers)
    (GPT-2), or sqrt(2 (layer + 1)) (InternLM)."""

    def __post_init__(self) -> None:
        _require_not_negative(self, "model.init", "std", "embedding_std")


@section
class ExpertsConfig:
    """A mixture of experts in place of each block's feed-forward: a token goes through a few of many (Shazeer 2017)."""

    count: int
    """Experts of a block, each a feed-forward of `ffn_size`."""
    per_token: int = 2
    """Experts that a token goes through."""
    normalize: bool = True
    """Whether the weights of a token's experts sum to 1, instead of being shares of all experts."""
    balance_loss: float = 0.01
    """Weight of the side loss that evens out how often the experts of a row are chosen: 1 where all are alike."""
    z_loss: float = 0.001
    """Weight of the side loss that keeps the router's logits small: their log-sum-exp, squared (Zoph et al. 2022)."""

    def __post_init__(self) -> None:
        require(self, "model.experts", ["count"], lambda count: count >= 2, "must be at least 2")
        what = f"must lie between 1 and model.experts.count {self.count}"
        require(self, "model.experts", ["per_token"], lambda number: 1 <= number <= self.count, what)
        _require_not_negative(self, "model.experts", "balance_loss", "z_loss")


@section
class ModelConfig:
    """Shape and switches of the decoder."""

    vocab_size: int
    """Number of token ids."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of blocks."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int = 0
    """Key and value heads; queries share them in equal groups. 0 becomes num_heads."""
    head_dim: int = 0
    """Width of a head. 0 becomes hidden_size / num_heads."""
    ffn_size: int
    """Inner width of the feed-forward, or of one expert."""
    experts: ExpertsConfig | None = None
    """A mixture of experts in place of the feed-forward; None: none."""
    context_length: int = 2048
    """Longest text the model is trained for, in tokens."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    qkv_bias: bool = False
    """Biases on wq, wk, wv."""
    output_bias: bool = False
    """Bias on wo."""
    qk_norm: bool = False
    """An RMSNorm over each head of queries and keys, before they are rotated (Qwen3)."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    rope: RopeConfig = RopeConfig()
    """Rotary positions."""
    init: InitConfig = InitConfig()
    """Random start."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "context_length")
        require_positive(self, "model", *sizes)
        _require_not_negative(self, "model", "num_kv_heads", "head_dim")
        _require_over(self, "model", 0, "norm_eps")
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}",
                    where="model",
                    do="Change one of them, or give head_dim.",
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.num_heads % self.num_kv_heads:
            what = f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}"
            raise ConfigError(what, where="model")
        require(self, "model", ["head_dim"], lambda dim: dim % 2 == 0, "must be even: rotary positions turn pairs")
        if isinstance(self.rope.scaling, DynamicScaling):
            require(self, "model", ["head_dim"], lambda dim: dim > 2, "must be over 2 for dynamic scaling")

    @property
    def attention_matrices(self) -> int:
        """Parameters of the matrices of one block's attention."""
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def feed_forward_parameters(self) -> int:
        """Parameters of one block's feed-forward: of all its experts and their router."""
        one = 3 * self.hidden_size * self.ffn_size
        return one if self.experts is None else self.experts.count * (one + self.hidden_size)

    @property
    def active_feed_forward_parameters(self) -> int:
        """Parameters of one block's feed-forward that a token meets."""
        one = 3 * self.hidden_size * self.ffn_size
        if self.experts is None:
            return one
        return self.experts.per_token * one + self.experts.count * self.hidden_size

    @property
    def block_parameters(self) -> int:
        """Parameters of one block, norms and biases included."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        biases += self.hidden_size * self.output_bias
        return self.attention_matrices + self.feed_forward_parameters + norms + biases

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        tables = self.embedding_parameters * (1 if self.tie_embeddings else 2)
        return tables + self.num_layers * self.block_parameters + self.hidden_size

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets: all but those of experts it does not go through."""
        idle = self.feed_forward_parameters - self.active_feed_forward_parameters
        return self.num_parameters - self.num_layers * idle

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply a token: blocks without norms and biases, and the head; not the embedding."""
        block = self.attention_matrices + self.active_feed_forward_parameters
        return self.num_layers * block + self.embedding_parameters
