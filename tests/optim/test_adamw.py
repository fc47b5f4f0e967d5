"""Moments in two bytes or one: what is lost, what is kept, and that a run goes on bit by bit."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internlm import recipe as recipes
from internlm.checkpoint import store
from internlm.optim import Group, adamw
from internlm.optim.adamw import (
    BLOCK,
    AdamW,
    CompactAdamW,
    Rule,
    StateDtype,
    decode,
    encode,
    fractions,
    round_at_random,
)
from internlm.optim.muon import Muon
from internlm.optim.optimizer import AdamWConfig, MuonConfig, Optimizer
from internlm.recipe import Recipe
from internlm.train.trainer import Trainer

Make = Callable[..., Recipe]
COMPACT: list[StateDtype] = ["bfloat16", "int8"]


def test_rounding_at_random_keeps_the_mean_and_gives_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1 + 2**-7 * 0.25, -3.3, 1e-30, 0.0])
    rounded = torch.stack([round_at_random(x, generator).float() for _ in range(4000)])
    for value, column in zip(x, rounded.T, strict=True):
        assert len(column.unique()) <= 2
        assert (column - value).abs().max() <= 2**-7 * value.abs()
        assert column.mean() == pytest.approx(float(value), rel=2**-7 * 0.05)


def test_rounding_at_random_leaves_infinities_and_what_bf16_can_say() -> None:
    x = torch.tensor([float("inf"), -float("inf"), 1.5, -0.0, 2.0**-130])
    assert torch.equal(round_at_random(x, torch.Generator()).float(), x)


def test_rounding_at_random_hides_no_nan() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)  # the first is that of GPUs
    assert round_at_random(bits.view(torch.float32), torch.Generator()).isnan().all()


def test_each_step_rounds_with_noise_of_its_own() -> None:
    weight = nn.Parameter(torch.zeros(1000))
    weight.grad = torch.full((1000,), 1 + 2.0**-8)  # between two numbers of bf16
    optimizer = CompactAdamW([Group([weight], 0.0)], (0.0, 0.0), 1e-8, "bfloat16")
    optimizer.step()
    first = optimizer.state[weight]["exp_avg"].clone()
    optimizer.step()
    assert len(first.unique()) == 2
    assert not torch.equal(first, optimizer.state[weight]["exp_avg"])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_dense_near_zero_and_coding_again_changes_nothing(signed: bool) -> None:
    table, _ = fractions(signed, torch.device("cpu"))
    assert len(table.unique()) == 256
    assert table.max() == 1.0
    x = torch.randn(1000) * torch.logspace(-4, 2, 1000)
    x = x if signed else x.abs()
    codes, scales = encode(x, signed)
    assert (codes.dtype, len(codes), len(scales)) == (torch.uint8, 1000, 4)
    found = decode(codes, scales, signed)
    peaks = torch.stack([block.abs().max() for block in x.split(BLOCK)]).repeat_interleave(BLOCK)[:1000]
    near = x.abs() > 0.1 * peaks
    assert ((found - x).abs() / peaks)[near].max() <= (0.0071 if signed else 0.0036)  # half of 0.9 / 64, 0.9 / 128
    small = (x.abs() > 1e-3 * peaks) & ~near
    assert ((found - x) / x).abs()[small].max() <= (0.29 if signed else 0.15)  # in the third decade, 16 and 32 steps
    again = encode(found, signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    if not signed:
        through_squares = encode(found.square().sqrt(), signed)
        assert torch.equal(through_squares[0], codes)
        assert torch.equal(through_squares[1], scales)


def test_a_second_moment_that_is_not_zero_does_not_become_zero() -> None:
    codes, scales = encode(torch.tensor([1.0, 1e-12, 0.0]), signed=False)
    found = decode(codes, scales, signed=False)
    assert found[1] > 0
    assert found[2] == 0
    assert torch.equal(decode(*encode(torch.zeros(5), signed=True), signed=True), torch.zeros(5))


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_of_denormal_numbers_is_zero_and_one_of_the_smallest_normal_ones_is_not(signed: bool) -> None:
    x = torch.cat([torch.full((BLOCK,), 1e-40), torch.full((3,), torch.finfo(torch.float32).tiny)])
    codes, scales = encode(x, signed)
    found = decode(codes, scales, signed)
    assert (found[:BLOCK] == 0).all()
    assert torch.equal(found[BLOCK:], x[BLOCK:])
    again = encode(found, signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@pytest.mark.parametrize("signed", [True, False])
def test_coding_hides_no_nan(signed: bool) -> None:
    x = torch.ones(BLOCK + 1)
    x[3] = float("nan")
    found = decode(*encode(x, signed), signed)
    assert found[3].isnan()
    assert found[BLOCK] == 1


def test_the_update_is_that_of_torch() -> None:
    p = nn.Parameter(torch.randn(50))
    reference = nn.Parameter(p.detach().clone())
    theirs = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mean = square = torch.zeros(50)
    mean, square = mean.clone(), square.clone()
    for step in range(1, 6):
        grad = torch.randn(50)
        adamw.update(p.data, grad, mean, square, Rule(0.01, 0.9, 0.95, 1e-8, 0.1, step))
        reference.grad = grad
        theirs.step()
    torch.testing.assert_close(p.data, reference.data, rtol=1e-6, atol=1e-7)


@functools.cache
def minimise(state_dtype: StateDtype, betas: tuple[float, float]) -> float:
    """Return how far from its minimum a badly scaled quadratic in 4,096 unknowns is left, as a share of the start."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 64, generator=generator)
    curvature = torch.logspace(-3, 3, 64)[:, None]
    p = nn.Parameter(torch.zeros(64, 64))
    config = AdamWConfig(lr=0.03, betas=betas, weight_decay=0.0, state_dtype=state_dtype)
    optimizer = Optimizer(config, [("blocks.0.w.weight", p)])
    for step in range(400):
        p.grad = curvature * (p.detach() - target)
        optimizer.step(1 - step / 400)
    return float((p.detach() - target).square().mean() / target.square().mean())


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("state_dtype", COMPACT)
def test_a_quadratic_with_six_decades_of_curvature_is_minimised(
    state_dtype: StateDtype, betas: tuple[float, float]
) -> None:
    wanted = minimise("float32", betas)
    assert wanted < 2e-4
    assert minimise(state_dtype, betas) < 1.05 * wanted + 1e-9


