"""The two libraries behind `Tokenizer`, brought to one form.

Of both back ends:

    specials        written form → id of every token that is structure
    roles           bos, eos, pad → written form, as far as the vocabulary file itself says
    has_prefix      whether every text gets a space put before it
    escapes_mark    whether `▁` stands for the space and every byte has a piece: a typed `▁` can be written in bytes
    adds_around     whether the file says that special tokens are put around a text, which `encode` never does
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm.errors import TokenizerError

SPACE_MARK = "▁"  # U+2581: the space inside SentencePiece vocabularies
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type of its .proto


class SentencePieceBackend:
    """A SentencePiece `.model`. Structure is what the file calls unknown, control or user-defined.

    Raises:
        TokenizerError: the bytes are damaged.
    """

    file_name = "tokenizer.model"
    adds_around = False

    def __init__(self, data: bytes, path: Path | None) -> None:
        import sentencepiece

        sentencepiece.set_min_log_level(2)  # each load reports that NUL is written as a byte, which is what we want
        self._path = path
        try:
            if not data:
                raise ValueError("the file is empty")
            self._outer = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.has_prefix = self._outer.normalize("a").startswith(SPACE_MARK)
            # Serialised messages merge when they are joined: this sets normalizer_spec.add_dummy_prefix = false.
            without = data + b"\x1a\x02\x18\x00"
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=without) if self.has_prefix else self._outer
            self.vocab_size: int = self._outer.get_piece_size()
            self.pieces: list[str] = [self._outer.id_to_piece(id_) for id_ in range(self.vocab_size)]
            # The library may set a piece aside that the file calls normal: NUL, which it writes as a byte.
            self.kinds = [UNUSED if self._outer.is_unused(id_) else kind for id_, kind in enumerate(_kinds(data))]
        except (RuntimeError, IndexError, ValueError) as error:
            raise TokenizerError(
                "is no SentencePiece model, or is damaged", where=path, do="Copy the file again."
            ) from error
        assert len(self.kinds) == self.vocab_size, "the message holds one type for each piece"
        self._data = data
        self.specials = {
            piece.replace(SPACE_MARK, " "): id_
            for id_, (piece, kind) in enumerate(zip(self.pieces, self.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        }
        ids = {"bos": self._outer.bos_id(), "eos": self._outer.eos_id(), "pad": self._outer.pad_id()}
        self.roles = {role: self.pieces[id_] for role, id_ in ids.items() if id_ >= 0}
        self.escapes_mark = BYTE in self.kinds

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts, on one thread: the callers work in many processes."""
        return self._outer.encode(list(texts), num_threads=1)

    def encode_inner(self, text: str) -> list[int]:
        """Return the ids of a later part of a text, without a space put before it."""
        return self._inner.encode(text)

    def score(self, id_: int) -> float:
        """Return the score of a piece."""
        return float(self._outer.get_score(id_))

    def find(self, name: str) -> int | None:
        """Return the id of a piece, or None."""
        id_ = self._outer.piece_to_id(name)
        return id_ if self.pieces[id_] == name else None

    def table(self) -> list[bytes]:
        """Return the UTF-8 bytes of every id; those of special tokens are the bytes of their name."""
        return [_piece_bytes(piece, kind == BYTE) for piece, kind in zip(self.pieces, self.kinds, strict=True)]

    def identity(self) -> bytes:
        """Return what decides ids: all of the file."""
        return self._data

    def to_json(self) -> str:
        """Return a BPE `tokenizer.json` that gives the same ids.

        SentencePiece joins the neighbours whose union has the highest score, wherever they were split; so every split
        of a piece into two known pieces is a merge, ranked by the score of the piece. Of two unions of one score it
        takes the left one, this the lower id: with V7_sft.model (10,474 scores are shared) none of 226,724 texts
        differed.
        """
        self._check_convertible()
        vocabulary = {piece: id_ for id_, piece in enumerate(self.pieces)}
        known = {piece: id_ for piece, id_ in vocabulary.items() if self.kinds[id_] in (NORMAL, USER_DEFINED)}
        ranked = sorted(known, key=lambda piece: (-self.score(known[piece]), known[piece]))
        merges = [
            (piece[:at], piece[at:])
            for piece in ranked
            for at in range(1, len(piece))
            if self.kinds[known[piece]] == NORMAL and piece[:at] in known and piece[at:] in known
        ]
        for id_, kind in enumerate(self.kinds):
            if kind == UNUSED:  # never made from text; under its own name it would be
                vocabulary[f"<unused_{id_}>"] = vocabulary.pop(self.pieces[id_])
        return self._assemble(vocabulary, merges)

    def _assemble(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> str:
        """Return the JSON of a BPE tokenizer with these entries and the special tokens."""
        tokenizers = _import_tokenizers()
        unknown = next((p for p, kind in zip(self.pieces, self.kinds, strict=True) if kind == UNKNOWN), None)
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=self.escapes_mark
            )
        )
        replace = tokenizers.normalizers.Replace(" ", SPACE_MARK)
        decoders = [tokenizers.decoders.Replace(SPACE_MARK, " "), tokenizers.decoders.ByteFallback()]
        decoders.append(tokenizers.decoders.Fuse())
        if self.has_prefix:
            replace = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend(SPACE_MARK), replace])
            decoders.append(tokenizers.decoders.Strip(" ", 1, 0))
        made.normalizer, made.decoder = replace, tokenizers.decoders.Sequence(decoders)
        for name in self.specials:
            is_text = len(name) == 1 or name.isspace()
            token = tokenizers.AddedToken(name, normalized=False, special=not is_text)
            (made.add_tokens if is_text else made.add_special_tokens)([token])
        return _with_plain_merges(made.to_str())

    def _check_convertible(self) -> None:
        bpe = 2  # TrainerSpec.model_type in sentencepiece_model.proto
        trainer = [value for number, value in _fields(self._data) if number == 2]
        kind = [value for spec in trainer for number, value in _fields(spec) if number == 3]
        if kind[-1:] != [bpe]:
            raise TokenizerError(
                "only SentencePiece models of the BPE kind have an equivalent tokenizer.json", where=self._path,
                do="Keep the tokenizer.model.",
            )  # fmt: skip
        if self._inner.normalize(" ﬁ  Å ") != "▁ﬁ▁▁Å▁":
            raise TokenizerError(
                "normalises its text, which tokenizer.json cannot repeat exactly", where=self._path,
                do="Keep the tokenizer.model.",
            )  # fmt: skip


