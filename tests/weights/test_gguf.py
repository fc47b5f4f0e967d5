"""GGUF files: read by the package gguf, computed in llama.cpp's form, and back; llama.cpp itself is in parity/."""

from __future__ import annotations

import logging
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internlm import storage
from internlm.errors import InternLMError, StorageError, UsageError, WeightsError
from internlm.model.config import (
    DynamicScaling,
    ExpertsConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from internlm.model.transformer import Transformer, build
from internlm.text.training import train_bpe
from internlm.weights.gguf import header
from internlm.weights.gguf import model as gguf
from internlm.weights.load import read_model, shapes
from internlm.weights.talk import Talk
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import of_tensors, tensors
from tests.models import Counted, random_model

library = pytest.importorskip("gguf")

SHAPE = ModelConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_size=24, qkv_bias=True,
    output_bias=True, context_length=64,
)  # fmt: skip
EXPERTS = ExpertsConfig(count=3, per_token=2)
LLAMA3 = RopeConfig(base=5e5, scaling=Llama3Scaling(factor=8.0, original_length=32))
YARN_TABLE = RopeConfig(scaling=YarnScaling(factor=4.0, original_length=16, beta_fast=2.0, attention_factor=1.25))


def export(model: Transformer, out: Path, talk: Talk = Talk(), **options: Any) -> Path:  # noqa: B008
    quantization = options.pop("quantization", None)
    chosen = ExportOptions(**options)
    gguf.export(of_tensors(model.named_parameters()), model.config, out, talk, chosen, quantization=quantization)
    (file,) = out.glob("*.gguf")
    return file


def stored(file: Path) -> dict[str, Tensor]:
    """Return every tensor of a file as the package gguf reads it."""
    found = {}
    for tensor in library.GGUFReader(file).tensors:
        array = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type.name == "BF16":
            array = array.view(torch.bfloat16)
        found[tensor.name] = array.reshape(tuple(tensor.shape.tolist()[::-1]))
    return found


def facts(file: Path) -> dict[str, Any]:
    """Return every field of a file as the package gguf reads it."""
    return {name: field.contents() for name, field in library.GGUFReader(file).fields.items()}


