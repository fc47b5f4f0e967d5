"""The decoder: embedding, blocks, final norm, head.

    hidden = model(tokens, positions, documents)       # [B, T, D]
    outputs = model.head(hidden, labels)               # TokenOutputs, each [B, T]

Blocks live in a ModuleDict so that a parameter keeps its name when the layers are split over stages.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from internlm import compat
from internlm.model import attention
from internlm.model.config import ModelConfig
from internlm.model.heads import LanguageHead
from internlm.model.layers import Block, RMSNorm
from internlm.model.rope import Rope
from internlm.runtime import AttentionPath


class Transformer(nn.Module):
    """A causal decoder. Weights are uninitialised until `initialize` or a loader fills them."""

    def __init__(self, config: ModelConfig, attention_path: AttentionPath = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_path = attention_path
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = Rope(config.rope, config.head_dim)
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.num_layers)})
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = LanguageHead(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's."""
        self.head.weight = self.embedding.weight  # type: ignore[assignment]  # torch annotates it as a Tensor

    def forward(self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Return the normalised hidden states [B, T, D].

        A part of a model (`embedding` or `norm` is None) takes and gives the stream between its blocks instead.

        Args:
            tokens: [B, T] ids.
            positions: [B, T], each token's place in its document; None: 0 … T−1.
            documents: [B, T], equal inside a document; None: each row is one document.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(1, -1)
        x = tokens if self.embedding is None else self.embedding(tokens)
        # Autocast casts products only: the stream, and with it rotated queries and keys, would stay in fp32.
        x = compat.as_products(x)
        layout = attention.arrange(documents, x.device, x.dtype, self.attention_path)
        rotation = self.rope(positions, x.dtype)
        for block in self.blocks.values():
            x = block(x, rotation, layout)
        return x if self.norm is None else self.norm(x)


class _NoStart(TorchFunctionMode):
    """Leaves out torch's own start of parameters.

    Drawing on the meta device loads torch's compiler: seconds, and 170 MB of a small server's 420.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty(config: ModelConfig, path: AttentionPath = "auto") -> Transformer:
    """Return a model without memory (on the meta device), for a loader to fill."""
    with torch.device("meta"), _NoStart():
        return Transformer(config, path)


def build(
    config: ModelConfig, seed: int, *, dtype: torch.dtype = torch.float32, path: AttentionPath = "auto"
) -> Transformer:
    """Return a randomly initialised model on the CPU."""
    model = empty(config, path)
    give_memory(model, torch.device("cpu"), dtype)
    initialize(model, seed)
    return model


def give_memory(model: Transformer, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give the parameters of a model without memory some, in place; values are what lies there, shared ones stay so.

    `dtype`: of all; None: what each has. torch's `to_empty` imports sympy: a second of every start.
    """
    given: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            if old not in given:
                memory = torch.empty(old.shape, dtype=dtype or old.dtype, device=device)
                given[old] = nn.Parameter(memory, old.requires_grad)
            setattr(module, name, given[old])


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter, in place, from its name and the seed alone: the same start in any order and layout."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial(model.config, name, parameter.shape, seed))


def initial(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the start of a parameter, on the CPU in float32, from its name and the seed alone."""
    std = init_std(config, name)
    if std is None:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    return torch.empty(shape).normal_(0.0, std, generator=generator_of(name, seed))


def generator_of(name: str, seed: int) -> torch.Generator:
    """Return the random numbers of a parameter: the generator looks at 32 bits, hashed of name and seed together."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def init_std(config: ModelConfig, name: str) -> float | None:
    """Return the standard deviation of a parameter's start; None for norms (all 1) and biases (all 0)."""
    init = config.init
    if name.endswith("bias") or "norm" in name:
        return None
    if not name.startswith("blocks."):
        return init.embedding_std
    std = init.std if init.std is not None else 0.5 * config.hidden_size**-0.5
    if name.endswith(("wo.weight", "w_down.weight")):
        layer = int(name.split(".")[1])
        depth = {"none": 0.5, "total": config.num_layers, "layer": layer + 1}[init.residual]
        std /= (2 * depth) ** 0.5
    return std
