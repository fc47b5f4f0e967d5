"""Linear layers in the form that a CPU multiplies fastest by few rows, for decoding; on a GPU, fewer of them.

    pack_block(block, "fp16")     # in place; the weights it was made of are given up; then `pack_head`
    join(model)                   # in place; on a GPU

A step of decoding reads every weight for a handful of rows, and plain products are slow at that. q, k and v become one
product, gate and up another.

    kind   memory   what is rounded                                  speed × F.linear at 1, 4, 16, 128 rows    error
    split  1        nothing: sums are made in another order          2.1   2.1   1.6   1.3                     4e-7
    fp32   1        nothing: sums are made in another order          1.6   2.6   2.1   1.4                     4e-7
    fp16   1/2 ¹    weights, to 11 bits                              3.9   5.7   2.7   1.3                     2e-4
    bf16   1/2      weights, activations and results, to 8 bits      2.9   4.6   3.6   2.6                     3e-3
    int8   1/4      weights, to 8 bits with a scale per output;      2.6   4.2   3.0   2.1                     8e-3
                    activations, to 14 bits with a scale per row

    ¹ inputs are filled up to a multiple of 512: a third more at width 768, 1 % at 4096

Speed by wall time on 2 cores of a Zen 4 for the products of a model of 134 M parameters; error of one product with
random weights: `benchmarks/linear_cpu.py` and its results. Each kind is faster than the plain product at 128 rows too,
hence prompts have no other kernel. Without AVX-512 VNNI (measured with oneDNN kept to AVX2) int8 is slower than fp16 at
any number of rows, and only saves memory.

"bf16" is for processors with AVX512-BF16 or AMX; others get fp16. Models trained in bf16 lose nothing of their weights.
The head is fp16: logits of 8 bits are often equal.

"int8" keeps activations at 14 bits: a row is two digits of 7 bits, x ≈ s · (128 · a + b), multiplied by the weight as
two rows of one integer product. Its sums are exact, without VNNI too, where 8 bits overflow. So the weights' rounding
is the whole cost in quality, also where activations have outliers.

Neighbours: with "bf16" and "int8", and with "fp16" where there is AVX-512, a row's result is bitwise the same alone and
in any batch; else to 2e-6, as oneDNN, and fbgemm's kernels for AVX2, choose the order of a sum by the number of rows.
fbgemm's own dynamic int8 is not offered: it scales all rows by the largest activation of the batch.

"split" is for a single text: a product of one or two rows goes to all threads, which MKL's own does not. More rows are
plain products.

Limits: inference; packed weights are for CPUs. Experts stay as they are. A tied head is packed apart from the
embedding, whose rows are looked up in fp32. What rounding costs trained models is in docs/performance.md.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm.compat import kernels
from internlm.errors import EngineError
from internlm.log import warn_once
from internlm.model.heads import LanguageHead
from internlm.model.layers import Attention, Block, FeedForward, Linear
from internlm.model.transformer import Transformer

logger = logging.getLogger(__name__)

Kind = Literal["split", "fp32", "fp16", "bf16", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FP16_MAX = 65504.0
_INT8_MAX = 127
_ROW_MAX = 63 * 128 + 63
"""Largest activation in two digits of −64 … 63, kept symmetric."""
_ROWS = 1024
"""Rows of a weight that are rounded at a time: the head's is large."""
_FEW_ROWS = 2
"""Most rows that "split" multiplies in its own way."""
_LEAST_ROWS = 4
"""Fewer are filled up for oneDNN, which is faster at four than at one: 14 – 17 ms against 20 for 134 M parameters."""
_ROW_GROUP = 16
"""More are filled up to a multiple: oneDNN makes code for each number of rows and keeps it, 0.5 ms and 0.6 MB for a
product, and prompts sooner or later have every length."""
_TINY = 1e-30
"""Scale of a row of zeros."""


class PackedLinear(nn.Module):
    """x [..., in] → x · weight transposed + bias [..., out], fp32, without parameters. One subclass for each kind."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        raise NotImplementedError


class PlainLinear(PackedLinear):
    """Nothing packed: for machines without the kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        return F.linear(x, self.weight, self.bias)


class SplitLinear(PackedLinear):
    """fp32 weights as they are; few rows are multiplied as a batch of products with parts of the weight.

    Read at 14 GB/s by F.linear, 19 by oneDNN, 31 – 42 so (2 cores of a Zen 4, which read 38 – 42 at best).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.product = kernels.onednn_linear if kernels.has_onednn_linear() else F.linear
        self.parts = weight.view(math.gcd(64, weight.shape[0]), -1, weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if not 0 < count <= _FEW_ROWS:
            return self.product(x, self.weight, self.bias)
        out = torch.bmm(self.parts, rows.t().expand(self.parts.shape[0], -1, -1)).view(-1, count).t()
        return (out if self.bias is None else out + self.bias).reshape(*x.shape[:-1], -1)


class Fp32Linear(PackedLinear):
    """fp32 weights in oneDNN's order."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = kernels.pack_onednn_linear(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        rows = x.reshape(-1, x.shape[-1])
        out = kernels.onednn_linear(_filled(rows), self.weight, self.bias)[: rows.shape[0]]
        return out.view(*x.shape[:-1], out.shape[-1])


