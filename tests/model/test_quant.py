"""Packed linear layers: the same answers to what a kind rounds, rows that do not see each other, memory given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm import log
from internlm.compat import groups, kernels
from internlm.config import decode
from internlm.errors import EngineError
from internlm.model import quant
from internlm.model.config import ModelConfig
from internlm.model.lora import LoraConfig, apply_lora
from internlm.model.quant import KINDS, Kind, pack_head, pack_weight
from internlm.model.transformer import Transformer, build
from tests.models import pack
from tests.processes import forked

HAVE = {
    "split": lambda: True,
    "fp32": kernels.has_packed_onednn_linear,
    "fp16": kernels.has_fp16_linear,
    "bf16": kernels.has_bf16_linear,
    "int8": kernels.has_int8_linear,
}
TOLERANCE = {"split": 5e-6, "fp32": 5e-6, "fp16": 2e-3, "bf16": 2e-2, "int8": 4e-2}
"""Largest difference of logits, over the largest logit."""
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"vocab_size": 101, "hidden_size": 33, "num_heads": 3, "head_dim": 10, "ffn_size": 57},
    "biases": {"qkv_bias": True, "output_bias": True},
    "grouped": {"num_kv_heads": 2, "qkv_bias": True},
    "qk_norm": {"qk_norm": True, "head_dim": 6, "num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
}


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_warned", set())


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """A small model all of whose weights, norms and biases too, are random."""
    shape = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 56}
    made = build(decode(ModelConfig, shape | changes), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return made.to(dtype)


def logits(made: Transformer, length: int = 9) -> Tensor:
    ids = torch.randint(made.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return made.head.logits(made(ids))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def need(kind: str) -> None:
    if not HAVE[kind]():
        pytest.skip(f"no {kind} products on this machine")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_says_the_same_to_what_its_kind_rounds(name: str, kind: Kind) -> None:
    made = model(**CONFIGS[name])
    wanted = logits(made)
    pack(made, kind)
    got = logits(made)
    assert distance(got, wanted) < TOLERANCE[kind]
    if kind in ("fp16", "bf16", "int8") and HAVE[kind]():
        assert not torch.equal(got, wanted), "nothing was rounded: was it packed?"


def test_every_product_is_packed_and_only_embedding_and_norms_stay_parameters() -> None:
    made = model(qk_norm=True, qkv_bias=True, output_bias=True, tie_embeddings=True)
    pack(made, "fp32")
    names = {name for name, _ in made.named_parameters()}
    assert "embedding.weight" in names
    assert all("norm" in name for name in names - {"embedding.weight"})
    packed = [module for module in made.modules() if isinstance(module, quant.PackedLinear)]
    assert len(packed) == made.config.num_layers * 4 + 1
    assert not any(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_of_bf16_weights_computes_in_fp32(kind: Kind) -> None:
    made = model(dtype=torch.bfloat16, tie_embeddings=True)
    wide = model(dtype=torch.bfloat16, tie_embeddings=True).float()
    wide.tie()
    pack(made, kind)
    got = logits(made)
    assert got.dtype == torch.float32
    assert distance(got, logits(wide)) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(56, 32), (33, 65), (1, 7), (300, 1030)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_bitwise_the_same_alone_and_in_any_batch(kind: Kind, outputs: int, inputs: int, threads: int) -> None:
    need(kind)
    if kind == "fp16" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("fbgemm's kernels of one and two rows sum in another order there: see the test below")
    torch.manual_seed(0)
    layer = pack_weight(torch.randn(outputs, inputs), torch.randn(outputs), kind)
    rows = torch.randn(150, inputs) * torch.logspace(-3, 3, 150)[:, None]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([layer(row[None]) for row in rows])
        for count in (2, 3, 4, 5, 7, 8, 13, 16, 17, 32, 64, 65, 128, 150):
            assert torch.equal(layer(rows[-count:]), alone[-count:]), f"{count} rows"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["split", "fp32", "fp16"])
@pytest.mark.parametrize("outputs", [300, 301, 256, 1])
def test_rows_differ_between_batches_by_the_order_of_sums_at_most(kind: Kind, outputs: int) -> None:
    need(kind)
    torch.manual_seed(0)
    weight, rows = torch.randn(outputs, 1030), torch.randn(64, 1030)
    if kind == "fp16":  # which they are then without rounding
        weight = weight.half().float()
    layer = pack_weight(weight, None, kind)
    assert layer(rows[:0]).shape == (0, outputs)
    alone = torch.cat([layer(row[None]) for row in rows])
    exact = rows.double() @ weight.double().t()
    for count in (2, 3, 4, 7, 14, 16, 64):
        assert distance(layer(rows[:count]), alone[:count]) < 2e-6
    assert distance(layer(rows).double(), exact) < 2e-6


def test_int8_rounds_weights_only_even_where_activations_have_outliers() -> None:
    need("int8")
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 70), torch.randn(40)
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    x = torch.randn(3, 5, 70)
    layer = pack_weight(weight, bias, "int8")
    assert distance(layer(x), x @ rounded.t() + bias) < 2e-4
    x[..., 3] = 100  # 14 bits of the largest still leave 6 bits to the others
    by_row = layer(x) - (x @ rounded.t() + bias)
    assert by_row.abs().max() < 100 / 8127 * 0.5 * rounded.abs().sum(1).max()
    assert by_row.std() < 0.1, "8 bits of activations would be off by 1.9 here"


def test_int8_rounds_activations_to_the_nearest_of_their_steps() -> None:
    need("int8")
    x = torch.randn(5, 64)
    step = x.abs().amax(1, keepdim=True) / 8127
    off = (pack_weight(torch.eye(64), None, "int8")(x) - x) / step  # the weights are exact
    assert off.abs().max() < 0.52


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_leaves_the_others_alone(kind: Kind) -> None:
    need(kind)
    torch.manual_seed(0)
    layer = pack_weight(torch.randn(24, 40), torch.randn(24), kind)
    x = torch.randn(4, 40)
    wanted = layer(x)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    got = layer(x)
    assert torch.equal(got[[0, 3]], wanted[[0, 3]])
    assert not got[1].isfinite().any()
    assert not got[2].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_weights_of_zeros_give_the_bias(kind: Kind) -> None:
    need(kind)
    weight, bias = torch.randn(6, 8), torch.randn(6)
    weight[2] = 0
    layer = pack_weight(weight, bias, kind)
    assert torch.equal(layer(torch.zeros(2, 8)), bias.expand(2, -1))
    assert torch.equal(layer(torch.randn(3, 8))[:, 2], bias[2].expand(3))


def test_weights_beyond_fp16_stay_in_fp32_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    need("fp16")
    made = model()
    with torch.no_grad():
        made.blocks["1"].feed_forward.w_down.weight[0, 0] = 70000.0  # type: ignore[union-attr,operator,index]
    wanted = logits(made)
    pack(made, "fp16")
    kinds = {name: type(m) for name, m in made.named_modules() if isinstance(m, quant.PackedLinear)}
    assert kinds.pop("blocks.1.feed_forward.w_down") is not quant.Fp16Linear
    assert set(kinds.values()) == {quant.Fp16Linear}
    assert distance(logits(made), wanted) < TOLERANCE["fp16"]
    assert "do not fit into fp16" in caplog.text


def test_int8_weights_that_are_not_finite_stay_in_fp32() -> None:
    need("int8")
    weight = torch.randn(5, 6)
    weight[1, 1] = float("nan")
    out = pack_weight(weight, None, "int8")(torch.ones(1, 6))
    assert out.isnan().tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_machine_without_the_kernels_gets_plain_products_and_a_warning_where_that_is_no_equal(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("has_packed_onednn_linear", "has_fp16_linear", "has_bf16_linear", "has_int8_linear"):
        monkeypatch.setattr(kernels, name, lambda: False)
    made = model(tie_embeddings=True)
    wanted = logits(made)
    pack(made, kind)
    assert distance(logits(made), wanted) < TOLERANCE["fp32"]
    # Plain fp32 products are what packed ones are: there is nothing to warn of.
    warnings = {"split": 0, "fp32": 0, "fp16": 1, "bf16": 2, "int8": 2}[kind]
    assert caplog.text.count("missing on this machine") == warnings


@pytest.mark.parametrize("kernel", ["fp16_linear", "bf16_linear", "int8_linear"])
def test_a_kernel_that_fails_or_overflows_counts_as_missing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no such engine")

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    has, works = getattr(kernels, f"has_{kernel}").__wrapped__, getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, fails)
    assert not has()
    monkeypatch.setattr(kernels, kernel, lambda *given: works(*given) + 1)
    assert not has()


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_experts_stay_as_they_are_with_a_warning_where_rounding_was_asked_for(
    kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    need(kind)
    made = model(experts={"count": 4}, dtype=torch.bfloat16)
    wide = model(experts={"count": 4}, dtype=torch.bfloat16).float()
    pack(made, kind)
    assert ("experts are not packed" in caplog.text) == (kind != "fp32")
    assert distance(logits(made), logits(wide)) < TOLERANCE[kind]


def test_what_cannot_be_packed_is_refused_and_left_as_it_was() -> None:
    config = model().config
    with torch.device("meta"):
        empty = Transformer(config)
    with pytest.raises(EngineError, match=r"attention\.wq: .*for the CPU \(got 'meta'\)\. Load"):
        pack(empty, "fp32")
    far = model()
    with groups.fake_tensors():
        weight = torch.nn.Parameter(torch.empty(32, 32, device="cuda"))
    far.blocks["1"].attention.wq.weight = weight  # type: ignore[union-attr]
    with pytest.raises(EngineError, match=r"for the CPU \(got 'cuda'\)"):
        pack(far, "fp16")
    assert not any(isinstance(module, quant.PackedLinear) for module in far.blocks["1"].modules())
    adapted = model()
    apply_lora(adapted, LoraConfig(targets=("w_down",)))
    with pytest.raises(EngineError, match=r"feed_forward\.w_down: .*LoraLinear.*Merge"):
        pack(adapted, "int8")
    assert not any(isinstance(module, quant.PackedLinear) for module in adapted.modules())
    made = model()
    with pytest.raises(EngineError, match="allowed: split, fp32, fp16, bf16, int8"):
        pack(made, "int4")  # type: ignore[arg-type]
    pack(made, "fp32")
    for again in (lambda: pack(made, "fp32"), lambda: pack_head(made.head, "fp32")):
        with pytest.raises(EngineError, match="packed already"):
            again()
    with pytest.raises(AssertionError, match="logits only"):
        made.head(torch.zeros(1, 1, 32), torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_let_go(kind: Kind) -> None:
    made = model()
    kept = [weakref.ref(p) for n, p in made.named_parameters() if n.endswith("weight") and p.ndim == 2]
    assert len(kept) == 1 + 2 * 7 + 1
    pack(made, kind)
    assert [ref() is not None for ref in kept].count(True) == 1  # the embedding


_WEIGH = """
import json, torch
from internlm.compat import groups, kernels
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from tests.models import pack

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_num_threads(1)
for name in ("packed_onednn", "fp16", "bf16", "int8"):
    getattr(kernels, f"has_{name}_linear")()
