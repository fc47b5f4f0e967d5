"""Families of Transformers: names, config.json both ways, what is refused. Against references: tests/parity."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm.errors import WeightsError
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
from internlm.weights import transformers as folders
from internlm.weights.families import table as names
from internlm.weights.families import translate as families
from internlm.weights.families.table import FAMILIES, from_transformers, is_stacked, to_transformers
from internlm.weights.load import shapes
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import Weight, Weights, of_tensors

SHAPE = ModelConfig(vocab_size=50, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=24)
EXPERTS = ExpertsConfig(count=4, per_token=2)
HELD: dict[str, ModelConfig] = {
    "llama": SHAPE,
    "mistral": SHAPE,
    "mixtral": replace(SHAPE, experts=EXPERTS),
    "qwen2": replace(SHAPE, qkv_bias=True),
    "qwen3": replace(SHAPE, qk_norm=True, head_dim=6),
    "qwen3_moe": replace(SHAPE, qk_norm=True, experts=replace(EXPERTS, normalize=False), head_dim=6),
    "internlm": replace(SHAPE, qkv_bias=True, output_bias=True),
    "internlm2": SHAPE,
    "internlm3": replace(SHAPE, qkv_bias=True),
}
TABLES = {
    name: table
    for name, table in vars(names).items()
    if name.isupper() and isinstance(table, dict) and any(ours.startswith("blocks.") for ours in table)
}


def rope_edit(**changes: Any) -> dict[str, Any]:
    """Return changes of a config.json which make it YaRN, with some parameters changed."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    return {"rope_scaling": None, "rope_parameters": yarn | changes}


def described(config: ModelConfig, family: str) -> dict[str, Any]:
    return families.write(unread(config), config, family)[0]


def unread(config: ModelConfig) -> Weights:
    return {
        name: Weight(tuple(shape), torch.float32, functools.partial(torch.zeros, shape))
        for name, shape in shapes(config).items()
    }


def complaint(function: Callable[[], Any]) -> str | None:
    """Return what a function says is wrong."""
    try:
        function()
    except WeightsError as error:
        return str(error)
    return None


