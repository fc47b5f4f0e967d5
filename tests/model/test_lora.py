"""Low-rank adapters: exact forward and backward, targets by pattern, the same start everywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from internlm import config as recipes
from internlm.errors import ConfigError
from internlm.model import lora
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.layers import Linear
from internlm.model.lora import LoraConfig, LoraLinear, apply_lora, initialize_lora, lora_parameters, merge_lora
from internlm.model.transformer import Transformer, build, empty
from internlm.weights.load import shapes

SHAPE = ModelConfig(
    vocab_size=61, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=40, qkv_bias=True,
    output_bias=True,
)  # fmt: skip
KINDS = {
    "lora": LoraConfig(rank=3, alpha=5.0),
    "rslora": LoraConfig(rank=3, alpha=5.0, rank_stabilized=True),
    "dora": LoraConfig(rank=3, alpha=5.0, dora=True),
    "dora, rank-stabilised": LoraConfig(rank=3, alpha=5.0, dora=True, rank_stabilized=True),
}
IDS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(7))


def randomize(module: nn.Module, seed: int = 5) -> None:
    """Make adapters that change a lot, and biases that are there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("lora_magnitude"):
                parameter.mul_(1 + 0.3 * noise)
            elif name.endswith(("lora_a", "lora_b", "bias")):
                parameter.copy_(0.3 * noise)


def adapted(config: LoraConfig, model: ModelConfig = SHAPE, dtype: torch.dtype = torch.float32) -> Transformer:
    found = build(model, 1, dtype=dtype)
    apply_lora(found, config, dtype)
    initialize_lora(found, 2)
    randomize(found)
    return found


def layer(config: LoraConfig, rows: int = 9, columns: int = 7) -> LoraLinear:
    """Return one layer with a random adapter, in fp64."""
    base = Linear(columns, rows, bias=True).double()
    found = LoraLinear(base, config.update("x"), dora=config.dora, dropout=config.dropout, dtype=torch.float64)
    found.weight.requires_grad_(False)
    initialize_lora(found, 0)
    randomize(found)
    return found


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.head.logits(model(IDS))


def by_hand(found: LoraLinear, x: Tensor, scale: float, *, detach: bool = True) -> Tensor:
    """Return the output through the whole changed matrix."""
    weight = found.weight + scale * found.lora_b @ found.lora_a
    if found.lora_magnitude is not None:
        norms = weight.norm(dim=1, keepdim=True)
        weight = weight * (found.lora_magnitude[:, None] / (norms.detach() if detach else norms))
    return x @ weight.t() + found.bias


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_nothing_at_first(kind: str) -> None:
    model = build(SHAPE, 1)
    before = logits(model)
    apply_lora(model, KINDS[kind])
    initialize_lora(model, 2)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_changed_matrix(kind: str) -> None:
    config = KINDS[kind]
    found, scale = layer(config), 5 / math.sqrt(3) if config.rank_stabilized else 5 / 3
    x = torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *lora_parameters(found).values()]
    assert len(inputs) == 4 if config.dora else 3
    direction = torch.randn(4, 6, 9, dtype=torch.float64)
    expected = by_hand(found, x, scale)
    out = found(x)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert (out - (x @ found.weight.t() + found.bias)).abs().max() > 0.1, "no change would prove nothing"
    gradients = torch.autograd.grad((out * direction).sum(), inputs)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * direction).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_the_norm_of_dora_is_a_constant_in_backward() -> None:
    found = layer(KINDS["dora"])
    x = torch.randn(5, 7, dtype=torch.float64)
    ours = torch.autograd.grad(found(x).sum(), found.lora_b)[0]
    through = torch.autograd.grad(by_hand(found, x, 5 / 3, detach=False).sum(), found.lora_b)[0]
    assert (ours - through).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_says_the_same_and_is_a_plain_one(kind: str) -> None:
    model = adapted(KINDS[kind], dtype=torch.float64)
    expected = logits(model)
    assert (expected - logits(build(SHAPE, 1, dtype=torch.float64))).abs().max() > 0.1
    merge_lora(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)  # the head's logits are fp32
    plain = build(SHAPE, 1)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    model.double().head(model(IDS).double(), IDS).logp.sum().backward()
    assert model.get_parameter("blocks.0.attention.wq.weight").grad is not None


