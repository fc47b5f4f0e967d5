"""`internlm convert` loses nothing that people have, goes on with nothing that is out of date, and tells no paths."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from internlm import storage
from internlm.cli import convert, main
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import adapters, files
from internlm.weights import card as cards
from internlm.weights import transformers as folders
from internlm.weights.gguf import model as gguf
from internlm.weights.talk import Talk
from internlm.weights.transformers import KIND, ExportOptions
from internlm.weights.weight import of_tensors

SHAPE = ModelConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=4, ffn_size=256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a Transformers folder without a tokenizer."""
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, tmp_path / "model")
    return tmp_path / "model"


def test_force_keeps_files_that_were_put_into_the_export(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "my-evaluation.json").write_text("{}")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--force", "--dtype", "bfloat16"]) == 1
    assert "out: holds files that were added to it, and would be lost: my-evaluation.json" in capsys.readouterr().err
    assert (tmp_path / "out" / "my-evaluation.json").read_text() == "{}"
    assert storage.read_manifest(tmp_path / "out", KIND)["dtype"] == "float32"


def test_a_folder_of_links_into_the_target_is_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, links = tmp_path / "out", tmp_path / "links"
    assert main(["convert", str(folder), str(out)]) == 0
    links.mkdir()
    (links / "config.json").write_bytes((out / "config.json").read_bytes())
    (links / files.SINGLE).symlink_to(out / files.SINGLE)
    assert main(["convert", str(links), str(out), "--force", "--dtype", "bfloat16"]) == 2
    assert "would be replaced, and SRC with it" in capsys.readouterr().err
    assert storage.read_manifest(out, KIND)["dtype"] == "float32"


def test_what_takes_the_name_while_a_result_is_verified_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"

    def meanwhile(*_: object) -> float:
        out.mkdir()
        (out / "thesis.txt").write_text("years")
        return 0.0

    monkeypatch.setattr(convert, "verify", meanwhile)
    assert main(["convert", str(folder), str(out), "--to", "internlm-v0.2", "--verify"]) == 1
    assert (out / "thesis.txt").read_text() == "years"
    kept = Path(capsys.readouterr().err.strip().rpartition("complete: ")[2])
    assert storage.is_complete(kept, KIND)


def test_a_conversion_that_fails_before_it_is_verified_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tensors = load_file(folder / files.SINGLE)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / files.SINGLE, metadata={"format": "pt"})
    assert main(["convert", str(folder), str(tmp_path / "out"), "--verify"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_beside_what_is_verified_stays_and_disturbs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(convert, "verify", lambda *_: 0.0)
    (tmp_path / "out.unverified").mkdir()
    (tmp_path / "out.unverified" / "mine.txt").write_text("a week")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "internlm-v0.2", "--verify"]) == 0
    assert [path.name for path in (tmp_path / "out.unverified").iterdir()] == ["mine.txt"]
    assert storage.is_complete(tmp_path / "out", KIND)


def say_another_eos(folder: Path) -> None:
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"eos_token": "<|end|>"}))


def say_another_stop(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))


