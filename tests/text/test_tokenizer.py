import hashlib
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm.errors import StorageError, TokenizerError
from internlm.text.tokenizer import Tokenizer, well_formed
from tests.text.conftest import ALL

SHARED = Path(__file__).parents[2].parent / "shared"

many = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
TYPED = [
    "<s>",
    "</s>",
    "<eoh>",
    "<eoa>",
    "<TOKENS_UNUSED_2>",
    "<|bos|>",
    "<|end|>",
    "<|im_end|>",
    "<unk>",
    "<0x41>",
    "▁",
]
spiked_text = st.lists(st.sampled_from([*TYPED, "<", ">", "eoa>", " ", "  ", "\n", "a", "天", "🙂", "\0"])).map("".join)
TRICKY = [
    "", " ", "  ", "\n", "\r\n", "\t\t x", " leading", "trailing ", "a\0b", "\0", "▁", "▁▁ ▁a", "a▁", "🙂👩‍👩‍👧‍👦",
    "é", "e\u0301", "ﬁ Å ½", "\ufeffx", "\U0010ffff", "def f(x):\n        return x\n\n\n", "今天天气晴朗", "１２３",
    "1234567890", "<eoa", "<<eoa>>", "<eo<eoa>a>", "<eoa><eoa>", "<|end|><|end|>", "<s></s>", " <eoa> ", "#",
    "##", "#0", "<0x41>",
]  # fmt: skip


def test_the_published_vocabulary_gives_the_published_ids(v7):
    assert v7.vocab_size == 103168
    assert (v7.bos_id, v7.eos_id, v7.pad_id) == (1, 2, None)
    assert v7.fingerprint == hashlib.sha256(v7.path.read_bytes()).hexdigest()
    assert v7.special("<eoh>") == 103027
    assert v7.special("<eoa>") == 103028
    assert v7.special("<TOKENS_UNUSED_2>") == 103029
    assert len(v7.special_tokens) == 3 + 141
    table = {
        "<|User|>:": [333, 352, 1621, 352, 27232],
        "<|Bot|>:": [333, 352, 23845, 352, 27232],
        "<|System|>:": [333, 352, 2472, 352, 27232],
        "hello": [15115],
        "今天天气晴朗适合出门散步": [67577, 69095, 63010, 61770, 67783, 69301, 74732],
        " ": [262],
        "\t": [363],
        "\n": [364],
        "\n\n": [402],
    }
    assert v7.encode_batch(list(table)) == list(table.values())


@many
@given(text=unicode_text | spiked_text)
def test_decoding_what_was_encoded_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@many
@given(text=unicode_text | spiked_text)
def test_no_text_becomes_a_special_token(tokenizer, text):
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))


def test_tricky_strings_survive(tokenizer):
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special=True) == text
        assert tokenizer.special_ids.isdisjoint(ids), text


def test_every_special_name_typed_in_text_stays_text(tokenizer):
    for name, id_ in tokenizer.special_tokens.items():
        for text in (name, f"a{name}b", f" {name} ", name * 2, name[0] + name):
            ids = tokenizer.encode(text)
            assert id_ not in ids
            assert tokenizer.decode(ids) == text


def test_a_special_token_is_spoken_by_name_and_can_be_skipped(v7, small):
    ids = [v7.bos_id, *v7.encode("hello"), v7.special("<eoa>")]
    assert v7.decode(ids) == "<s>hello<eoa>"
    assert v7.decode(ids, skip_special=True) == "hello"
    ids = [small.bos_id, *small.encode(" hello"), small.special("<|end|>")]
    assert small.decode(ids) == "<|bos|> hello<|end|>"
    assert small.decode(ids, skip_special=True) == " hello"


@many
@given(text=unicode_text | spiked_text)
def test_token_bytes_join_to_the_utf8_of_the_text(tokenizer, text):
    joined = b"".join(tokenizer.token_bytes(id_) for id_ in tokenizer.encode(text))
    begins_with_space = tokenizer.encode("a") and tokenizer.token_bytes(tokenizer.encode("a")[0]).startswith(b" ")
    if begins_with_space and not text.startswith("▁"):  # a vocabulary with a prefix; a typed mark is written in bytes
        joined = joined.removeprefix(b" ")
    assert joined == text.encode()


def test_a_special_token_stands_for_no_bytes(tokenizer):
    assert {tokenizer.token_bytes(id_) for id_ in tokenizer.special_ids} == {b""}


def test_a_character_cut_in_the_middle_decodes_to_the_replacement_character(v7, small):
    for tokenizer in (v7, small):
        ids = tokenizer.encode("a\U0001fadf")  # a character that neither vocabulary has whole
        assert tokenizer.decode(ids[:-1]) == "a\ufffd"
        assert tokenizer.decode(ids) == "a\U0001fadf"


