"""The two libraries behind `Tokenizer`, brought to one form; nothing else of this package touches them.

A back end turns text into ids and says what every id stands for. What text may never become (special tokens) and how
a round trip stays exact is the business of `Tokenizer`.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from internlm.errors import TokenizerError

SPACE_MARK = "▁"  # U+2581: the space inside SentencePiece vocabularies
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Backend(Protocol):
    """What `Tokenizer` needs from a library."""

    file_name: str
    vocab_size: int
    specials: dict[str, int]
    """Written form → id of every token that is structure."""
    roles: dict[str, str]
    """bos, eos, pad → written form, as far as the vocabulary file itself says."""
    has_prefix: bool
    """Whether every text gets a space put before it."""
    escapes_mark: bool
    """Whether `▁` stands for the space and every byte has a piece, so that a typed `▁` can be written in bytes."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts."""

    def encode_inner(self, text: str) -> list[int]:
        """Return the ids of a later part of a text: the same, without a space put before it."""

    def find(self, name: str) -> int | None:
        """Return the id of a vocabulary entry, or None."""

    def table(self) -> list[bytes]:
        """Return the UTF-8 bytes of every id; those of special tokens are the bytes of their name."""

    def identity(self) -> bytes:
        """Return what decides ids: equal for files that give equal ids to every text."""

    @property
    def adds_around(self) -> bool:
        """Whether the file says that special tokens are put around a text, which `encode` never does."""

    def to_json(self) -> str:
        """Return the content of an equivalent `tokenizer.json`, which adds no special tokens by itself."""


def load_backend(data: bytes, *, is_json: bool, path: Path | None) -> Backend:
    """Return the back end of a vocabulary file's bytes.

    Raises:
        TokenizerError: the bytes are damaged, or of a kind whose token bytes are not known.
    """
    backend: Backend = JsonBackend(data, path) if is_json else SentencePieceBackend(data, path)
    return backend


