"""Folders of adapters: what fits is read lazily, what does not is refused with a sentence."""

from __future__ import annotations

import json
import logging
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internlm import storage
from internlm.errors import StorageError, WeightsError
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.lora import LoraConfig, apply_lora, initialize_lora, lora_parameters, merge_lora
from internlm.model.transformer import Transformer, build, empty
from internlm.weights import adapters
from internlm.weights.families import translate
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import Weight, of_tensors, table, tensors

SHAPE = ModelConfig(vocab_size=50, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=24)
NAME = "base_model.model.model.layers.{}.self_attn.{}_proj.{}"


def adapted(config: LoraConfig, model: ModelConfig = SHAPE) -> Transformer:
    found = build(model, 0)
    apply_lora(found, config)
    initialize_lora(found, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(found).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


def written(folder: Path, config: LoraConfig, model: ModelConfig = SHAPE, **options: Any) -> Path:
    adapters.export(adapters.of_model(adapted(config, model), config, "a/base"), folder, ExportOptions(**options))
    return folder


def by_hand(folder: Path, **changes: Any) -> Path:
    """Write a folder as PEFT does: rank 2 on q and v of every layer."""
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    generator = torch.Generator().manual_seed(0)
    named = {}
    for layer in range(3):
        for which, rows in (("q", 16), ("v", 8)):
            named[NAME.format(layer, which, "lora_A.weight")] = torch.randn(2, 16, generator=generator)
            named[NAME.format(layer, which, "lora_B.weight")] = torch.randn(rows, 2, generator=generator)
    named |= changes.pop("tensors", {})
    for name in changes.pop("without", ()):
        del named[name]
    folder.mkdir()
    save_file(named, folder / adapters.WEIGHTS)
    (folder / adapters.FILE).write_text(json.dumps(fields | changes))
    return folder


def refused(folder: Path, model: ModelConfig = SHAPE) -> str:
    with pytest.raises(WeightsError) as caught:
        adapters.open_adapter(folder, model)
    return str(caught.value)


def test_a_folder_of_an_adapter_is_known_by_its_config(tmp_path: Path) -> None:
    assert adapters.is_one(by_hand(tmp_path / "a"))
    assert not adapters.is_one(tmp_path)
    assert not adapters.is_one(tmp_path / "a" / adapters.FILE)


def test_a_folder_is_read_as_what_it_says(tmp_path: Path) -> None:
    folder = by_hand(
        tmp_path / "a",
        base_model_name_or_path="meta/llama",
        lora_dropout=0.1,
        use_rslora=True,
        alpha_pattern={"layers.1.self_attn.q_proj": 9},
        fan_in_fan_out=True,
    )
    adapter = adapters.open_adapter(folder, SHAPE)
    assert adapter.base == "meta/llama"
    assert adapter.config == LoraConfig(
        rank=2, alpha=4, rank_stabilized=True, dropout=0.1, targets=("blocks.*.attention.wq", "blocks.*.attention.wv"),
        alphas={"blocks.1.attention.wq": 9},
    )  # fmt: skip
    stored = load_file(folder / adapters.WEIGHTS)
    assert len(adapter.weights) == len(stored) == 12
    found = dict(tensors(adapter.weights))
    assert torch.equal(found["blocks.1.attention.wv.lora_b"], stored[NAME.format(1, "v", "lora_B.weight")])


def test_merging_is_the_formula_and_keeps_the_dtype(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "a")
    base = build(SHAPE, 0, dtype=torch.bfloat16)
    merged = adapters.merge(of_tensors(base.named_parameters()), adapters.open_adapter(folder, SHAPE))
    stored = load_file(folder / adapters.WEIGHTS)
    assert list(merged) == [name for name, _ in base.named_parameters()]
    for name, tensor in tensors(merged):
        expected = base.get_parameter(name)
        if ".wq." in name or ".wv." in name:
            a, b = (stored[NAME.format(name.split(".")[1], name[20], f"lora_{which}.weight")] for which in "AB")
            expected = (expected.float() + 2.0 * b @ a).bfloat16()
        assert torch.equal(tensor, expected)
    assert any(line.startswith("blocks.{i}.attention.wq.weight + adapter") for line in table(merged))


def test_merging_reads_nothing_before_it_is_asked_and_one_matrix_at_a_time(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, dora=True)
    adapter = adapters.open_adapter(written(tmp_path / "a", config), SHAPE)
    alive: list[Any] = []
    most = 0

    def counted(weight: Weight) -> Weight:
        def read() -> Tensor:
            nonlocal most
            tensor = weight.read().clone()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            return tensor

        return replace(weight, read=read)

    base = {name: counted(weight) for name, weight in of_tensors(build(SHAPE, 0).named_parameters()).items()}
    merged = adapters.merge(base, adapter)
    assert not alive
    for name in merged:
        merged[name].read()
    assert most == 1
    assert len(alive) == len(base)


@pytest.mark.parametrize("dora", [False, True])
def test_of_the_model_and_of_the_weights_merging_is_the_same(dora: bool) -> None:
    config = LoraConfig(rank=3, dora=dora, ranks={"wk": 1}, targets=("w[qk]", "w_down"))
    model = adapted(config)
    adapter = adapters.of_model(model, config)
    base = build(SHAPE, 0)
    merged = dict(tensors(adapters.merge(of_tensors(base.named_parameters()), adapter)))
    merge_lora(model)
    assert all(torch.equal(merged[name], parameter) for name, parameter in model.named_parameters())
    assert sum(not torch.equal(merged[name], parameter) for name, parameter in base.named_parameters()) == 9


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3),
        LoraConfig(rank=3, alpha=2.5, dora=True, rank_stabilized=True, dropout=0.25, targets=("w[qv]",)),
        LoraConfig(rank=3, targets=("blocks.1.attention.wo", "w_up"), ranks={"wo": 5}, alphas={"blocks.2.*": 1.0}),
    ],
)
def test_an_adapter_comes_back_with_the_same_bits(config: LoraConfig, tmp_path: Path) -> None:
    model = adapted(config)
    adapter = adapters.open_adapter(written(tmp_path / "a", config), SHAPE)
    again = build(SHAPE, 0)
    adapters.attach(again, adapter)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert parameter.requires_grad == (".lora_" in name)
    ids = torch.arange(10)[None]
    modes = []
    for one in (again, model):
        torch.manual_seed(0)  # of dropout
        modes.append(one.train()(ids))
    assert torch.equal(*modes)
    assert torch.equal(again.eval()(ids), model.eval()(ids))
    adapters.export(adapter, tmp_path / "b")
    for file in (adapters.WEIGHTS, adapters.FILE, "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_model_without_memory_takes_the_weights_themselves(tmp_path: Path) -> None:
    config = LoraConfig(rank=3, dora=True)
    model = empty(SHAPE)
    adapters.attach(model, adapters.open_adapter(written(tmp_path / "a", config), SHAPE))
    expected = adapted(config)
    for name, parameter in lora_parameters(model).items():
        assert torch.equal(parameter, expected.get_parameter(name))
        assert parameter.requires_grad


def test_an_export_is_whole_or_absent_and_never_written_over(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", LoraConfig(rank=2), dtype=torch.bfloat16, notes={"why": "a test"})
    assert storage.read_manifest(folder, adapters.KIND) == {"why": "a test"}
    storage.verify(folder)
    assert {tensor.dtype for tensor in load_file(folder / adapters.WEIGHTS).values()} == {torch.bfloat16}
    with pytest.raises(StorageError, match="exists already"):
        written(folder, LoraConfig(rank=2))
    written(folder, LoraConfig(rank=3), replace=True)
    assert json.loads((folder / adapters.FILE).read_text())["r"] == 3
    model = adapted(LoraConfig(rank=2))
    with torch.no_grad():
        model.get_parameter("blocks.1.attention.wq.lora_a")[0, 0] = torch.nan
    with pytest.raises(WeightsError, match="not finite"):
        adapters.export(adapters.of_model(model, LoraConfig(rank=2)), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(WeightsError, match=r"lora_a is \(2, 16\), not \(4, 16\)"):
        adapters.export(adapters.of_model(model, LoraConfig(rank=4)), tmp_path / "b")


def test_config_names_layers_as_short_as_can_be(tmp_path: Path) -> None:
    config = LoraConfig(rank=3, targets=("w[qv]", "blocks.1.attention.wo"), ranks={"wq": 5, "blocks.0.attention.wv": 2})
    fields = json.loads((written(tmp_path / "a", config) / adapters.FILE).read_text())
    assert fields["target_modules"] == ["q_proj", "v_proj", "model.layers.1.self_attn.o_proj"]
    assert fields["rank_pattern"] == {"q_proj": 5, "model.layers.0.self_attn.v_proj": 2}
    assert fields["alpha_pattern"] == {}


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "a", base_model_name_or_path="meta/llama")
    wide = refused(folder, replace(SHAPE, hidden_size=32, head_dim=0))
    assert "this adapter does not belong to this base" in wide
    assert "blocks.0.attention.wq.lora_a is (2, 16), not (2, 32)" in wide
    assert "It was made for 'meta/llama'." in wide
    assert "blocks.3.attention.wq.lora_a is missing" in refused(folder, replace(SHAPE, num_layers=4))
    assert "layers.2.self_attn.q_proj.lora_A.weight is left over" in refused(folder, replace(SHAPE, num_layers=2))
    adapter = adapters.open_adapter(folder, SHAPE)
    other = build(replace(SHAPE, ffn_size=32), 0)
    with pytest.raises(WeightsError, match="weights do not fit the model"):
        adapters.merge(of_tensors(other.named_parameters()), adapter)
    with pytest.raises(WeightsError, match=r"wq\.lora_a is \(2, 16\), not \(2, 32\)"):
        adapters.attach(build(replace(SHAPE, hidden_size=32, head_dim=0), 0), adapter)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: adapters of this kind cannot be read (got 'PREFIX_TUNING'"),
        ({"peft_type": None}, "peft_type: adapters of this kind cannot be read"),
        ({"bias": "lora_only"}, "bias: biases that were trained along cannot be read (got 'lora_only')"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a base that was changed then (got 'pissa_niter_4')"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is not supported (got [3])"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is not supported"),
        ({"target_modules": ["q_proj", "fc1"]}, "of the base outside of experts (got 'fc1'); allowed: q_proj, k"),
        ({"target_modules": ["q_porj"]}, "Did you mean 'q_proj'?"),
        ({"target_modules": ["q_proj", "lm_head"]}, "fits lm_head, which can have no adapter here"),
        ({"target_modules": ".*"}, "fits model.embed_tokens, which can have no adapter here"),
        ({"target_modules": "q_proj"}, "fits no linear layer of the base outside of experts (got 'q_proj')"),
        ({"target_modules": r".*\.q_pro"}, "fits no linear layer"),
        ({"target_modules": "(q"}, "is no regular expression"),
        ({"target_modules": []}, "target_modules: names no targets"),
        ({"target_modules": 3}, "is neither a text nor a list of texts"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "targets no linear layer of the base"),
        ({"layers_to_transform": 1, "layers_pattern": "blocks"}, "layers_pattern: is not supported"),
        ({"modules_to_save": ["score"]}, "modules_to_save: the base has no such weight (got 'score')"),
        ({"modules_to_save": ["lm_head"]}, "head.weight is missing"),
        ({"r": "many"}, "describes no adapter: rank"),
        ({"r": 0}, "describes no adapter"),
        ({"lora_alpha": -1}, "lora.alpha"),
        ({"rank_pattern": [1]}, "rank_pattern: is no JSON object"),
        ({"r": 3}, "blocks.0.attention.wq.lora_a is (2, 16), not (3, 16)"),
        ({"rank_pattern": {"v_proj": 1}}, "blocks.0.attention.wv.lora_a is (2, 16), not (1, 16)"),
        ({"use_dora": True}, "blocks.0.attention.wq.lora_magnitude is missing"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "blocks.0.feed_forward.w_up.lora_a is missing"),
        ({"target_modules": ["q_proj"]}, "blocks.0.attention.wv.lora_a is left over"),
        ({"without": [NAME.format(1, "v", "lora_B.weight")]}, "blocks.1.attention.wv.lora_b is missing"),
        ({"tensors": {"base_model.model.x.weight": torch.ones(1)}}, "base_model.model.x.weight is left over"),
        ({"tensors": {"model.norm.weight": torch.ones(16)}}, "model.norm.weight is left over"),
        ({"tensors": {NAME.format(0, "q", "lora_A.other.weight"): torch.ones(2, 16)}}, "A.other.weight is left over"),
        ({"tensors": {NAME.format(0, "q", "lora_A.default.weight"): torch.ones(2, 16)}}, "lora_a came twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_sentence(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    said = refused(by_hand(tmp_path / "a", **changes))
    assert complaint in said
    assert str(tmp_path / "a") in said


def test_experts_and_tied_tables_are_refused(tmp_path: Path) -> None:
    mixture = replace(SHAPE, experts=ExpertsConfig(count=3))
    said = refused(by_hand(tmp_path / "a", target_modules=["q_proj", "w1"]), mixture)
    assert "fits no linear layer of the base outside of experts (got 'w1')" in said
    assert adapters.open_adapter(by_hand(tmp_path / "b"), mixture).config.rank == 2
    head = {"base_model.model.lm_head.weight": torch.ones(50, 16)}
    folder = by_hand(tmp_path / "c", tensors=head, modules_to_save=["lm_head"])
    assert list(adapters.open_adapter(folder, SHAPE).saved) == ["head.weight"]
    assert "brings its own head.weight" in refused(folder, replace(SHAPE, tie_embeddings=True))


def test_files_that_are_missing_or_damaged_are_refused(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "a")
    os.rename(folder / adapters.WEIGHTS, folder / adapters.BIN)
    assert f"{adapters.BIN}: " in refused(folder)
    (folder / adapters.BIN).unlink()
    assert "holds neither adapter_model.safetensors nor adapter_model.bin" in refused(folder)
    (folder / adapters.WEIGHTS).write_bytes(b"short")
    assert f"{adapters.WEIGHTS}: cannot be read" in refused(folder)
    (folder / adapters.FILE).write_text("[]")
    assert "is no JSON object" in refused(folder)
    (folder / adapters.FILE).write_text("{")
    assert "cannot be read" in refused(folder)
    assert "adapter_config.json: cannot be read" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_fused_matrix_of_internlm2_is_three_of_ours(dora: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    whole = {i: random(32, 16) for i in range(3)}
    named, expected = {}, {}
    for i, weight in whole.items():
        prefix = f"base_model.model.model.layers.{i}.attention.wqkv."
        a, b, m = random(2, 16), random(32, 2), random(32)
        named |= {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}
        changed = weight + 2.0 * b @ a
        if dora:
            named[f"{prefix}lora_magnitude_vector"] = m
            changed = changed * (m / changed.norm(dim=1))[:, None]
        expected[i] = changed
    folder = by_hand(tmp_path / "a", target_modules=["wqkv"], use_dora=dora)
    save_file(named, folder / adapters.WEIGHTS)
    base = dict(of_tensors(build(SHAPE, 0).named_parameters()))

    def put(target: dict[str, Weight], i: int, tensor: Tensor) -> None:
        names = [f"blocks.{i}.attention.{w}.weight" for w in ("wq", "wk", "wv")]
        target.update(zip(names, translate.cut(of_tensors([("wqkv", tensor)])["wqkv"], names, SHAPE), strict=True))

    wanted = dict(base)
    for i, weight in whole.items():
        put(base, i, weight)
        put(wanted, i, expected[i])
    adapter = adapters.open_adapter(folder, SHAPE)
    assert adapter.config.targets == tuple(f"blocks.*.attention.{w}" for w in ("wq", "wk", "wv"))
    merged = adapters.merge(base, adapter)
    for name, weight in wanted.items():
        torch.testing.assert_close(merged[name].read(), weight.read(), atol=1e-5, rtol=1e-5)
    adapters.export(adapter, tmp_path / "b")
    again = adapters.open_adapter(tmp_path / "b", SHAPE)
    assert all(torch.equal(again.weights[name].read(), weight.read()) for name, weight in adapter.weights.items())
    assert "wqkv.lora_B.weight" not in load_file(tmp_path / "b" / adapters.WEIGHTS)
    assert "wk.lora_b is (32, 2), not (4, 2)" in refused(folder, replace(SHAPE, num_heads=2, num_kv_heads=1))


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_a_hostile_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = by_hand(tmp_path / "a")
    (folder / adapters.WEIGHTS).unlink()
    torch.save({"x": Bomb()}, folder / adapters.BIN)
    assert "is not only tensors" in refused(folder)
    assert not (tmp_path / "exploded").exists()


def test_names_that_still_hold_that_of_the_adapter_are_read(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "a")
    named = load_file(folder / adapters.WEIGHTS)
    save_file({name.replace(".weight", ".default.weight"): t for name, t in named.items()}, folder / adapters.WEIGHTS)
    assert len(adapters.open_adapter(folder, SHAPE).weights) == 12


def test_a_setting_that_is_not_known_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adapters.open_adapter(by_hand(tmp_path / "a", new_thing=True, other_thing=None, task_type="CAUSAL_LM"), SHAPE)
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: {tmp_path / 'a' / adapters.FILE}: the setting new_thing is not known here and passed over"
    ]
