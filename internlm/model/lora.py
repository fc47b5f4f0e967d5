"""Low-rank adapters: a linear layer's frozen matrix and a small change that is trained beside it.

    y = x · Wᵀ + s · (x · Aᵀ) · Bᵀ + bias         A [r, in], B [out, r]
                                                  s = alpha / r (LoRA, Hu et al. 2021) or alpha / √r (rank-stabilised,
                                                  Kalajdzievski 2023)
    W' = m · (W + s·B·A) / ‖W + s·B·A‖            the norm of each row; DoRA (Liu et al. 2024): a trained length per row

    apply_lora(model, LoraConfig(rank=16, targets=("blocks.*.attention.w[qv]",)))       # freezes all else
    initialize_lora(model, seed)                  # B = 0: the model still says what it said
    …                                             # train lora_parameters(model)
    merge_lora(model)                             # a plain model again

A layer keeps its names, `lora_a`, `lora_b` and `lora_magnitude` stand beside `weight`: what fits the plain model fits.
Where a layer is cut over ranks its adapter is cut with it:

                weight    lora_a           lora_b           lora_magnitude    the output is
    columns     dim 0     whole            dim 0            dim 0             a part of the channels
    rows        dim 1     dim 1            whole            whole             a partial sum, as that of the weight alone

A whole factor gets a part of its gradient on each rank, to be summed.

Limits: only `Linear` layers of blocks. One on the head or the embedding would need a merged copy of the table in every
step, one on experts a grouped product for each factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm import compat
from internlm.config import require_positive, section
from internlm.errors import ConfigError, did_you_mean
from internlm.model.config import ModelConfig
from internlm.model.heads import LanguageHead
from internlm.model.layers import Linear
from internlm.model.moe import Router, StackedLinear
from internlm.model.transformer import Transformer, empty, generator_of

ALL_LINEAR = "all-linear"
"""The target that is every linear layer of every block."""
_CHUNK = 2**22
"""Elements of W + s·B·A that are held at a time, 16 MiB in fp32."""


@section
class LoraConfig:
    """Low-rank adapters, trained in place of the model."""

    rank: int = 16
    """r, the width of an adapter."""
    alpha: float = 32.0
    """What the change is multiplied by, over the rank."""
    rank_stabilized: bool = False
    """rsLoRA: alpha is divided by √rank instead, so that large ranks learn as fast as small ones."""
    dora: bool = False
    """DoRA: the length of each row of a matrix is trained apart from its direction."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Layers, as patterns (`*`, `?`, `[qv]`) of a name or of its end after a dot: `blocks.*.attention.w[qv]`, `w_up`.
    `all-linear`: every linear layer of every block."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Layers of another rank, by pattern; the first that fits counts."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Layers of another alpha, likewise."""

    def __post_init__(self) -> None:
        require_positive(self, "lora", "rank")
        for name, rank in self.ranks.items():
            if rank < 1:
                raise ConfigError("must be at least 1", where=f"lora.ranks.{name}", got=rank)
        for name, alpha in {"alpha": self.alpha, **{f"alphas.{n}": a for n, a in self.alphas.items()}}.items():
            if not 0 < alpha < float("inf"):
                raise ConfigError("must be finite and more than 0", where=f"lora.{name}", got=alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError("must be at least 0 and less than 1", where="lora.dropout", got=self.dropout)
        if not self.targets:
            raise ConfigError("needs at least one pattern", where="lora.targets", do=f"Give `{ALL_LINEAR}`.")

    def update(self, layer: str) -> Update:
        """Return the form of a layer's adapter, whether it is a target or not."""
        rank = next((rank for pattern, rank in self.ranks.items() if fits(layer, pattern)), self.rank)
        alpha = next((alpha for pattern, alpha in self.alphas.items() if fits(layer, pattern)), self.alpha)
        return Update(rank, alpha, alpha / rank**0.5 if self.rank_stabilized else alpha / rank)


@dataclass(frozen=True)
class Update:
    """The form of one layer's adapter."""

    rank: int
    alpha: float
    scale: float
    """s."""


