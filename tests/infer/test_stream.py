"""Text while it comes: whole characters, stop strings across tokens, silent special tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.infer.stream import TextStream
from internlm.text.training import train_bpe
from tests.infer.engines import sentencepiece_tokenizer

TOKENIZER = train_bpe(["the cat sat on the mat. 你好 👋🏽 END"] * 4, 300)
SPACED = sentencepiece_tokenizer(["the cat sat on the mat. 你好 👋🏽 END"] * 8)
BYTES = {TOKENIZER.token_bytes(id_): id_ for id_ in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(id_)}


def one_token_per_byte(text: str) -> list[int]:
    return [BYTES[bytes([byte])] for byte in text.encode()]


def pieces(ids: list[int], *stops: str) -> list[str]:
    stream = TextStream(TOKENIZER, stops)
    return [*map(stream.add, ids), stream.finish()]


def test_a_character_comes_whole_when_its_last_byte_does() -> None:
    assert pieces(one_token_per_byte("é你👋")) == ["", "é", "", "", "你", "", "", "", "👋", ""]


def test_an_unfinished_character_is_shown_at_the_end_only() -> None:
    assert pieces(one_token_per_byte("a👋")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_special_tokens_give_no_text() -> None:
    ids = [TOKENIZER.special("<|user|>"), *one_token_per_byte("hi"), TOKENIZER.special("<|end|>")]
    assert "".join(pieces(ids)) == "hi"


def test_a_stop_string_across_tokens_is_held_back_and_cut() -> None:
    assert pieces(one_token_per_byte("so END it"), "END") == ["s", "o", " ", "", "", "", "", "", "", ""]


def test_what_only_begins_like_a_stop_string_is_shown_later() -> None:
    assert pieces(one_token_per_byte("ENTER"), "END") == ["", "", "ENT", "", "ER", ""]
    assert pieces(one_token_per_byte("EN"), "END") == ["", "", "EN"]


def test_a_stop_string_may_overlap_itself() -> None:
    assert "".join(pieces(one_token_per_byte("aabaabaaab"), "aabaaa")) == "aab"


def test_of_two_stop_strings_in_one_token_the_one_that_is_complete_first_counts() -> None:
    texts = {id_: TOKENIZER.token_bytes(id_).decode(errors="ignore") for id_ in range(TOKENIZER.vocab_size)}
    id_, text = next((id_, text) for id_, text in texts.items() if len(text) == len(set(text)) == 3)
    for stops in ((text[1], text[2]), (text[2], text[1])):
        stream = TextStream(TOKENIZER, stops)
        assert stream.add(id_) == text[0]
        assert stream.stopped


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=60), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_what_is_held_back_is_the_longest_ending_that_a_stop_string_begins_with(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(TOKENIZER, stops), ""
    for end, id_ in enumerate(one_token_per_byte(text), start=1):
        shown += stream.add(id_)
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            assert stream.stopped
            assert shown == text[: end - max(map(len, whole))]
            break
        begun = [n for stop in stops for n in range(len(stop)) if text[:end].endswith(stop[:n])]
        assert shown == text[: end - max(begun)]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
def test_the_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    ids = one_token_per_byte(text) if data.draw(st.booleans()) else TOKENIZER.encode(text)
    stream = TextStream(TOKENIZER, stops)
    got = ""
    while ids:
        size = data.draw(st.integers(1, 5))
        got += "".join(map(stream.add, ids[:size]))
        ids = ids[size:]
        # Every prefix is safe to show: it never has to be taken back.
        assert TOKENIZER.decode(TOKENIZER.encode(text)).startswith(got)
    got += stream.finish()
    ends = [at for at in range(len(text)) for stop in stops if text.startswith(stop, at)]
    if not ends:
        assert got == text
        assert not stream.stopped
    else:
        assert stream.stopped
        assert any(text.startswith(got + stop) for stop in stops)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_ids_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids, skip_special=True)


@pytest.mark.parametrize("continuation", [False, True])
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, SPACED.vocab_size - 1), max_size=30))
def test_with_a_space_before_every_text_any_ids_give_their_text_too(continuation: bool, ids: list[int]) -> None:
    stream = TextStream(SPACED, continuation=continuation)
    got = "".join([*map(stream.add, ids), stream.finish()])
    data = b"".join(SPACED.token_bytes(id_) for id_ in ids)
    assert got == (data if continuation else data.removeprefix(b" ")).decode("utf-8", "replace")
    if not continuation:
        assert got == SPACED.decode(ids, skip_special=True)


def test_a_stop_string_that_ends_with_a_cut_character_is_not_shown() -> None:
    tokenizer = train_bpe(["a"], 270)
    stream = TextStream(tokenizer, ("X\ufffd",))
    half = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe6")
    shown = "".join(map(stream.add, [*tokenizer.encode("aX"), half]))
    assert shown + stream.finish() == "a"
    assert stream.stopped