def random_model(config: ModelConfig) -> Transformer:
    model = build(config, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def export(model: Transformer, folder: Path, family: str | None = None) -> Path:
    folders.export(of_tensors(model.named_parameters()), model.config, folder, options=ExportOptions(family=family))
    return folder


@pytest.mark.parametrize("table", TABLES)
def test_every_name_goes_there_and_back(table: str) -> None:
    rows = TABLES[table]
    for ours, theirs in rows.items():
        number = 3 if "{e}" in theirs else None
        ours, theirs = ours.replace("{i}", "11"), theirs.replace("{i}", "11")
        assert to_transformers(ours, rows) == theirs
        found, expert = from_transformers(theirs.replace("{e}", "3"), rows)
        assert ours in found
        assert expert == number
        assert len(found) == sum(theirs == to_transformers(o.replace("{i}", "11"), rows) for o in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_have_every_weight_of_the_models(family: str) -> None:
    config = HELD[family]
    _, theirs = families.write(unread(config), config, family)
    back = families.read(theirs, described(config, family), Path("config.json"))
    assert {name: weight.shape for name, weight in back.items()} == {
        name: tuple(shape) for name, shape in shapes(config).items()
    }


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(WeightsError, match=r"blocks\.2\.attention\.wq\.weight"):
        to_transformers("blocks.2.attention.wqq.weight")
    with pytest.raises(WeightsError, match=r"model\.layers\.7\.mlp\.up_proj\.weight"):
        from_transformers("model.layers.7.mlp.up_projection.weight")
    with pytest.raises(WeightsError, match=r"Did you mean 'model\.layers\.7\.attention\.wqkv\.weight'"):
        from_transformers("model.layers.7.attention.wqk.weight", names.INTERNLM2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(base=5e5),
        RopeConfig(scaling=LinearScaling(factor=2.0)),
        RopeConfig(base=7e4, scaling=DynamicScaling(factor=1.5, original_length=512)),
        RopeConfig(scaling=YarnScaling(factor=4.0, original_length=512, attention_factor=1.25)),
        RopeConfig(scaling=Llama3Scaling(factor=8.0, original_length=512)),
    ],
    ids=lambda rope: rope.scaling.kind if rope.scaling else "plain",
)
def test_the_shape_comes_back_equal_or_is_refused(family: str, rope: RopeConfig) -> None:
    config = replace(HELD[family], rope=rope, context_length=4096, norm_eps=3e-6, tie_embeddings=True)
    if rope.scaling is not None and rope.scaling.kind not in FAMILIES[family].scalings:
        with pytest.raises(WeightsError, match=f"the family {family} has no such rotary scaling"):
            described(config, family)
        return
    assert families.read_config(described(config, family), Path("config.json")) == config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"qkv_bias": True}, "qkv_bias"),
        ({"output_bias": True}, "output_bias"),
        ({"head_dim": 6}, "head_dim"),
        ({"qk_norm": True}, "qk_norm"),
        ({"qk_norm": False}, "qk_norm"),
        ({"experts": None}, "experts"),
        ({"experts": EXPERTS}, "experts"),
        ({"experts": replace(EXPERTS, normalize=False)}, "experts"),
        ({"hidden_size": 18, "head_dim": 4}, "hidden_size"),
    ],
    ids=lambda value: str(list(value.values())) if isinstance(value, dict) else value,
)
def test_a_family_holds_all_of_a_shape_or_names_the_part_that_it_cannot(
    family: str, change: dict[str, Any], part: str
) -> None:
    """What is written comes back and computes the same; what is refused is refused before anything is written."""
    config = replace(HELD[family], **change)
    model = random_model(config)
    weights = of_tensors(model.named_parameters())
    refusal = complaint(lambda: families.write(weights, config, family))
    if refusal is not None:
        assert f"the family {family} " in refusal
        assert part in refusal or (part == "hidden_size" and "head_dim" in refusal)
        return
    fields, theirs = families.write(weights, config, family)
    read = families.read(theirs, fields, Path("config.json"))
    for name, weight in read.items():
        expected = weights[name].read() if name in weights else torch.zeros(weight.shape)
        assert torch.equal(weight.read(), expected), name
    assert read.keys() >= weights.keys()
    found = families.read_config(fields, Path("config.json"))
    widened = {"qkv_bias": found.qkv_bias, "output_bias": found.output_bias}
    assert found == replace(config, **widened)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral", {"qkv_bias": True}),
        ("mixtral", {"experts": replace(EXPERTS, normalize=False)}),
        ("qwen2", {"output_bias": True}),
        ("qwen2", {"head_dim": 6}),
        ("qwen3", {"qk_norm": False}),
        ("qwen3_moe", {"experts": None}),
        ("internlm", {"head_dim": 6}),
        ("internlm2", {"experts": EXPERTS}),
        ("internlm3", {"output_bias": True}),
        ("llama", {"qk_norm": True}),
    ],
)
def test_what_no_weight_of_a_family_can_hold_is_refused(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=f"model: the family {family} "):
        described(replace(HELD[family], **change), family)


def test_a_refusal_names_the_families_that_can() -> None:
    with pytest.raises(WeightsError, match=r"Families that can hold this model: qwen3\."):
        described(HELD["qwen3"], "llama")
    with pytest.raises(WeightsError, match="No family can hold it"):
        described(replace(SHAPE, qkv_bias=True, experts=EXPERTS), "mixtral")
    with pytest.raises(WeightsError, match=r"no such family \(got 'gpt2'\); allowed: llama, mistral"):
        described(SHAPE, "gpt2")


def test_biases_that_a_family_always_has_are_written_as_zeros(tmp_path: Path) -> None:
    written = load_file(export(random_model(SHAPE), tmp_path / "a", "qwen2") / "model.safetensors")
    assert not written["model.layers.2.self_attn.k_proj.bias"].any()
    half = random_model(replace(SHAPE, output_bias=True))
    written = load_file(export(half, tmp_path / "b", "internlm2") / "model.safetensors")
    assert not written["model.layers.2.attention.wqkv.bias"].any()
    assert written["model.layers.2.attention.wo.bias"].any()


def test_the_fused_matrix_lies_as_internlm2_has_it(tmp_path: Path) -> None:
    """[key head, its queries then key then value, row of the head, hidden]"""
    model = random_model(SHAPE)
    written = load_file(export(model, tmp_path / "a", "internlm2") / "model.safetensors")
    fused = written["model.layers.1.attention.wqkv.weight"].view(2, 2 + 2, 4, 16)
    wq, wk, wv = (model.get_parameter(f"blocks.1.attention.{w}.weight") for w in ("wq", "wk", "wv"))
    assert torch.equal(fused[1, 0], wq[2 * 4 : 3 * 4])  # the third query head is the first of the second key head
    assert torch.equal(fused[1, 2], wk[1 * 4 :])
    assert torch.equal(fused[0, 3], wv[: 1 * 4])


