"""The exported tokenizer and chat template in Transformers, against our own ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm.cli import main
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.text.chat import Message, render_prompt, stop_ids
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk, read_talk
from internlm.weights.weight import of_tensors

reference = pytest.importorskip("transformers")
reference.utils.logging.disable_progress_bar()

SHARED = Path(__file__).parents[2].parent / "shared"
V7 = SHARED / "tokenizer" / "V7_sft.model"
NAMES = ["<s>", "</s>", "<eoh>", "<eoa>", "<unk>", "<TOKENS_UNUSED_2>", "<TOKENS_UNUSED_140>"]
"""Structure of the published vocabulary."""

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "What is 2 + 2?"),
    Message("assistant", "4. 你好 👋"),
    Message("user", "And <b>3</b>?\n\nNow."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["What is the sum? Be brief, and say 4 now.", "你好 👋"] * 3, 300)


def export(folder: Path, tokenizer: Tokenizer, template: str | None) -> None:
    shape = ModelConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16)
    model = build(shape, 0)
    folders.export(of_tensors(model.named_parameters()), shape, folder, Talk(tokenizer, template))


def test_the_chat_template_gives_our_ids_with_one_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", tokenizer, "internlm")
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    ours = render_prompt(CONVERSATION, get_template("internlm"), tokenizer)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ours
    assert ids.count(tokenizer.bos_id) == 1
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # Servers render first and then encode with special tokens on.
    assert theirs(text)["input_ids"] == ours


def test_without_a_template_plain_text_has_our_ids_and_bos_is_written_once(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    export(tmp_path / "out", tokenizer, None)
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    ours = tokenizer.encode("What is the sum?")
    assert theirs("What is the sum?")["input_ids"] == ours
    assert theirs(theirs.bos_token + "What is the sum?")["input_ids"] == [tokenizer.bos_id, *ours]
    assert theirs.chat_template is None


def test_text_comes_back_as_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", tokenizer, "internlm")
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = " two  spaces , a comma 你好 👋\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(theirs(text)["input_ids"]) == text
    ours = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == ours


def test_every_stop_is_in_the_generation_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", tokenizer, "internlm")
    loaded = reference.GenerationConfig.from_pretrained(tmp_path / "out")
    assert loaded.eos_token_id == stop_ids(get_template("internlm"), tokenizer)
    assert tokenizer.special("<|end|>") in loaded.eos_token_id
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_id


def test_our_own_tokenizer_is_read_back_unchanged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", tokenizer, "internlm")
    assert Tokenizer.load(tmp_path / "out") == tokenizer
    assert read_talk(tmp_path / "out").template == "internlm"


def foreign_folder(folder: Path, tokenizer: Tokenizer, **described: object) -> Path:
    """Write a chat model as others do: its own template, several ends, a tokenizer that puts bos before every text."""
    export(folder, tokenizer, None)
    (folder / "manifest.json").unlink()
    spec = json.loads((folder / "tokenizer.json").read_text())
    sequence = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>", **described}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 6]}))
    return folder


FOREIGN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize("in_file", [False, True])
def test_a_chat_format_of_others_and_its_ends_are_carried_along(
    tokenizer: Tokenizer, tmp_path: Path, in_file: bool
) -> None:
    source = foreign_folder(tmp_path / "a", tokenizer, chat_template="old" if in_file else FOREIGN)
    if in_file:
        (source / "chat_template.jinja").write_text(FOREIGN)
    assert main(["convert", str(source), str(tmp_path / "b")]) == 0
    messages = [{"role": "user", "content": "say 4"}]
    before, after = (reference.AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    assert after.apply_chat_template(messages, tokenize=False) == "<|bos|>[user]say 4<|end|>"
    assert after("say 4").input_ids == before("say 4").input_ids == [tokenizer.bos_id, *tokenizer.encode("say 4")]
    assert reference.GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [1, 6]
    assert "a chat model (its own format)" in (tmp_path / "b" / "README.md").read_text()
    assert Tokenizer.load(tmp_path / "b") == Tokenizer.load(source) == tokenizer


def test_our_format_with_a_tokenizer_that_adds_bos_has_it_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = foreign_folder(tmp_path / "a", tokenizer, chat_template=FOREIGN)
    assert main(["convert", str(source), str(tmp_path / "b"), "--template", "internlm"]) == 0
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path / "b")
    messages = [{"role": "user", "content": "say 4"}]
    ours = render_prompt([Message("user", "say 4")], get_template("internlm"), tokenizer)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs(text).input_ids == ours
    assert ours.count(tokenizer.bos_id) == 1
    assert Tokenizer.load(tmp_path / "b") == Tokenizer.load(source), "what is added around a text decides no id"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export with InternLM's published vocabulary."""
    if not V7.exists():
        pytest.skip(f"{V7} is not here")
    tokenizer = Tokenizer.load(V7)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8)
    folder = tmp_path_factory.mktemp("published") / "out"
    folders.export(of_tensors(build(shape, 0).named_parameters()), shape, folder, Talk(tokenizer, "internlm-v1.1"))
    return folder


