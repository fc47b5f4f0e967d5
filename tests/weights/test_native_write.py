"""What is written for InternLM v0.2 is what it would have written itself, at every layout."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.errors import StorageError, WeightsError
from internlm.model.config import DynamicScaling, ExpertsConfig, ModelConfig, RopeConfig, YarnScaling
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import pickles
from internlm.weights.load import shapes
from internlm.weights.native import archive
from internlm.weights.native import read as native
from internlm.weights.native import write as native_write
from internlm.weights.native.write import Layout
from internlm.weights.talk import Talk
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import Weight, of_tensor, of_tensors, table, tensors
from tests.weights.old_layout import Old, write

BIASED = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=7, num_heads=8, ffn_size=256, qkv_bias=True, output_bias=True
)
PLAIN = replace(BIASED, qkv_bias=False, output_bias=False)
DYNAMIC = RopeConfig(base=5e5, scaling=DynamicScaling(original_length=512))
GROUPED = replace(PLAIN, num_kv_heads=4)


def random(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=source).to(dtype) for name, shape in shapes(config).items()}


def export(
    weights: dict[str, Tensor], config: ModelConfig, out: Path, layout: Layout | None = None, **options: Any
) -> Path:
    layout = layout or Layout()
    native_write.export(of_tensors(weights.items()), config, out, options=ExportOptions(**options), layout=layout)
    return out


def equal(ours: object, theirs: object) -> bool:
    """Equal values in equal order; tensors bit for bit."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(equal(ours[name], theirs[name]) for name in ours)
    return ours == theirs


LAYOUTS = [  # others with --proof
    pytest.param(tensor, pipeline, marks=[pytest.mark.proof] * ((tensor, pipeline) not in [(1, 1), (2, 2), (4, 3)]))
    for tensor in (1, 2, 4)
    for pipeline in (1, 2, 3)
]
DIALECTS = {"INTERNLM": BIASED, "LLAMA2": PLAIN, "grouped": GROUPED}


@pytest.mark.parametrize("config", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_files_equal_those_of_the_old_framework(
    tensor: int, pipeline: int, config: ModelConfig, tmp_path: Path
) -> None:
    weights = random(config)
    ours = export(weights, config, tmp_path / "ours", Layout(tensor, pipeline, step=7))
    dialect = "INTERNLM" if config.qkv_bias else "LLAMA2"
    old = Old(8, config.num_kv_heads, 7, dialect, tensor, pipeline)
    theirs = write(weights, old, tmp_path / "theirs")
    names = {file.name for file in theirs.glob("model_tp*")} | {file.name for file in theirs.glob("topo*")} | {"7.step"}
    assert names <= {file.name for file in ours.iterdir()}
    for name in names:
        if not name.startswith("topo") or dialect == "INTERNLM":  # the other dialect's module has another name
            content = [torch.load(folder / name, map_location="cpu") for folder in (ours, theirs)]
            assert equal(dict(content[0]), dict(content[1])), name
    stored, of_theirs = torch.load(ours / "model_config.pt"), pickles.load(theirs / "model_config.pt")
    assert type(stored) is dict
    for name in ("num_attention_heads", "hidden_size", "num_layers", "vocab_size", "embed_split_hidden", "dtype"):
        assert stored[name] == of_theirs[name]


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (BIASED, Layout()),
        (replace(BIASED, context_length=512), Layout(2, 2)),
        (replace(BIASED, rope=DYNAMIC, context_length=4096), Layout()),
        (replace(GROUPED, norm_eps=1e-6, context_length=300), Layout(4, 3)),
        (replace(GROUPED, qkv_bias=True, output_bias=True), Layout(2)),
    ],
)  # fmt: skip
def test_written_and_read_is_the_same_model(config: ModelConfig, layout: Layout, tmp_path: Path) -> None:
    weights = random(config)
    path = export(weights, config, tmp_path / "out", layout)
    assert native.is_one(path)
    assert native.open_checkpoint(path).config == config
    assert equal(dict(tensors(native.open_checkpoint(path).weights)), weights)


def test_biases_that_only_some_matrices_have_become_zeros(tmp_path: Path) -> None:
    config = replace(BIASED, output_bias=False)
    weights = random(config)
    found = dict(tensors(native.open_checkpoint(export(weights, config, tmp_path / "out")).weights))
    for name in shapes(BIASED):
        assert torch.equal(found[name], weights[name] if name in weights else torch.zeros(32).bfloat16())