class SentencePieceBackend:
    """A SentencePiece `.model`. Structure is what the file calls unknown, control or user-defined."""

    file_name = "tokenizer.model"
    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type of its .proto

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
            self._inner = self._outer
            if self.has_prefix:
                self._inner = sentencepiece.SentencePieceProcessor(model_proto=without)
            self.vocab_size: int = self._outer.get_piece_size()
            self._pieces: list[str] = [self._outer.id_to_piece(id_) for id_ in range(self.vocab_size)]
            # The library may set a piece aside that the file calls normal: NUL, which it writes as a byte.
            self._types = [
                self.UNUSED if self._outer.is_unused(id_) else kind for id_, kind in enumerate(_piece_types(data))
            ]
        except (RuntimeError, IndexError, ValueError) as error:
            raise TokenizerError(
                "is no SentencePiece model, or is damaged", where=path, do="Copy the file again."
            ) from error
        assert len(self._types) == self.vocab_size, "the message holds one type for each piece"
        self._data = data
        structure = (self.UNKNOWN, self.CONTROL, self.USER_DEFINED)
        self.specials = {
            piece.replace(SPACE_MARK, " "): id_
            for id_, (piece, kind) in enumerate(zip(self._pieces, self._types, strict=True))
            if kind in structure
        }
        ids = {"bos": self._outer.bos_id(), "eos": self._outer.eos_id(), "pad": self._outer.pad_id()}
        self.roles = {role: self._pieces[id_] for role, id_ in ids.items() if id_ >= 0}
        self.escapes_mark = self.BYTE in self._types

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts, on one thread: the callers work in many processes."""
        return self._outer.encode(list(texts), num_threads=1)

    def encode_inner(self, text: str) -> list[int]:
        """Return the ids of a later part of a text."""
        return self._inner.encode(text)

    def find(self, name: str) -> int | None:
        """Return the id of a piece, or None."""
        id_ = self._outer.piece_to_id(name)
        return id_ if self._pieces[id_] == name else None

    def table(self) -> list[bytes]:
        """Return the UTF-8 bytes of every id."""
        return [_piece_bytes(piece, kind == self.BYTE) for piece, kind in zip(self._pieces, self._types, strict=True)]

    def identity(self) -> bytes:
        """Return the file."""
        return self._data

    @property
    def adds_around(self) -> bool:
        """Whether special tokens are put around a text: no."""
        return False

    def to_json(self) -> str:
        """Return a BPE `tokenizer.json` that gives the same ids.

        SentencePiece joins the neighbours whose union has the highest score, wherever they were split; so every split
        of a piece into two known pieces is a merge, ranked by the score of the piece. Where two unions have the same
        score SentencePiece takes the left one and this one the lower id: the one place where they could differ. On
        V7_sft.model (10,474 scores are shared) none of 226,724 documents and lines of English, Chinese, Japanese and
        code differed, nor any of 100,000 random strings of pieces, punctuation, white space and Unicode.

        Raises:
            TokenizerError: the model is not BPE, or normalises its text.
        """
        self._check_convertible()
        vocabulary = {piece: id_ for id_, piece in enumerate(self._pieces)}
        kinds = (self.NORMAL, self.USER_DEFINED)
        known = {piece: id_ for piece, id_ in vocabulary.items() if self._types[id_] in kinds}
        ranked = sorted(known, key=lambda piece: (-self._outer.get_score(known[piece]), known[piece]))
        merges = [
            (piece[:at], piece[at:])
            for piece in ranked
            for at in range(1, len(piece))
            if self._types[known[piece]] == self.NORMAL and piece[:at] in known and piece[at:] in known
        ]
        for id_ in (id_ for id_, kind in enumerate(self._types) if kind == self.UNUSED):
            # Never made from text; under its own name it would be.
            vocabulary[f"<unused_{id_}>"] = vocabulary.pop(self._pieces[id_])
        return self._assemble(vocabulary, merges)

    def _assemble(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> str:
        """Return the JSON of a BPE tokenizer with these entries and our special tokens."""
        tokenizers = _import_tokenizers()
        unknown = next((p for p, kind in zip(self._pieces, self._types, strict=True) if kind == self.UNKNOWN), None)
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
    """Return a SentencePiece model in which ids have other names, and then are control pieces: tokens of structure.

    Args:
        model: the bytes of a `.model`.
        added: id → name, beyond its pieces or over them; what the model has already is left as it is.
        path: for messages.

    Raises:
        TokenizerError: a name is that of another piece; or the model is damaged.
    """
    kinds = SentencePieceBackend
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
        pieces.append(_piece(f"<unused_{id_}>", kinds.UNUSED))
    for id_, name in changed.items():
        pieces[id_] = _piece(name, kinds.CONTROL)
    others = [(number, value) for number, value in fields if number != 1]
    return b"".join(_field(number, value) for number, value in (*((1, piece) for piece in pieces), *others))


class JsonBackend:
    """A Hugging Face `tokenizer.json`: byte-level, or SentencePiece-like with `▁` and byte pieces."""

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
        parts = list(_parts(spec, ("normalizer", "pre_tokenizer", "decoder")))
        kinds = {part["type"] for part in parts}
        self._is_byte_level = "ByteLevel" in {part["type"] for part in _parts(spec, ("decoder",))}
        if not self._is_byte_level and not kinds & {"Metaspace", "ByteFallback"}:
            raise TokenizerError(
                "has tokens whose bytes are not known", where=path, got=(spec.get("decoder") or {}).get("type"),
                allowed=["a ByteLevel, ByteFallback or Metaspace decoder"],
            )  # fmt: skip
        vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._library.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self.specials = {token.content: id_ for id_, token in added.items() if token.special}
        self.roles: dict[str, str] = {}
        self.escapes_mark = not self._is_byte_level and "<0xE2>" in vocabulary
        probe = self._library.encode("a", add_special_tokens=False).ids
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
        """Return the ids of a later part of a text."""
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
        """Return the file without its layout and without what is added around a text: `encode` adds nothing."""
        around = ("post_processor", "truncation", "padding")
        spec = {key: value for key, value in self._spec.items() if key not in around}
        merges = spec["model"].get("merges") or []
        if merges and isinstance(merges[0], str):  # two spellings of one rule
            spec["model"] = {**spec["model"], "merges": [merge.split(" ") for merge in merges]}
        return json.dumps(spec, sort_keys=True).encode()

    @property
    def adds_around(self) -> bool:
        """Whether the file says that special tokens are put around a text."""
        return bool(self._library.encode("a").ids != self._library.encode("a", add_special_tokens=False).ids)

    def to_json(self) -> str:
        """Return the file, without a post-processor that puts special tokens around a text."""
        text = (
            json.dumps({**self._spec, "post_processor": None}, ensure_ascii=False) if self.adds_around else self._text
        )
        return _with_plain_merges(text)


def _with_plain_merges(text: str) -> str:
    """Return a `tokenizer.json` whose merges are written as "a b", as before tokenizers 0.20: every version reads it.

    Where a piece holds a space, only the newer spelling, ["a", "b"], can tell.
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
    """Return GPT-2's printable character for every byte.

    Printable Latin-1 stands for itself, the other 68 bytes for U+0100 on, in order (Radford et al. 2019,
    https://github.com/openai/gpt-2, `bytes_to_unicode`).
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def _parts(spec: dict[str, Any], sections: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield every normaliser, pre-tokenizer or decoder of a `tokenizer.json`, sequences taken apart."""
    waiting = [spec[name] for name in sections if spec.get(name)]
    while waiting:
        part = waiting.pop()
        waiting += [inner for key in ("normalizers", "pretokenizers", "decoders") for inner in part.get(key, [])]
        yield part


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a `tokenizer.json` that puts no space before a text."""
    spec = copy.deepcopy(spec)
    for part in _parts(spec, ("normalizer", "pre_tokenizer")):
        if part["type"] == "Prepend":
            part["prepend"] = ""
        elif part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return spec


def _piece_types(model: bytes) -> Iterator[int]:
    """Yield the type of each piece of a serialised ModelProto: the library does not tell user-defined from normal."""
    for number, piece in _fields(model):
        if number == 1:
            yield next((kind for inner, kind in _fields(piece) if inner == 3), SentencePieceBackend.NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message; so that the protobuf package is not needed."""
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
    """Return a field of a protobuf message that is text, or a message."""
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _piece(name: str, kind: int) -> bytes:
    """Return a SentencePiece of a ModelProto: name, score 0, type."""
    return _field(1, name.encode()) + b"\x15" + bytes(4) + b"\x18" + _as_varint(kind)


def _as_varint(value: int) -> bytes:
    """Return an integer as a variable-length one."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


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