def train(make: Make, state_dtype: StateDtype, **changes: Any) -> Trainer:
    """Train the tiny language model to the end, 40 steps."""
    optim = {"lr": 3e-3, "state_dtype": state_dtype}
    trainer = recipes.prepare(make(train__tokens=40 * 256, optim=optim, run=make().run + state_dtype, **changes))
    while trainer.progress.step < trainer.config.total_steps:
        trainer.stepper.step()
    return trainer


def test_a_language_model_ends_near_the_loss_of_float32_with_a_half_and_a_quarter_of_the_bytes(recipe: Make) -> None:
    losses, sizes = {}, {}
    for kind in ("float32", *COMPACT):
        trainer = train(recipe, kind)
        found = trainer.evaluator.evaluate(trainer.parallel, final=True)
        losses[kind] = found["valid/loss/held"]
        coded = {p for p in trainer.stepper.parameters if p.ndim > 1}
        sizes[kind] = sum(
            value.numel() * value.element_size()
            for part in trainer.stepper.optimizer.parts
            for p in coded & part.state.keys()
            for slot, value in part.state[p].items()
            if slot != "step"
        ) / sum(p.numel() for p in coded)
    print(losses, sizes)
    assert losses["float32"] < 3.5  # it has learnt something: ln 280 = 5.6
    for kind in COMPACT:
        assert losses[kind] == pytest.approx(losses["float32"], rel=0.001)
    assert (sizes["float32"], sizes["bfloat16"]) == (8, 4)
    assert sizes["int8"] == pytest.approx(2 * (1 + 4 / BLOCK), rel=1e-3)


