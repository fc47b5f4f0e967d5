"""`internlm convert` from every format to every format, and what it says when that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internlm.cli import main
from internlm.errors import UsageError, WeightsError
from internlm.model import lora
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.source import Hints, open_source
from internlm.text.training import train_bpe
from internlm.weights import adapters
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk, read_talk
from internlm.weights.weight import of_tensors

SHAPE = ModelConfig(
    vocab_size=300, hidden_size=32, num_layers=3, num_heads=4, ffn_size=256, qkv_bias=True, output_bias=True
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a Transformers folder of a chat model with biases that are not zero."""
    model = build(SHAPE, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    talk = Talk(train_bpe(["What is the sum of the numbers?"] * 3, 300), "internlm")
    folders.export(of_tensors(model.named_parameters()), SHAPE, tmp_path / "folder", talk)
    return tmp_path / "folder"


def tensors(path: Path, **hints: object) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in open_source(path, Hints(**hints)).tensors()}  # type: ignore[arg-type]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "llama"],
        ["--to", "internlm"],
        ["--remote-code"],
        ["--to", "internlm2"],
        ["--to", "gguf"],
        ["--to", "internlm-v0.2"],
        ["--to", "internlm-v0.2", "--tensor", "2", "--pipeline", "3"],
    ],
    ids=" ".join,
)
def test_there_and_back_every_bit_is_the_same(
    options: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "gguf" in options:
        pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    assert convert(folder, tmp_path / "there", *options, "--verify") == 0
    said = capsys.readouterr().out
    assert "SRC by transformers: logits differ by" in said
    assert "DST by" in said
    assert "wq.weight" in said or "q_proj.weight" in said, "the table"
    template = [] if "internlm-v0.2" not in options else ["--template", "internlm"]
    assert convert(tmp_path / "there", tmp_path / "back", *template) == 0
    assert_equal(tensors(folder), tensors(tmp_path / "back"))
    assert open_source(tmp_path / "there").config.num_parameters == SHAPE.num_parameters
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "back" / weights).read_bytes()
    assert read_talk(tmp_path / "back").template == "internlm"
    assert read_talk(tmp_path / "back").tokenizer is not None


def test_an_adapter_is_merged_with_its_base(folder: Path, tmp_path: Path) -> None:
    model = open_source(folder).model()
    chosen = lora.LoraConfig(rank=4, targets=("blocks.*.attention.w[qv]",))
    lora.apply_lora(model, chosen)
    with torch.no_grad():
        for parameter in lora.lora_parameters(model).values():
            parameter.normal_(0, 0.1)
    ids = torch.arange(40)[None]
    expected = model(ids)
    adapters.export(adapters.of_model(model, chosen, base=str(folder)), tmp_path / "adapter")
    assert convert(tmp_path / "adapter", tmp_path / "merged") == 0
    with torch.no_grad():
        assert (open_source(tmp_path / "merged").model()(ids) - expected).abs().max() < 1e-5
        assert (open_source(folder).model()(ids) - expected).abs().max() > 1e-2
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="--base"):
        open_source(tmp_path / "adapter")
    assert convert(tmp_path / "adapter", tmp_path / "again", "--base", tmp_path / "elsewhere") == 0
    assert_equal(tensors(tmp_path / "merged"), tensors(tmp_path / "again"))