def test_a_fused_matrix_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = export(random_model(SHAPE), tmp_path / "a", "internlm2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.attention.wqkv.weight"] = torch.zeros(31, 16)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.attention\.wqkv\.weight: is \(31, 16\), not \(32, 16\)"):
        folders.load(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_put_together_by_their_numbers_in_whatever_order_they_come(family: str) -> None:
    model = random_model(HELD[family])
    fields, theirs = families.write(of_tensors(model.named_parameters()), model.config, family)
    found = families.read(dict(reversed(theirs.items())), fields, Path("config.json"))
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name].read(), parameter), name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
            r"blocks\.1\.feed_forward\.experts\.w_up\.weight: is there twice, or experts",
        ),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"is \(3, 24, 16\), not \(4, 24, 16\)"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 48, 16)}),
            r"blocks\.1\.feed_forward\.experts\.w_gate\.weight: is there twice",
        ),
        (lambda t: t.update({"model.layers.0.mlp.gate_proj.weight": torch.zeros(1)}), "no such weight"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(24)}), "q.bias is left over"),
    ],
)
def test_experts_that_are_not_all_there_once_are_named(change: Any, match: str, tmp_path: Path) -> None:
    folder = export(random_model(HELD["qwen3_moe"]), tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=match):
        folders.load(folder)


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is not supported"),
        ("internlm3", {"bias": True}, "bias is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias is not supported"),
        ("internlm", {"rotary": {"base": 10000, "type": "xpos"}}, "rotary type cannot be read.*xpos"),
        ("internlm", {"rotary": {"base": 9999, "type": "origin"}}, "say different things"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked"]}, "layer_types"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window is no number"),
        ("internlm2", {"rope_scaling": {"type": "su", "factor": 2.0}}, "scaling cannot be read.*su"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention is not supported"),
        ("llama", {"rope_theta": 5e5}, r"two values of rope_theta.*500000\.0"),
        ("llama", rope_edit(truncate=False), "truncate is not supported"),
        ("llama", rope_edit(rope_type="linear", mscale=1.0), "mscale is not supported"),
        ("llama", rope_edit(mscale=0.7), "mscale and mscale_all_dim count together"),
        ("llama", rope_edit(mscale="large", mscale_all_dim=1.0), "mscale and mscale_all_dim give no factor"),
        ("llama", rope_edit(mscale=10**400, mscale_all_dim=1.0), "mscale and mscale_all_dim give no factor"),
        ("llama", rope_edit(factor=0), r"model\.rope\.scaling\.factor: must be finite and over 0 \(got 0"),
        ("llama", rope_edit(beta_fast=1.0, beta_slow=2.0), r"scaling\.beta_fast: must not be under beta_slow 2\.0"),
        ("llama", {"num_key_value_heads": -2}, r"model\.num_kv_heads: must be finite and not negative"),
        ("llama", {"rms_norm_eps": -1.0}, r"model\.norm_eps: must be finite and over 0"),
    ],
)
def test_what_this_decoder_does_not_have_is_refused_by_name(family: str, change: dict[str, Any], match: str) -> None:
    fields = described(HELD[family], family)
    families.read_config(fields, Path("config.json"))
    with pytest.raises(WeightsError, match=rf"config\.json: .*{match}"):
        families.read_config(fields | change, Path("config.json"))


def test_yarn_beside_the_plain_parameters_that_an_export_has_is_yarn() -> None:
    """As Qwen's model cards say: an export of ours, to which only rope_scaling is added."""
    fields = described(HELD["qwen2"], "qwen2")
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    read = families.read_config(fields | {"rope_scaling": yarn}, Path("config.json"))
    assert read.rope.scaling == YarnScaling(factor=4.0, original_length=64)


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}),
        ({"type": "yarn", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}),
        ({"rope_type": "default"}, {"rope_type": "yarn", "factor": 4.0}),
        ({"type": "yarn", "factor": 4.0}, {"rope_type": "default", "rope_theta": 1e6}),
    ],
)
def test_two_rotary_scalings_that_differ_are_refused_by_both_names(
    scaling: dict[str, Any], parameters: dict[str, Any]
) -> None:
    """The last is a folder of Transformers 5 with a rope_scaling added: Transformers would forget its base."""
    fields = {key: value for key, value in described(SHAPE, "llama").items() if key != "rope_theta"}
    fields |= {"rope_scaling": scaling, "rope_parameters": parameters}
    with pytest.raises(WeightsError, match=r"config\.json: rope_scaling and rope_parameters say different things"):
        families.read_config(fields, Path("config.json"))