def row_there(row: int, head_dim: int) -> int:
    """Return where llama.cpp has a row of wq or wk: i and i + E/2 of a head are 2i and 2i + 1."""
    head, place = divmod(row, head_dim)
    half = head_dim // 2
    return head * head_dim + (2 * place if place < half else 2 * (place - half) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_every_tensor_is_in_the_file_bit_for_bit(
    dtype: torch.dtype, experts: ExpertsConfig | None, tmp_path: Path
) -> None:
    model = random_model(replace(SHAPE, experts=experts)).to(dtype)
    found = stored(export(model, tmp_path / "out"))
    parts = {
        "attention_norm": "attn_norm", "feed_forward_norm": "ffn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v",
        "wo": "attn_output", "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down", "router": "ffn_gate_inp",
        "embedding": "token_embd", "norm": "output_norm", "head": "output",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        *path, part, kind = name.split(".")
        theirs = f"blk.{path[1]}.{parts[part]}" if path else parts[part]
        tensor = found.pop(theirs + ("_exps" if "experts" in path else "") + f".{kind}")
        if part in ("wq", "wk"):
            tensor = tensor[[row_there(row, 6) for row in range(len(tensor))]]
        is_small = parameter.dim() == 1 or part == "router"
        assert tensor.dtype == (torch.float32 if is_small else dtype), name
        assert torch.equal(tensor, parameter.to(tensor.dtype)), name
    assert not found


def test_rows_keep_their_order_where_llama_cpp_rotates_as_we_do(tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, qk_norm=True, qkv_bias=False, output_bias=False))
    file = export(model, tmp_path / "out")
    assert facts(file)["general.architecture"] == "qwen3"
    found = stored(file)
    for ours, theirs in (("wq", "attn_q"), ("wk", "attn_k"), ("q_norm", "attn_q_norm"), ("k_norm", "attn_k_norm")):
        expected = model.get_parameter(f"blocks.1.attention.{ours}.weight")
        assert torch.equal(found[f"blk.1.{theirs}.weight"], expected)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Return [T, H, E] with each pair of neighbours turned, as llama.cpp's architecture `llama` does."""
    angles = torch.arange(len(x))[:, None, None] * turns  # [T, 1, E/2]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, -1).flatten(-2)


def logits_there(file: Path, ids: Tensor) -> Tensor:
    """Return logits [T, V] from what a file says alone, in llama.cpp's form."""
    t, say = stored(file), facts(file)
    say = {key.removeprefix("llama."): value for key, value in say.items()}
    heads, kv, width = (say[f"attention.{key}"] for key in ("head_count", "head_count_kv", "key_length"))
    turns = say["rope.freq_base"] ** (-torch.arange(0, width, 2) / width)
    turns = turns / t.get("rope_freqs.weight", 1.0) / say.get("rope.scaling.factor", 1.0)
    x = t["token_embd.weight"][ids]

    def normed(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], t[name], say["attention.layer_norm_rms_epsilon"])

    for block in (f"blk.{i}." for i in range(say["block_count"])):
        h = normed(x, block + "attn_norm.weight")
        q, k, v = (
            F.linear(h, t[f"{block}attn_{part}.weight"], t.get(f"{block}attn_{part}.bias")).unflatten(-1, (-1, width))
            for part in "qkv"
        )
        q, k = rotated(q, turns), rotated(k, turns)
        k, v = (part.repeat_interleave(heads // kv, 1) for part in (k, v))
        scores = torch.einsum("the,she->hts", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hts,she->the", scores.softmax(-1), v).flatten(1)
        x = x + F.linear(mixed, t[block + "attn_output.weight"], t.get(block + "attn_output.bias"))
        h = normed(x, block + "ffn_norm.weight")
        if "expert_count" not in say:
            gate, up, down = (t[f"{block}ffn_{part}.weight"] for part in ("gate", "up", "down"))
            x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
            continue
        shares, chosen = (h @ t[block + "ffn_gate_inp.weight"].T).softmax(-1).topk(say["expert_used_count"])
        gate, up, down = (t[f"{block}ffn_{part}_exps.weight"][chosen] for part in ("gate", "up", "down"))
        inner = F.silu(torch.einsum("tkfd,td->tkf", gate, h)) * torch.einsum("tkfd,td->tkf", up, h)
        x = x + torch.einsum("tk,tkdf,tkf->td", shares / shares.sum(-1, keepdim=True), down, inner)
    return normed(x, "output_norm.weight") @ t.get("output.weight", t["token_embd.weight"]).T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_bias": False},
        {"qkv_bias": False, "num_kv_heads": 4, "tie_embeddings": True},
        {"rope": LLAMA3, "head_dim": 16},
        {"rope": RopeConfig(scaling=LinearScaling(factor=4.0))},
        {"experts": EXPERTS},
    ],
)
def test_the_file_computes_our_logits_in_llama_cpps_form(changes: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, **changes))
    ids = torch.randint(50, (40,))
    with torch.inference_mode():
        expected = model.head.logits(model(ids[None]))[0]
    found = logits_there(export(model, tmp_path / "out"), ids)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "qkv_bias": False, "norm_eps": 1e-6, "context_length": 4096},
        {"experts": ExpertsConfig(count=3, per_token=2)},
        {"rope": LLAMA3},
        {"rope": RopeConfig(base=1.5e6, scaling=LinearScaling(factor=2.5))},
        {"rope": RopeConfig(scaling=YarnScaling(factor=4.0, original_length=16))},
        {"rope": YARN_TABLE},
        {"rope": RopeConfig(scaling=Llama3Scaling(factor=8.0, original_length=32, low_frequency_factor=2.0))},
        {"qk_norm": True, "qkv_bias": False, "output_bias": False},
        {"qk_norm": True, "qkv_bias": False, "output_bias": False, "experts": EXPERTS},
    ],
)
def test_a_file_is_read_back_as_the_same_model(changes: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, **changes))
    file = export(model, tmp_path / "out")
    assert gguf.is_one(file)
    assert gguf.is_one(tmp_path / "out")
    assert gguf.read_config(tmp_path / "out") == gguf.read_config(file) == model.config
    weights = gguf.open_weights(file)
    assert list(weights) == list(shapes(model.config))
    loaded = read_model(gguf.read_config(file), weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_an_own_attention_factor_of_yarn_comes_back(tmp_path: Path) -> None:
    scaling = YarnScaling(factor=4.0, original_length=16, attention_factor=1.5)
    config = gguf.read_config(export(random_model(replace(SHAPE, rope=RopeConfig(scaling=scaling))), tmp_path / "out"))
    assert isinstance(config.rope.scaling, YarnScaling)
    assert config.rope.scaling.attention_factor == pytest.approx(1.5)


def test_a_file_of_half_precision_is_one_dtype_when_read(tmp_path: Path) -> None:
    model = random_model(SHAPE).to(torch.bfloat16)
    weights = gguf.open_weights(export(model, tmp_path / "out"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for name, tensor in tensors(weights):
        assert torch.equal(tensor, model.get_parameter(name))


def test_norms_that_half_precision_cannot_hold_stay_as_they_are(tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, qkv_bias=True))
    weights = gguf.open_weights(export(model, tmp_path / "out", dtype=torch.float16))
    assert weights["head.weight"].dtype == torch.float16
    for name, tensor in tensors(weights):
        expected = model.get_parameter(name)
        assert torch.equal(tensor, expected if expected.dim() == 1 else expected.half()), name


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file it is")
def test_a_file_has_its_name_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        calls.append(("rename", Path(old).name))
        rename(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", renamed)
    export(random_model(SHAPE), tmp_path / "out")
    at = calls.index(("rename", "out-f32.unfinished"))
    assert ("sync", "out-f32.unfinished") in calls[:at]


def test_8_bit_rows_hold_a_scale_and_32_integers(tmp_path: Path) -> None:
    model = random_model(SHAPE)
    file = export(model, tmp_path / "out", quantization="q8_0")
    assert file.name == "out-q8_0.gguf"
    tensors_there = {tensor.name: tensor for tensor in library.GGUFReader(file).tensors}
    assert {t.tensor_type.name for t in tensors_there.values()} == {"F32", "F16", "Q8_0"}
    assert tensors_there["blk.0.ffn_down.weight"].tensor_type.name == "F16"  # rows of 24
    raw = torch.from_numpy(np.array(tensors_there["blk.1.ffn_up.weight"].data)).view(24, 34)
    scale, integers = raw[:, :2].contiguous().view(torch.float16).float(), raw[:, 2:].contiguous().view(torch.int8)
    expected = model.get_parameter("blocks.1.feed_forward.w_up.weight")
    assert ((scale * integers - expected).abs() <= scale * (0.5 + 127 / 2048)).all()  # the scale is rounded too
    read = gguf.open_weights(file)["blocks.1.feed_forward.w_up.weight"]
    assert read.dtype == torch.float32
    assert torch.equal(read.read(), scale * integers)
    wq = gguf.open_weights(file)["blocks.0.attention.wq.weight"].read()
    assert (wq - model.get_parameter("blocks.0.attention.wq.weight")).abs().max() < 0.01


def test_the_fields_say_what_the_model_is(tmp_path: Path) -> None:
    file = export(random_model(replace(SHAPE, experts=EXPERTS)), tmp_path / "name", dtype=torch.float16)
    assert file.name == "name-f16.gguf"
    said = facts(file)
    expected = {
        "general.architecture": "llama", "general.file_type": 1, "general.name": "name", "llama.vocab_size": 50,
        "llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 2,
        "llama.feed_forward_length": 24, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 6, "llama.attention.value_length": 6, "llama.rope.dimension_count": 6,
        "llama.rope.freq_base": 10000.0, "llama.expert_count": 3, "llama.expert_used_count": 2,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {key: said.get(key) for key in expected} == expected
    assert storage.read_manifest(tmp_path / "name", "export")["dtype"] == "f16"
    assert "`name-f16.gguf`" in (tmp_path / "name" / "README.md").read_text()


def test_an_export_holds_one_tensor_in_memory_not_the_model(tmp_path: Path) -> None:
    counted = Counted(SHAPE)
    gguf.export(counted.weights, SHAPE, tmp_path / "a")
    gguf.export(counted.weights, SHAPE, tmp_path / "b", quantization="q8_0")
    counted.assert_one_by_one()


def test_what_llama_cpp_does_not_have_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("internlm").propagate = True
    dynamic = RopeConfig(scaling=DynamicScaling(original_length=32))
    assert facts(export(random_model(replace(SHAPE, rope=dynamic)), tmp_path / "out"))["llama.context_length"] == 32
    assert "no dynamic NTK: the file gives 32 tokens" in caplog.text
    for changes, message in (
        ({"experts": replace(EXPERTS, normalize=False)}, r"experts\.normalize.*sum to 1"),
        ({"qk_norm": True}, r"model\.qkv_bias"),
        ({"qk_norm": True, "qkv_bias": False, "output_bias": False, "rope": LLAMA3}, r"model\.rope"),
    ):
        with pytest.raises(WeightsError, match=message):
            export(random_model(replace(SHAPE, **changes)), tmp_path / "no")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"cannot be written as it is.*float64.*float32, float16, bfloat16"):
        export(build(SHAPE, 0, dtype=torch.float64), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = random_model(SHAPE)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    with pytest.raises(WeightsError, match=r"output\.weight: is not finite as torch\.float16"):
        export(model, tmp_path / "out", dtype=torch.float16)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"head\.weight: is not finite"):
        export(model, tmp_path / "out", quantization="q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "start"), [("8 is 64.", 64), ("9 is not.", 96), ("7 is 63", 64)])
def test_tensors_begin_at_the_next_block_or_where_the_header_ends_at_one(name: str, start: int, tmp_path: Path) -> None:
    listed = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IQIQ", 1, 4, 0, 0)  # 4 numbers in fp32, at 0
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + listed
    (tmp_path / "a.gguf").write_bytes(head.ljust(start, b"\0") + struct.pack("<4f", 1, 2, 3, 4))
    assert header.read_header(tmp_path / "a.gguf").tensors[name].offset == start


def test_without_the_package_the_next_step_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SHAPE)
    plain, small = export(model, tmp_path / "a"), export(model, tmp_path / "b", quantization="q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"need the package gguf.*pip install .*\[gguf\]"):
        export(model, tmp_path / "out")
    assert torch.equal(gguf.open_weights(plain)["norm.weight"].read(), model.norm.weight)
    with pytest.raises(UsageError, match="need the package gguf"):
        gguf.open_weights(small)["head.weight"].read()


def test_an_interrupted_export_begins_again_and_a_complete_one_is_kept(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    model = random_model(SHAPE)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "out", resume="same", progress=stop)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.gguf"))
    export(model, tmp_path / "out", resume="same")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".gguf", ".md", ".json"}
    storage.verify(tmp_path / "out")
    with pytest.raises(StorageError, match="--force"):
        export(model, tmp_path / "out")
    export(model, tmp_path / "out", replace=True)


def test_a_damaged_file_is_explained_wherever_it_is_cut_or_changed(tmp_path: Path) -> None:
    model = replace(SHAPE, vocab_size=300, num_layers=1, rope=LLAMA3, head_dim=8, ffn_size=8)
    file = export(build(model, 0), tmp_path / "out", Talk(train_bpe(["a sum"], 270)))
    data, other = file.read_bytes(), tmp_path / "other.gguf"
    start = min(tensor.offset for tensor in header.read_header(file).tensors.values())
    generator, read, explained = np.random.default_rng(0), 0, []
    for size in [0, 3, 4, 10, *generator.integers(20, start, 40), start, len(data) // 2]:
        other.write_bytes(data[:size])
        with pytest.raises(WeightsError, match=r"other\.gguf"):
            gguf.open_weights(other)
    for at in generator.integers(4, start, 250):
        other.write_bytes(data[:at] + bytes([data[at] ^ int(generator.integers(1, 256))]) + data[at + 1 :])
        try:
            dict(tensors(gguf.open_weights(other)))
            read += 1
        except InternLMError as error:
            explained.append(str(error))
    assert len(explained) == 250 - read > 20
    assert all("other.gguf" in text for text in explained)
    with pytest.raises(WeightsError, match="No such file"):
        gguf.read_config(tmp_path / "nothing.gguf")
    assert not gguf.is_one(tmp_path / "nothing.gguf")
    other.rename(tmp_path / "other.txt")
    assert not gguf.is_one(tmp_path)
