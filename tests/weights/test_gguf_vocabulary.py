"""What a GGUF file says of its tokens; that llama.cpp makes the same ids of it is shown in parity/test_llama_cpp.py."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from internlm.errors import TokenizerError
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.tool_jinja import chat_template
from internlm.text.training import train_bpe
from internlm.weights.gguf import model as gguf
from internlm.weights.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors

library = pytest.importorskip("gguf")


def pieces(**options: Any) -> Tokenizer:
    """Return a small SentencePiece tokenizer."""
    source = Path(gguf.__file__).read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if line.strip()]
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", "user_defined_symbols": ["<eoh>", "<eoa>"], "minloglevel": 2,
        "add_dummy_prefix": False, "hard_vocab_limit": False, **options,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return Tokenizer(model.getvalue(), is_json=False)


def with_tokenizer(tokenizer: Tokenizer, out: Path, template: str | None = None, foreign: Any = None) -> dict[str, Any]:
    """Return the fields of a model with three ids more than its tokenizer."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size + 3, hidden_size=8, num_layers=1, num_heads=2, ffn_size=8)
    gguf.export(of_tensors(build(config, 0).named_parameters()), config, out, Talk(tokenizer, template, foreign))
    (file,) = out.glob("*.gguf")
    fields = library.GGUFReader(file).fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}


def test_a_sentencepiece_vocabulary_is_written_with_scores_and_kinds(tmp_path: Path) -> None:
    tokenizer = pieces()
    said = with_tokenizer(tokenizer, tmp_path / "out", "internlm-v1.0")
    (tmp_path / "model").mkdir()
    saved, _ = tokenizer.save(tmp_path / "model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(saved))
    size = tokenizer.vocab_size
    assert said["tokens"][:size] == model.id_to_piece(list(range(size)))
    assert said["tokens"][size:] == [f"<unused_{size + n}>" for n in range(3)]
    assert said["scores"] == [*model.get_score(list(range(size))), 0, 0, 0]
    kinds = dict(zip(said["tokens"], said["token_type"], strict=True))
    assert [kinds[token] for token in ("<unk>", "<s>", "</s>", "<eoa>")] == [UNKNOWN, CONTROL, CONTROL, CONTROL]
    assert [kinds[token] for token in ("<0x41>", "▁the", f"<unused_{size}>")] == [BYTE, NORMAL, UNUSED]
    assert said["model"] == "llama"
    assert (said["add_space_prefix"], said["add_bos_token"], said["add_eos_token"]) == (False, True, False)
    ids = {role: said[f"{role}_token_id"] for role in ("bos", "eos", "eot", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "eot": tokenizer.special("<eoa>"), "unknown": 0}
    assert said["tokenizer.chat_template"] == chat_template(get_template("internlm-v1.0"))
    assert gguf.read_talk(tmp_path / "out").template == "internlm-v1.0"
    assert gguf.read_talk(tmp_path / "out").tokenizer == tokenizer


def test_a_json_of_pieces_ranks_them_as_its_merges_do(tmp_path: Path) -> None:
    tokenizer = pieces(add_dummy_prefix=True)
    tokenizer.write_tokenizer_json(tmp_path / "tokenizer.json")
    first = with_tokenizer(tokenizer, tmp_path / "a")
    again = Tokenizer.from_json((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    second = with_tokenizer(again, tmp_path / "b")
    assert second["add_space_prefix"] is first["add_space_prefix"] is True
    assert (first["tokens"], first["token_type"]) == (second["tokens"], second["token_type"])
    for left, right in zip(first["scores"], second["scores"], strict=True):
        assert (left <= 0) == (right <= 0)
    merged = [id_ for id_, token in enumerate(first["tokens"]) if first["token_type"][id_] == NORMAL and len(token) > 1]
    order = [sorted(merged, key=lambda id_, said=said: (-said["scores"][id_], id_)) for said in (first, second)]
    assert order[0] == order[1]
    assert len(merged) > 20
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    merges = spec["model"]["merges"]
    for changed in (merges[:-1], merges[::2] + merges[1::2]):
        spec["model"]["merges"] = changed
        with pytest.raises(TokenizerError, match=r"its merges are not those of a SentencePiece.*tokenizer\.model"):
            with_tokenizer(Tokenizer.from_json(json.dumps(spec)), tmp_path / "c")


def json_of(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    tokenizer.write_tokenizer_json(folder / "tokenizer.json")
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_byte_level_vocabulary_is_written_with_merges_and_a_known_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("internlm").propagate = True
    tokenizer = train_bpe(["What is the sum of 12 and 30? The sum is 42."], 290)
    spec, size = json_of(tokenizer, tmp_path), tokenizer.vocab_size
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": size, "content": "<think>", "special": False})
    roles = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}
    tokenizer = Tokenizer(json.dumps(spec).encode(), is_json=True, roles=roles)
    said = with_tokenizer(tokenizer, tmp_path / "out", "internlm")
    assert said["model"] == "gpt2"
    assert said["merges"] == [p if isinstance(p, str) else " ".join(p) for p in spec["model"]["merges"]]
    assert said["tokens"][:3] == ["<|bos|>", "<|eos|>", "<|pad|>"]
    assert said["token_type"][:8] == [CONTROL] * 7 + [NORMAL]
    assert said["token_type"][size:] == [USER_DEFINED, UNUSED, UNUSED, UNUSED]
    assert (said["bos_token_id"], said["eos_token_id"], said["padding_token_id"]) == (0, 1, 2)
    assert said["eot_token_id"] == tokenizer.special("<|end|>")
    assert said["pre"] == "dbrx"
    assert "a line break with spaces after it" in caplog.text
    assert said["tokenizer.chat_template"] == chat_template(get_template("internlm"))


def test_a_tokenizer_that_llama_cpp_cannot_repeat_is_refused(tmp_path: Path) -> None:
    spec = json_of(train_bpe(["What is the sum?"], 280, pattern=r"\w+|\W+"), tmp_path)
    lower = json_of(train_bpe(["What is the sum?"], 280), tmp_path) | {"normalizer": {"type": "Lowercase"}}
    for tokenizer, message in (
        (Tokenizer.from_json(json.dumps(spec)), r"cuts words.*w\+"),
        (Tokenizer.from_json(json.dumps(lower)), "normalises its text.*Lowercase"),
        (pieces(model_type="unigram"), "only SentencePiece models of the BPE kind"),
        (pieces(normalization_rule_name="nfkc"), "only SentencePiece models of the BPE kind"),
        (pieces(byte_fallback=False, vocab_size=150), "no token for every byte"),
    ):
        with pytest.raises(TokenizerError, match=message):
            with_tokenizer(tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "foreign", "adds_bos"),
    [
        (None, None, True),
        ("chatml", None, False),
        ("internlm2", None, True),
        (None, "{{ bos_token }}x", True),
        (None, "{{ messages }}", False),
    ],
)
def test_bos_is_put_before_a_prompt_where_training_had_it(
    template: str | None, foreign: str | None, adds_bos: bool, tmp_path: Path
) -> None:
    names = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    said = with_tokenizer(train_bpe(["a sum of all"], 280, names), tmp_path / "out", template, foreign)
    assert said["add_bos_token"] is adds_bos
    if foreign:
        assert said["tokenizer.chat_template"] == foreign


def test_no_text_ends_at_a_token_of_text(tmp_path: Path) -> None:
    tokenizer = train_bpe(["a sum of all"], 270, ["<|x|>", "<|y|>"])
    assert tokenizer.eos_id is None
    assert with_tokenizer(tokenizer, tmp_path / "out")["eos_token_id"] == tokenizer.special("<|x|>")
