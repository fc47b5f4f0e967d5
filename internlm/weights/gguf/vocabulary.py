r"""How the model of a GGUF file is talked to: its vocabulary and chat format, as llama.cpp reads them.

    describe(writer, talk, folder, config.vocab_size)
    read(folder, tokenizer, config.vocab_size)      # Vocabulary(model="llama", tokens=[…], scores=[…], …)

llama.cpp has two tokenizers that fit ours:

    llama    SentencePiece BPE: neighbours whose union has the highest score are joined, the left ones first
    gpt2     byte-level BPE: words are cut by a regular expression that the file can name, not write (`pre`)

Limits of llama.cpp: a typed `▁` is a space there; a typed name of a special token may be joined into that token; a
tokenizer of our own training is cut as GPT-4's is, which differs after a line break that spaces follow (`read` warns).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.errors import TokenizerError
from internlm.text.backends import (
    BYTE,
    BYTE_PIECE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceBackend,
    parts,
)
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import PATTERN
from internlm.weights.talk import Talk

logger = logging.getLogger(__name__)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"

PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_WORDS,), True): "llama-bpe",
    ((_WORDS,), False): "dbrx",
    ((_GPT4,), False): "dbrx",
    ((PATTERN,), False): "dbrx",
    ((_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),), False): "qwen2",
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
}
"""(regular expressions that cut words, whether whole words come before merges) → llama.cpp's name.

From `llm_tokenizer_bpe` in llama.cpp's llama-vocab.cpp; ours is the nearest, see the module."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokens."""

    model: str
    """"llama" or "gpt2"."""
    tokens: list[str]
    kinds: list[int]
    """`llama_token_type`, equal to SentencePiece's."""
    scores: list[float] | None = None
    """For "llama"."""
    merges: list[str] | None = None
    """For "gpt2"."""
    pre: str = "default"


