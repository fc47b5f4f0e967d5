"""The decoder: counts, start, attention inside documents, the chunked head."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from internlm.config import decode
from internlm.errors import ConfigError
from internlm.model import attention, heads
from internlm.model.config import InitConfig, ModelConfig
from internlm.model.heads import LanguageHead
from internlm.model.layers import Linear, RMSNorm
from internlm.model.presets import PRESETS, preset
from internlm.model.rope import Rope, rotate
from internlm.model.transformer import Transformer, build, init_std
from internlm.optim.optimizer import role


def toy(**changes: object) -> ModelConfig:
    shape = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 56}
    return decode(ModelConfig, shape | changes)


@pytest.mark.parametrize(
    ("name", "parameters", "context"),
    [
        ("internlm-7b", 7_321_948_160, 2048),
        ("internlm-7b-8k", 7_321_948_160, 8192),
        ("internlm-20b", 20_088_714_240, 4096),
        ("internlm2-1.8b", 1_889_110_016, 32768),
        ("internlm2-7b", 7_737_708_544, 32768),
        ("internlm3-8b", 8_804_241_408, 32768),
        ("llama2-7b", 6_738_415_616, 4096),
        ("llama3-8b", 8_030_261_248, 8192),
        ("mistral-7b", 7_241_732_096, 4096),
        ("qwen2.5-0.5b", 494_032_768, 32768),
        ("qwen2.5-7b", 7_615_616_512, 131072),
        ("qwen3-0.6b", 596_049_920, 40960),
        ("qwen3-4b", 4_022_468_096, 40960),
        ("qwen3-8b", 8_190_735_360, 40960),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int, context: int) -> None:
    config = decode(ModelConfig, preset(name))
    assert config.num_parameters == parameters
    assert config.context_length == context


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_model_that_is_built(name: str) -> None:
    config = decode(ModelConfig, PRESETS[name])
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n != "embedding.weight")
    matrices += config.embedding_parameters * config.tie_embeddings  # it is the head
    assert matrices == config.matmul_parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"num_kv_heads": 2, "qkv_bias": True},
        {"head_dim": 6},
        {"qk_norm": True, "head_dim": 6},
    ],
)
def test_counts_follow_the_switches(changes: dict[str, object]) -> None:
    config = toy(**changes)
    assert sum(p.numel() for p in build(config, 0).parameters()) == config.num_parameters


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_heads": 5}, "not divisible by num_heads 5"),
        ({"num_kv_heads": 3}, "not divisible by num_kv_heads 3"),
        ({"head_dim": 7}, "must be even"),
        ({"num_layers": 0}, r"model\.num_layers: must be at least 1 \(got 0\)"),
        ({"num_kv_heads": -2}, r"model\.num_kv_heads: must be finite and not negative \(got -2\)"),
        ({"head_dim": -4}, r"model\.head_dim: must be finite and not negative \(got -4\)"),
        ({"norm_eps": -1.0}, r"model\.norm_eps: must be finite and over 0 \(got -1\.0\)"),
        ({"norm_eps": math.nan}, r"model\.norm_eps: must be finite and over 0"),
        (
            {"head_dim": 2, "rope": {"scaling": {"kind": "dynamic", "original_length": 8}}},
            r"model\.head_dim: must be over 2 for dynamic scaling \(got 2\)",
        ),
    ],
)
def test_impossible_shapes_are_errors(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        toy(**changes)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_length": 8},
    "yarn": {"factor": 2.0, "original_length": 8, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.1},
    "llama3": {"factor": 2.0, "original_length": 8, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0},
}


@pytest.mark.parametrize("value", [0, -3.0, math.inf, math.nan])
def test_numbers_of_rotary_positions_that_make_no_sense_are_errors_of_the_recipe(value: float) -> None:
    """Each by the name of its field, on the way that a recipe and a config.json go."""
    for kind, numbers in SCALINGS.items():
        assert toy(rope={"scaling": {"kind": kind, **numbers}}).rope.scaling is not None
        for name in numbers:
            scaling = {"kind": kind, **numbers, name: value}
            with pytest.raises(ConfigError, match=rf"rope\.scaling\.({kind}\.)?{name}\b"):
                toy(rope={"scaling": scaling})
    for part, name in (("rope", "base"), ("init", "std"), ("init", "embedding_std")):
        if part == "rope" or value != 0:
            with pytest.raises(ConfigError, match=rf"model\.{part}\.{name}: must be finite"):
                toy(**{part: {name: value}})


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("yarn", {"beta_fast": 0.5}, r"scaling\.beta_fast: must not be under beta_slow 1\.0 \(got 0\.5\)"),
        ("llama3", {"low_frequency_factor": 4.0}, r"high_frequency_factor: must be over low_frequency_factor 4\.0"),
        ("llama3", {"low_frequency_factor": 5.0}, r"high_frequency_factor: must be over low_frequency_factor 5\.0"),
    ],
)
def test_limits_of_a_scaling_that_are_crossed_are_errors(kind: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        toy(rope={"scaling": {"kind": kind, **SCALINGS[kind], **changes}})


def test_the_start_depends_on_name_and_seed_alone() -> None:
    shallow, deep = build(toy(), 7), build(toy(num_layers=3, init={"residual": "layer"}), 7)
    other = build(toy(), 8)
    name = "blocks.1.attention.wq.weight"
    assert torch.equal(shallow.get_parameter(name), deep.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), shallow.get_parameter("blocks.1.attention.wk.weight"))


def test_the_start_has_the_spread_that_the_recipe_says() -> None:
    config = toy(
        hidden_size=256, num_layers=8, init={"std": 0.05, "embedding_std": 0.5, "residual": "layer"}, qkv_bias=True
    )
    model = build(config, 0)
    for name, parameter in model.named_parameters():
        wanted = init_std(config, name)
        if wanted is None:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
        else:
            assert parameter.std().item() == pytest.approx(wanted, rel=0.1), name
    assert init_std(config, "blocks.5.feed_forward.w_down.weight") == pytest.approx(0.05 / math.sqrt(12))
    assert init_std(toy(init=InitConfig(std=1.0).__dict__), "blocks.0.attention.wo.weight") == pytest.approx(0.5)


def test_norms_of_heads_start_at_one_and_are_never_decayed() -> None:
    model = build(toy(qk_norm=True, num_kv_heads=2), 0)
    for name in ("q_norm", "k_norm"):
        weight = model.get_parameter(f"blocks.1.attention.{name}.weight")
        assert torch.equal(weight, torch.ones(8))
        assert role(f"blocks.1.attention.{name}.weight", weight) == "vector"


def test_norms_of_heads_see_each_head_alone_before_it_is_turned() -> None:
    """A head's size makes no difference: the scores of one that is a hundred times larger are the same."""
    model = build(toy(qk_norm=True, norm_eps=1e-12), 0)
    tokens = torch.randint(0, 97, (2, 16))
    attention_part = model.blocks["0"].get_submodule("attention")
    seen: list[torch.Tensor] = []
    plain = attention_part.attend

    def attend(q, k, v, documents):  # type: ignore[no-untyped-def]
        seen.append(q)
        return plain(q, k, v, documents)

    attention_part.attend = attend
    with torch.no_grad():
        first = model(tokens)
        attention_part.wq.weight[8:16] *= 100.0  # the second head
        second = model(tokens)
    torch.testing.assert_close(first, second)
    assert seen[0].square().mean(-1).sub(1).abs().max() < 1e-4, "turning keeps the mean square of 1"


