"""Groups, schedules, Muon, clipping."""

from __future__ import annotations

import math

import pytest
import torch

from internlm.errors import ConfigError
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.optim.muon import Muon, orthogonalise
from internlm.optim.optimizer import AdamWConfig, MuonConfig, Optimizer, role, scale_to_norm, squared_norm
from internlm.optim.schedule import ScheduleConfig, rate

SHAPE = ModelConfig(vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, ffn_size=24, qkv_bias=True)


def test_only_matrices_inside_blocks_decay() -> None:
    model = build(SHAPE, 0)
    optimizer = Optimizer(AdamWConfig(weight_decay=0.3, table_lr_ratio=2.0, lr=1e-3), model.named_parameters())
    seen = {}
    for group in optimizer.parts[0].param_groups:
        for p in group["params"]:
            seen[optimizer.names[p]] = (group["weight_decay"], group["peak_lr"])
    assert seen.keys() == dict(model.named_parameters()).keys()
    for name, (decay, lr) in seen.items():
        inside = name.startswith("blocks.") and name.endswith("weight") and "norm" not in name
        assert decay == (0.3 if inside else 0.0), name
        assert lr == (2e-3 if name in ("embedding.weight", "head.weight") else 1e-3), name


def test_a_tied_head_is_updated_once() -> None:
    model = build(
        ModelConfig(vocab_size=61, hidden_size=16, num_layers=1, num_heads=2, ffn_size=24, tie_embeddings=True), 0
    )
    optimizer = Optimizer(AdamWConfig(), model.named_parameters())
    names = [optimizer.names[p] for part in optimizer.parts for g in part.param_groups for p in g["params"]]
    assert len(names) == len(set(names))
    assert "head.weight" not in names


def test_adamw_is_the_published_update() -> None:
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = Optimizer(AdamWConfig(lr=0.1, weight_decay=0.5, betas=(0.9, 0.99)), [("blocks.0.w.weight", p)])
    m = v = torch.zeros(1, 2)
    w = p.detach().clone()
    for step in range(1, 4):
        p.grad = g = torch.tensor([[0.3, -0.1]]) * step
        optimizer.step(0.5)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w * (1 - 0.05 * 0.5) - 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), w)


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 16, 48), (2, 48, 16)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalise(x)
    values = torch.linalg.svdvals(y)
    assert values.max() < 1.3
    assert values.median() > 0.6
    # Its singular vectors are those of x: u' y v is diagonal.
    core = u.mT @ y @ vt.mT
    off = core - torch.diag_embed(torch.diagonal(core, dim1=1, dim2=2))
    assert off.abs().max() < 1e-6


def test_muon_moves_matrices_by_an_orthogonal_step_of_adamw_size() -> None:
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Muon([p], lr=1.0)
    p.grad = torch.randn(64, 64)
    optimizer.step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)  # RMS of an AdamW update


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    model = build(SHAPE, 0)
    optimizer = Optimizer(MuonConfig(), model.named_parameters())
    muon, adamw = optimizer.parts
    assert {role(optimizer.names[p], p) for g in muon.param_groups for p in g["params"]} == {"matrix"}
    assert {role(optimizer.names[p], p) for g in adamw.param_groups for p in g["params"]} == {"table", "vector"}


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig()])
def test_state_before_the_first_step_has_the_names_and_shapes_of_later(config: AdamWConfig) -> None:
    model, other = build(SHAPE, 0), build(SHAPE, 0)
    first, second = Optimizer(config, model.named_parameters()), Optimizer(config, other.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first.step(1.0)
    shapes = [{n: (v.shape, v.dtype) for n, v in o.named_state().items()} for o in (first, second)]
    assert shapes[0] == shapes[1]


def clip(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Clip as the trainer does, and return the norm before."""
    norm = squared_norm(parameters).sqrt()
    scale_to_norm(parameters, norm, limit)
    return norm


def test_clipping_uses_one_global_norm_and_reports_it_before() -> None:
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))
    a.grad, b.grad = torch.full((3,), 2.0), torch.full((2, 2), 1.0)
    norm = clip([a, b], 1.0)
    assert norm.item() == pytest.approx(4.0)
    total = math.sqrt(a.grad.square().sum() + b.grad.square().sum())
    assert total == pytest.approx(1.0, rel=1e-5)
    assert a.grad[0] / b.grad[0, 0] == pytest.approx(2.0)


def test_clipping_below_the_limit_and_with_limit_zero_changes_nothing() -> None:
    a = torch.nn.Parameter(torch.zeros(4))
    a.grad = torch.full((4,), 0.1)
    for limit in (1.0, 0.0):
        assert clip([a], limit).item() == pytest.approx(0.2)
        assert torch.equal(a.grad, torch.full((4,), 0.1))


def test_a_non_finite_norm_is_reported_and_leaves_gradients_alone() -> None:
    a = torch.nn.Parameter(torch.zeros(2))
    a.grad = torch.tensor([1.0, float("inf")])
    assert not clip([a], 1.0).isfinite()
    assert a.grad[0] == 1.0


def test_schedules_take_the_courses_they_draw() -> None:
    total = 100
    cosine = ScheduleConfig(kind="cosine", warmup_ratio=0.1, final_ratio=0.2)
    rates = [rate(cosine, s, total) for s in range(total)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[-1] == pytest.approx(0.2)
    assert rates[54] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)), abs=1e-9)
    linear = [rate(ScheduleConfig(kind="linear", warmup_ratio=0, final_ratio=0), s, total) for s in range(total)]
    assert linear == pytest.approx([1 - (s + 1) / 100 for s in range(total)])
    wsd = [
        rate(ScheduleConfig(kind="wsd", warmup_ratio=0, final_ratio=0, decay_ratio=0.25), s, total)
        for s in range(total)
    ]
    assert wsd[:75] == pytest.approx([1.0] * 75)
    assert wsd[75:] == pytest.approx([1 - (i + 1) / 25 for i in range(25)])
    assert {rate(ScheduleConfig(kind="constant", warmup_ratio=0), s, total) for s in range(total)} == {1.0}


def test_a_ratio_outside_zero_to_one_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup_ratio"):
        ScheduleConfig(warmup_ratio=2000)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("eps", -1.0),
        ("weight_decay", math.inf),
        ("table_lr_ratio", -1.0),
        ("betas", (0.9, 1.0)),
        ("momentum", 2.0),
    ],
)
def test_a_number_that_no_optimizer_can_use_is_an_error(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.{key}"):
        MuonConfig(**{key: value})  # type: ignore[arg-type]