def test_a_tied_head_is_written_as_a_copy(tmp_path: Path) -> None:
    config = replace(PLAIN, tie_embeddings=True)
    weights = random(config)
    found = dict(tensors(native.open_checkpoint(export(weights, config, tmp_path / "out")).weights))
    assert torch.equal(found["head.weight"], weights["embedding.weight"])


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"ffn_size": 48}, r"model\.ffn_size"),
        ({"head_dim": 6}, r"model\.head_dim"),
        ({"qk_norm": True}, r"model\.qk_norm"),
        ({"experts": ExpertsConfig(count=2)}, r"model\.experts"),
        ({"rope": RopeConfig(scaling=YarnScaling(factor=2.0, original_length=64))}, r"model\.rope\.scaling"),
        ({"rope": RopeConfig(scaling=DynamicScaling(original_length=64)), "num_kv_heads": 4}, r"model\.rope\.scaling"),
    ],
)
def test_what_v02_cannot_express_is_refused(changes: dict[str, Any], where: str, tmp_path: Path) -> None:
    config = replace(BIASED, **changes)
    with pytest.raises(WeightsError, match=where):
        export(random(config), config, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layout", [Layout(3), Layout(8), Layout(1, 8), Layout(0)])
def test_layouts_that_do_not_cut_evenly_are_refused(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be cut|must be at least 1"):
        export(random(GROUPED), GROUPED, tmp_path / "out", layout)


def test_v02_computes_the_size_of_the_feed_forward_from_the_ratio() -> None:
    for hidden, ffn in (
        (4096, 11008),
        (5120, 13824),
        (4096, 14336),
        (96, 256),
        (2048, 8192),
        (3072, 8192),
        (1000, 768),
    ):
        config = replace(PLAIN, hidden_size=hidden, ffn_size=ffn)
        ratio = native_write.fields.mlp_ratio(config)
        assert 256 * ((int(hidden * ratio) + 255) // 256) == ffn


def test_dtype_and_the_table(tmp_path: Path) -> None:
    weights = random(BIASED, torch.float32)
    options = ExportOptions(dtype=torch.float16)
    written = native_write.export(
        of_tensors(weights.items()), BIASED, tmp_path / "out", options=options, layout=Layout(2, 2)
    )
    lines = "\n".join(table(written))
    assert "tp[{i}]_pp[{i}] model.blocks.{i}.mlp.w3.weight" in lines
    assert lines.count("\n") < 20
    states = torch.load(tmp_path / "out" / "model_tp1_pp1.pt")
    assert {tensor.dtype for tensor in states.values()} == {torch.float16}
    assert torch.load(tmp_path / "out" / "model_config.pt")["dtype"] == torch.float16


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = random(BIASED, torch.float32)
    weights["norm.weight"][3] = 1e30
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: is not finite as torch\.float16"):
        export(weights, BIASED, tmp_path / "out", dtype=torch.float16)
    assert not any(tmp_path.iterdir())


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    weights = random(BIASED)
    lazy = of_tensors(weights.items())

    def broken() -> Tensor:
        raise StorageError("full")

    cut = {**lazy, "norm.weight": replace(lazy["norm.weight"], read=broken)}
    options = ExportOptions(resume="same")
    with pytest.raises(StorageError):
        native_write.export(cut, BIASED, tmp_path / "out", options=options, layout=Layout(1, 2))
    partial = next(tmp_path.iterdir())
    before = (partial / "model_tp0_pp0.pt").stat().st_mtime_ns
    native_write.export(lazy, BIASED, tmp_path / "out", options=options, layout=Layout(1, 2))
    assert (tmp_path / "out" / "model_tp0_pp0.pt").stat().st_mtime_ns == before
    assert equal(dict(tensors(native.open_checkpoint(tmp_path / "out").weights)), weights)


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive = most = 0

    class Counted(Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def counting(tensor: Tensor) -> Weight:
        def read() -> Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return tensor.as_subclass(Counted)

        return replace(of_tensor(tensor), read=read)

    archive.write(tmp_path / "a.pt", {str(n): counting(torch.randn(4, 4)) for n in range(9)})
    assert most <= 2  # one is replaced by the next
    assert len(torch.load(tmp_path / "a.pt")) == 9


def test_archives_are_whole_zip_files_with_aligned_storages(tmp_path: Path) -> None:
    tensors_ = {
        "a": torch.randn(3, 5),
        "b.c": torch.randn(7).half(),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(2.0),
    }
    archive.write(tmp_path / "a.pt", {name: of_tensor(tensor) for name, tensor in tensors_.items()})
    with zipfile.ZipFile(tmp_path / "a.pt") as zipped:
        assert zipped.testzip() is None
        for entry in zipped.infolist():
            with open(tmp_path / "a.pt", "rb") as file:
                file.seek(entry.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0
    for options in ({}, {"mmap": True}, {"weights_only": False}):
        assert equal(torch.load(tmp_path / "a.pt", **options), tensors_)
    with pytest.raises(WeightsError, match="int64"):
        archive.write(tmp_path / "b.pt", {"a": of_tensor(torch.zeros(2, dtype=torch.long))})


def test_the_tokenizer_is_written_along(tmp_path: Path) -> None:
    tokenizer = train_bpe(["alpha beta gamma"] * 50, 300)
    config = replace(BIASED, vocab_size=512)
    native_write.export(of_tensors(random(config).items()), config, tmp_path / "out", Talk(tokenizer))
    assert Tokenizer.load(tmp_path / "out") == tokenizer
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "export"


def test_the_python_config_is_one(tmp_path: Path) -> None:
    path = export(random(GROUPED), GROUPED, tmp_path / "out")
    names: dict[str, Any] = {}
    exec(torch.load(path / "config_file.pt"), names)
    assert names["model_type"] == "LLAMA2"
    assert names["SEQ_LEN"] == GROUPED.context_length
    assert names["model"]["num_kv_attention_heads"] == 4
    assert names["model"]["dtype"] == "torch.bfloat16"


@pytest.mark.proof  # needs 4.3 GiB of disk
def test_archives_over_four_gib_are_read(tmp_path: Path) -> None:
    big = torch.zeros(2**31 + 2**27, dtype=torch.float16)  # pages that nobody wrote take no memory
    small = torch.randn(5)
    weights = {"a": of_tensor(small), "big": of_tensor(big), "b": of_tensor(small)}
    archive.write(tmp_path / "a.pt", weights)
    found = torch.load(tmp_path / "a.pt", mmap=True)
    assert torch.equal(found["a"], small)
    assert torch.equal(found["b"], small)
    assert found["big"].shape == big.shape
    with zipfile.ZipFile(tmp_path / "a.pt") as zipped:
        assert zipped.testzip() is None
