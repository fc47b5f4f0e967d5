"""Training checkpoints of InternLM v0.2 and InternEvo: any layout gives the model that was cut, bit for bit."""

from __future__ import annotations

import itertools
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from internlm.errors import WeightsError
from internlm.model.config import DynamicScaling, ModelConfig, RopeConfig
from internlm.model.transformer import Transformer
from internlm.source import open_source
from internlm.weights.load import read_model, shapes
from internlm.weights.native import read as native
from internlm.weights.weight import of_tensors, table, tensors
from tests.weights.old_layout import Old, every_layout, write

SHAPE = ModelConfig(
    vocab_size=80, hidden_size=64, num_layers=7, num_heads=8, ffn_size=96, context_length=4096,
    qkv_bias=True, output_bias=True,
)  # fmt: skip
GROUPED = replace(SHAPE, num_kv_heads=4, qkv_bias=False, output_bias=False)
V02 = Old(heads=8, kv_heads=8, layers=7)
LLAMA = Old(heads=8, kv_heads=4, layers=7, dialect="LLAMA2")


def random(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=source).to(dtype) for name, shape in shapes(config).items()}


def compare(path: Path, weights: dict[str, Tensor], config: ModelConfig, **overrides: object) -> None:
    """The checkpoint is exactly this model."""
    assert native.open_checkpoint(path, overrides).config == config
    found = dict(tensors(native.open_checkpoint(path, overrides).weights))
    assert list(found) == list(shapes(config))
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
@every_layout
def test_every_layout_gives_the_model_that_was_cut(
    tensor: int, pipeline: int, split_hidden: bool, has_bias: bool, tmp_path: Path
) -> None:
    config = replace(SHAPE, qkv_bias=has_bias, output_bias=has_bias)
    weights = random(config)
    old = replace(V02, tensor=tensor, pipeline=pipeline, embed_split_hidden=split_hidden, inv_freq=True, zero=2)
    compare(write(weights, old, tmp_path), weights, config)


@pytest.mark.parametrize(
    "old",
    [
        replace(V02, layers=8, chunks=2, pipeline=2),
        replace(V02, layers=8, chunks=2, pipeline=3, tensor=2),  # each chunk's four layers over stages of 1, 1, 2
        replace(V02, layers=8, chunks=4, pipeline=2),
    ],
    ids=["2 × 2", "2 × 3", "4 × 2"],
)
def test_interleaved_chunks_are_put_in_the_order_of_their_layers(old: Old, tmp_path: Path) -> None:
    config = replace(SHAPE, num_layers=8)
    weights = random(config)
    compare(write(weights, old, tmp_path), weights, config)


# Every second one always: of any two options all four pairs.
@pytest.mark.parametrize(
    ("w2_is_down", "adapt_hf", "has_bias", "dialect"),
    [
        pytest.param(
            *(is_down, is_half, has_bias, dialect),
            marks=[pytest.mark.proof] * ((is_down + is_half + has_bias + (dialect == "LLAMA2")) % 2),
            id=f"{dialect}-{'bias' if has_bias else 'plain'}-{'half' if is_half else 'interleaved'}-"
            f"{'InternEvo' if is_down else 'v0.2'}",
        )
        for is_down, is_half, has_bias, dialect in itertools.product(
            [False, True], [True, False], [True, False], ["LLAMA2", "INTERNLM2"]
        )
    ],
)
def test_the_other_dialects_give_the_model_that_was_cut(
    dialect: str, has_bias: bool, adapt_hf: bool, w2_is_down: bool, tmp_path: Path
) -> None:
    config = replace(GROUPED, qkv_bias=has_bias, output_bias=has_bias)
    weights = random(config)
    old = replace(LLAMA, dialect=dialect, adapt_hf=adapt_hf, w2_is_down=w2_is_down, tensor=2, pipeline=3)
    compare(write(weights, old, tmp_path), weights, config)


@pytest.mark.parametrize(("tensor", "weight"), [(1, 2), (2, 4), (4, 2), (2, 3)])
@pytest.mark.parametrize("dialect", ["INTERNLM", "LLAMA2", "INTERNLM2"])
def test_weight_parallel_files_of_internevo_are_cut_into_rows(
    dialect: str, tensor: int, weight: int, tmp_path: Path
) -> None:
    heads = 4 if dialect != "INTERNLM" else 8
    config = replace(SHAPE, num_kv_heads=heads, hidden_size=96, head_dim=12, ffn_size=144, num_layers=3)
    weights = random(config)
    old = replace(V02, dialect=dialect, kv_heads=heads, layers=3, tensor=tensor, weight=weight, pipeline=2)
    compare(write(weights, replace(old, w2_is_down=True), tmp_path), weights, config)