def test_unpaired_surrogates_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode_batch(["x", "\ud83d\ude00"])[1] == tokenizer.encode("😀")
    assert well_formed("plain") == "plain"


@many
@given(texts=st.lists(unicode_text | spiked_text, max_size=5))
def test_a_batch_gives_the_same_ids_as_single_texts(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_the_later_part_of_a_cut_text_gets_no_space_of_its_own(prefixed, prefixed_json, metaspace):
    for tokenizer in (prefixed, prefixed_json, metaspace):
        pieces = [tokenizer.token_bytes(id_) for id_ in tokenizer.encode("self<eoa>self")]
        assert b"".join(pieces) == b" self<eoa>self"


def test_a_special_token_of_one_character_is_text(prefixed):
    assert "#" not in prefixed.special_tokens
    assert set(prefixed.special_tokens) == {"<unk>", "<s>", "</s>", "<eoh>", "<eoa>"}


def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    for id_ in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.decode([0, id_])
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.token_bytes(id_)
    assert tokenizer.decode([]) == ""


def test_a_missing_special_token_names_the_nearest(small):
    with pytest.raises(TokenizerError, match=r"Did you mean '<\|end\|>'"):
        small.special("<end>")


def test_the_converted_vocabulary_gives_equal_ids_on_real_text(v7, v7_json):
    corpus = SHARED / "corpus" / "pretrain"
    if not corpus.exists():
        pytest.skip("the corpus is not here")
    lines = []
    for file in sorted(corpus.glob("*.jsonl")):
        with file.open(encoding="utf-8") as rows:
            texts = [json.loads(row)["text"] for _, row in zip(range(20), rows, strict=False)]
        lines += texts[:2] + [line for text in texts for line in text.splitlines(keepends=True)][:400]
    assert len(lines) >= 2000
    assert v7_json.encode_batch(lines) == v7.encode_batch(lines)


def test_the_converted_vocabulary_gives_equal_ids_on_random_strings(v7, v7_json):
    draw = random.Random(0)
    pieces = [v7.token_bytes(id_).decode("utf-8", "ignore") for id_ in range(v7.vocab_size)]
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(2000)]
    texts += ["".join(draw.choices(" \n\t\r-=*#_/.(){}<>0a的\0", k=draw.randint(1, 60))) for _ in range(2000)]
    texts += [char * count for char in " \n\t-=a0的\0" for count in range(1, 70)] + TRICKY
    assert v7_json.encode_batch(texts) == v7.encode_batch(texts)


@many
@given(text=unicode_text | spiked_text)
def test_the_converted_vocabulary_with_a_prefix_gives_equal_ids(prefixed, prefixed_json, text):
    assert prefixed_json.encode(text) == prefixed.encode(text)


def test_the_converted_vocabulary_keeps_ids_roles_and_special_tokens(v7, v7_json):
    assert v7_json.vocab_size == v7.vocab_size
    assert (v7_json.bos_id, v7_json.eos_id) == (1, 2)
    assert v7_json.special_tokens == v7.special_tokens


def test_a_model_that_normalises_or_is_no_bpe_is_not_converted(train_sentencepiece, tmp_path):
    for options in ({"normalization_rule_name": "nmt_nfkc"}, {"model_type": "unigram"}):
        tokenizer = Tokenizer(train_sentencepiece(**options), is_json=False)
        with pytest.raises(TokenizerError, match=r"Keep the tokenizer\.model"):
            tokenizer.write_tokenizer_json(tmp_path / "tokenizer.json")
        assert not (tmp_path / "tokenizer.json").exists()


# Of the converted vocabularies the small one stands for the published one, which takes seconds each time it is read.
all_but_the_long = pytest.mark.parametrize(
    "tokenizer", [pytest.param(name, marks=[pytest.mark.proof] * (name == "v7_json")) for name in ALL], indirect=True
)