class LoraLinear(Linear):
    """The frozen layer `base` and an adapter of `dtype`; products are made in the dtype of x."""

    lora_magnitude: nn.Parameter | None

    def __init__(self, base: Linear, update: Update, *, dora: bool, dropout: float, dtype: torch.dtype) -> None:
        assert type(base) is Linear, "adapters come before whatever else changes a layer"
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.onednn = base.onednn
        self.scale, self.dropout = update.scale, dropout
        self.weight = base.weight
        self.register_parameter("bias", base.bias)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=base.weight.device))

        self.lora_a = new(update.rank, self.in_features)
        self.lora_b = new(self.out_features, update.rank)
        self.register_parameter("lora_magnitude", new(self.out_features) if dora else None)
        self.total: Callable[[Tensor], Tensor] = lambda squares: squares
        """A seam: the sum of squares over all that hold a part of each row, where it is cut by `rows`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in].

        DoRA's norm counts as a constant in backward (Liu et al. 2024, §4.3): its gradient costs much and gives little.
        Dropout is on the low-rank path alone; PEFT's DoRA has it on a second product with W too.
        """
        a, b, magnitude = self.lora_a, self.lora_b, self.lora_magnitude
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        # `product` may have been replaced, by one in 8 bits: narrow factors gain nothing there and lose precision.
        narrow = Linear.product(self, dropped, a.to(x.dtype), None) * self.scale  # [..., r]
        change = Linear.product(self, narrow, b.to(narrow.dtype), None)
        if magnitude is None:
            return self.product(x, self.weight, self.bias) + change
        out = self.product(x, self.weight, None) + change
        out = out * (magnitude / self.row_norms(self.weight, a, b)).to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def row_norms(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return ‖W + s·B·A‖ of each row [out], in fp32 at least, a few rows at a time."""
        with compat.without_autocast(weight):
            parts = [_sum(weight[rows], a, b[rows], self.scale).square().sum(1) for rows in _chunks(weight)]
            return _root(self.total(torch.cat(parts)))

    def merged(self) -> Tensor:
        """Return the weight [out, in] of the plain layer that says the same."""
        return merged(self.weight, self.lora_a, self.lora_b, self.scale, self.lora_magnitude)


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """Return W + s·B·A, or with magnitudes m · (W + s·B·A) / ‖W + s·B·A‖, computed in fp32 at least.

    W [out, in] stays as it is, and the result has its dtype. A [r, in], B [out, r], m [out].
    """
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    with compat.without_autocast(weight):
        for rows in _chunks(weight):
            changed = _sum(weight[rows], a, b[rows], scale)
            if magnitude is not None:
                changed *= (magnitude[rows] / _root(changed.square().sum(1)))[:, None]
            out[rows] = changed
    return out


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W + s·B·A in fp32, or in the dtype of the weight if that is wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale)


def _root(squares: Tensor) -> Tensor:
    """Return the roots; those of rows of zeros are not 0, so that 0 · W / ‖W‖ is 0."""
    return squares.sqrt().clamp(min=torch.finfo(squares.dtype).tiny)


def _chunks(weight: Tensor) -> list[slice]:
    rows = max(1, _CHUNK // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def fits(layer: str, pattern: str) -> bool:
    """Return whether a pattern is one of a layer's name, or of its end after a dot. Upper and lower case differ."""
    return pattern == ALL_LINEAR or fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}")


def linear_layers(model: ModelConfig) -> dict[str, torch.Size]:
    """Return the layers that can have an adapter by name, in the model's order, and the shapes of their weights."""
    return {name: module.weight.shape for name, module in _modules(model).items() if isinstance(module, Linear)}


