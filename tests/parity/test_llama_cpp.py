"""GGUF exports in llama.cpp itself: logits, greedy tokens and token ids. Needs `pip install llama-cpp-python`."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor

from internlm.model.config import (
    ExpertsConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from internlm.model.transformer import Transformer, build
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import PATTERN, train_bpe
from internlm.weights import load
from internlm.weights.gguf import model as gguf
from internlm.weights.gguf import vocabulary
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors
from tests.models import random_model

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
Jinja2ChatFormatter = pytest.importorskip("llama_cpp.llama_chat_format").Jinja2ChatFormatter

ROOT = Path(__file__).parents[2]
V7 = ROOT.parent / "shared" / "tokenizer" / "V7_sft.model"
SHAPE = ModelConfig(
    vocab_size=97, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=64, context_length=128
)
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "biases": {"qkv_bias": True, "output_bias": True},
    "qkv biases": {"qkv_bias": True},
    "wide heads": {"head_dim": 16, "qkv_bias": True},
    "tied": {"tie_embeddings": True},
    "base": {"rope": RopeConfig(base=5e5)},
    "linear": {"rope": RopeConfig(scaling=LinearScaling(factor=4.0))},
    "yarn": {"rope": RopeConfig(scaling=YarnScaling(factor=4.0, original_length=32))},
    "yarn factor": {"rope": RopeConfig(scaling=YarnScaling(factor=4.0, original_length=32, attention_factor=1.5))},
    "yarn betas": {"rope": RopeConfig(scaling=YarnScaling(factor=4.0, original_length=32, beta_fast=8.0))},
    "llama3": {"rope": RopeConfig(scaling=Llama3Scaling(factor=8.0, original_length=32))},
    "experts": {"experts": ExpertsConfig(count=4, per_token=2)},
    "experts and biases": {"experts": ExpertsConfig(count=4, per_token=3), "qkv_bias": True, "output_bias": True},
    "head norms": {"qk_norm": True, "head_dim": 16},
    "head norms and experts": {"qk_norm": True, "experts": ExpertsConfig(count=4, per_token=2)},
    "head norms and yarn": {"qk_norm": True, "rope": RopeConfig(scaling=YarnScaling(factor=4.0, original_length=32))},
}


def opened(folder: Path, **options: object):  # type: ignore[no-untyped-def]
    """Return llama.cpp's model of a folder, which computes in fp32 on one thread."""
    (file,) = folder.glob("*.gguf")
    fp32 = {"type_k": 0, "type_v": 0, "flash_attn": False}
    return llama_cpp.Llama(
        str(file), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **fp32, **options
    )


def logits(model: Transformer, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model.head.logits(model(torch.tensor([ids])))[0]


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_llama_cpp_computes_our_logits(changes: dict[str, object], tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, **{"head_dim": 0, **changes}))  # type: ignore[arg-type]
    gguf.export(of_tensors(model.named_parameters()), model.config, tmp_path / "out")
    ids = torch.randint(97, (100,)).tolist()
    theirs = opened(tmp_path / "out")
    theirs.eval(ids)
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    expected = logits(model, ids)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_llama_cpp_gives_our_greedy_tokens(tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, qkv_bias=True, output_bias=True))
    gguf.export(of_tensors(model.named_parameters()), model.config, tmp_path / "out")
    engine = opened(tmp_path / "out")
    chosen = []
    for _ in range(20):
        ours = theirs = torch.randint(97, (10,)).tolist()
        engine.reset()
        engine.eval(theirs)
        for _ in range(8):
            ours = [*ours, int(logits(model, ours)[-1].argmax())]
            theirs = [*theirs, int(engine.scores[len(theirs) - 1].argmax())]
            engine.eval(theirs[-1:])
        assert theirs == ours
        chosen += ours[10:]
    assert len(set(chosen)) > 8


def test_8_bit_weights_are_near_in_llama_cpp(tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, qkv_bias=True))
    gguf.export(of_tensors(model.named_parameters()), model.config, tmp_path / "out", quantization="q8_0")
    ids = torch.randint(97, (50,)).tolist()
    theirs = opened(tmp_path / "out")
    theirs.eval(ids)
    (file,) = (tmp_path / "out").glob("*.gguf")
    stored = logits(load.read_model(model.config, gguf.open_weights(file)).float(), ids)
    found, exact = torch.from_numpy(np.array(theirs.scores[:50])), logits(model, ids)
    # llama.cpp rounds activations to 8 bits too: as much again.
    assert 1e-4 < (stored - exact).std() < 0.1 * exact.std()
    assert (found - stored).std() < 0.1 * exact.std()


def sources() -> list[str]:
    """Return this package's own text room: code and prose that are always there, with some Chinese and emoji."""
    found = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "internlm" / "text").glob("*.py"))]
    return [
        *found,
        "今天天气晴朗，适合出门散步。\n" * 20,
        "🙂 naïve café\t\r\n" * 20,
        "I'll say it's 12345 o'clock!!\n",
    ]


