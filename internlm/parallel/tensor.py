"""Tensor and sequence parallel as one table: module → how its weight is cut.

                 tokens in parts              all tokens                          tokens in parts
    … → norm ──────────────── gather → [wq wk wv | w_gate w_up] columns → [wo | w_down] rows → scatter → + …

A matrix cut by columns gives each rank its own heads or ffn channels; the matrix after it is cut by rows, so that each
rank has a partial sum of the whole output, and one collective adds them (Shoeybi et al. 2019). With `sequence` that
collective, which moves no byte more, leaves each rank its part of the tokens, and norms and residuals are computed once
instead of on every rank (Korthikanti et al. 2022). A norm's weight then sees a part of the tokens only: its gradient is
the sum over ranks.

The vocabulary is cut too: embedding and head hold V / T ids each, and the loss needs three numbers per token from the
others (the largest logit, the sum of exponentials, the label's logit).

Weights are DTensors, for their names and for checkpoints; arithmetic is on the local parts, with the collectives spelt
out, so that the same products run as on one device.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from internlm.model.config import ModelConfig
from internlm.model.heads import LanguageHead, Slice
from internlm.model.layers import Linear, RMSNorm
from internlm.model.moe import Mixture, Router
from internlm.model.transformer import Transformer
from internlm.parallel import collectives

TOKENS = 1
"""The dim of activations [B, T, D] that holds tokens."""


class Tokens:
    """How activations pass between the stretches where tokens are parted, or repeated, and where all are needed."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool) -> None:
        self.group, self.sequence = group, sequence

    def enter(self, x: Tensor) -> Tensor:
        """Return all tokens, for products with a part of the weights."""
        return collectives.gather(x, self.group, TOKENS) if self.sequence else collectives.copy(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' partial outputs: this rank's tokens of it, or all."""
        return collectives.scatter(x, self.group, TOKENS) if self.sequence else collectives.total(x, self.group)

    @property
    def whole(self) -> list[Placement]:
        """How the gradient of a weight comes that every rank has whole."""
        return [Partial() if self.sequence else Replicate()]


class ColumnLinear(Linear):
    """A linear layer with a part of the outputs; its input was gathered by the module around it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out / T] from x [..., in]."""
        return self.product(x, own(self.weight), None if self.bias is None else own(self.bias))


class RowLinear(Linear):
    """A linear layer with a part of the inputs."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T or its part, out] from x [B, T, in / T]."""
        out = self.tokens.leave(self.product(x, own(self.weight), None))
        return out if self.bias is None else out + own(self.bias, self.tokens.whole).to(out.dtype)


class WholeRouter(Router):
    """A router that every rank has whole and asks about all tokens; each has a part of its gradient, as of experts."""

    def table(self) -> Tensor:
        """Return the weight."""
        return own(self.weight, [Partial()])


class TokenNorm(RMSNorm):
    """A norm over the rank's own tokens."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x [..., D]."""
        return self.normalise(x, own(self.weight, self.tokens.whole))


class HeadNorm(RMSNorm):
    """A norm over each of the rank's own heads: every rank has a part of its gradient, which is their sum.

    So with `sequence` and without: ranks differ in heads, not in tokens.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x [B, T, H / T or K / T, E]."""
        return self.normalise(x, own(self.weight, [Partial()]))


class VocabularyEmbedding(nn.Embedding):
    """An embedding with a part of the ids."""

    tokens: Tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B, T or its part, D] from tokens [B, T]."""
        weight = own(self.weight)
        at = tokens - dist.get_rank(self.tokens.group) * weight.shape[0]
        inside = (at >= 0) & (at < weight.shape[0])
        x = F.embedding(at.clamp(0, weight.shape[0] - 1), weight)
        return self.tokens.leave(x * inside[..., None])


class VocabularyHead(LanguageHead):
    """A head with the logits of a part of the ids."""

    tokens: Tokens

    def forward(self, hidden: Tensor, labels: Tensor, coefficients: Tensor | None = None) -> Any:
        """Score all labels; hidden [B, T or its part, D]."""
        return super().forward(self.tokens.enter(hidden), labels, coefficients)

    def table(self) -> Tensor:
        """Return this rank's part of the weight."""
        return own(self.weight)