def test_layouts_do_not_change_logits(tmp_path: Path) -> None:
    weights = random(SHAPE, torch.float32)
    old = replace(V02, tensor=4, pipeline=3, embed_split_hidden=False)
    path = write({name: t * 0.1 for name, t in weights.items()}, old, tmp_path)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = read_model(SHAPE, of_tensors((name, t * 0.1) for name, t in weights.items()))
    found = native.open_checkpoint(path)
    loaded = read_model(found.config, found.weights)
    assert torch.equal(logits(loaded, ids), logits(expected, ids))


def logits(model: Transformer, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.head.logits(model(ids))


def test_neighbouring_rotary_pairs_are_those_of_the_old_attention(tmp_path: Path) -> None:
    # Computed as the old model does: take even elements, then odd ones, and rotate the halves.
    config = replace(GROUPED, num_layers=1)
    weights = random(config, torch.float32)
    path = write(weights, replace(LLAMA, layers=1, adapt_hf=False), tmp_path)
    there = torch.load(path / "model_tp0_pp0.pt", map_location="cpu")["model.layers.0.attention.wk.weight"]
    x = torch.randn(64)
    old = (there @ x).reshape(4, 8)
    old = torch.cat([old[:, ::2], old[:, 1::2]], -1)
    ours = dict(tensors(native.open_checkpoint(path).weights))["blocks.0.attention.wk.weight"]
    assert torch.allclose((ours @ x).reshape(4, 8), old)


def test_square_feed_forwards_ask_which_matrix_is_which(tmp_path: Path) -> None:
    config = replace(SHAPE, ffn_size=64, num_layers=1)
    weights = random(config)
    path = write(weights, replace(V02, layers=1, w2_is_down=True), tmp_path)
    with pytest.raises(WeightsError, match="--set w2=up"):
        native.open_checkpoint(path)
    compare(path, weights, config, w2="down")
    wide = write(random(SHAPE), replace(V02, w2_is_down=True), tmp_path / "wide")
    with pytest.raises(WeightsError, match="where w2 is up"):
        native.open_checkpoint(wide, {"w2": "up"})


def test_shards_that_are_square_by_chance_ask_too(tmp_path: Path) -> None:
    config = replace(SHAPE, ffn_size=128)  # of two ranks: [64, 64]
    weights = random(config)
    path = write(weights, replace(V02, tensor=2), tmp_path)
    with pytest.raises(WeightsError, match="same shape"):
        native.open_checkpoint(path)
    compare(path, weights, config, w2="up")


def test_without_a_config_the_user_is_asked_what_weights_do_not_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random(GROUPED)
    path = write(weights, replace(LLAMA, tensor=2), tmp_path)
    (path / "model_config.pt").unlink()
    with pytest.raises(WeightsError, match="--set rotary="):
        native.open_checkpoint(path)
    with pytest.raises(WeightsError, match="--set num_heads="):
        native.open_checkpoint(path, {"rotary": "half"})
    said = {"num_heads": "8", "rotary": "half", "context_length": 4096}
    with caplog.at_level(logging.WARNING):
        compare(path, weights, GROUPED, **said)
    assert "norm_eps is taken to be 1e-05" in caplog.text
    assert native.open_checkpoint(path, {**said, "norm_eps": 1e-6}).config.norm_eps == 1e-6


def test_the_config_is_read(tmp_path: Path) -> None:
    stored = {
        "layer_norm_epsilon": 1e-6,
        "rope_base": 1000000,
        "use_dynamic_ntk_rope": True,
        "max_position_embeddings": 512,
    }
    path = write(random(SHAPE), replace(V02, config=stored), tmp_path)
    rope = RopeConfig(base=1e6, scaling=DynamicScaling(original_length=512))
    assert native.open_checkpoint(path).config == replace(SHAPE, norm_eps=1e-6, rope=rope)
    assert native.open_checkpoint(path, {"norm_eps": "0.5"}).config.norm_eps == 0.5


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        ({"norm_type": "layernorm"}, "no RMSNorm"),
        ({"use_swiglu": False}, "not gated"),
        ({"is_reward": True}, "reward model"),
        ({"num_experts": 4}, "mixture of experts"),
        ({"norm_head": True}, "normalised"),
        ({"num_layers": 9}, "num_layers 7"),
        ({"vocab_size": 81}, "vocab_size 80"),
        ({"num_attention_heads": 5}, "not divisible"),
        ({"num_attention_heads": 0}, "not divisible"),
        ({"num_attention_heads": "8"}, "is no number"),
        ({"num_experts": []}, "is no number"),
    ],
)
def test_what_cannot_be_expressed_or_contradicts_is_refused(
    stored: dict[str, object], why: str, tmp_path: Path
) -> None:
    path = write(random(SHAPE), replace(V02, config=stored), tmp_path)
    with pytest.raises(WeightsError, match=why):
        native.open_checkpoint(path)