def test_an_adapter_with_a_tokenizer_beside_it_keeps_how_its_base_is_talked_to(folder: Path, tmp_path: Path) -> None:
    """Trainers save the tokenizer with an adapter: stops, sampling and chat format lie beside the base alone."""
    stops = {"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    model = open_source(folder).model()
    chosen = lora.LoraConfig(rank=4, targets=("w[qv]",))
    lora.apply_lora(model, chosen)
    with torch.no_grad():
        for parameter in lora.lora_parameters(model).values():
            parameter.zero_()  # they are made without values
    adapters.export(adapters.of_model(model, chosen, base=str(folder)), tmp_path / "adapter")
    base = open_source(folder).talk
    assert base.tokenizer is not None
    base.tokenizer.save(tmp_path / "adapter")
    talk = open_source(tmp_path / "adapter").talk
    assert (talk.stops, talk.generation) == ((2, 5), {"temperature": 0.6, "top_p": 0.9})
    assert talk.template == base.template == "internlm"


def test_another_tokenizer_takes_the_place_of_the_one_that_lies_there(folder: Path, tmp_path: Path) -> None:
    other = train_bpe(["Other words make other tokens"] * 3, 290)
    other.save(tmp_path / "tokenizer")
    assert convert(folder, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer") == 0
    found = read_talk(tmp_path / "out")
    assert found.tokenizer is not None
    assert found.tokenizer.fingerprint == other.fingerprint
    assert found.template is None, "the chat format belonged to the other tokenizer"


def test_the_card_says_what_the_run_was(folder: Path, tmp_path: Path) -> None:
    assert convert(folder, tmp_path / "out", "--licence", "apache-2.0") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"Converted from `{folder.name}`." in card


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--to", "ggml"], "--to: no such format"),
        (["--quantize", "q8_0"], "--quantize: belongs to --to gguf"),
        (["--to", "gguf", "--remote-code"], "--remote-code: belongs to --to transformers"),
        (["--to", "llama", "--tensor", "2"], "--tensor: belongs to --to internlm-v0.2"),
        (["--set", "num_heads"], "--set: is no KEY=VALUE"),
        (["--set", "num_heads=2"], "settings means nothing"),
        (["--base", "x"], "base means nothing"),
        (["--to", "gguf", "--max-shard", "1GB"], "--max-shard: belongs to --to transformers"),
        (["--to", "gguf", "--quantize", "q8_0", "--dtype", "float16"], "--dtype: means nothing beside --quantize"),
        (["--to", "qwen2"], "output_bias"),
        (["--to", "internlm-v0.2", "--tensor", "3"], "tensor"),
        (["--to", "internlm-v0.2", "--tensor", "0"], "tensor: must be at least 1"),
        (["--to", "internlm-v0.2", "--pipeline", "0"], "pipeline: 3 layers cannot be cut"),
        (["--to", "llama", "--tensor", "0"], "--tensor: belongs to"),
        (["--to", "internlm", "--remote-code", "--max-shard", "x"], "--max-shard"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    words: list[str], complaint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(folder, tmp_path / "out", *words) in (1, 2)
    assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_code_of_others_is_never_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert convert(folder, tmp_path / "code", "--remote-code") == 0
    mark = tmp_path / "mark"
    code = tmp_path / "code" / "modeling_internlm.py"
    code.write_text(f"open({str(mark)!r}, 'w')\n" + code.read_text())
    assert convert(tmp_path / "code", tmp_path / "out", "--verify") == 0
    assert "SRC by transformers" not in capsys.readouterr().out
    assert not mark.exists()


@pytest.mark.parametrize("place", ["custom_generate/generate.py", "sub/configuration.py"])
def test_code_that_transformers_would_find_by_itself_is_not_run(place: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert convert(folder, tmp_path / "code", "--remote-code") == 0
    mark, code = tmp_path / "mark", tmp_path / "code" / place
    code.parent.mkdir()
    code.write_text(f"open({str(mark)!r}, 'w')\nclass X: pass\ndef generate(*_, **__): pass\n")
    if place.startswith("sub"):
        described = json.loads((tmp_path / "code" / "config.json").read_text())
        described["auto_map"]["AutoConfig"] = "sub/configuration.X"
        (tmp_path / "code" / "config.json").write_text(json.dumps(described))
    assert convert(tmp_path / "code", tmp_path / "out", "--verify") == 0
    assert not mark.exists()


def test_a_source_is_never_replaced_by_what_is_made_of_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(folder, folder, "--force", "--dtype", "float16", "--verify") == 2
    assert "SRC with it" in capsys.readouterr().err
    assert convert(folder, tmp_path / "out") == 0
    inner = tmp_path / "out" / "inner"
    folder.rename(inner)
    assert convert(inner, tmp_path / "out", "--force") == 1
    assert "files that were added to it, and would be lost: inner/" in capsys.readouterr().err
    assert open_source(inner).config == SHAPE
    assert convert(tmp_path / "out", inner / "deeper") == 0, "beside or below it there is room"


def test_an_adapter_that_names_itself_as_its_base_is_an_error(folder: Path, tmp_path: Path) -> None:
    model = open_source(folder).model()
    chosen = lora.LoraConfig(rank=4, targets=("blocks.*.attention.wq",))
    lora.apply_lora(model, chosen)
    for parameter in lora.lora_parameters(model).values():
        torch.nn.init.ones_(parameter)
    first, second = tmp_path / "first", tmp_path / "second"
    adapters.export(adapters.of_model(model, chosen, base=str(second)), first)
    adapters.export(adapters.of_model(model, chosen, base=str(first)), second)
    with pytest.raises(WeightsError, match="names itself as its base"):
        open_source(first)
    assert open_source(first, Hints(base=folder)).config == SHAPE


def test_what_a_folder_says_of_generating_goes_along(folder: Path, tmp_path: Path) -> None:
    path = folder / "generation_config.json"
    said = json.loads(path.read_text()) | {"temperature": 0.7, "repetition_penalty": 1.05}
    path.write_text(json.dumps(said | {"transformers_version": "4.30.2"}))
    assert convert(folder, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / path.name).read_text()) == said
    path.write_text("{")
    with pytest.raises(WeightsError, match="generation_config"):
        open_source(folder)
    path.unlink()
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"eos_token_id": [2, 7]}))
    assert {2, 7} <= set(open_source(folder).talk.stop_ids()), "where Transformers finds them too"


def test_a_hint_of_use_to_no_one_is_an_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="settings"):
        open_source(folder, Hints(settings={"num_heads": "4"}))


def test_a_source_that_changed_is_another_source(folder: Path) -> None:
    source = open_source(folder)
    before = source.state()
    assert before == open_source(folder).state()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert before != source.state()
    assert replace(SHAPE, norm_eps=0.5) == open_source(folder).config