def say_another_format(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("change", [say_another_eos, say_another_stop, say_another_format])
def test_an_interrupted_file_is_written_anew_when_its_model_is_talked_to_otherwise(
    change: Callable[[Path], None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`state` is put aside: it sees files of SRC alone, not of a tokenizer that lies elsewhere, nor of a base."""
    library = pytest.importorskip("gguf")
    monkeypatch.setattr("internlm.source.Source.state", lambda self: "")
    train_bpe(["What is the sum of the numbers?"] * 3, 300).save(folder)
    words = ["convert", str(folder), str(tmp_path / "out"), "--to", "gguf"]

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf, "_card", interrupted)
        main(words)
    assert len(list(tmp_path.glob("out.partial-*/*.gguf"))) == 1
    change(folder)
    assert main(words) == 0
    assert main([*words[:2], str(tmp_path / "fresh"), *words[3:]]) == 0

    def fields(name: str) -> dict[str, object]:
        (file,) = (tmp_path / name).glob("*.gguf")
        found = library.GGUFReader(file).fields.items()
        return {key: field.contents() for key, field in found if key.startswith("tokenizer")}

    assert fields("out") == fields("fresh")
    assert not list(tmp_path.glob("out.*"))


def test_an_interrupted_file_of_a_sentencepiece_model_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.weights.test_remote_code import sentencepiece_tokenizer

    tokenizer: Tokenizer = sentencepiece_tokenizer()
    shape = replace(SHAPE, vocab_size=tokenizer.vocab_size)
    weights = of_tensors(build(shape, 0).named_parameters())

    def stopped(done_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.export(weights, shape, tmp_path / "out", Talk(tokenizer), ExportOptions(resume="x", progress=stopped))
    assert list(tmp_path.glob("out.partial-*/tokenizer.*"))
    gguf.export(weights, shape, tmp_path / "out", Talk(tokenizer), ExportOptions(resume="x"))
    assert gguf.read_talk(tmp_path / "out").tokenizer == tokenizer


@pytest.mark.parametrize("to", convert.FORMATS)
def test_what_is_published_says_the_name_of_the_source_not_where_it_lay(to: str, folder: Path, tmp_path: Path) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--to", to]) == 0
    assert "Converted from `model`." in (out / "README.md").read_text()
    assert storage.read_manifest(out, KIND)["source"] == "model"
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_source_that_is_the_present_folder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["convert", ".", "../out"]) == 0
    assert storage.read_manifest(folder.parent / "out", KIND)["source"] == "model"


@pytest.mark.parametrize("to", convert.FORMATS)
def test_licence_and_notice_of_the_source_go_along(to: str, folder: Path, tmp_path: Path) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / "out"
    for name in ("LICENSE", "Notice.txt"):
        (folder / name).write_text(f"{name}: pass it on")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: llama3\n---\n# Model\n")
    assert main(["convert", str(folder), str(out), "--to", to]) == 0
    for name in ("LICENSE", "Notice.txt"):
        assert (out / name).read_text() == f"{name}: pass it on"
        assert name in storage.hashes(out)
    storage.verify(out)
    assert storage.read_manifest(out, KIND)["licence"] == "llama3"
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["license"] == "llama3"
    assert main(["convert", str(folder), str(out), "--to", to, "--force", "--licence", "MIT"]) == 0
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["license"] == "MIT"


def test_the_licence_of_a_base_goes_along_where_its_adapter_has_none(folder: Path, tmp_path: Path) -> None:
    from internlm.model import lora

    model, config = build(SHAPE, 0), lora.LoraConfig(rank=2, targets=("*.wq",))
    lora.apply_lora(model, config)
    lora.initialize_lora(model, 0)
    adapters.export(adapters.of_model(model, config), tmp_path / "adapter")
    for path, name in ((folder, "LICENSE"), (folder, "NOTICE"), (tmp_path / "adapter", "NOTICE")):
        (path / name).write_text(f"of {path.name}")
    (folder / "README.md").write_text("---\nlicense: llama3\n---\n")
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(folder)]) == 0
    assert [(tmp_path / "out" / name).read_text() for name in ("LICENSE", "NOTICE")] == ["of model", "of adapter"]
    assert storage.read_manifest(tmp_path / "out", KIND)["licence"] == "llama3"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "# Model\nlicense: mit",
        "---\nlicense: [mit\n---\n",
        "---\n- license\n---\n",
        "---\nlicense: 3\n---\n",
        "---\nlicense: mit\n",
        "---\n" + "[" * 1000 + "\n---\n",
    ],
    ids=["none", "no front matter", "no YAML", "a list", "a number", "without end", "deep"],
)
def test_a_readme_that_states_no_licence_states_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert cards.licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("\ufeff---\r\nlicense: mit\r\n---\r\n", encoding="utf-8")
    assert cards.licence_of(tmp_path) == "mit"


def test_a_tokenizer_that_an_interrupted_export_has_left_is_written_over(tmp_path: Path) -> None:
    for text in ("one text", "another text"):
        Talk(train_bpe([text] * 3, 270)).write(tmp_path)
    assert Tokenizer.load(tmp_path) == train_bpe(["another text"] * 3, 270)
    Talk().write(tmp_path)
    assert Tokenizer.find(tmp_path) is None
