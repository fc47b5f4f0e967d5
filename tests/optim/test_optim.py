"""Groups, schedules, Muon, clipping."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from internlm.compat import groups
from internlm.errors import ConfigError
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.transformer import build
from internlm.optim import Group, muon
from internlm.optim.adamw import AdamW
from internlm.optim.muon import Muon, orthogonalise
from internlm.optim.optimizer import AdamWConfig, MuonConfig, Optimizer, role, scale_to_norm, squared_norm
from internlm.optim.schedule import ScheduleConfig, rate

SHAPE = ModelConfig(vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, ffn_size=24, qkv_bias=True)
MIXED = replace(SHAPE, experts=ExpertsConfig(count=3))
both_shapes = pytest.mark.parametrize("shape", [SHAPE, MIXED], ids=["dense", "experts"])


@both_shapes
def test_only_matrices_inside_blocks_decay(shape: ModelConfig) -> None:
    model = build(shape, 0)
    optimizer = Optimizer(AdamWConfig(weight_decay=0.3, table_lr_ratio=2.0, lr=1e-3), model.named_parameters())
    seen = {}
    for group in optimizer.parts[0].groups:
        for p in group.parameters:
            seen[optimizer.names[p]] = (group.weight_decay, group.lr)
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
    names = [optimizer.names[p] for part in optimizer.parts for g in part.groups for p in g.parameters]
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
    optimizer = Muon([Group([p], 1.0)])
    p.grad = torch.randn(64, 64)
    optimizer.step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)  # RMS of an AdamW update


def test_muon_is_the_published_update() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 10))
    wanted, momentum = weight.detach().clone(), torch.zeros(6, 10)
    optimizer = Muon([Group([weight], 0.1, 0.2)], momentum=0.9)
    for _ in range(3):
        weight.grad = torch.randn(6, 10)
        momentum = 0.9 * momentum + weight.grad
        factor = orthogonalise((0.9 * momentum + weight.grad)[None])[0]
        wanted = wanted - 0.1 * (0.2 * 10**0.5 * factor + 0.2 * wanted)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), wanted)


@both_shapes
def test_muon_takes_matrices_and_adamw_the_rest(shape: ModelConfig) -> None:
    model = build(shape, 0)
    optimizer = Optimizer(MuonConfig(weight_decay=0.3), model.named_parameters())
    first, second = optimizer.parts
    assert isinstance(first, Muon)
    assert {group.weight_decay for group in first.groups} == {0.3}
    taken = {optimizer.names[p] for g in first.groups for p in g.parameters}
    assert taken == {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim > 1}
    assert {role(optimizer.names[p], p) for g in second.groups for p in g.parameters} == {"table", "vector"}


def step_by_muon(parameters: list[torch.nn.Parameter], gradients: list[list[torch.Tensor]]) -> None:
    optimizer = Muon([Group([*parameters], 0.1, 0.5)])
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 8, 16), (4, 16, 8), (1, 8, 8)])
def test_muon_treats_each_matrix_of_a_stack_as_if_it_were_alone(shape: tuple[int, ...]) -> None:
    stack = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    gradients = [torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None, None] for _ in range(3)]
    step_by_muon([stack], [[gradient] for gradient in gradients])
    step_by_muon(alone, [list(gradient) for gradient in gradients])
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in alone]))


def test_muon_works_on_no_more_matrices_at_once_than_fit_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    start = [torch.randn(5, 8, 16), torch.randn(8, 16), torch.randn(5, 8, 16)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(2)]
    results, counts = [], []

    def counted(matrices: torch.Tensor) -> torch.Tensor:
        counts.append(len(matrices))
        return orthogonalise(matrices)

    monkeypatch.setattr(muon, "orthogonalise", counted)
    for batch in (1 << 27, 3 * 8 * 16, 1):
        monkeypatch.setattr(muon, "BATCH", batch)
        results.append([torch.nn.Parameter(p.clone()) for p in start])
        step_by_muon(results[-1], gradients)
    assert counts == [10, 1] * 2 + [3, 3, 3, 1, 1] * 2 + [1] * 22
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(found.detach(), wanted.detach())


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(AssertionError, match="only matrices"):
        Muon([Group([torch.nn.Parameter(torch.zeros(4))], 1.0)])


def test_only_axes_that_cut_matrices_make_ranks_exchange_them() -> None:
    groups.join_fake_group(0, 8)
    try:
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("shard", "tensor"))
        inner = groups.shard_inside(1, 4)
        found = {}
        for name, placements in {
            "whole experts": [Shard(0), Replicate()],
            "rows of some experts": [Shard(0), Shard(1)],
            "columns": [Replicate(), Shard(2)],
            "rows and columns": [Shard(1), Shard(2)],
            "rows twice": [inner, Shard(1)],
        }.items():
            local = torch.zeros(2, 3, 5)
            like = DTensor.from_local(local, mesh, placements, run_check=False, shape=(8, 20, 30), stride=(600, 30, 1))
            found[name] = [(cut.dim, cut.most, cut.ranks) for cut in muon._cuts(like)]
    finally:
        groups.leave_fake_group()
    assert found == {
        "whole experts": [],
        "rows of some experts": [(1, 5, 4)],
        "columns": [(2, 8, 4)],
        "rows and columns": [(1, 10, 2), (2, 8, 4)],
        "rows twice": [(1, 3, 2), (1, 5, 4)],
    }


@both_shapes
@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig(), AdamWConfig(state_dtype="int8")])
def test_state_before_the_first_step_has_the_names_and_shapes_of_later(config: AdamWConfig, shape: ModelConfig) -> None:
    model, other = build(shape, 0), build(shape, 0)
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


@pytest.mark.parametrize("limit", [0.0, float("inf"), 100.0])
def test_gradients_are_divided_though_they_are_not_clipped(limit: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 8.0)
    scale_to_norm([parameter], torch.tensor(3.5), limit, 4.0)
    assert parameter.grad.tolist() == [2.0] * 3


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


def test_the_fall_of_wsd_takes_its_share_of_the_whole_run() -> None:
    config = ScheduleConfig(kind="wsd", warmup_ratio=0.5, decay_ratio=0.2, final_ratio=0.0)
    assert [rate(config, step, 20) for step in range(14, 20)] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0])


def test_a_fall_that_would_begin_in_the_warm_up_is_an_error() -> None:
    ScheduleConfig(kind="wsd", warmup_ratio=0.7, decay_ratio=0.3)
    with pytest.raises(ConfigError, match=r"decay_ratio: begins before .* \(got 0\.5\); allowed: at most .* 0\.4"):
        ScheduleConfig(kind="wsd", warmup_ratio=0.6, decay_ratio=0.5)


def test_ratios_that_a_course_does_not_use_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ScheduleConfig(kind="linear", decay_ratio=0.123)
        ScheduleConfig(kind="constant", final_ratio=0.123)
    assert "schedule.decay_ratio has no effect with schedule.kind linear" in caplog.text
    assert "schedule.final_ratio has no effect with schedule.kind constant" in caplog.text


def test_a_ratio_outside_zero_to_one_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup_ratio"):
        ScheduleConfig(warmup_ratio=2000)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("eps", -1.0),
        ("eps", 0.0),
        ("weight_decay", math.inf),
        ("table_lr_ratio", -1.0),
        ("betas", (0.9, 1.0)),
        ("momentum", 2.0),
    ],
)
def test_a_number_that_no_optimizer_can_use_is_an_error(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.{key}"):
        MuonConfig(**{key: value})  # type: ignore[arg-type]


def test_adamw_is_torchs_bit_by_bit() -> None:
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (3,), (0, 4))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    reference = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.3, fused=True)
    optimizer = AdamW([Group([*ours], 0.04, 0.3)], (0.9, 0.95), 1e-6)
    for step in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = None if step == 1 and one is ours[0] else torch.randn_like(one)
        optimizer.step(0.5)
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        for slot, value in optimizer.state[one].items():
            assert torch.equal(value, reference.state[other][slot]), slot
