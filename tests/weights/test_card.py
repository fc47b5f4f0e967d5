"""The model card of an export."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import yaml

from internlm.model import lora
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import adapters
from internlm.weights import transformers as folders
from internlm.weights.card import UNKNOWN, card
from internlm.weights.gguf import model as gguf
from internlm.weights.native import write as native_write
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors

SHAPE = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, ffn_size=40, context_length=64)
NOTES = {
    "name": "Tiny",
    "source": "runs/a/checkpoints/step-00000010",
    "recipe": {"data": {"train": {"web": {"path": "x"}, "书": {"path": "y"}}}, "optim": {"lr": 0.001}},
    "step": 1200,
    "tokens": 2_700_000,
    "evaluation": {"loss, nats per token": 2.5},
    "limits": "It knows one library only.",
    "licence": "Apache-2.0",
}


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return {title: content.strip() for title, content in zip(parts[1::2], parts[2::2], strict=True)}


def test_what_nobody_recorded_is_said_to_be_not_recorded() -> None:
    text = card(SHAPE, "LlamaForCausalLM", "float32", Talk(), {})
    found = sections(text)
    assert list(found) == ["Use", "Training", "Data", "Evaluation", "Limits", "Licence"]
    assert found["Data"] == found["Evaluation"] == UNKNOWN
    assert UNKNOWN.lower() in found["Training"]
    assert found["Licence"].startswith(UNKNOWN)
    assert "64 tokens" in found["Limits"]
    assert "license" not in yaml.safe_load(text.split("---")[1])


def test_what_was_recorded_stands_in_its_section() -> None:
    text = card(SHAPE, "LlamaForCausalLM", "float32", Talk(), NOTES)
    found = sections(text)
    assert "# Tiny" in text
    assert "2,700,000 tokens in 1,200 steps" in found["Training"]
    assert "step-00000010" in found["Training"]
    written = re.search(r"```yaml\n(.*?)```", found["Training"], re.DOTALL)
    assert written is not None
    assert yaml.safe_load(written[1]) == NOTES["recipe"]
    assert found["Data"] == "- `web`\n- `书`"
    assert "| loss, nats per token | 2.5 |" in found["Evaluation"]
    assert "It knows one library only." in found["Limits"]
    assert "Apache-2.0" in found["Licence"]
    assert yaml.safe_load(text.split("---")[1])["license"] == "Apache-2.0"


def test_an_export_carries_its_card_and_the_lines_for_its_kind(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is the sum?"] * 3, 300)
    weights = of_tensors(build(SHAPE, 0).named_parameters())
    for name, talk, remote_code in (("base", None, False), ("chat", "internlm", False), ("code", "internlm", True)):
        options = folders.ExportOptions(notes={"licence": "MIT"}, remote_code=remote_code)
        folders.export(weights, SHAPE, tmp_path / name, Talk(tokenizer, talk), options)
    base, chat, code = ((tmp_path / name / "README.md").read_text() for name in ("base", "chat", "code"))
    assert "a base model" in base
    assert "bos_token" in sections(base)["Use"]
    assert "apply_chat_template" in sections(chat)["Use"]
    assert "model.chat(tokenizer" not in chat
    assert "trust_remote_code" not in chat
    assert 'model.chat(tokenizer, "hello", history=[])' in sections(code)["Use"]
    assert sections(code)["Use"].count("trust_remote_code=True") == 2


@pytest.mark.parametrize(("template", "puts_bos"), [(None, False), (None, True), ("internlm", False)])
def test_the_lines_of_the_card_run(
    tmp_path: Path, template: str | None, puts_bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    tokenizer = train_bpe(["What is the sum? Once"] * 3, 300)
    if puts_bos:  # as Llama 3's file says
        library = tokenizers.Tokenizer.from_str(tokenizer._data.decode())
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.special("<|bos|>"))]
        )
        tokenizer = Tokenizer.from_json(library.to_str())
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, tmp_path / "out", Talk(tokenizer, template))
    lines = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr("builtins.print", lambda text: said.append(text))
    said: list[str] = []
    exec(lines[1].replace("**inputs", "**inputs, max_new_tokens=2"))
    assert len(said) == 1
    assert said[0].startswith("<|bos|>")
    assert said[0].count("<|bos|>") == 1


def test_every_kind_of_export_says_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    shape = replace(SHAPE, ffn_size=256)
    model = build(shape, 0)
    weights, talk = of_tensors(model.named_parameters()), Talk(train_bpe(["What is the sum?"] * 3, 300))
    known = folders.ExportOptions(notes={"licence": "MIT", "tokens": 1_000_000, "source": "runs/a"})
    gguf.export(weights, shape, tmp_path / "gguf", talk, known)
    native_write.export(weights, shape, tmp_path / "native", talk, known)
    config = lora.LoraConfig(rank=2, targets=("*.wq",))
    lora.apply_lora(model, config)
    lora.initialize_lora(model, 0)
    adapters.export(adapters.of_model(model, config), tmp_path / "adapter", known)
    for kind in ("gguf", "native", "adapter"):
        text = (tmp_path / kind / "README.md").read_text(encoding="utf-8")
        found = sections(text)
        assert list(found) == ["Use", "Training", "Data", "Evaluation", "Limits", "Licence"]
        assert "1,000,000 tokens" in found["Training"]
        assert "runs/a" in found["Training"]
        assert found["Evaluation"] == UNKNOWN
        assert "64 tokens" in found["Limits"]
        assert "MIT" in found["Licence"]
        assert yaml.safe_load(text.split("---")[1])["license"] == "MIT"