ROUTER = "feed_forward.router"
HEAD_NORMS = ("attention.q_norm", "attention.k_norm")
BLOCK: dict[str, tuple[type[nn.Module], Placement]] = {
    "attention_norm": (TokenNorm, Replicate()),
    "attention.wq": (ColumnLinear, Shard(0)),
    "attention.wk": (ColumnLinear, Shard(0)),
    "attention.wv": (ColumnLinear, Shard(0)),
    "attention.wo": (RowLinear, Shard(1)),
    **dict.fromkeys(HEAD_NORMS, (HeadNorm, Replicate())),
    "feed_forward_norm": (TokenNorm, Replicate()),
    "feed_forward.w_gate": (ColumnLinear, Shard(0)),
    "feed_forward.w_up": (ColumnLinear, Shard(0)),
    "feed_forward.w_down": (RowLinear, Shard(1)),
    ROUTER: (WholeRouter, Replicate()),
}
ENTERED = ("attention", "feed_forward")
"""Parts of a block that need all tokens."""
ENDS: dict[str, tuple[type[nn.Module], Placement]] = {
    "embedding": (VocabularyEmbedding, Shard(0)),
    "norm": (TokenNorm, Replicate()),
    "head": (VocabularyHead, Shard(0)),
}


def cut(model: Transformer, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Cut the matrices of a model, or of a pipeline stage, over the tensor axis, in place; it may have no memory yet.

    `sequence`: whether tokens are parted between the matrices.
    """
    tokens = Tokens(mesh.get_group(), sequence)
    for path, (kind, placement) in ENDS.items():
        module = getattr(model, path)
        if module is not None:
            _convert(module, kind, placement, mesh, tokens)
    for block in model.blocks.values():
        for path, (kind, placement) in BLOCK.items():
            if _is_part(path, model.config):
                _convert(block.get_submodule(path), kind, placement, mesh, tokens)
        feed_forward = block.get_submodule("feed_forward")
        if isinstance(feed_forward, Mixture):  # each rank has a part of every expert's sum
            feed_forward.register_forward_hook(lambda module, arguments, out: tokens.leave(out))
        for path in ENTERED:
            block.get_submodule(path).register_forward_pre_hook(
                lambda module, arguments: (tokens.enter(arguments[0]), *arguments[1:])
            )
    if model.head is not None:
        model.head.part = _slice(model.config.vocab_size, mesh)
    if model.config.tie_embeddings:
        model.tie()


def _is_part(path: str, config: ModelConfig) -> bool:
    """Return whether a block of such a model has this row of `BLOCK`."""
    if path in HEAD_NORMS:
        return config.qk_norm
    return not path.startswith("feed_forward.") or (path == ROUTER) == (config.experts is not None)


def _convert(module: nn.Module, kind: type[nn.Module], placement: Placement, mesh: DeviceMesh, tokens: Tokens) -> None:
    """Give a module the class that computes on local parts, and its parameters their placement."""
    module.__class__ = kind
    module.tokens = tokens  # type: ignore[assignment]
    for name, parameter in list(module.named_parameters(recurse=False)):
        placed = placement if parameter.ndim > 1 or kind is not RowLinear else Replicate()  # a row's bias is whole
        spread = distribute_tensor(parameter.detach(), mesh, [placed], src_data_rank=None)
        setattr(module, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))


def _slice(vocab_size: int, mesh: DeviceMesh) -> Slice:
    group, size = mesh.get_group(), mesh.size()

    def reduce(x: Tensor, operation: Literal["max", "sum"]) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM, group=group)
        return x

    return Slice(mesh.get_local_rank() * (vocab_size // size), reduce)


def own(parameter: Tensor, gradient: list[Placement] | None = None) -> Tensor:
    """Return this rank's part of a DTensor on the tensor axis.

    `gradient`: how the part's gradient is placed, where not as the parameter is.
    """
    assert isinstance(parameter, DTensor), "every parameter was placed by `cut`"
    return parameter.to_local(grad_placements=gradient)
