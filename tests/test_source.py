"""What is given as a model and is none: names of the hub, pointers in the place of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm.cli import main
from internlm.errors import InternLMError, WeightsError
from internlm.hub import require_here
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.source import open_source
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors

SHAPE = ModelConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, ffn_size=32, context_length=64)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476\n"
VERBS = {
    "chat": ["chat", "MODEL", "-p", "x", "--device", "cpu"],
    "serve": ["serve", "MODEL", "--port", "0", "--device", "cpu"],
    "convert": ["convert", "MODEL", "new"],
    "deploy": ["deploy", "MODEL", "--engine", "vllm"],
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder `model` in the current one."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(["What is the sum? One and one are two."] * 3, 300)
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, "model", Talk(tokenizer, "internlm"))
    return Path("model")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_in_the_place_of_a_file_is_called_so_by_every_verb(
    verb: str, name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).write_text(POINTER)
    assert main([word.replace("MODEL", str(model)) for word in VERBS[verb]]) == 1
    said = capsys.readouterr().err
    assert f"model/{name}: is a pointer of git-lfs, not the file: that was never fetched. In its folder: `git" in said


def test_a_pointer_in_the_place_of_a_file_that_is_not_read_does_no_harm(model: Path) -> None:
    (model / "pytorch_model.bin").write_text(POINTER)
    (model / "tokenizer.model").write_text(POINTER)
    assert open_source(model).weights()


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "adapter_model.bin", "some.gguf"])
def test_a_pointer_is_called_so_in_every_form_of_weights(name: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_text(POINTER)
    for given in (model, model / name):
        with pytest.raises(WeightsError, match=rf"^model/{name}: is a pointer of git-lfs"):
            open_source(given)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_who_reads_the_weights_alone_is_told_of_a_pointer_too(name: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_text(POINTER)
    with pytest.raises(WeightsError, match=rf"^model/{name}: is a pointer of git-lfs"):
        folders.load(model)


@pytest.mark.parametrize("name", ["gpt2", "internlm/internlm-7b", "https://huggingface.co/gpt2/tree/main"])
@pytest.mark.parametrize(
    "words",
    [
        *VERBS.values(),
        ["convert", "model", "o", "--tokenizer", "MODEL"],
        ["convert", "adapter", "o", "--base", "MODEL"],
    ],
    ids=" ".join,
)
def test_a_name_of_the_hub_is_answered_by_every_verb_with_the_command_that_downloads_it(
    words: list[str], name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("internlm").mkdir()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert main([word.replace("MODEL", name) for word in words]) == 1
    wanted = "gpt2" if name.startswith("http") else name
    said = capsys.readouterr().err.strip()
    assert "no such folder, and nothing is downloaded here. " in said
    assert said.endswith(f"From the Hugging Face hub: `hf download {wanted} --local-dir DIR`, then give DIR.")
    assert said.count("\n") == 0


@pytest.mark.parametrize(
    "path", ["./gpt2", "/gpt2", "a/b/c", "x.jsonl", "runs/x.gguf", "s3://b/x", "here", "here/there"]
)
def test_what_cannot_be_a_name_of_the_hub_or_lies_here_is_not_taken_for_one(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/there").mkdir(parents=True)
    require_here(path)


@pytest.mark.parametrize(
    "given", ["tatsu-lab/alpaca", "https://hf.co/datasets/tatsu-lab/alpaca", "hf://datasets/tatsu-lab/alpaca"]
)
def test_a_data_set_and_an_option_are_told_as_such(given: str) -> None:
    command = "`hf download tatsu-lab/alpaca --repo-type dataset --local-dir DIR`"
    with pytest.raises(InternLMError, match=rf"^--data: no such folder.*\(got '{given}'\).*{command}"):
        require_here(given, where="--data", dataset="://" not in given)