def pieces(**options: object) -> Tokenizer:
    """Return a small SentencePiece BPE tokenizer with bytes."""
    lines = [line for text in sources() for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 900, "byte_fallback": True, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", "user_defined_symbols": ["<eoh>", "<eoa>", "#"],
        "character_coverage": 0.99, "minloglevel": 2, "add_dummy_prefix": False, **options,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return Tokenizer(model.getvalue(), is_json=False)


def json_of(tokenizer: Tokenizer) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.write_tokenizer_json(Path(folder) / "tokenizer.json")
        return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


def words(patterns: tuple[str, ...], ignores_merges: bool) -> Tokenizer:
    """Return a byte-level tokenizer that cuts words by these regular expressions."""
    spec = json.loads(json_of(train_bpe(sources(), 700, pattern=patterns[-1])))
    spec["model"]["ignore_merges"] = ignores_merges
    if len(patterns) > 1:
        spec["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    return Tokenizer.from_json(json.dumps(spec))


TEXTS = [
    "", " ", "  ", "\n", "\r\n", "\t\t x", " leading", "trailing ", "a\0b", "🙂👩\u200d👩\u200d👧\u200d👦", "é",
    "e\u0301", "ﬁ Å ½", "\ufeffx", "\U0010ffff", "今天天气晴朗，适合出门散步。Hello 你好", "１２３", "1234567890 3.14",
    "_a_b_",    "I'LL we've It's don't", "##", "#0", "x\n\ny\n\n\nz", "a  b   c", "a \n b", "(x);\n\n\ty", "naïve café",
    "\u3000全角", "def f(x):\n        return x\n\n\n", "<eo", "!?!\n\n", "'", "''s", "\xa0\xa0x", "\x85y",
    "\u2028z", "Ω≈ç√", "नमस्ते",    "สวัสดี", "مرحبا", "Ⅷ²³",
]  # fmt: skip


def mixed(count: int, seed: int) -> list[str]:
    """Return random texts of words, spaces, digits and punctuation of several scripts."""
    generator = random.Random(seed)
    parts = [
        *"aZ09 .,;'\"()é天日ёあ한🙂½\t\n",
        "  ",
        "\r\n",
        "the ",
        " of",
        "return",
        "'s",
        "12",
        "今天",
        "    ",
        "->",
        "e\u0301",
    ]
    return ["".join(generator.choices(parts, k=generator.randrange(1, 30))) for _ in range(count)]


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "pieces": pieces,
    "pieces with a prefix": lambda: pieces(add_dummy_prefix=True),
    "pieces as json": lambda: Tokenizer.from_json(json_of(pieces())),
    "v7": lambda: Tokenizer.load(V7),
    "v7 as json": lambda: Tokenizer.from_json(json_of(Tokenizer.load(V7))),
    **{
        "own" if PATTERN in key[0] else f"{name} {number}": partial(words, *key)
        for number, (key, name) in enumerate(vocabulary.PRE.items())
    },
}


def exported(tokenizer: Tokenizer, folder: Path, template: str | None = None):  # type: ignore[no-untyped-def]
    """Return llama.cpp's tokenizer of a model with some ids more than ours has."""
    config = replace(SHAPE, vocab_size=tokenizer.vocab_size + 7, num_layers=1)
    gguf.export(of_tensors(build(config, 0).named_parameters()), config, folder, Talk(tokenizer, template))
    return opened(folder, vocab_only=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_gives_our_ids(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of every text without a typed `▁` or name of a special token; with our own pattern, without indentation."""
    if kind.startswith("v7") and not V7.exists():
        pytest.skip(f"{V7} is not here")
    tokenizer = TOKENIZERS[kind]()
    theirs = exported(tokenizer, tmp_path / "out")
    texts = TEXTS + mixed(20_000 if request.config.getoption("--proof") else 500, 1)
    texts += [part for text in sources() for part in text.split("\n\n\n")]
    left_out = "|".join(map(re.escape, ["▁", *tokenizer.special_tokens]))
    if kind == "own":
        left_out += r"|[\r\n][ \t]"
    texts = [text for text in texts if not re.search(left_out, text)]
    assert len(texts) > 300
    different = [text for text in texts if theirs.tokenize(text.encode(), add_bos=False) != tokenizer.encode(text)]
    assert different == []


@pytest.mark.parametrize("template", ["internlm", "internlm-v1.1"])
def test_chat_prompts_and_their_ends_are_ours_in_llama_cpp(template: str, tmp_path: Path) -> None:
    if template == "internlm-v1.1" and not V7.exists():
        pytest.skip(f"{V7} is not here")
    tokenizer = Tokenizer.load(V7) if template == "internlm-v1.1" else train_bpe(sources(), 700)
    theirs = exported(tokenizer, tmp_path / "out", template)
    names = {role: tokenizer.decode([getattr(tokenizer, f"{role}_id")]) for role in ("bos", "eos")}
    form = Jinja2ChatFormatter(theirs.metadata["tokenizer.chat_template"], names["eos"], names["bos"])
    turns = [("system", "Be brief."), ("user", "今天 hello?"), ("assistant", "Yes."), ("user", "Why?")]
    prompt = form(messages=[{"role": role, "content": content} for role, content in turns]).prompt
    expected = render_prompt([Message(*turn) for turn in turns], get_template(template), tokenizer)
    assert theirs.tokenize(prompt.encode(), add_bos=False, special=True) == expected
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
    ends = [id_ for id_ in range(tokenizer.vocab_size) if llama_cpp.llama_vocab_is_eog(vocabulary, id_)]
    assert ends == sorted(Talk(tokenizer, template).stop_ids())
    assert llama_cpp.llama_vocab_get_add_bos(vocabulary)