def with_added(model: bytes, added: Mapping[int, str], path: Path | None) -> bytes:
    """Return a SentencePiece model in which these ids, beyond its pieces or over them, are control pieces of that name.

    Raises:
        TokenizerError: a name is that of another piece; or the model is damaged.
    """
    try:
        fields = list(_fields(model))
        pieces = [value for number, value in fields if number == 1]
        names = [next(text for number, text in _fields(piece) if number == 1).decode() for piece in pieces]
        if not all(isinstance(value, bytes) for _, value in fields):
            raise ValueError("a part of it is no message")
    except (ValueError, IndexError, TypeError, StopIteration) as error:
        raise TokenizerError(
            "is no SentencePiece model, or is damaged", where=path, do="Copy the file again."
        ) from error
    known = {name: id_ for id_, name in enumerate(names)}
    changed = {id_: name for id_, name in sorted(added.items()) if known.get(name) != id_}
    if not changed:
        return model
    for id_, name in changed.items():
        if name in known or list(changed.values()).count(name) > 1:
            raise TokenizerError(f"gives the token {name!r} two ids, one of them {id_}", where=path)
    for id_ in range(len(pieces), max(changed) + 1):
        pieces.append(_piece(f"<unused_{id_}>", UNUSED))
    for id_, name in changed.items():
        pieces[id_] = _piece(name, CONTROL)
    others = [(number, value) for number, value in fields if number != 1]
    return b"".join(_field(number, value) for number, value in (*((1, piece) for piece in pieces), *others))