def test_a_fresh_internlm_has_the_loss_of_a_uniform_guess() -> None:
    config = decode(
        ModelConfig, preset("internlm-7b") | {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 128}
    )
    model = build(config, 0)
    tokens = torch.randint(0, config.vocab_size, (2, 33))
    with torch.no_grad():
        loss = -model.head(model(tokens[:, :-1]), tokens[:, 1:]).logp.mean()
    assert loss.item() == pytest.approx(math.log(103168), abs=0.01)


PATHS = ("auto", "blocks", "flex", "masked")
DOCUMENTS = torch.tensor([[0] * 16, [0] * 5 + [1] * 1 + [2] * 10, [0] * 5 + [1] * 1 + [2] * 10, [0] * 12 + [-1] * 4])


@pytest.mark.parametrize(("path", "kv"), list(itertools.product(PATHS, (4, 2))))
def test_packed_documents_give_what_they_give_alone(path: str, kv: int) -> None:
    model = build(toy(num_kv_heads=kv), 0, path=path)
    tokens = torch.randint(0, 97, DOCUMENTS.shape)
    positions = torch.zeros_like(tokens)
    for row, ids in enumerate(DOCUMENTS):
        for document in ids.unique():
            where = ids == document
            positions[row, where] = torch.arange(int(where.sum()))
    with torch.no_grad():
        packed = model(tokens, positions, DOCUMENTS)
    for row, ids in enumerate(DOCUMENTS):
        for document in ids.unique():
            where = ids == document
            with torch.no_grad():
                alone = model(tokens[row, where][None])
            torch.testing.assert_close(packed[row, where], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["auto", "blocks"])  # FlexAttention has no backward on CPUs
def test_gradients_are_equal_on_every_attention_path(path: str) -> None:
    tokens = torch.randint(0, 97, DOCUMENTS.shape)
    weights = torch.rand(*DOCUMENTS.shape, 32)
    grads = []
    for chosen in (path, "masked"):
        model = build(toy(num_kv_heads=2), 0, path=chosen)
        (model(tokens, None, DOCUMENTS) * weights).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("ids", [DOCUMENTS, None], ids=["documents", "one document a row"])
