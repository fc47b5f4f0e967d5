"""Transformers folders: strict, streaming, the same bits every time."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm import storage
from internlm.errors import InternLMError, StorageError, WeightsError
from internlm.model.config import DynamicScaling, ModelConfig, RopeConfig, YarnScaling
from internlm.model.transformer import Transformer, build, empty
from internlm.source import open_source
from internlm.text.templates import get_template, jinja
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.load import fill
from internlm.weights.talk import Talk, read_talk
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import of_tensors
from tests.models import Counted

SHAPE = ModelConfig(vocab_size=50, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=24)


def export(model: Transformer, folder: Path, **options: object) -> Path:
    talk = Talk(options.pop("tokenizer", None), options.pop("template", None))  # type: ignore[arg-type]
    chosen = ExportOptions(**options)  # type: ignore[arg-type]
    folders.export(of_tensors(model.named_parameters()), model.config, folder, talk, chosen)
    return folder


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != storage.MANIFEST}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_load_save_gives_the_same_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    first = export(build(SHAPE, 3, dtype=dtype), tmp_path / "a", max_shard_bytes=4000)
    second = export(folders.load(first), tmp_path / "b", max_shard_bytes=4000)
    folders.export(
        folders.open_weights(first),
        folders.read_config(first),
        tmp_path / "c",
        options=ExportOptions(max_shard_bytes=4000),
    )
    assert len(list(first.glob("*.safetensors"))) > 2
    assert weight_files(first) == weight_files(second) == weight_files(tmp_path / "c")
    assert folders.load(second).embedding.weight.dtype == dtype


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": True, "output_bias": True},
        {"rope": RopeConfig(base=5e5, scaling=DynamicScaling(original_length=512)), "context_length": 4096},
        {"rope": RopeConfig(scaling=YarnScaling(factor=4.0, original_length=512, attention_factor=1.25))},
        {"head_dim": 6, "norm_eps": 1e-6},
    ],
)
def test_the_config_comes_back_equal(changes: dict[str, object], tmp_path: Path) -> None:
    config = replace(SHAPE, **{"head_dim": 0, "num_kv_heads": 2, **changes})  # type: ignore[arg-type]
    loaded = folders.load(export(build(config, 0), tmp_path / "a"))
    assert loaded.config == config
    expected = dict(build(config, 0).named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected.pop(name))
    assert not expected


def test_a_tied_head_is_one_tensor_and_may_come_along(tmp_path: Path) -> None:
    model = build(replace(SHAPE, tie_embeddings=True), 0)
    folders.export(of_tensors(model.state_dict().items()), model.config, tmp_path / "a")
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "model.safetensors")
    loaded = folders.load(tmp_path / "a")
    assert loaded.head.weight is loaded.embedding.weight


def test_a_tied_head_that_is_another_than_the_embedding_is_an_error(tmp_path: Path) -> None:
    model = build(replace(SHAPE, tie_embeddings=True), 0)
    folders.export(of_tensors(model.named_parameters()), model.config, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, file)
    assert torch.equal(folders.load(tmp_path / "a").head.weight, head)
    save_file(tensors | {"lm_head.weight": head + 1e-3}, file)
    with pytest.raises(WeightsError, match=r"lm_head\.weight that is another"):
        folders.load(tmp_path / "a")


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0.0}},
        {"num_key_value_heads": -1},
        {"tie_word_embeddings": "false"},
        {"attention_bias": "false"},
        {"num_hidden_layers": 10**9},
    ],
    ids=str,
)
def test_numbers_that_no_model_has_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, tmp_path / "a")
    with pytest.raises(WeightsError, match=r"config\.json"):
        folders.open_weights(changed_config(tmp_path / "a", tmp_path / "b", **change))


def test_integers_are_no_weights(tmp_path: Path) -> None:
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(50, 16, dtype=torch.int8)}, file)
    with pytest.raises(WeightsError, match=r"lm_head\.weight: holds integers"):
        folders.load(tmp_path / "a")


def test_absent_biases_are_written_as_zeros(tmp_path: Path) -> None:
    model = build(replace(SHAPE, qkv_bias=True), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    written = load_file(export(model, tmp_path / "a") / "model.safetensors")
    assert not written["model.layers.2.self_attn.o_proj.bias"].any()
    assert written["model.layers.2.self_attn.q_proj.bias"].any()
    ids = torch.arange(20)[None]
    assert torch.equal(folders.load(tmp_path / "a")(ids), model(ids))


def test_the_dtype_can_be_changed_on_the_way(tmp_path: Path) -> None:
    folder = export(build(SHAPE, 0), tmp_path / "a", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert folders.load(folder, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_no_file_is_larger_than_asked_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    folder = export(build(SHAPE, 0), tmp_path / "a", max_shard_bytes=5000)
    files = sorted(folder.glob("*.safetensors"))
    header = 4096  # names and offsets
    assert all(file.stat().st_size <= 5000 + header for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 4 * SHAPE.num_parameters
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


def test_an_export_holds_one_tensor_in_memory_not_the_model(tmp_path: Path) -> None:
    counted = Counted(SHAPE)
    folders.export(counted.weights, SHAPE, tmp_path / "a")
    counted.assert_one_by_one()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
        (lambda t: t.update({"blocks.9.attention.wq.weight": torch.zeros(1)}), "blocks.9.attention.wq.weight is left"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"norm.weight is \(3,\), not \(16,\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(change, message: str, tmp_path: Path) -> None:
    tensors = dict(build(SHAPE, 0).state_dict())
    change(tensors)
    with pytest.raises(WeightsError, match=message):
        folders.export(of_tensors(tensors.items()), SHAPE, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match=message):
        fill(empty(SHAPE), tensors.items())


def test_a_weight_that_comes_twice_is_an_error() -> None:
    tensors = list(build(SHAPE, 0).named_parameters())
    with pytest.raises(WeightsError, match=r"embedding\.weight came twice"):
        fill(empty(SHAPE), [*tensors, tensors[0]])


def test_filling_copies_into_a_real_model_and_hands_over_to_an_empty_one() -> None:
    source, real, hollow = build(SHAPE, 0), build(SHAPE, 1), empty(SHAPE)
    fill(real, source.named_parameters())
    fill(hollow, source.named_parameters())
    assert torch.equal(real.norm.weight, source.norm.weight)
    assert torch.equal(real.embedding.weight, source.embedding.weight)
    assert real.embedding.weight.data_ptr() != source.embedding.weight.data_ptr()
    assert hollow.embedding.weight.data_ptr() == source.embedding.weight.data_ptr()
    assert not any(parameter.is_meta for parameter in hollow.parameters())


def test_loaded_weights_survive_the_folder(tmp_path: Path) -> None:
    folder = export(build(SHAPE, 0), tmp_path / "a")
    loaded = folders.load(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * 20000)
    assert torch.equal(loaded.embedding.weight, build(SHAPE, 0).embedding.weight)


def test_an_export_is_replaced_only_on_demand(tmp_path: Path) -> None:
    folder = export(build(SHAPE, 0), tmp_path / "a", notes={"step": 7})
    assert storage.read_manifest(folder, "export")["step"] == 7
    with pytest.raises(StorageError, match="--force"):
        export(build(SHAPE, 1), folder)
    export(build(SHAPE, 1), folder, replace=True)
    assert torch.equal(folders.load(folder).embedding.weight, build(SHAPE, 1).embedding.weight)


def test_rotary_buffers_of_old_exports_are_ignored(tmp_path: Path) -> None:
    folder = export(build(SHAPE, 0), tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(folders.load(folder).norm.weight, build(SHAPE, 0).norm.weight)


def changed_config(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def test_what_this_decoder_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    folder = export(build(SHAPE, 0), tmp_path / "a")
    for number, (changes, message) in enumerate(
        [
            ({"model_type": "gpt2"}, "gpt2.*allowed: llama, mistral, qwen2"),
            ({"hidden_act": "gelu"}, "hidden_act is not supported"),
            ({"mlp_bias": True}, "mlp_bias is not supported"),
            ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ]
    ):
        with pytest.raises(WeightsError, match=message):
            folders.read_config(changed_config(folder, tmp_path / str(number), **changes))


def test_the_rotary_fields_are_read_in_every_form(tmp_path: Path) -> None:
    folder = export(build(SHAPE, 0), tmp_path / "a")
    old = {"rope_theta": 7e4, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}, "rope_theta": None}
    first = folders.read_config(changed_config(folder, tmp_path / "old", **old))
    second = folders.read_config(changed_config(folder, tmp_path / "new", **new))
    assert first == second
    assert first.rope.base == 7e4
    assert first.rope.scaling is not None


def test_a_shape_that_transformers_refuses_is_not_exported(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=50, hidden_size=18, num_layers=1, num_heads=4, head_dim=4, ffn_size=8)
    with pytest.raises(WeightsError, match=r"is loaded only where hidden_size 18 is a multiple.*: mistral, internlm3"):
        export(build(config, 0), tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[" * 10**5, "[]"], ids=["cut", "deep", "list"])
def test_a_damaged_description_is_named(name: str, content: str, tmp_path: Path) -> None:
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(WeightsError, match=name):
        open_source(tmp_path / "a")


def test_broken_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        folders.load(tmp_path)
    folder = export(build(SHAPE, 0), tmp_path / "a")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="cannot be read"):
        folders.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds neither"):
        folders.load(folder)


def test_what_cannot_be_talked_to_or_is_not_finite_is_refused_before_it_is_written(tmp_path: Path) -> None:
    model = build(replace(SHAPE, vocab_size=300), 0)
    tokenizer = train_bpe(["What is the sum?"], 300)
    for options, match in (
        ({"tokenizer": train_bpe([str(i) * 9 for i in range(999)], 309)}, "ids, the model"),
        ({"template": "internlm"}, "needs a tokenizer"),
        ({"tokenizer": train_bpe(["a"], 260, ["<|bos|>", "<|eos|>"]), "template": "internlm"}, "user"),
        ({"tokenizer": tokenizer, "template": "nonsense"}, "nonsense"),
    ):
        with pytest.raises(InternLMError, match=match):
            export(model, tmp_path / "out", **options)
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    export(model, tmp_path / "fine")
    with pytest.raises(WeightsError, match=r"norm\.weight: is not finite as torch\.float16"):
        export(model, tmp_path / "out", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["fine"]


def test_a_chat_model_stays_one_when_its_folder_is_edited(tmp_path: Path) -> None:
    out = export(
        build(replace(SHAPE, vocab_size=300), 0),
        tmp_path / "out",
        tokenizer=train_bpe(["a sum"], 290),
        template="internlm",
    )
    (out / "README.md").write_text("my notes")
    assert read_talk(out).template == "internlm"


def test_a_template_of_others_is_known_by_its_text_or_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": jinja(get_template("chatml"))}))
    assert read_talk(tmp_path).template == "chatml"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    logging.getLogger("internlm").propagate = True
    with caplog.at_level("WARNING"):
        assert read_talk(tmp_path).template is None
    assert "not known here" in caplog.text