class Fp16Linear(PackedLinear):
    """fp16 weights in fbgemm's order; activations and sums in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = kernels.pack_fp16_linear(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        return kernels.fp16_linear(x, self.packed)


class Bf16Linear(PackedLinear):
    """bf16 weights in oneDNN's order; rows are rounded to bf16, results too; sums in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = kernels.pack_bf16_linear(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        rows = x.reshape(-1, x.shape[-1])
        out = kernels.bf16_linear(_filled(rows), self.weight)[: rows.shape[0]]
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], out.shape[-1])


class Int8Linear(PackedLinear):
    """int8 weights with a scale for each output; rows as two digits of 7 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        largest = torch.linalg.vector_norm(weight, float("inf"), 1)
        self.scales = torch.where(largest > 0, largest / _INT8_MAX, 1.0)
        rounded = torch.empty(weight.shape, dtype=torch.int8)
        for part, scale, out in zip(*(x.split(_ROWS) for x in (weight, self.scales, rounded)), strict=True):
            out.copy_((part / scale[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX))
        self.weight, self.bias = kernels.pack_int8_linear(rounded), bias

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from x [..., in]."""
        given = x.reshape(-1, x.shape[-1])
        rows = _filled(given)
        scale = rows.abs().amax(1, keepdim=True).clamp_(min=_TINY * _ROW_MAX).div_(_ROW_MAX)
        # 64 is added to both digits, and ½ because the conversion cuts off.
        whole = (rows / scale).add_(64 * 128 + 64 + 0.5).to(torch.int16)
        digits = torch.cat((whole >> 7, whole & 127)).to(torch.uint8)
        high, low = kernels.int8_linear(digits, self.weight, self.scales).chunk(2)
        out = torch.add(low, high, alpha=128).mul_(scale)
        if self.bias is not None:
            out += self.bias
        return out[: given.shape[0]].view(*x.shape[:-1], out.shape[-1])