def test_a_stretch_of_queries_gives_what_it_gives_among_all(ids: torch.Tensor | None) -> None:
    q, k, v = (torch.randn(4, 16, count, 8) for count in (4, 2, 2))
    layout = attention.arrange(ids, torch.device("cpu"), torch.float32)
    whole = attention.attend(q, k, v, layout)
    for first in (0, 5, 11):
        part = attention.attend_from(q[:, first : first + 5], k, v, layout, first)
        torch.testing.assert_close(part, whole[:, first : first + 5])


def test_the_cost_on_the_cpu_grows_with_the_squares_of_the_documents() -> None:
    layout = attention.arrange(DOCUMENTS, torch.device("cpu"), torch.float32)
    assert layout.path == "blocks"
    assert layout.spans == (
        (0, 1, 0, 16), (1, 3, 0, 5), (1, 3, 5, 6), (1, 3, 6, 16), (3, 4, 0, 12), (3, 4, 12, 16),
    )  # fmt: skip
    assert attention.arrange(torch.zeros(3, 8), torch.device("cpu"), torch.float32).path == "dense"


def test_varlen_offsets_list_every_document_once_and_are_padded() -> None:
    starts = attention._starts(DOCUMENTS)
    assert starts.dtype == torch.int32
    assert starts.numel() == DOCUMENTS.numel() + 1
    assert starts[:10].tolist() == [0, 16, 21, 22, 32, 37, 38, 48, 60, 64]
    assert (starts[9:] == 64).all()


