"""One Tokenizer over two kinds of vocabulary: SentencePiece (`tokenizer.model`) and Hugging Face (`tokenizer.json`).

Text is only ever text: `encode` adds no bos or eos, and no string that is typed becomes a special token. The caller
appends ids of structure (`<eoa>`, `<|im_end|>`, …) through `special(name)`.

    tokenizer = Tokenizer.load("V7_sft.model")
    tokenizer.encode("hello")          # [15115]
    tokenizer.special("<eoa>")         # 103028
    tokenizer.encode("<eoa>")          # the ids of "<" and "eoa>": text, not structure

Where a library does turn typed text into a special token (SentencePiece matches its user-defined pieces anywhere), the
text is cut after the first character of every special name in it and encoded in parts. A typed `▁` (U+2581,
SentencePiece's mark of a space) is written as three byte tokens.

Limits: `decode(encode(text)) == text` is exact for vocabularies that cover every byte and do not normalise (InternLM's,
our own, GPT's, Llama's); others lose what they do not keep, and their unknown token can come from text. Added tokens
that a tokenizer.json calls not special (`<think>` of some chat models) are text, and so are special tokens of one
character or of white space only. Unpaired surrogates become U+FFFD. Where the file puts a space before a text (Llama 1
and 2), `encode` does too and `decode` takes it off. Tokens that files of Transformers add to a `.model`, or rename in
it, are special, whatever they say.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from internlm import disk, hub
from internlm.errors import StorageError, TokenizerError, did_you_mean
from internlm.log import warn_once
from internlm.text.backends import SPACE_MARK, JsonBackend, SentencePieceBackend, with_added

logger = logging.getLogger(__name__)

CONFIG_FILE = "tokenizer_config.json"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
VOCABULARY_KEY = "internlm_vocabulary"
"""In tokenizer_config.json: which of both files the other was made from."""
CONVENTIONAL = {
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>"),
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "<|finetune_right_pad_id|>", "[PAD]"),
}


class Tokenizer:
    """Strings to ids and back. Made by `load` or `from_json`; picklable; never changes.

    Args:
        data: the bytes of a `tokenizer.json` (`is_json`) or a SentencePiece model.
        is_json: which it is.
        roles: bos, eos, pad → name of the token or None, where the caller knows more.
        path: where the bytes came from.
    """

    def __init__(
        self,
        data: bytes,
        *,
        is_json: bool,
        roles: Mapping[str, str | None] | None = None,
        path: str | Path | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self._data, self._is_json, self._given_roles = data, is_json, dict(roles or {})
        self._backend = JsonBackend(data, self.path) if is_json else SentencePieceBackend(data, self.path)
        self.vocab_size: int = self._backend.vocab_size
        """The largest id + 1."""
        self.puts_space_first: bool = self._backend.has_prefix
        """Whether the vocabulary puts a space before every text (Llama 1 and 2)."""
        self.adds_around: bool = self._backend.adds_around
        """Whether the file makes other programs put special tokens around a text."""
        self._roles = self._find_roles()
        ids = {role: id_ for role, (_, id_) in self._roles.items()}
        self.bos_id, self.eos_id, self.pad_id = (ids.get(role) for role in CONVENTIONAL)
        by_name = {**self._backend.specials, **dict(self._roles.values())}
        # A role may name an ordinary entry ("!" as padding, a newline as eos): such a text must stay possible.
        kept = {name: id_ for name, id_ in by_name.items() if len(name) > 1 and not name.isspace()}
        self.special_tokens: dict[str, int] = dict(sorted(kept.items(), key=lambda item: item[1]))
        """Written form → id of every special token, by id."""
        self.special_ids: frozenset[int] = frozenset(kept.values())
        """The ids that `encode` never gives."""
        self.fingerprint: str = hashlib.sha256(self._backend.identity()).hexdigest()
        """SHA-256, in hexadecimal, of what decides ids in the vocabulary file."""
        longest_first = sorted(map(re.escape, kept), key=len, reverse=True)
        self._name_starts = re.compile(f"(?={'|'.join(longest_first)})" if kept else "(?!)")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Return the tokenizer in a `.model` file, a `tokenizer.json`, or a folder that holds one.

        Of both in a folder it is the one that `tokenizer_config.json` names, else the JSON.

        Raises:
            StorageError: it would have to be downloaded.
            TokenizerError: nothing is there, or it is damaged or of a kind that is not known.
        """
        hub.require_here(path)
        path = Path(path)
        beside = _read_configs(path if path.is_dir() else path.parent)
        file = _vocabulary_file(path, beside)
        with disk.explained(f"reading {file}"):
            data = file.read_bytes()
        if file.suffix == ".model":
            data = with_added(data, _added(file.parent, beside), file)
        return cls(data, is_json=file.suffix == ".json", roles=_roles(beside), path=file)

    @classmethod
    def find(cls, folder: str | Path) -> Tokenizer | None:
        """Return the tokenizer of a folder, None if it holds none; errors as of `load`."""
        folder = Path(folder)
        if any((folder / name).is_file() for name in VOCABULARY_FILES):
            return cls.load(folder)
        if (folder / "vocab.json").is_file():  # of GPT-2 and others; what else is in it, only their code knows
            save = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
            logger.warning("warning: %s has a vocab.json, and no tokenizer.json: it is opened without a tokenizer. "
                           "Transformers writes one: %s", folder, save)  # fmt: skip
        return None

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Return the tokenizer in the content of a `tokenizer.json`."""
        return cls(text.encode(), is_json=True)

    def special(self, name: str) -> int:
        """Return the id of a special token by its written form; raise TokenizerError for any other."""
        if name in self.special_tokens:
            return self.special_tokens[name]
        advice = did_you_mean(name, self.special_tokens) or "Take a template whose special tokens this tokenizer has."
        raise TokenizerError("has no such special token", where=self.path or "tokenizer", got=name, do=advice)

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text: no bos, no eos, never a special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, in one call of the library on one thread."""
        texts = [well_formed(text) for text in texts]
        batch = self._backend.encode(texts)
        for index, (text, ids) in enumerate(zip(texts, batch, strict=True)):
            typed_mark = self._backend.escapes_mark and SPACE_MARK in text
            if typed_mark or not self.special_ids.isdisjoint(ids):
                batch[index] = self._encode_in_parts(text)
        return batch

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ids; special tokens give their name, or nothing with `skip_special`.

        Bytes that are no UTF-8 (an answer cut inside a character) become U+FFFD.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        silent, spoken = self._byte_tables
        table = silent if skip_special else spoken
        if len(ids) and not (min(ids) >= 0 and max(ids) < len(table)):
            raise self._outside(next(id_ for id_ in ids if not 0 <= id_ < len(table)))
        joined = b"".join([table[id_] for id_ in ids])
        if self._backend.has_prefix:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", "replace")

    def token_bytes(self, id: int, *, skip_special: bool = True) -> bytes:
        """Return the UTF-8 bytes that a token stands for; b"" for a special token, or its name. Raises as `decode`."""
        if not 0 <= id < self.vocab_size:
            raise self._outside(id)
        return self._byte_tables[0 if skip_special else 1][id]

    def config(self) -> dict[str, Any]:
        """Return the content of a `tokenizer_config.json`: what the vocabulary file does not say."""
        # Null where there is none: a name that is usual for the role must not be taken for it.
        names = {f"{role}_token": self._roles[role][0] if role in self._roles else None for role in CONVENTIONAL}
        # The chat template writes bos; a tokenizer that added another would double it.
        own = {VOCABULARY_KEY: self._backend.file_name}
        return {**names, "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False, **own}

    def save(self, folder: str | Path) -> list[Path]:
        """Write what `load` reads as an equal tokenizer into a folder, and return the paths.

        Raises:
            StorageError: the folder holds another vocabulary, or could not be written.
        """
        folder = Path(folder)
        vocabulary = folder / self._backend.file_name
        for other in (folder / name for name in VOCABULARY_FILES):
            if other.exists() and (other != vocabulary or other.read_bytes() != self._data):
                raise StorageError("is another tokenizer's", where=other, do="Choose another folder.")
        with disk.beside(vocabulary) as draft:
            draft.write_bytes(self._data)
        reader = {"tokenizer_class": "PreTrainedTokenizerFast"} if self._is_json else {}
        disk.write_json(folder / CONFIG_FILE, {**reader, **self.config()})
        return [vocabulary, folder / CONFIG_FILE]

    def write_tokenizer_json(self, path: str | Path) -> None:
        """Write an equivalent `tokenizer.json` that adds no bos or eos, for other programs.

        Raises:
            TokenizerError: the SentencePiece model is not BPE, or normalises its text.
        """
        disk.write_text(path, self._backend.to_json())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return (self.fingerprint, self._roles) == (other.fingerprint, other._roles)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path or self._backend.file_name)!r}, vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple[Any, ...]:
        made = partial(Tokenizer, is_json=self._is_json, roles=self._given_roles, path=self.path)
        return made, (self._data,)

    def _find_roles(self) -> dict[str, tuple[str, int]]:
        """Return name and id of bos, eos and pad: as given, as the file says, or by convention."""
        given = {**self._backend.roles, **self._given_roles}
        found: dict[str, tuple[str, int]] = {}
        for role, usual in CONVENTIONAL.items():
            name = given[role] if role in given else next((n for n in usual if n in self._backend.specials), None)
            if name is None:
                continue
            id_ = self._backend.find(name)
            if id_ is None:
                warn_once(logger, f"{self.path}: the {role} token {name!r} is not in the vocabulary: left out")
            else:
                found[role] = (name, id_)
        return found

    def _encode_in_parts(self, text: str) -> list[int]:
        """Return the ids of a text with special names or `▁` in it, none of which survives whole."""
        cuts = {0, len(text), *(match.start() + 1 for match in self._name_starts.finditer(text))}
        escapes = self._backend.escapes_mark
        if escapes:
            cuts.update(at for match in re.finditer(SPACE_MARK, text) for at in match.span())
        ids: list[int] = []
        for start, end in itertools.pairwise(sorted(cuts)):
            part = text[start:end]
            if escapes and part == SPACE_MARK:
                ids += [self._byte_id(byte) for byte in part.encode()]
            elif start == 0:
                ids += self._backend.encode([part])[0]
            else:
                ids += self._backend.encode_inner(part)
        if self.special_ids.isdisjoint(ids):
            return ids
        # A normaliser made a special name of other characters (＜eoa＞): alone, no character can become one.
        alone = [self._backend.encode_inner(character) for character in text]
        return [id_ for part in alone for id_ in part if id_ not in self.special_ids]

    def _byte_id(self, byte: int) -> int:
        found = self._backend.find(f"<0x{byte:02X}>")
        assert found is not None, "a vocabulary that escapes the mark has a piece for every byte"
        return found

    @cached_property
    def _byte_tables(self) -> tuple[list[bytes], list[bytes]]:
        """The bytes of every id: special tokens as b"", and as their name."""
        spoken = self._backend.table()
        return [b"" if id_ in self.special_ids else entry for id_, entry in enumerate(spoken)], spoken

    def _outside(self, id: int) -> TokenizerError:
        return TokenizerError("this id is outside the vocabulary", got=int(id), allowed=[f"0 to {self.vocab_size - 1}"])