class JsonBackend:
    """A Hugging Face `tokenizer.json`: byte-level, or SentencePiece-like with `▁` and byte pieces.

    Raises:
        TokenizerError: the bytes are damaged, or of a kind whose token bytes are not known.
    """

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, path: Path | None) -> None:
        tokenizers = _import_tokenizers()
        try:
            text = data.decode()
            spec = json.loads(text)
            self._library = self._make(tokenizers, text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"is no tokenizer.json, or is damaged: {str(error)[:200]}", where=path, do="Copy the file again."
            ) from error
        self._text, self._spec = text, spec
        kinds = {part["type"] for name in ("normalizer", "pre_tokenizer", "decoder") for part in parts(spec.get(name))}
        self._is_byte_level = any(part["type"] == "ByteLevel" for part in parts(spec.get("decoder")))
        if not self._is_byte_level and not kinds & {"Metaspace", "ByteFallback"}:
            raise TokenizerError(
                "has tokens whose bytes are not known", where=path, got=(spec.get("decoder") or {}).get("type"),
                allowed=["a ByteLevel, ByteFallback or Metaspace decoder"],
            )  # fmt: skip
        vocabulary: dict[str, int] = self._library.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._library.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self.specials = {token.content: id_ for id_, token in added.items() if token.special}
        self.roles: dict[str, str] = {}
        self.escapes_mark = not self._is_byte_level and "<0xE2>" in vocabulary
        probe = self._library.encode("a", add_special_tokens=False).ids
        self.adds_around = bool(self._library.encode("a").ids != probe)
        mark = "Ġ" if self._is_byte_level else SPACE_MARK
        self.has_prefix = bool(probe) and self._library.id_to_token(probe[0]).startswith(mark)
        if self.has_prefix:
            # The space is then put here, since the library's ways lose text: Metaspace and ByteLevel put none before a
            # text that begins with a space, Prepend puts one after every added token too.
            self._library = self._make(tokenizers, json.dumps(_without_prefix(spec)))

    @staticmethod
    def _make(tokenizers: Any, text: str) -> Any:
        made = tokenizers.Tokenizer.from_str(text)
        made.encode_special_tokens = True  # special names typed in text are text
        made.no_truncation()
        made.no_padding()
        return made

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts."""
        if self.has_prefix:
            texts = [" " + text if text else text for text in texts]
        return [coded.ids for coded in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_inner(self, text: str) -> list[int]:
        """Return the ids of a later part of a text, without a space put before it."""
        return self._library.encode(text, add_special_tokens=False).ids

    def find(self, name: str) -> int | None:
        """Return the id of a vocabulary entry, or None."""
        return self._library.token_to_id(name)

    def table(self) -> list[bytes]:
        """Return the UTF-8 bytes of every id; an id that no token has gives b""."""
        entries = [b""] * self.vocab_size
        as_bytes = {char: byte for byte, char in _byte_characters().items()}
        for piece, id_ in self._library.get_vocab(with_added_tokens=False).items():
            if not self._is_byte_level:
                entries[id_] = _piece_bytes(piece, BYTE_PIECE.fullmatch(piece) is not None)
            elif all(char in as_bytes for char in piece):
                entries[id_] = bytes(as_bytes[char] for char in piece)
            else:
                entries[id_] = piece.encode()
        for id_, content in self._added.items():
            entries[id_] = content.encode()
        return entries

    def identity(self) -> bytes:
        """Return what decides ids: the file without its layout and without what is added around a text."""
        around = ("post_processor", "truncation", "padding")
        spec = {key: value for key, value in self._spec.items() if key not in around}
        merges = spec["model"].get("merges") or []
        if merges and isinstance(merges[0], str):  # two spellings of one rule
            spec["model"] = {**spec["model"], "merges": [merge.split(" ") for merge in merges]}
        return json.dumps(spec, sort_keys=True).encode()

    def to_json(self) -> str:
        """Return the file, without a post-processor that puts special tokens around a text."""
        spec = {**self._spec, "post_processor": None}
        return _with_plain_merges(json.dumps(spec, ensure_ascii=False) if self.adds_around else self._text)


def _with_plain_merges(text: str) -> str:
    """Return a `tokenizer.json` whose merges are written "a b", which every version of tokenizers reads.

    Where a piece holds a space, only the spelling since 0.20, ["a", "b"], can tell.
    """
    spec = json.loads(text)
    merges = spec["model"].get("merges") or []
    if not merges or isinstance(merges[0], str) or any(" " in piece for merge in merges for piece in merge):
        return text
    spec["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(spec, ensure_ascii=False)


def _import_tokenizers() -> Any:
    # The callers work in many processes; threads below them only fight, and forking after a threaded call can hang.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    """Return what a SentencePiece piece stands for: `<0xNN>` one byte, `▁` a space."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE_MARK, " ").encode()


def _byte_characters() -> dict[int, str]:
    """Return GPT-2's printable character for every byte (https://github.com/openai/gpt-2, `bytes_to_unicode`).

    Printable Latin-1 stands for itself, the other 68 bytes for U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def parts(section: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a section of a `tokenizer.json` and the parts that it is a sequence of, in order."""
    if section:
        yield section
        for key in ("normalizers", "pretokenizers", "decoders"):
            for part in section.get(key, []):
                yield from parts(part)


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    spec = copy.deepcopy(spec)
    for part in (*parts(spec.get("normalizer")), *parts(spec.get("pre_tokenizer"))):
        if part["type"] == "Prepend":
            part["prepend"] = ""
        elif part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return spec


def _kinds(model: bytes) -> Iterator[int]:
    """Yield the type of each piece of a ModelProto: the library does not tell user-defined from normal."""
    for number, piece in _fields(model):
        if number == 1:
            yield next((kind for inner, kind in _fields(piece) if inner == 3), NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message, without the package of that name."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
                yield tag >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(message, at)
            case 5:
                size = 4
            case _:
                raise ValueError("not a protobuf message")
        yield tag >> 3, message[at : at + size]
        at += size


def _field(number: int, value: bytes) -> bytes:
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _piece(name: str, kind: int) -> bytes:
    """Return a SentencePiece of a ModelProto: name, score 0, type."""
    return _field(1, name.encode()) + b"\x15" + bytes(4) + b"\x18" + _as_varint(kind)


def _as_varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _as_varint(value >> 7)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a variable-length integer and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