def test_what_a_config_lacks_is_what_the_family_means() -> None:
    sizes = {
        "vocab_size": 50, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 32, "intermediate_size": 8,
    }  # fmt: skip

    def read(family: str, **fields: Any) -> ModelConfig:
        return families.read_config(sizes | {"model_type": family} | fields, Path("config.json"))

    assert read("llama").norm_eps == 1e-6
    assert read("llama").num_kv_heads == 32
    assert read("mistral").context_length == 4096, "its sliding window"
    assert read("mistral").num_kv_heads == 8
    assert read("qwen2").context_length == 32768, "no window unless it is asked for"
    assert read("qwen3").head_dim == 128
    assert read("mixtral", num_local_experts=4, num_experts_per_tok=2).rope.base == 1e6
    moe = read("qwen3_moe", num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)
    assert moe.experts is not None
    assert (moe.experts.normalize, moe.ffn_size) == (False, 6)
    window = {"use_sliding_window": True, "sliding_window": 64}
    assert read("qwen2", **window).context_length == 32768, "its first 28 layers look at everything, and it has 3"
    assert read("qwen2", **window, max_window_layers=2).context_length == 64
    released = families.read_config({"model_type": "internlm"}, Path("config.json"))
    assert (released.vocab_size, released.ffn_size, released.qkv_bias) == (103168, 11008, True)
    assert released.rope == RopeConfig(scaling=DynamicScaling(original_length=2048))
    assert read("internlm", rope_theta=1e4, rope_scaling=None).rope == RopeConfig(), "as in December 2023"
    assert read("internlm2").output_bias
    assert not read("internlm3").qkv_bias


def test_the_balance_of_qwens_experts_comes_back() -> None:
    fields = described(HELD["qwen3_moe"], "qwen3_moe")
    del fields["internlm_balance_loss"]
    found = families.read_config(fields, Path("config.json")).experts
    assert found is not None
    assert found.balance_loss == pytest.approx(EXPERTS.balance_loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_values_in_a_foreign_config_are_errors_of_the_user(family: str) -> None:
    """Every field of a config.json, given every odd value, is read or refused in a sentence."""
    scalings = (None, YarnScaling(factor=4.0, original_length=64), DynamicScaling(original_length=64))
    odd: list[Any] = [None, "abc", -1, 0, 1.5, [], {"a": 1}, True, 10**30]
    refused = 0
    for scaling in scalings:
        if scaling is not None and scaling.kind not in FAMILIES[family].scalings:
            continue
        good = described(replace(HELD[family], rope=RopeConfig(scaling=scaling)), family)
        extra = {
            "layer_types": ["full_attention"],
            "max_window_layers": 1,
            "sliding_window": 8,
            "quantization_config": 0,
        }
        good |= {"use_sliding_window": True, "partial_rotary_factor": None} | extra
        trees = [good | {key: value} for key in good for value in odd] if scaling is None else []
        trees += [good | {"layer_types": None, key: value} for key in extra for value in odd if scaling is None]
        balance = ("router_aux_loss_coef", "num_experts_per_tok", "num_hidden_layers")
        if scaling is None and "internlm_balance_loss" in good:
            trees += [good | {"internlm_balance_loss": None, key: value} for key in balance for value in odd]
        forms = ("rope_scaling", "rope_parameters", "rotary")
        for form in forms:
            rope, rest = (
                good.get(form),
                {key: value for key, value in good.items() if key not in (*forms, "rope_theta")},
            )
            trees += [rest | {form: rope | {key: value}} for key in rope or () for value in odd]
        for tree in trees:
            fields = json.loads(json.dumps(tree))
            said = complaint(functools.partial(families.read_config, fields, Path("config.json")))
            refused += said is not None
            assert said is None or "config.json: " in said
    assert refused > 60
    for nothing in ([1], None, "text"):
        with pytest.raises(WeightsError, match="no JSON object"):
            families.read_config(nothing, Path("config.json"))  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="lacks 'hidden_size'"):
        families.read_config({"model_type": "llama", "vocab_size": 5}, Path("config.json"))


def test_experts_are_read_one_at_a_time(tmp_path: Path) -> None:
    """What is stacked here is one matrix per expert there: a stacked weight is read once, however many there are."""
    config, reads = HELD["qwen3_moe"], list[str]()
    weights = {
        name: Weight(w.shape, w.dtype, lambda name=name, w=w: (reads.append(name), w.read())[1])  # type: ignore[misc]
        for name, w in unread(config).items()
    }
    folders.export(weights, config, tmp_path / "out")
    assert sorted(reads) == sorted(weights)
    assert sum(is_stacked(name) for name in reads) == 3 * config.num_layers