def describe(writer: Any, talk: Talk, folder: Path, size: int) -> None:
    """Write tokens, the ids of structure, and the chat format.

    Args:
        writer: a `gguf.GGUFWriter`.
        talk: tokenizer and chat format; without a tokenizer the file says that it has none.
        folder, size: as of `read`.

    Raises:
        TokenizerError: as `read`.
    """
    if talk.tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    vocabulary = read(folder, talk.tokenizer, size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(talk.tokenizer.puts_space_first)
    if text := talk.jinja:
        writer.add_chat_template(text)
    # llama.cpp takes the bos of a chat prompt off where it puts one, but puts one where a format has none too.
    wants_bos = talk.format.bos if talk.format is not None else not text or "bos_token" in str(text)
    writer.add_add_bos_token(wants_bos and talk.tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    for role, id_ in _roles(vocabulary, talk.tokenizer, talk.stop_ids()).items():
        getattr(writer, f"add_{role}_token_id")(id_)


def _roles(vocabulary: Vocabulary, tokenizer: Tokenizer, stops: Sequence[int]) -> dict[str, int]:
    """Return the ids that llama.cpp knows by a role. It stops at eos, at eot (end of turn) and at eom (of message)."""
    # Without any, llama.cpp would end texts at id 2 or 11. A special token is never text.
    ends = stops or sorted(tokenizer.special_ids)[:1]
    if len(ends) > 3 or not ends:
        logger.warning("warning: a GGUF file names one to three ids that end an answer; this model has %d", len(ends))
    roles = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    if UNKNOWN in vocabulary.kinds:
        roles["unk"] = vocabulary.kinds.index(UNKNOWN)
    for role, id_ in (("bos", tokenizer.bos_id), ("pad", tokenizer.pad_id)):
        if id_ is not None:
            roles[role] = id_
    return roles


def read(folder: Path, tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Return the vocabulary that lies in a folder.

    Args:
        folder: where `Talk.write` wrote the files of the tokenizer.
        tokenizer: the same, opened.
        size: ids of the model; those that the tokenizer has not become unused tokens.

    Raises:
        TokenizerError: llama.cpp has no tokenizer that gives the same ids.
    """
    where = tokenizer.path or "tokenizer"
    path = folder / "tokenizer.json"
    if not path.exists():  # `Talk.write` makes one of every model that only joins pieces
        raise TokenizerError(
            "only SentencePiece models of the BPE kind, without normalisation, can be written as GGUF", where=where
        )
    if (folder / "tokenizer.model").exists():
        found = _sentencepiece((folder / "tokenizer.model").read_bytes(), tokenizer)
    else:
        spec = disk.read_json(path, TokenizerError)
        is_byte_level = any(part.get("type") == "ByteLevel" for part in parts(spec.get("decoder")))
        found = _byte_level(spec, tokenizer, where) if is_byte_level else _joined_pieces(spec, tokenizer, where)
    if found.model == "llama" and found.kinds.count(BYTE) != 256:
        raise TokenizerError("has no token for every byte, which llama.cpp needs", where=where)
    missing = size - len(found.tokens)
    found.tokens.extend("" for _ in range(missing))
    found.kinds.extend([UNUSED] * missing)
    if found.scores is not None:
        found.scores.extend([0.0] * missing)
    _name_unused(found.tokens, found.kinds)
    return found


def _sentencepiece(data: bytes, tokenizer: Tokenizer) -> Vocabulary:
    model = SentencePieceBackend(data, None)
    kinds = [
        kind if kind in (UNKNOWN, BYTE, UNUSED) else CONTROL if id_ in tokenizer.special_ids else NORMAL
        for id_, kind in enumerate(model.kinds)
    ]
    return Vocabulary("llama", model.pieces, kinds, [model.score(id_) for id_ in range(len(kinds))])


def _joined_pieces(spec: dict[str, Any], tokenizer: Tokenizer, where: object) -> Vocabulary:
    """Return the vocabulary of a `tokenizer.json` that was made of a SentencePiece BPE model.

    Its merges are those of every piece, best piece first: the order gives scores back.
    """
    vocabulary, merges = _bpe(spec, where)
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    firsts = [order[left + right] for left, right in merges]
    made = set(merges)
    added = {token["content"] for token in spec.get("added_tokens") or []}
    known = {token for token in vocabulary if token not in added and not BYTE_PIECE.fullmatch(token)}
    splits = {(piece[:at], piece[at:]) for piece in known for at in range(1, len(piece))}
    if firsts != sorted(firsts) or any({*split} <= known for split in splits - made):
        raise TokenizerError(
            "its merges are not those of a SentencePiece model", where=where,
            do="Use its tokenizer.model, if it has one.",
        )  # fmt: skip
    tokens, kinds = _listed(spec, tokenizer)
    kinds = [BYTE if BYTE_PIECE.fullmatch(token) else kind for token, kind in zip(tokens, kinds, strict=True)]
    unknown = spec["model"].get("unk_token")
    if unknown in vocabulary:
        kinds[vocabulary[unknown]] = UNKNOWN
    scores = [float(-order.get(token, 0)) for token in tokens]
    return Vocabulary("llama", tokens, kinds, scores)


def _byte_level(spec: dict[str, Any], tokenizer: Tokenizer, where: object) -> Vocabulary:
    _, merges = _bpe(spec, where)
    kinds_of_normaliser = [part.get("type") for part in parts(spec.get("normalizer")) if "normalizers" not in part]
    if set(kinds_of_normaliser) - {"NFC"}:
        raise TokenizerError("normalises its text, which llama.cpp does not", where=where, got=kinds_of_normaliser)
    if kinds_of_normaliser:
        logger.warning("warning: %s brings text into NFC, llama.cpp does not: decomposed accents get other ids", where)
    tokens, kinds = _listed(spec, tokenizer)
    # llama.cpp asks for some; single bytes never become a `no`.
    pairs = [" ".join(pair) for pair in merges] or ["no merges"]
    return Vocabulary("gpt2", tokens, kinds, merges=pairs, pre=_pre(spec, tokenizer, where))


def _pre(spec: dict[str, Any], tokenizer: Tokenizer, where: object) -> str:
    patterns: list[str] = []
    for part in parts(spec.get("pre_tokenizer")):
        options = (part.get("behavior"), part.get("invert"))
        if part["type"] == "Split" and options in (("Isolated", False), ("Removed", True)):
            patterns += part["pattern"].values()
        elif part["type"] == "Digits" and part.get("individual_digits"):
            patterns.append(_DIGIT)
        elif part["type"] == "ByteLevel":
            patterns += [_GPT2] if part.get("use_regex", True) else []
        elif part["type"] != "Sequence":
            patterns.append(f"<{part['type']}>")
    name = PRE.get((tuple(patterns), bool(spec["model"].get("ignore_merges"))))
    if name is None or tokenizer.puts_space_first:
        raise TokenizerError(
            "cuts words in a way that llama.cpp does not know", where=where, got=" then ".join(patterns),
            do="Convert to another format.",
        )  # fmt: skip
    if patterns == [PATTERN]:
        logger.warning(
            "warning: llama.cpp cuts words as GPT-4 does: a line break with spaces after it (indented code) gets other "
            "ids than in training; all other text gets the same"
        )
    return name


def _bpe(spec: dict[str, Any], where: object) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = spec["model"]
    marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type") != "BPE" or marks:
        got = marks[0] if marks else model.get("type")
        raise TokenizerError("only plain BPE can be written as GGUF", where=where, got=got)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
    return model["vocab"], [(left, right) for left, right in pairs]


def _listed(spec: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    """Return the tokens of a `tokenizer.json` by id, and their kinds; an id without a token is unused."""
    import tokenizers

    opened = tokenizers.Tokenizer.from_str(json.dumps(spec))  # it gives added tokens other ids than a file with gaps
    tokens, kinds = [""] * tokenizer.vocab_size, [UNUSED] * tokenizer.vocab_size
    for token, id_ in opened.get_vocab(with_added_tokens=False).items():
        tokens[id_], kinds[id_] = token, NORMAL
    for id_, added in opened.get_added_tokens_decoder().items():
        if kinds[id_] != NORMAL or len(added.content) > 1:
            tokens[id_], kinds[id_] = added.content, USER_DEFINED
    for id_ in tokenizer.special_ids:
        kinds[id_] = CONTROL
    return tokens, kinds


def _name_unused(tokens: list[str], kinds: Sequence[int]) -> None:
    """Give unused tokens, in place, names that no text is joined into: llama.cpp ends where two names are equal."""
    taken = {token for token, kind in zip(tokens, kinds, strict=True) if kind != UNUSED}
    for id_, kind in enumerate(kinds):
        if kind == UNUSED:
            name = f"<unused_{id_}>"
            while name in taken:
                name = f"<{name}>"
            tokens[id_] = name