def _filled(rows: Tensor) -> Tensor:
    """Return rows [R, K] and so many of zeros that their number is one of a few."""
    count = rows.shape[0]
    wanted = -(-count // _ROW_GROUP) * _ROW_GROUP if count > _ROW_GROUP else max(count, _LEAST_ROWS)
    return rows if wanted == count or not count else F.pad(rows, (0, 0, 0, wanted - count))


@torch.no_grad()
def pack_block(block: Block, kind: Kind) -> None:
    """Replace the linear layers of one block by packed ones, in place; norms become fp32. Experts are left.

    Raises:
        EngineError: the kind is unknown, or a layer is not on the CPU or no plain one; nothing was changed.
    """
    _check(block, kind)
    attention, feed_forward = block.attention, block.feed_forward
    attention.wqkv = _join(attention, ("wq", "wk", "wv"), kind)
    attention.wo = _product([attention.wo], kind)  # type: ignore[assignment]
    if isinstance(feed_forward, FeedForward):
        feed_forward.w_gate_up = _join(feed_forward, ("w_gate", "w_up"), kind)
        feed_forward.w_down = _product([feed_forward.w_down], kind)  # type: ignore[assignment]
    elif kind in ("fp16", "bf16", "int8"):
        warn_once(logger, "experts are not packed: their weights stay in fp32, and their products are plain ones")
    block.float().requires_grad_(False)


@torch.no_grad()
def pack_head(head: LanguageHead, kind: Kind) -> None:
    """Give a head a packed weight in place of its own; it then gives logits only.

    Raises:
        EngineError: as `pack_block`; nothing was changed.
    """
    _check(head, kind)
    # Logits rounded to the 8 bits of bf16 are often equal, and the first of them would be taken.
    head.packed = _product([head], "fp16" if kind == "bf16" else kind)
    head.register_parameter("weight", None)


@torch.no_grad()
def join(model: Transformer) -> None:
    """Make q, k and v one product, gate and up another, in place, in the dtype that they have: for GPUs.

    Nothing is copied where `lay_together` was called for the weights. Separate weights stay there as views of the
    joined ones, so that new values can be copied into them. Layers that are not plain ones are left.
    """
    for owner, layers in _neighbours(model):
        weight, bias = _together(layers)
        setattr(owner, "wqkv" if isinstance(owner, Attention) else "w_gate_up", PlainLinear(weight, bias))


@torch.no_grad()
def lay_together(model: Transformer) -> None:
    """Move the weights that `join` joins side by side in memory, in place; their values stay what they are.

    One pair of layers is held twice at a time. Who shares the parameters goes on sharing them; who shares only their
    memory keeps the old one.
    """
    for _, layers in _neighbours(model):
        _together(layers)


def _neighbours(model: Transformer) -> Iterator[tuple[nn.Module, list[Linear]]]:
    """Yield the layers with the same input, and whose they are."""
    for block in model.blocks.values():
        assert isinstance(block, Block), "a decoder is made of blocks"
        for owner, names in ((block.attention, ("wq", "wk", "wv")), (block.feed_forward, ("w_gate", "w_up"))):
            layers: list[Any] = [getattr(owner, name, None) for name in names]
            if all(type(layer) is Linear and type(layer.weight.data) is Tensor for layer in layers):
                yield owner, layers


def _together(layers: list[Linear]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of several layers as one, of which theirs become views."""
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "layers that are joined have biases alike"
    return _one([layer.weight for layer in layers]), _one(biases) if biases else None


def _one(parameters: list[Tensor]) -> Tensor:
    """Return parameters that lie side by side as one tensor; where they do not, move them."""
    first, rows = parameters[0].data, sum(parameter.shape[0] for parameter in parameters)
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    places = [first.data_ptr() + before for before in itertools.accumulate(sizes[:-1], initial=0)]
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    if len(own) == 1 and [parameter.data_ptr() for parameter in parameters] == places:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return whole


def _join(owner: nn.Module, names: tuple[str, ...], kind: Kind) -> PackedLinear:
    """Return these layers of a module as one, and take them out of it."""
    joined = _product([getattr(owner, name) for name in names], kind)
    for name in names:
        setattr(owner, name, None)
    return joined


def _product(layers: list[nn.Module], kind: Kind) -> PackedLinear:
    weights = [layer.get_parameter("weight").detach().float() for layer in layers]
    biases = [bias.detach().float() for layer in layers if (bias := getattr(layer, "bias", None)) is not None]
    assert len(biases) in (0, len(layers)), "layers that are joined have biases alike"
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return pack_weight(weight, torch.cat(biases) if biases else None, kind)


def pack_weight(weight: Tensor, bias: Tensor | None, kind: Kind) -> PackedLinear:
    """Return the packed product of a weight [out, in] and a bias [out], fp32, of this kind or the next better there is.

    Another kind gives a warning, but for plain fp32 products in place of packed ones: they give the same.
    """
    if kind == "int8":
        if not kernels.has_int8_linear():
            return _instead("int8 products are missing on this machine", weight, bias, "fp16")
        if not _largest(weight).isfinite():
            return _instead("weights that are not finite cannot be int8", weight, bias, "fp32")
        return Int8Linear(weight, bias)
    if kind == "bf16":
        if not kernels.has_bf16_linear():
            return _instead("bf16 products are missing on this machine", weight, bias, "fp16")
        return Bf16Linear(weight, bias)
    if kind == "fp16":
        if not kernels.has_fp16_linear():
            return _instead("fp16 products are missing on this machine", weight, bias, "fp32")
        if not _largest(weight) <= _FP16_MAX:  # also false for what is not a number
            return _instead(f"weights beyond ±{_FP16_MAX:.0f} do not fit into fp16", weight, bias, "fp32")
        return Fp16Linear(weight, bias)
    if kind == "split":
        return SplitLinear(weight, bias)
    if not kernels.has_packed_onednn_linear():
        return PlainLinear(weight, bias)
    return Fp32Linear(weight, bias)


def _largest(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, float("inf"))


def _instead(problem: str, weight: Tensor, bias: Tensor | None, kind: Kind) -> PackedLinear:
    warn_once(logger, f"{problem}: {kind} is used instead, at twice the memory or more")
    return pack_weight(weight, bias, kind)


def _check(module: nn.Module, kind: Kind) -> None:
    if kind not in KINDS:
        raise EngineError("is no kind of packed weights", where="kind", got=kind, allowed=KINDS)
    if isinstance(module, Block):
        names = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
        if isinstance(module.feed_forward, FeedForward):
            names += [f"feed_forward.{name}" for name in ("w_gate", "w_up", "w_down")]
        layers = {name: attrgetter(name)(module) for name in names}
    else:
        layers = {"head": module}
    for name, layer in layers.items():
        if layer is None or isinstance(layer, PackedLinear) or getattr(layer, "packed", None) is not None:
            raise EngineError("is packed already", where=name, do="Load the weights into a new model and pack that.")
        if type(layer) not in (Linear, LanguageHead):
            do = "Merge adapters first; nothing else may have changed the layers."
            raise EngineError("only plain layers can be packed", where=name, got=type(layer).__name__, do=do)
        device = layer.weight.device.type
        if device != "cpu":
            do = "Load its weights first." if device == "meta" else "Move the model to the CPU, or leave it unpacked."
            raise EngineError("packed weights are for the CPU", where=name, got=device, do=do)
