"""Tokenizers shared by the tests of this room: the published InternLM one, where it is at hand, and small own ones."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
V7 = SHARED / "tokenizer" / "V7_sft.model"


def own_sources() -> list[str]:
    """Return this package's own text room: a corpus of code that is always there, with some Chinese and emoji."""
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "internlm" / "text").glob("*.py"))]
    return [*sources, "今天天气晴朗，适合出门散步。\n" * 20, "🙂 naïve café\t\r\n" * 20]


@pytest.fixture(scope="session")
def sources() -> list[str]:
    return own_sources()


@pytest.fixture(scope="session")
def v7() -> Tokenizer:
    if not V7.exists():
        pytest.skip(f"{V7} is not here")
    return Tokenizer.load(V7)


@pytest.fixture(scope="session")
def v7_json(v7, tmp_path_factory) -> Tokenizer:
    """The same vocabulary as tokenizer.json."""
    path = tmp_path_factory.mktemp("v7") / "tokenizer.json"
    v7.write_tokenizer_json(path)
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A byte-level tokenizer of our own."""
    return train_bpe(own_sources(), 700)


@pytest.fixture(scope="session")
def wide() -> Tokenizer:
    """A byte-level tokenizer that has the special tokens of every template."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names += ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    return train_bpe(own_sources(), 700, names)


def _train_sentencepiece(**options) -> bytes:
    """Return a small SentencePiece BPE model with bytes, without normalisation."""
    lines = [line for text in own_sources() for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 900, "byte_fallback": True, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", "user_defined_symbols": ["<eoh>", "<eoa>", "#"],
        "character_coverage": 0.99, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings, **options}
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def train_sentencepiece():
    return _train_sentencepiece


@pytest.fixture(scope="session")
def prefixed() -> Tokenizer:
    """A SentencePiece tokenizer that puts a space before every text, as Llama 1 and 2 do."""
    return Tokenizer(_train_sentencepiece(add_dummy_prefix=True), is_json=False)


@pytest.fixture(scope="session")
def prefixed_json(prefixed, tmp_path_factory) -> Tokenizer:
    """The same as tokenizer.json, with the `Prepend` normaliser."""
    path = tmp_path_factory.mktemp("prefixed") / "tokenizer.json"
    prefixed.write_tokenizer_json(path)
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def metaspace(prefixed_json, tmp_path_factory) -> Tokenizer:
    """The same with a Metaspace pre-tokeniser, which puts no space before a text that begins with one."""
    spec = json.loads(prefixed_json.path.read_text(encoding="utf-8"))
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return Tokenizer.from_json(json.dumps(spec))


ALL = ["v7", "v7_json", "small", "wide", "prefixed", "prefixed_json", "metaspace"]


@pytest.fixture(params=ALL)
def tokenizer(request) -> Tokenizer:
    """Each of the tokenizers above in turn."""
    return request.getfixturevalue(request.param)