def test_a_tool_s_checkpoint_without_prefix_and_mark_is_read(tmp_path: Path) -> None:
    # As the tool that turns Transformers folders back: no trainer files, and no name of its own for a vocabulary split.
    weights = random(GROUPED)
    old = replace(LLAMA, tensor=2, prefix="", embed_split_hidden=False, embedding_name="tok_embeddings")
    path = write(weights, old, tmp_path)
    for file in path.iterdir():
        if not file.name.startswith("model_"):
            file.unlink()
    compare(path, weights, GROUPED, context_length=4096)


@pytest.mark.parametrize("lost", ["model_tp0_pp1.pt", "model_tp1_pp0.pt"])
def test_a_missing_rank_is_refused(lost: str, tmp_path: Path) -> None:
    path = write(random(SHAPE), replace(V02, tensor=2, pipeline=3), tmp_path)
    (path / lost).unlink()
    with pytest.raises(WeightsError, match=f"{lost} missing"):
        native.open_checkpoint(path)


@pytest.mark.parametrize("of", ["pp2", "tp1"])
def test_missing_last_ranks_are_noticed_by_what_they_held(of: str, tmp_path: Path) -> None:
    path = write(random(SHAPE), replace(V02, tensor=2, pipeline=3), tmp_path)
    for file in path.glob(f"model_*{of}*"):
        file.unlink()
    with pytest.raises(WeightsError, match="is not whole"):
        native.open_checkpoint(path)


def test_an_odd_rank_in_a_name_is_answered_at_once(tmp_path: Path) -> None:
    path = write(random(SHAPE), replace(V02, tensor=1, pipeline=1), tmp_path)
    shutil.copyfile(path / "model_tp0_pp0.pt", path / f"model_tp{10**9}_pp{10**9}.pt")
    with pytest.raises(WeightsError, match=r"model_tp1_pp0\.pt, .* missing"):
        native.open_checkpoint(path)


def test_a_missing_weight_rank_is_refused(tmp_path: Path) -> None:
    old = replace(V02, layers=2, weight=4, tensor=2)
    path = write(random(replace(SHAPE, num_layers=2)), old, tmp_path)
    for lost, told in (("tp1_wp3", "last ranks are missing"), ("tp1_wp1", "wp1 in pp0 missing")):
        (path / f"model_{lost}_pp0.pt").unlink()
        with pytest.raises(WeightsError, match=told):
            native.open_checkpoint(path)


def test_a_checkpoint_without_its_mark_is_refused_unless_asked_for(tmp_path: Path) -> None:
    weights = random(SHAPE)
    path = write(weights, V02, tmp_path / "7")
    (path / "7.step").unlink()
    assert native.is_one(path)
    with pytest.raises(WeightsError, match="--set unfinished=true"):
        native.open_checkpoint(path)
    compare(path, weights, SHAPE, unfinished="true")


def test_the_newest_complete_checkpoint_of_a_folder_is_taken(tmp_path: Path) -> None:
    write(random(SHAPE), V02, tmp_path / "20", step=20)
    write(random(SHAPE), V02, tmp_path / "100", step=100)
    write(random(SHAPE), V02, tmp_path / "snapshot" / "0", step=90)
    write(random(SHAPE), V02, tmp_path / "snapshot" / "1", step=100)
    write(random(SHAPE), V02, tmp_path / "200", step=200)
    (tmp_path / "200" / "200.step").unlink()
    (tmp_path / "pings").mkdir()
    assert native.open_checkpoint(tmp_path).folder == tmp_path / "100"
    write(random(SHAPE), V02, tmp_path / "snapshot" / "0", step=150)
    assert native.open_checkpoint(tmp_path).folder == tmp_path / "snapshot" / "0"
    assert native.is_one(tmp_path)
    assert not native.is_one(tmp_path / "pings")
    assert not native.is_one(tmp_path / "absent")