def test_merging_in_pieces_is_merging_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = layer(KINDS["dora"])
    x = torch.randn(3, 7, dtype=torch.float64)
    whole, out = found.merged(), found(x)
    monkeypatch.setattr(lora, "_CHUNK", 14)  # two rows
    torch.testing.assert_close(found.merged(), whole, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(found(x), out, atol=1e-13, rtol=1e-13)


def test_only_adapters_are_trained_and_weights_keep_their_names() -> None:
    model = adapted(KINDS["dora"])
    model.head(model(IDS), IDS).logp.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(lora_parameters(model))
    assert all(parameter.grad.abs().sum() > 0 for parameter in lora_parameters(model).values())  # type: ignore[union-attr]
    assert set(shapes(SHAPE)) == {name for name, _ in model.named_parameters()} - trained
    ends = ("lora_a", "lora_b", "lora_magnitude")
    assert trained == {f"{name}.{end}" for name in lora.linear_layers(SHAPE) for end in ends}


class Sizes(TorchDispatchMode):
    """Notes how many elements every result has."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        is_view = function in (torch.ops.aten.t.default, torch.ops.aten.detach.default)
        if isinstance(out, Tensor) and not is_view:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_no_step_makes_a_matrix_of_the_size_of_the_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_CHUNK", 200)
    found = layer(KINDS[kind], rows=100, columns=120)
    x = torch.randn(3, 120, dtype=torch.float64)
    with Sizes() as sizes:
        found(x).sum().backward()
    assert 300 <= sizes.largest < 1000, "A has 360 elements, the weight 12,000"
    with Sizes() as sizes:
        found.merged()
    assert sizes.largest == 12_000


def test_the_start_is_from_name_and_seed_alone_and_uniform() -> None:
    def start(targets: tuple[str, ...], seed: int) -> dict[str, Tensor]:
        model = build(SHAPE, 1)
        apply_lora(model, LoraConfig(rank=4, targets=targets))
        initialize_lora(model, seed)
        return dict(lora_parameters(model))

    everything, some, other = start(("all-linear",), 3), start(("wq", "w_up"), 3), start(("all-linear",), 4)
    assert len(some) == 12
    for name, parameter in some.items():
        assert torch.equal(parameter, everything[name])
        assert torch.equal(parameter, other[name]) == name.endswith("lora_b")
    assert not torch.equal(some["blocks.0.attention.wq.lora_a"], some["blocks.1.attention.wq.lora_a"])
    a = lora.initial("blocks.0.attention.wq.lora_a", torch.Size([64, 400]), 0)
    theirs = nn.init.kaiming_uniform_(torch.empty(64, 400), a=math.sqrt(5))
    assert 0.049 < a.abs().max() <= 1 / 20
    assert 0.049 < theirs.abs().max() <= 1 / 20
    assert a.std().item() == pytest.approx(theirs.std().item(), rel=0.02)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("blocks.*.attention.w[qv]",), {"attention.wq", "attention.wv"}),
        (("w_up", "wo"), {"feed_forward.w_up", "attention.wo"}),
        (("feed_forward.*",), {"feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down"}),
        (("wk", "w[kq]"), {"attention.wq", "attention.wk"}),
        (
            ("all-linear",),
            {
                "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w_gate",
                "feed_forward.w_up", "feed_forward.w_down",
            },
        ),
    ],
)  # fmt: skip
def test_targets_are_patterns_of_names(targets: tuple[str, ...], expected: set[str]) -> None:
    found = lora.updates(LoraConfig(targets=targets), SHAPE)
    assert set(found) == {f"blocks.{i}.{end}" for i in range(3) for end in expected}
    model = build(SHAPE, 1)
    apply_lora(model, LoraConfig(targets=targets))
    assert list(lora.lora_layers(model)) == list(found)


def test_one_layer_can_be_named() -> None:
    assert list(lora.updates(LoraConfig(targets=("blocks.1.attention.wq",)), SHAPE)) == ["blocks.1.attention.wq"]


def test_layers_can_have_their_own_rank_and_alpha() -> None:
    config = LoraConfig(
        rank=4, alpha=8.0, ranks={"blocks.1.attention.wq": 9, "wq": 2}, alphas={"feed_forward.*": 1.0}, dora=True
    )
    model = adapted(config)
    found = {name: (m.lora_a.shape[0], m.scale) for name, m in lora.lora_layers(model).items()}
    assert found["blocks.0.attention.wq"] == (2, 4.0)
    assert found["blocks.1.attention.wq"] == (9, 8 / 9), "the first pattern counts"
    assert found["blocks.0.attention.wk"] == (4, 2.0)
    assert found["blocks.2.feed_forward.w_up"] == (4, 0.25)
    stable = lora.updates(replace(config, rank_stabilized=True), SHAPE)
    assert stable["blocks.1.attention.wq"].scale == pytest.approx(8 / 3)


@pytest.mark.parametrize("target", ["embedding", "head", "*", "emb*"])
def test_tables_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: fits (embedding|head), which can have no adapter"):
        lora.updates(LoraConfig(targets=(target,)), SHAPE)


@pytest.mark.parametrize("target", ["all-linear", "w_gate", "router", "blocks.*.feed_forward.*"])
def test_experts_are_refused_by_name(target: str) -> None:
    mixture = replace(SHAPE, qkv_bias=False, output_bias=False, experts=ExpertsConfig(count=3))
    with pytest.raises(ConfigError, match=r"fits blocks\.0\.feed_forward\.(router|experts\.w_gate), which can have no"):
        lora.updates(LoraConfig(targets=(target,)), mixture)
    assert len(lora.updates(LoraConfig(targets=("blocks.*.attention.*",)), mixture)) == 12


def test_what_fits_nothing_is_answered_with_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: fits no linear layer.*w_up.*Did you mean 'w_down'"):
        lora.updates(LoraConfig(targets=("wq", "blocks.*.feed_forward.down")), SHAPE)
    with pytest.raises(ConfigError, match=r"lora\.ranks: fits none of the targets \(got 'w_up'\)"):
        lora.updates(LoraConfig(targets=("wq",), ranks={"w_up": 3}), SHAPE)
    with pytest.raises(ConfigError, match=r"lora\.alphas: fits none of the targets"):
        lora.updates(LoraConfig(targets=("wq",), alphas={"wk": 3.0}), SHAPE)


def test_a_recipe_can_say_it_all() -> None:
    tree = {
        "rank": 8, "alpha": "1e1", "dora": True, "targets": ["w[qv]"], "ranks": {"wq": 4}, "alphas": {"wv": 3},
        "rank_stabilized": True, "dropout": 0.1,
    }  # fmt: skip
    found = recipes.decode(LoraConfig, tree)
    assert found.update("blocks.0.attention.wq") == lora.Update(4, 10.0, 5.0)
    assert found.targets == ("w[qv]",)
    with pytest.raises(ConfigError, match="rank"):
        recipes.decode(LoraConfig, {"rnk": 8})


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"alpha": math.nan}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"dropout": -0.1}, "lora.dropout"),
        ({"targets": ()}, "lora.targets"),
        ({"ranks": {"wq": 0}}, "lora.ranks.wq"),
        ({"alphas": {"wq": -1.0}}, "lora.alphas.wq"),
    ],
)
def test_values_without_a_meaning_are_refused(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        LoraConfig(**changes)


def test_a_model_gets_adapters_once() -> None:
    model = adapted(KINDS["lora"])
    with pytest.raises(ConfigError, match="has adapters already"):
        apply_lora(model, KINDS["lora"])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_on_the_adapter_alone_and_in_training_alone(kind: str) -> None:
    config = replace(KINDS[kind], dropout=0.5)
    found = layer(config)
    x = torch.randn(2, 7, dtype=torch.float64)
    found.eval()
    assert torch.equal(found(x), found(x))
    torch.testing.assert_close(found(x), by_hand(found, x, 5 / 3), atol=1e-12, rtol=1e-12)
    found.train()
    mean = sum(found(x) for _ in range(4000)) / 4000
    assert not torch.equal(found(x), found(x))
    torch.testing.assert_close(mean, by_hand(found, x, 5 / 3), atol=0.15, rtol=0)
    with torch.no_grad():
        found.lora_b.zero_()
    assert torch.equal(found(x), found(x))


def test_a_model_without_memory_takes_adapters_too() -> None:
    model = empty(SHAPE)
    apply_lora(model, KINDS["dora"])
    assert all(parameter.is_meta for parameter in model.parameters())


def test_adapters_stay_in_fp32_beside_a_bf16_model() -> None:
    model = build(SHAPE, 1, dtype=torch.bfloat16)
    apply_lora(model, KINDS["dora"])
    initialize_lora(model, 2)
    randomize(model)
    hidden = model(IDS)
    assert hidden.dtype == torch.bfloat16
    exact = adapted(KINDS["dora"])(IDS)
    assert (hidden.float() - exact).abs().mean() < 0.02 * exact.abs().mean()
    hidden.float().square().sum().backward()
    for parameter in lora_parameters(model).values():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_under_autocast_norms_are_computed_in_full() -> None:
    model = adapted(KINDS["dora"])
    found = lora.lora_layers(model)["blocks.0.attention.wq"]
    expected = found.row_norms(found.weight, found.lora_a, found.lora_b)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).dtype == torch.bfloat16
        assert torch.equal(found.row_norms(found.weight, found.lora_a, found.lora_b), expected)
        assert found.merged().equal(found.merged())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["columns", "rows"])
def test_a_layer_can_be_cut_as_the_table_says(kind: str, cut: str) -> None:
    config = KINDS[kind]
    whole = layer(config, rows=8, columns=6)
    x = torch.randn(3, 6, dtype=torch.float64)
    parts = []
    for half in (0, 1):
        own = {
            "columns": {"weight": 0, "lora_b": 0, "lora_magnitude": 0, "bias": 0},
            "rows": {"weight": 1, "lora_a": 1},
        }[cut]
        part = layer(config, rows=4 if cut == "columns" else 8, columns=6 if cut == "columns" else 3)
        for name, parameter in whole.named_parameters():
            value = parameter.chunk(2, own[name])[half] if name in own else parameter
            setattr(part, name, nn.Parameter(value.detach().clone()))
        parts.append(part)
    if cut == "columns":
        out = torch.cat([part(x) for part in parts], -1)
    else:
        squares = whole.row_norms(whole.weight, whole.lora_a, whole.lora_b).square()
        sums = []
        for part, mine in zip(parts, x.chunk(2, -1), strict=True):
            seen: list[Tensor] = []
            part.total = lambda own, seen=seen: seen.append(own) or squares
            part.bias = None
            sums.append(part(mine))
            assert bool(seen) == config.dora
        assert not config.dora or torch.allclose(
            sum(part.row_norms(part.weight, part.lora_a, part.lora_b) for part in parts) / 2, squares.sqrt()
        )
        out = sum(sums) + whole.bias
    torch.testing.assert_close(out, whole(x), atol=1e-12, rtol=1e-12)


def test_a_row_of_zeros_stays_one() -> None:
    found = layer(KINDS["dora"])
    with torch.no_grad():
        for tensor in (found.weight[3], found.lora_b[3], found.lora_magnitude[3:4]):  # type: ignore[index]
            tensor.zero_()
    out = found(torch.ones(1, 7, dtype=torch.float64))
    assert out[0, 3] == found.bias[3]
    assert torch.equal(found.merged()[3], torch.zeros(7, dtype=torch.float64))
    out.sum().backward()
    assert found.lora_b.grad is not None
    assert found.lora_b.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_layer_compiles_as_one_graph(kind: str) -> None:
    found = layer(replace(KINDS[kind], dropout=0.5)).float().eval()
    x = torch.randn(2, 7)
    torch.testing.assert_close(torch.compile(found, backend="aot_eager", fullgraph=True)(x), found(x))


def test_products_in_other_precisions_leave_the_factors_alone() -> None:
    found = layer(KINDS["lora"])
    x = torch.randn(2, 7, dtype=torch.float64)
    expected = found(x)
    asked = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        asked.append(weight.shape)
        return F.linear(x, weight, bias)

    found.product = product  # type: ignore[method-assign]
    torch.testing.assert_close(found(x), expected)
    assert asked == [found.weight.shape]