@pytest.mark.parametrize("state_dtype", COMPACT)
def test_a_resumed_run_goes_on_bit_by_bit(state_dtype: StateDtype, recipe: Make) -> None:
    value = recipe(optim={"lr": 3e-3, "state_dtype": state_dtype})
    first = recipes.prepare(value)
    for _ in range(5):
        first.stepper.step()
    first.save()
    second = recipes.prepare(value)
    assert second.progress.step == 5
    for _ in range(4):
        assert first.stepper.step()["train/step_loss"] == second.stepper.step()["train/step_loss"]
    for name, p in first.model.named_parameters():
        assert torch.equal(p, second.model.get_parameter(name)), name
    wanted = second.stepper.optimizer.named_state()
    for name, state in first.stepper.optimizer.named_state().items():
        assert torch.equal(state, wanted[name]), name


def test_moments_are_continued_in_another_dtype(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe())
    for _ in range(5):
        trainer.stepper.step()
    trainer.save()
    wanted = trainer.stepper.optimizer.named_state()
    for kind in COMPACT:
        shutil.copytree(tmp_path / "run", tmp_path / kind)
        other = recipes.prepare(recipe(optim={"lr": 3e-3, "state_dtype": kind}, run=str(tmp_path / kind)))
        found = other.stepper.optimizer.named_state()
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            largest = max(float(wanted[name].abs().max()), 1e-30)
            assert (value.float() - wanted[name]).abs().max() / largest < 0.015, name
        other.stepper.step()
    checkpoint = store.open_checkpoint(tmp_path / "run")
    assert "optim.blocks.0.attention.wq.weight.exp_avg_sq" in checkpoint.index


def test_vectors_and_muon_keep_float32() -> None:
    parameters: dict[str, Tensor] = {
        "blocks.0.w.weight": nn.Parameter(torch.zeros(4, 4)),
        "blocks.0.norm.weight": nn.Parameter(torch.zeros(4)),
        "head.weight": nn.Parameter(torch.zeros(8, 4)),
    }
    optimizer = Optimizer(MuonConfig(state_dtype="int8"), parameters.items())  # type: ignore[arg-type]
    kinds = {name: type(part) for part in optimizer.parts for p in part.state for name in [optimizer.names[p]]}
    assert kinds["head.weight"] is CompactAdamW
    assert kinds["blocks.0.norm.weight"] is AdamW
    assert kinds["blocks.0.w.weight"] is Muon


@pytest.mark.parametrize("state_dtype", COMPACT)
def test_large_parameters_are_updated_in_slabs(state_dtype: StateDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for slab in (1 << 24, 2 * BLOCK):
        monkeypatch.setattr(adamw, "SLAB", slab)
        monkeypatch.setattr(adamw, "round_at_random", lambda x, generator: x.bfloat16())  # noise depends on slabs
        p = nn.Parameter(torch.linspace(-1, 1, 1500).view(30, 50))
        optimizer = Optimizer(AdamWConfig(state_dtype=state_dtype), [("blocks.0.w.weight", p)])
        for _ in range(3):
            p.grad = p.detach().sin()
            optimizer.step(1.0)
        saved = {name: value.clone() for name, value in optimizer.named_state().items()}
        if state_dtype == "int8":  # the others are loaded in place
            for value in optimizer.parts[0].state[p].values():
                value.zero_()
            optimizer.restore(saved)
        found = optimizer.named_state()
        results.append([p.detach(), found["blocks.0.w.weight.exp_avg"], found["blocks.0.w.weight.exp_avg_sq"]])
        assert torch.equal(results[-1][2], saved["blocks.0.w.weight.exp_avg_sq"])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("config", [AdamWConfig, MuonConfig])
@pytest.mark.parametrize("state_dtype", ["float32", *COMPACT])
def test_a_matrix_takes_the_bytes_that_a_run_is_refused_by(config: type[AdamWConfig], state_dtype: StateDtype) -> None:
    weight = nn.Parameter(torch.zeros(256, 256))
    made = config(state_dtype=state_dtype)
    optimizer = Optimizer(made, [("blocks.0.w.weight", weight)])
    weight.grad = torch.ones_like(weight)
    optimizer.step(1.0)
    (part,) = optimizer.parts
    held = sum(value.numel() * value.element_size() for value in part.state[weight].values())
    assert held / weight.numel() == pytest.approx(made.moment_bytes, rel=0.05), "int8 has scales besides"
