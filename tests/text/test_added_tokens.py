"""Tokens that files of Transformers add to a `.model`, or rename in it; and roles that they say nobody has."""

import json
import pickle

import pytest

from internlm.errors import TokenizerError
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(train_sentencepiece):
    """A vocabulary with a piece of no use, as InternLM2's has `[UNUSED_TOKEN_145]`, which its chat models rename."""
    return train_sentencepiece(user_defined_symbols=["<eoh>", "[UNUSED]"], add_dummy_prefix=False)


def write(folder, model, older=None, newer=None, **config):
    """Write a tokenizer as Transformers does: tokens by name in one file, or by id in the other."""
    (folder / "tokenizer.model").write_bytes(model)
    if older is not None:
        (folder / "added_tokens.json").write_text(json.dumps(older))
    decoder = {str(id_): {"content": name, "special": True} for id_, name in (newer or {}).items()}
    described = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return Tokenizer.load(folder)


def test_added_and_renamed_tokens_are_structure_and_text_keeps_its_ids(tmp_path, model):
    plain = Tokenizer(model, is_json=False)
    size, unused = plain.vocab_size, plain.special("[UNUSED]")
    newer = {unused: "<|im_start|>", size + 2: "<|im_end|>", 1: "<s>"}
    tokenizer = write(tmp_path, model, {"<|im_end|>": size + 2, "<pad>": size}, newer, eos_token="<|im_end|>")
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.eos_id == tokenizer.special("<|im_end|>") == size + 2
    assert tokenizer.special("<|im_start|>") == unused
    assert "[UNUSED]" not in tokenizer.special_tokens
    assert tokenizer.decode([size, unused, *tokenizer.encode("a")]) == "<pad><|im_start|>a"
    typed = "def f(x): <|im_start|>user<|im_end|> [UNUSED] <eoh> 今天\n"
    ids = tokenizer.encode(typed)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == typed
    assert tokenizer.encode("def f(x): return 今天") == plain.encode("def f(x): return 今天")
    assert tokenizer.fingerprint != plain.fingerprint
    prompt = render_prompt([Message("user", "a")], get_template("chatml"), tokenizer)
    assert prompt.count(unused) == 2


def test_they_are_in_every_form_that_the_tokenizer_takes_on(tmp_path, model):
    (tmp_path / "in").mkdir()
    size = Tokenizer(model, is_json=False).vocab_size
    tokenizer = write(tmp_path / "in", model, newer={size: "<|im_start|>", size + 1: "<|im_end|>"})
    tokenizer.save(tmp_path / "out")
    tokenizer.write_tokenizer_json(tmp_path / "tokenizer.json")
    for other in (Tokenizer.load(tmp_path / "out"), pickle.loads(pickle.dumps(tokenizer))):
        assert other == tokenizer
    for other in (Tokenizer.load(tmp_path / "out"), Tokenizer.load(tmp_path / "tokenizer.json")):
        assert other.special("<|im_end|>") == size + 1
        assert other.encode("x <|im_end|>") == tokenizer.encode("x <|im_end|>")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.convert_tokens_to_ids("<|im_end|>") == size + 1


def test_what_the_model_has_already_changes_nothing(tmp_path, model):
    plain = Tokenizer(model, is_json=False)
    same = {id_: name for name, id_ in plain.special_tokens.items()}
    assert write(tmp_path, model, newer=same).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("added", "said"),
    [({"</s>": 5000}, r"gives the token '</s>' two ids, one of them 5000"), ({"<x>": "y"}, "cannot be read")],
)
def test_tokens_that_cannot_be_added_are_named(tmp_path, model, added, said):
    with pytest.raises(TokenizerError, match=said):
        write(tmp_path, model, older=added)


def test_a_role_that_a_file_says_nobody_has_is_not_guessed(tmp_path, small, model):
    """`<|bos|>` and `<s>` are there, and a text is not to begin with them."""
    small.save(tmp_path / "json")
    config = tmp_path / "json" / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<|eos|>"}))
    (tmp_path / "model").mkdir()
    for tokenizer in (Tokenizer.load(tmp_path / "json"), write(tmp_path / "model", model, bos_token=None)):
        assert tokenizer.bos_id is None
        assert tokenizer.eos_id is not None
        tokenizer.save(tmp_path / f"again-{tokenizer.vocab_size}")
        assert Tokenizer.load(tmp_path / f"again-{tokenizer.vocab_size}") == tokenizer
    config.unlink()
    assert Tokenizer.load(tmp_path / "json").bos_id is not None, "nothing is said: the usual name counts"


def test_a_vocabulary_of_other_files_is_not_taken_for_none_in_silence(tmp_path, caplog):
    (tmp_path / "vocab.json").write_text("{}")
    assert Tokenizer.find(tmp_path) is None
    assert "has a vocab.json, and no tokenizer.json" in caplog.text
    assert f"AutoTokenizer.from_pretrained('{tmp_path}').save_pretrained('{tmp_path}')" in caplog.text