def test_later_tokens_never_change_earlier_ones() -> None:
    model = build(toy(), 0)
    tokens = torch.randint(0, 97, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 97
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.allclose(model(tokens)[:, 8:], model(changed)[:, 8:])


def test_rotations_depend_on_distance_alone() -> None:
    rope = Rope(toy().rope, 8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(a: int, b: int) -> torch.Tensor:
        at = [rotate(x, rope(torch.tensor([[p]]), torch.float32)) for x, p in ((q, a), (k, b))]
        return (at[0] * at[1]).sum()

    assert score(9, 4).item() == pytest.approx(score(105, 100).item(), abs=1e-4)
    assert score(9, 4).item() != pytest.approx(score(9, 5).item(), abs=1e-3)


def test_angles_are_exact_in_low_precision() -> None:
    rope = Rope(toy().rope, 8)
    at = rope(torch.tensor([[8191]]), torch.bfloat16)
    assert at.cos.dtype == torch.bfloat16
    assert at.cos[0, 0, 0, 0].item() == pytest.approx(math.cos(8191), abs=0.005)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_norm_divides_by_the_root_of_mean_square_and_eps(with_gradients: bool) -> None:
    norm = RMSNorm(48, eps=0.3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.3).sqrt() * norm.weight.double()
    with torch.set_grad_enabled(with_gradients):
        assert (norm(x) - wanted).abs().max() < 1e-6


def test_norm_statistics_are_fp32() -> None:
    norm = RMSNorm(64, eps=1e-5).bfloat16()
    x = (torch.randn(4, 64) * 1e-2).bfloat16()
    wanted = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(norm(x), wanted.bfloat16(), atol=0, rtol=0)


def test_the_fast_product_is_used_where_torch_has_it() -> None:
    layer = build(toy(), 0).blocks["0"].attention.wq
    assert layer.onednn == torch.backends.mkldnn.is_available()
    with torch.profiler.profile() as profile:
        layer(torch.randn(2, 32))
    assert any("mkldnn" in event.key for event in profile.key_averages()) == layer.onednn


@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients_are_those_of_torch(bias: bool) -> None:
    ours = Linear(24, 40, bias=bias)
    x = torch.randn(3, 5, 24, requires_grad=True)
    grad = torch.randn(3, 5, 40)
    inputs = [x, *ours.parameters()]
    got = torch.autograd.grad(ours(x), inputs, grad)
    wanted = torch.autograd.grad(F.linear(x, ours.weight, ours.bias), inputs, grad)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def head_case() -> tuple[LanguageHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    head = LanguageHead(16, 97)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(3, 11, 16, requires_grad=True)
    return head, hidden, torch.randint(0, 97, (3, 11)), torch.randn(3, 11)


@pytest.mark.parametrize("chunk", [97, 97 * 4, 1 << 22])
@pytest.mark.parametrize("foreseen", [True, False])
def test_the_head_equals_full_logits(monkeypatch: pytest.MonkeyPatch, chunk: int, foreseen: bool) -> None:
    monkeypatch.setattr(heads, "CHUNK_LOGITS", chunk)
    head, hidden, labels, coefficients = head_case()
    coefficients[0, :3] = 0.0
    logits = head.logits(hidden)
    logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    out = head(hidden, labels, coefficients if foreseen else None)
    kept = coefficients != 0
    torch.testing.assert_close(out.logp[kept], logp[kept])
    torch.testing.assert_close(out.logz[kept], logits.logsumexp(-1)[kept])
    assert torch.equal(out.correct[kept], (logits.argmax(-1) == labels)[kept])
    loss = out.weighted if foreseen else (coefficients * out.logp).sum()
    assert loss is not None
    got = torch.autograd.grad(3 * loss, [hidden, head.weight])
    wanted = torch.autograd.grad(3 * (coefficients * logp).sum(), [hidden, head.weight])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_gradient_through_logz_is_exact() -> None:
    head, hidden, labels, weights = head_case()
    got = torch.autograd.grad((weights * head(hidden, labels).logz.square()).sum(), [hidden, head.weight])
    wanted = torch.autograd.grad((weights * head.logits(hidden).logsumexp(-1).square()).sum(), [hidden, head.weight])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_second_backward_of_the_head_has_its_own_scale() -> None:
    """Pipelines that part the gradient of weights from that of inputs run it twice."""
    head, hidden, labels, coefficients = head_case()
    weighted = head(hidden, labels, coefficients).weighted
    assert weighted is not None

    def gradients(scale: float) -> list[torch.Tensor]:
        found = torch.autograd.grad(scale * weighted, [hidden, head.weight], retain_graph=True)
        return [gradient.clone() for gradient in found]

    for first, second in zip(gradients(2.0), gradients(3.0), strict=True):
        torch.testing.assert_close(second, 1.5 * first)


def test_the_head_never_holds_all_logits() -> None:
    """2,048 tokens and 16,000 ids are 131 MB of logits; the largest tensor the head makes is a chunk of 16 MiB."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    head = LanguageHead(8, 16000)
    torch.nn.init.normal_(head.weight, std=0.02)
    hidden = torch.randn(1, 2048, 8, requires_grad=True)
    labels = torch.randint(0, 16000, (1, 2048))
    for coefficients in (None, torch.ones(1, 2048)):
        with Largest() as largest:
            out = head(hidden, labels, coefficients)
            (out.logp.sum() if out.weighted is None else out.weighted).backward()
        assert largest.elements <= heads.CHUNK_LOGITS


def test_under_autocast_the_stream_and_all_that_attention_sees_are_in_its_dtype() -> None:
    """Else queries and keys are in fp32 beside values in bf16, and flash attention takes none of them."""
    model, seen = build(toy(), 0), []
    plain = attention.attend
    for block in model.blocks.values():
        block.register_forward_hook(lambda module, arguments, out: seen.append(out.dtype))
        block.attention.attend = lambda q, k, v, documents: (
            seen.extend(x.dtype for x in (q, k, v))
            or plain(  # type: ignore[union-attr]
                q, k, v, documents
            )
        )
    tokens = torch.randint(0, 97, (2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(tokens)
    assert set(seen) == {torch.bfloat16} == {hidden.dtype}
    torch.testing.assert_close(hidden.float(), build(toy(), 0)(tokens), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("foreseen", [True, False])
def test_the_head_under_autocast_multiplies_in_bf16_and_keeps_fp32_gradients(foreseen: bool) -> None:
    head, hidden, labels, coefficients = head_case()
    wanted = torch.autograd.grad((coefficients * head(hidden, labels).logp).sum(), [hidden, head.weight])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.profiler.profile() as profile:
        out = head(hidden, labels, coefficients if foreseen else None)
        loss = out.weighted if foreseen else (coefficients * out.logp).sum()
    assert loss is not None
    assert loss.dtype == out.logz.dtype == torch.float32
    got = torch.autograd.grad(loss, [hidden, head.weight])
    assert got[1].dtype == torch.float32
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() / b.norm() < 0.02
    assert not any("mkldnn::_linear" in event.key for event in profile.key_averages())  # the fp32 product


def test_the_head_keeps_fp32_sums_for_bf16_states() -> None:
    head = LanguageHead(64, 500)
    torch.nn.init.normal_(head.weight, std=0.1)
    hidden = torch.randn(1, 4096, 64).bfloat16()
    labels = torch.randint(0, 500, (1, 4096))
    exact = F.cross_entropy(hidden[0].float() @ head.weight.t(), labels[0], reduction="sum")
    weight = head.weight.data
    head.weight = torch.nn.Parameter(weight.bfloat16())
    out = head(hidden, labels, torch.full((1, 4096), -1.0))
    assert out.weighted is not None
    assert out.weighted.dtype == torch.float32
    assert out.weighted.item() == pytest.approx(exact.item(), rel=1e-3)