def test_fsdp_and_experts_are_refused_by_their_files(tmp_path: Path) -> None:
    path = write(random(SHAPE), V02, tmp_path)
    shutil.copy(path / "model_tp0_pp0.pt", path / "model_moe_layer0_expert0_tp0.pt")
    with pytest.raises(WeightsError, match="mixture of experts"):
        native.open_checkpoint(path)
    (path / "model_moe_layer0_expert0_tp0.pt").unlink()
    (path / "model_tp0_pp0.pt").rename(path / "model_tp0_pp0_dp0.pt")
    assert native.is_one(path)
    with pytest.raises(WeightsError, match=r"zero1\.fsdp=False"):
        native.open_checkpoint(path)


def test_unknown_weights_are_named(tmp_path: Path) -> None:
    path = write(random(SHAPE), V02, tmp_path)
    states = torch.load(path / "model_tp0_pp0.pt", map_location="cpu")
    torch.save({**states, "model.blocks.3.mixer.gate.weight": torch.zeros(2)}, path / "model_tp0_pp0.pt")
    with pytest.raises(WeightsError, match=r"model\.blocks\.3\.mixer\.gate\.weight"):
        native.open_checkpoint(path)


@pytest.mark.parametrize("name", ["norm.weight", "blocks.3.mlp.w2.weight", "blocks.0.mixer.out_proj.weight"])
def test_a_weight_that_is_missing_or_no_plain_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = write(random(SHAPE), V02, tmp_path)
    states = dict(torch.load(path / "model_tp0_pp0.pt", map_location="cpu"))
    tensor = states.pop(f"model.{name}")
    torch.save(states, path / "model_tp0_pp0.pt")
    with pytest.raises(WeightsError, match=r"norm\.weight|w_up\.weight is missing|wo\.weight"):
        native.open_checkpoint(path)
    for odd in (tensor.to_sparse(), 3.0, tensor.to("meta"), tensor[None]):
        torch.save({**states, f"model.{name}": odd}, path / "model_tp0_pp0.pt")
        with pytest.raises(WeightsError, match=r"named tensors|not plain|another form|not \(|no feed-forward"):
            native.open_checkpoint(path)


def test_copies_that_differ_between_ranks_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = random(SHAPE)
    path = write(weights, replace(V02, tensor=2), tmp_path)
    states = torch.load(path / "model_tp1_pp0.pt", map_location="cpu")
    torch.save({**states, "model.norm.weight": torch.zeros(64).bfloat16()}, path / "model_tp1_pp0.pt")
    found = native.open_checkpoint(path).weights["norm.weight"]
    with caplog.at_level(logging.WARNING):
        assert torch.equal(found.read(), weights["norm.weight"])
    assert "norm.weight differ" in caplog.text


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(random(SHAPE), V02, tmp_path)
    file = path / "model_tp0_pp0.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"model_tp0_pp0\.pt: cannot be read"):
        native.open_checkpoint(path)


def test_wrong_overrides_are_errors(tmp_path: Path) -> None:
    path = write(random(SHAPE), V02, tmp_path)
    with pytest.raises(WeightsError, match="num_heads"):
        native.open_checkpoint(path, {"num_head": 4})
    for name, value in (("norm_eps", "nan"), ("norm_eps", "0"), ("rope_base", "-1"), ("rope_base", "inf")):
        with pytest.raises(WeightsError, match=f"{name}: has no such value"):
            native.open_checkpoint(tmp_path, {name: value})
    with pytest.raises(WeightsError, match="w2: has no such value"):
        native.open_checkpoint(path, {"w2": "left"})


def test_progress_says_how_far_training_had_come(tmp_path: Path) -> None:
    path = write(random(SHAPE), V02, tmp_path, step=12)
    assert open_source(path).facts == {
        "step": 12, "batch": 11, "tokens": 12000, "samples_in_epoch": 5, "skipped_steps": 1, "learning_rate": 3e-5,
    }  # fmt: skip


def test_the_table_says_how_parts_were_joined(tmp_path: Path) -> None:
    path = write(random(SHAPE), replace(V02, tensor=2, pipeline=3), tmp_path)
    lines = "\n".join(table(native.open_checkpoint(path).weights))
    assert "model.blocks.{i}.mixer.Wqkv.weight (q of 2)" in lines
    assert "model.blocks.{i}.mlp.w3.weight (columns of 2)" in lines
    assert lines.count("\n") + 1 == 16