def updates(config: LoraConfig, model: ModelConfig) -> dict[str, Update]:
    """Return the layers that get an adapter, in the model's order, each with its form.

    Of the whole model, so that the answer is the same for a part of it.

    Raises:
        ConfigError: a pattern fits no layer, or one that can have no adapter: the embedding, the head, experts.
    """
    modules = _modules(model)
    linear, tables, experts = (
        [name for name, module in modules.items() if isinstance(module, kinds)]
        for kinds in (Linear, nn.Embedding | LanguageHead, Router | StackedLinear)
    )
    chosen = set()
    for pattern in config.targets:
        # Somebody who asks for every linear layer means those of experts, and not the tables.
        refused = [name for name in experts + tables * (pattern != ALL_LINEAR) if fits(name, pattern)]
        if refused:
            raise ConfigError(
                f"fits {refused[0]}, which can have no adapter: only linear layers outside of experts can",
                where="lora.targets",
                got=pattern,
                do="Name others, such as `blocks.*.attention.*`.",
            )
        found = [name for name in linear if fits(name, pattern)]
        if not found:
            raise _unknown(pattern, "lora.targets", "no linear layer of the model", linear)
        chosen.update(found)
    for key, patterns in (("ranks", config.ranks), ("alphas", config.alphas)):
        for pattern in patterns:
            if not any(fits(name, pattern) for name in chosen):
                raise _unknown(pattern, f"lora.{key}", "none of the targets", sorted(chosen))
    return {name: config.update(name) for name in linear if name in chosen}


def _unknown(pattern: str, where: str, what: str, names: list[str]) -> ConfigError:
    ends = list(dict.fromkeys(name.split(".", 2)[2] for name in names))
    close = did_you_mean(pattern.rpartition(".")[2], [end.rpartition(".")[2] for end in ends])
    return ConfigError(f"fits {what}", where=where, got=pattern, allowed=[f"blocks.*.{e}" for e in ends], do=close)


def _modules(model: ModelConfig) -> dict[str, nn.Module]:
    return dict(empty(model).named_modules())


def apply_lora(model: Transformer, config: LoraConfig, dtype: torch.dtype = torch.float32) -> None:
    """Give the targets of a model, or of a part of it, adapters without values, and freeze everything else, in place.

    Args:
        model: not cut over ranks yet; it may be on the meta device.
        config: of the adapters.
        dtype: of the adapters: a small step is lost in a bf16 weight, whatever the dtype of the model.

    Raises:
        ConfigError: as `updates`, or the model has adapters already.
    """
    if lora_parameters(model):
        raise ConfigError("the model has adapters already", where="lora", do="Merge them first.")
    targets = updates(config, model.config)
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name in targets:
            assert isinstance(layer, Linear), "targets are linear layers"
            parent, _, own = name.rpartition(".")
            new = LoraLinear(layer, targets[name], dora=config.dora, dropout=config.dropout, dtype=dtype)
            setattr(model.get_submodule(parent), own, new.train(layer.training))


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all adapters by name."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2].startswith("lora_")}


@torch.no_grad()
def initialize_lora(model: nn.Module, seed: int) -> None:
    """Fill every adapter, in place, so that it changes nothing yet; the layers' weights must be there."""
    for name, layer in lora_layers(model).items():
        layer.lora_a.copy_(initial(f"{name}.lora_a", layer.lora_a.shape, seed))
        layer.lora_b.zero_()
        if layer.lora_magnitude is not None:
            layer.lora_magnitude.copy_(layer.row_norms(layer.weight, layer.lora_a, layer.lora_b))


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the start of an A [r, in] or a B [out, r], on the CPU in float32, from its name and the seed alone.

    A is uniform between ±1/√in, which is Kaiming's rule with a slope of √5, as PEFT and the first LoRA have it; B is 0.
    """
    if name.endswith("lora_b"):
        return torch.zeros(shape)
    assert name.endswith("lora_a"), "a magnitude follows from the weight"
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(name, seed))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Make a model with adapters a plain one that says the same, in place; all of it can be trained."""
    for layer in lora_layers(model).values():
        layer.weight = nn.Parameter(layer.merged())
        for name in ("lora_a", "lora_b", "lora_magnitude", "scale", "dropout", "total"):
            delattr(layer, name)
        layer.__class__ = Linear  # type: ignore[assignment]  # the object stays, and with it hooks and its place
    model.requires_grad_(True)