@pytest.fixture(scope="module")
def published_there(published: Path) -> Any:
    """Return its tokenizer in Transformers, which takes seconds."""
    return reference.AutoTokenizer.from_pretrained(published, trust_remote_code=False)


def strings_of(path: Path) -> Iterator[str]:
    """Yield every text in a JSON-lines or CSV file."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if path.suffix != ".jsonl":
            yield line
            continue
        waiting = [json.loads(line)] if line else []
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value


def mixed_texts(share: int) -> Iterator[str]:
    """Yield texts of many languages and of code, `share` bytes of each file, then as many random ones."""
    for path in sorted(p for p in SHARED.glob("*/**/*") if p.suffix in (".jsonl", ".csv")):
        taken = 0
        for text in strings_of(path):
            yield text
            taken += len(text.encode())
            if taken > share:
                break
    draw = random.Random(0)
    ranges = [(0x20, 0x7F), (0, 0x20), (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0x1F300, 0x1FAFF), (0xA0, 0x2FFF)]
    for _ in range(share // 50):
        low, high = draw.choice([*ranges, (0, 0xD800), (0xE000, 0x110000)])
        yield "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 60)))
        yield draw.randbytes(draw.randrange(1, 80)).decode("utf-8", "replace")
        yield draw.randbytes(draw.randrange(1, 80)).decode("latin-1")


def test_the_exported_tokenizer_json_equals_sentencepiece_on_megabytes(
    published_there: Any, request: pytest.FixtureRequest
) -> None:
    share, least = (300_000, 5_000_000) if request.config.getoption("--proof") else (2_500, 150_000)
    sentencepiece = pytest.importorskip("sentencepiece")
    source = sentencepiece.SentencePieceProcessor(model_file=str(V7))
    theirs = published_there
    assert theirs.is_fast
    size = count = 0
    batch: list[str] = []
    for text in [*mixed_texts(share), ""]:
        # SentencePiece takes a typed ▁ for a space, and knows no name of structure but its user-defined pieces.
        batch += [] if "▁" in text or any(name in text for name in ("<s>", "</s>", "<unk>")) else [text]
        if len(batch) < 2000 and text:
            continue
        ids = source.encode(batch)
        assert theirs(batch, add_special_tokens=True)["input_ids"] == ids
        decoded = theirs.batch_decode(ids)
        assert decoded == batch == [source.decode(one) for one in ids]
        size, count, batch = size + sum(len(one.encode()) for one in batch), count + len(batch), []
    print(f"{size:,} bytes in {count:,} texts")
    assert size > least, f"{size} bytes in {count} texts"


def test_structure_and_stops_of_the_published_vocabulary_are_where_engines_look(
    published: Path, published_there: Any
) -> None:
    theirs = published_there
    tokenizer = Tokenizer.load(V7)
    assert theirs.convert_tokens_to_ids(NAMES) == [tokenizer.special(name) for name in NAMES]
    assert theirs("a<eoa>b").input_ids == [*tokenizer.encode("a"), 103028, *tokenizer.encode("b")]
    assert json.loads((published / "generation_config.json").read_text())["eos_token_id"] == [2, 103028]
    described = json.loads((published / "tokenizer_config.json").read_text())
    mapped = json.loads((published / "special_tokens_map.json").read_text())
    assert (described["bos_token"], described["eos_token"]) == ("<s>", "</s>")
    assert {role: token["content"] for role, token in mapped.items()} == {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    ours = render_prompt(CONVERSATION, get_template("internlm-v1.1"), tokenizer)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for ids in (
        theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        theirs(text).input_ids,
        theirs(text, add_special_tokens=False).input_ids,
        theirs.encode(text),
    ):
        assert ids == ours
        assert ids.count(1) == 1
