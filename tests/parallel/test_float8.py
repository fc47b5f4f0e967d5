"""8-bit products: the rounding that is meant, gradients that point the right way, and training that still learns."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.parallel import float8
from internlm.parallel.recompute import RecomputeConfig, recompute

SHAPE = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, qkv_bias=True)


def test_numbers_that_eight_bits_hold_are_multiplied_exactly() -> None:
    x = torch.tensor([[448.0, -2.0, 0.5, 0.0] * 4])
    w = torch.tensor([[448.0, 1.0, -4.0, 3.0] * 4, [0.25, 448.0, 8.0, 1.0] * 4])
    assert torch.equal(float8.product(x, w, torch.tensor([1.0, 2.0])), x @ w.t() + torch.tensor([1.0, 2.0]))


def test_products_and_gradients_are_near_those_in_full_precision() -> None:
    x, w = torch.randn(3, 40, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    grad = torch.randn(3, 40, 96)
    found = float8.product(x, w, None)
    wanted = x @ w.t()
    for low, high in zip(
        (found, *torch.autograd.grad(found, (x, w), grad)), (wanted, *torch.autograd.grad(wanted, (x, w), grad)),
        strict=True,
    ):  # fmt: skip
        error = ((low - high).norm() / high.norm()).item()
        assert 1e-3 < error < 0.06  # rounded, and not by more than 2⁻⁴


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_a_tensor_changes_nothing(scale: float) -> None:
    x, w = torch.randn(8, 32), torch.randn(16, 32)
    plain = float8.product(x, w, None)
    scaled = float8.product(x * scale, w, None) / scale
    assert torch.allclose(plain, scaled, rtol=0.1, atol=0.05)
    assert float8.product(torch.zeros(8, 32), w, None).eq(0).all()


@pytest.mark.parametrize("kind", ["full", "operators"])
def test_recomputing_eight_bit_products_changes_nothing(kind: Literal["full", "operators"]) -> None:
    ids = torch.randint(64, (2, 16))
    gradients = []
    for config in (RecomputeConfig(), RecomputeConfig(kind=kind)):
        model = build(SHAPE, 0)
        float8.convert(model)
        recompute(model, config)
        model(ids).square().sum().backward()
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if name != "head.weight"])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, again)


def test_a_model_learns_in_eight_bits_as_in_thirty_two() -> None:
    ids = torch.arange(64).view(1, 64)
    losses = {}
    for eight in (False, True):
        model = build(SHAPE, 0)
        if eight:
            float8.convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(45):
            loss = -model.head(model(ids[:, :-1]), ids[:, 1:]).logp.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[eight] = loss.item()
    assert losses[False] < 0.5
    assert losses[True] == pytest.approx(losses[False], abs=0.05)
    assert losses[True] != losses[False]