def well_formed(text: str) -> str:
    """Return `text` with surrogate pairs joined and unpaired surrogates as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _vocabulary_file(path: Path, beside: Sequence[dict[str, Any]]) -> Path:
    """Return the vocabulary file that `path` is or holds; `beside` are the JSON files beside it."""
    if path.is_dir():
        named = [content[VOCABULARY_KEY] for content in beside if content.get(VOCABULARY_KEY) in VOCABULARY_FILES]
        found = next((path / name for name in (*named, *VOCABULARY_FILES) if (path / name).is_file()), None)
        if found is None:
            raise TokenizerError(f"holds neither {' nor '.join(VOCABULARY_FILES)}", where=path)
        return found
    if not path.exists():
        raise TokenizerError("no such file or folder", where=path, do="Give a tokenizer file or its folder.")
    if path.suffix not in (".json", ".model"):
        raise TokenizerError("is no tokenizer by its name", where=path, allowed=["*.model", "*.json", "a folder"])
    return path


def _read_configs(folder: Path) -> list[dict[str, Any]]:
    """Return the content of the JSON files beside a vocabulary; the first counts most."""
    names = (CONFIG_FILE, "special_tokens_map.json")
    return [disk.read_json(folder / name, TokenizerError) for name in names if (folder / name).is_file()]


def _roles(beside: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    """Return bos, eos, pad → token name, None where a file says that there is none; the first that says so counts."""
    roles: dict[str, str | None] = {}
    for content in beside:
        for role in CONVENTIONAL:
            value = content.get(f"{role}_token", "")
            name = value.get("content") if isinstance(value, dict) else value
            if name is None or (isinstance(name, str) and name):
                roles.setdefault(role, name)
    return roles


def _added(folder: Path, beside: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Return the tokens, by id, that files of Transformers say beside a `.model`."""
    try:
        older = disk.read_json(folder / "added_tokens.json", TokenizerError)
        added = {int(id_): str(name) for name, id_ in older.items()}
        for content in beside:
            newer = content.get("added_tokens_decoder") or {}
            added |= {int(id_): str(token["content"]) for id_, token in newer.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenizerError(
            f"the tokens that are added to its vocabulary cannot be read: {error}", where=folder
        ) from error
    return added