@all_but_the_long
def test_saving_and_loading_gives_an_equal_tokenizer(tokenizer, tmp_path):
    paths = tokenizer.save(tmp_path / "copy")
    assert {path.name for path in paths} <= {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    again = Tokenizer.load(tmp_path / "copy")
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_tokens == tokenizer.special_tokens
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    again.save(tmp_path / "copy")  # once more over itself
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(path.name for path in paths)


def test_saving_never_covers_another_tokenizer(small, prefixed, tmp_path):
    small.save(tmp_path)
    with pytest.raises(StorageError, match="another tokenizer's"):
        prefixed.save(tmp_path)
    assert Tokenizer.load(tmp_path) == small


@all_but_the_long
def test_a_pickled_tokenizer_is_equal(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer
    assert again.path == tokenizer.path
    assert again.encode("hello <eoa>▁") == tokenizer.encode("hello <eoa>▁")


def test_tokenizers_of_different_files_or_roles_differ(small, wide):
    assert small != wide
    assert small != Tokenizer(small._data, is_json=True, roles={"pad": "<|eos|>"})
    assert small != "a string"


def test_roles_come_from_the_files_beside_the_vocabulary(small, tmp_path):
    small.save(tmp_path)
    config = {"eos_token": {"content": "<|end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|eos|>", "pad_token": "!"}))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.eos_id == small.special("<|end|>")
    assert tokenizer.bos_id == small.bos_id  # nothing is said: by its usual name
    assert tokenizer.pad_id == tokenizer.encode("!")[0]  # one character stays text
    assert tokenizer.pad_id not in tokenizer.special_ids
    assert tokenizer.config()["pad_token"] == "!"


def test_a_role_that_names_an_ordinary_entry_makes_it_special(small, tmp_path):
    small.save(tmp_path)
    assert len(small.encode("return")) == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "return"}))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("return x")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "return x"


def test_a_folder_with_both_files_gives_the_json_one(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    assert Tokenizer.load(tmp_path) == small


def test_a_vocabulary_stays_the_one_when_another_form_lies_beside_it(prefixed, tmp_path):
    prefixed.save(tmp_path)
    prefixed.write_tokenizer_json(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path) == prefixed
    (tmp_path / "tokenizer.model").unlink()
    assert Tokenizer.load(tmp_path).encode("as good") == prefixed.encode("as good")
    assert Tokenizer.find(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.model", None, "no such file"),
        ("cut.model", b"", "no SentencePiece model"),
        ("bad.model", b"\xff" * 50, "no SentencePiece model"),
        ("tokenizer.json", b"{}", r"no tokenizer\.json"),
        ("tokenizer.json", b"\xff", r"no tokenizer\.json"),
        ("tokenizer.txt", b"x", "no tokenizer by its name"),
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(tmp_path / name)
    assert name in str(caught.value)


def test_a_truncated_model_is_refused(v7, tmp_path):
    (tmp_path / "cut.model").write_bytes(v7.path.read_bytes()[:500_000])
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path / "cut.model")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)


def test_a_damaged_config_beside_the_vocabulary_is_named(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_whose_bytes_are_not_known_is_refused():
    spec = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None, "decoder": None, "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
    }  # fmt: skip
    with pytest.raises(TokenizerError, match="bytes are not known"):
        Tokenizer.from_json(json.dumps(spec))


def test_truncation_and_padding_in_the_file_have_no_effect(small):
    spec = json.loads(small._data)
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }  # fmt: skip
    text = "def f(x): return x"
    other = Tokenizer.from_json(json.dumps(spec))
    assert other.encode(text) == small.encode(text)
    assert other.fingerprint == small.fingerprint, "it names what decides ids"


def test_an_added_token_that_is_not_special_is_text(small):
    spec = json.loads(small._data)
    token = {"id": small.vocab_size, "content": "<think>", "special": False, "normalized": False}
    spec["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    tokenizer = Tokenizer.from_json(json.dumps(spec))
    assert tokenizer.encode("<think>") == [small.vocab_size]
    assert tokenizer.decode([small.vocab_size], skip_special=True) == "<think>"
    assert tokenizer.fingerprint != small.fingerprint


def test_importing_the_room_loads_neither_torch_nor_a_tokenizer_library():
    code = (
        "import sys, internlm.text.tokenizer, internlm.text.training, internlm.text.chat; "
        "print([n for n in ('torch', 'tokenizers', 'sentencepiece', 'transformers') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_transformers_reads_what_save_writes(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return x  # 今天 🙂 . ,"
    assert theirs.encode(text) == small.encode(text)
    assert theirs.decode(small.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_characters_that_a_normaliser_turns_into_a_special_name_stay_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((chr(c), -3.0) for c in range(32, 127)), ("▁", -2.0)]
    library = Library(models.Unigram(pieces, 0, byte_fallback=False))
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library.decoder = decoders.Metaspace(prepend_scheme="never")
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in ("</s>", "＜/s＞", "a＜/s＞b", "＜／ｓ＞"):
        assert tokenizer.special("</s>") not in tokenizer.encode(text), text
        assert tokenizer.special("</s>") not in tokenizer.encode_batch([text])[0], text


@pytest.mark.parametrize("name", ["gpt2", "internlm/internlm-7b", "https://huggingface.co/gpt2"])
def test_a_name_of_the_hub_is_answered_with_the_command_that_downloads_it(name: str) -> None:
    with pytest.raises(StorageError, match=r"nothing is downloaded here.*`hf download \S+ --local-dir DIR`"):
        Tokenizer.load(name)
