"""A mixture of experts against the plain loop over tokens, its side losses against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.errors import ConfigError
from internlm.model.attention import Documents, arrange
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.moe import Mixture, SideLosses, grouped_product
from internlm.model.transformer import Transformer, build


def shape(**experts: float) -> ModelConfig:
    chosen = ExpertsConfig(**{"count": 4, **experts})  # type: ignore[arg-type]
    return ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, ffn_size=24, experts=chosen)


def mixture(config: ModelConfig) -> Mixture:
    found = build(config, 1).blocks["1"].feed_forward
    assert isinstance(found, Mixture)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(5)  # far from even choices
    return found


def by_token(mixture: Mixture, x: Tensor) -> Tensor:
    """The same, one token and expert after the other."""
    gates, chosen = mixture.router(x).softmax(-1).topk(mixture.config.per_token)
    if mixture.config.normalize:
        gates = gates / gates.sum(-1, keepdim=True)
    gate, up, down = (mixture.experts.get_submodule(n).get_parameter("weight") for n in ("w_gate", "w_up", "w_down"))
    rows = []
    for token, weights, numbers in zip(x.flatten(0, 1), gates.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        said = [down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token)) for e in numbers]
        rows.append(sum(w * y for w, y in zip(weights, said, strict=True)))
    return torch.stack(rows).view_as(x)  # type: ignore[arg-type]


@pytest.mark.parametrize(("per_token", "normalize"), [(1, False), (2, True), (2, False), (4, True)])
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts(per_token: int, normalize: bool) -> None:
    mixed = mixture(shape(per_token=per_token, normalize=normalize))
    x = torch.randn(2, 9, 16, requires_grad=True)
    out, wanted = mixed(x, Documents(None, "dense")), by_token(mixed, x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    inputs, direction = [x, *mixed.parameters()], torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, direction), torch.autograd.grad(wanted, inputs, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_experts_that_nobody_chose_get_zero_gradients() -> None:
    mixed = mixture(shape(per_token=1))
    with torch.no_grad():
        mixed.router.weight.zero_()
        mixed.router.weight[2] = 1.0
    mixed(torch.rand(1, 5, 16), Documents(None, "dense")).sum().backward()
    grad = mixed.experts.w_gate.weight.grad
    assert grad is not None
    assert grad[2].abs().sum() > 0
    assert grad[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("padded", [False, True])
def test_side_losses_are_their_formulas_over_tokens_that_are_not_padding(padded: bool) -> None:
    """Their gradient is that of the formulas times the share of a token, whatever becomes of the output."""
    config = shape(balance_loss=0.3, z_loss=0.1)
    mixed, x = mixture(config), torch.randn(2, 6, 16, requires_grad=True)
    ids = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, -1, -1] if padded else [0] * 6])
    mixed.sides = SideLosses(4, torch.device("cpu"))
    mixed.sides.share.fill_(0.25)
    out = mixed(x, arrange(ids, x.device, x.dtype))
    inputs = [x, *mixed.parameters(), mixed.sides.counter]
    *ours, counts = torch.autograd.grad(out, inputs, torch.zeros_like(out), allow_unused=True)

    total, balances = torch.zeros(()), []
    for row, here in zip(x, ids >= 0, strict=True):
        logits = mixed.router(row[here])
        p = logits.softmax(-1)
        shares = torch.bincount(p.topk(2).indices.flatten(), minlength=4) / (2 * len(p))
        balances.append(len(p) * 4 * (shares * p.mean(0)).sum())
        total = total + 0.3 * balances[-1] + 0.1 * logits.logsumexp(-1).square().sum()
    wanted = torch.autograd.grad(0.25 * total, inputs[:-1], allow_unused=True)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-6)
    assert counts[:4].sum() == 2 * (ids >= 0).sum()
    assert counts[4] == pytest.approx(float(sum(b.detach() for b in balances)), rel=1e-5)
    assert counts[6] == (ids >= 0).sum()


def test_counts_add_up_over_backwards_until_they_are_cleared() -> None:
    mixed, x = mixture(shape()), torch.randn(1, 5, 16)
    mixed.sides = SideLosses(4, torch.device("cpu"))
    with torch.no_grad():
        mixed(x, Documents(None, "dense"))
    for _ in range(2):
        mixed(x, Documents(None, "dense")).sum().backward()
    assert mixed.sides.counts[6] == 10
    mixed.sides.clear()
    assert mixed.sides.counts.sum() == 0


def test_groups_without_rows_have_no_part_in_a_grouped_product() -> None:
    x, weight = torch.randn(5, 8), torch.randn(4, 3, 8)
    out = grouped_product(x, weight, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(out, torch.cat([x[:2] @ weight[1].t(), x[2:] @ weight[3].t()]))


def test_counts_of_parameters_tell_all_experts_from_those_that_a_token_meets() -> None:
    config = shape(per_token=1)
    model = Transformer(config)
    assert config.num_parameters == sum(p.numel() for p in model.parameters())
    one = 3 * 16 * 24
    assert config.feed_forward_parameters == 4 * one + 4 * 16
    assert config.active_feed_forward_parameters == one + 4 * 16
    assert config.active_parameters == config.num_parameters - 2 * 3 * one
    dense = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
    assert config.matmul_parameters == dense.matmul_parameters + 2 * 4 * 16


@pytest.mark.parametrize(
    ("experts", "message"),
    [({"count": 1}, "at least 2"), ({"per_token": 5}, "count 4"), ({"balance_loss": float("nan")}, "balance_loss")],
)
def test_impossible_experts_are_refused(experts: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(**experts)


@pytest.mark.proof
def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(shape(), 1)
    tokens = torch.randint(64, (2, 8))
    wanted = model(tokens)
    for block in model.blocks.values():
        block.compile(fullgraph=True)
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-4, atol=1e-5)