config = ModelConfig(vocab_size=2048, hidden_size=1024, num_layers=2, num_heads=8, ffn_size=2048)
ids = torch.zeros(1, 4, dtype=torch.long)
changes = {}
for kind in ("fp32", "fp32", "fp16", "bf16", "int8"):  # the first time is not counted: it loads libraries
    model = build(config, 0)
    before = held()
    pack(model, kind)
    with torch.inference_mode():
        model.head.logits(model(ids))
    changes[kind] = (held() - before) / (4 * config.matmul_parameters)
    del model
print(json.dumps(changes))
"""


@pytest.mark.proof  # of a model that is read, `tests/weights` always asks it
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_packed_model_takes_the_memory_of_its_packed_weights() -> None:
    # Large blocks then go back to the system at once, and what is held is what is used.
    environment = os.environ | {"GLIBC_TUNABLES": "", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", _WEIGH], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    changes = json.loads(ran.stdout)
    for kind, share in (("fp32", 1.0), ("fp16", 0.5), ("bf16", 0.5), ("int8", 0.25)):
        if HAVE[kind]():
            assert share - 1 - 0.02 < changes[kind] < share - 1 + 0.06, changes


_EXACT = """
import ctypes, torch
from internlm.compat import groups, kernels
assert kernels.has_int8_linear()
weight = torch.randint(-127, 128, (70, 1030), generator=torch.Generator().manual_seed(0)).to(torch.int8)
weight[0], weight[1] = 127, -127
for rows in (1, 2, 5, 32):
    x = torch.randint(0, 128, (rows, 1030), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
    x[0] = 127
    got = kernels.int8_linear(x, kernels.pack_int8_linear(weight), torch.ones(70))
    assert torch.equal(got, ((x.long() - 64) @ weight.long().t()).float()), rows
ctypes.CDLL(None).fflush(None)
"""


def test_int8_sums_are_exact_without_vnni_too(tmp_path: Path) -> None:
    need("int8")
    (tmp_path / "exact.py").write_text(_EXACT)
    ran = forked(str(tmp_path / "exact.py"), ONEDNN_MAX_CPU_ISA="AVX2", ONEDNN_VERBOSE="1")
    assert ran.returncode == 0, ran.stderr
    assert "isa:Intel AVX2\n" in ran.stdout, "oneDNN had chosen its kernels before"
