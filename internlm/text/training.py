r"""Train a byte-level BPE tokenizer, and measure one.

Byte-level means lossless: the 256 bytes are tokens, nothing is normalised, no space is put before a text. Ids: special
tokens first (0 …), then the bytes, then the merges in the order they were learned. The same texts in the same order
give the same file.

`PATTERN` cuts text into words before merges are learned; no token crosses a cut. It is written for prose and code:

    '(?i:[sdmt]|ll|ve|re)               English contractions
    [^\r\n\p{L}\p{N}]?+\p{L}+           a word with the space, dot, … before it
    \p{N}{1,3}                          numbers in threes at most, so that arithmetic sees digits
     ?[^\s\p{L}\p{N}]++(?:[\r\n]+[ \t]*)?   punctuation with the line end and the indentation after it: "):\n        "
    \s*[\r\n]+[ \t]*                    line ends with the indentation after them
    \s+(?!\S)|\s+                       other white space; the last space goes to the word after it

Joining line end and indentation is worth 6 to 7 % of the tokens of Python source, beside the same pattern without it
(that of cl100k).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from internlm import storage
from internlm.errors import ConfigError, DataError
from internlm.text.tokenizer import Tokenizer, well_formed

logger = logging.getLogger(__name__)

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
KIND = "tokenizer"
_MIN_FREQUENCY = 2
"""A pair must be seen this often to be merged."""
_MAX_VOCAB_SIZE = 1 << 24  # the library reserves memory for all ids at once, and ends the process where there is none


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS, *, pattern: str = PATTERN
) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on `texts`, which are read once.

    Args:
        texts: documents; their words are counted in memory, the texts are not kept.
        vocab_size: ids to reach, special tokens and bytes included.
        special_tokens: in the order of their ids. `<|bos|>`, `<|eos|>` and `<|pad|>` get these roles.
        pattern: the regular expression (Oniguruma) whose matches no token crosses.

    Raises:
        ConfigError: `vocab_size` has no room for bytes and special tokens or is too large, or a special token comes
            twice or is a single character.
        DataError: there is no text.
    """
    _check(vocab_size, special_tokens)
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield well_formed(text)

    with _threads():
        library.train_from_iterator(counted(), trainer)
    if not characters:
        raise DataError("there is no text to train a tokenizer on", do="Check the input files and the text key.")
    tokenizer = Tokenizer.from_json(library.to_str())
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "warning: the text is too small for %d ids: no pair is left that occurs %d times; the vocabulary has %d",
            vocab_size, _MIN_FREQUENCY, tokenizer.vocab_size,
        )  # fmt: skip
    return tokenizer


def train_to_folder(texts: Iterable[str], folder: str | Path, vocab_size: int, *, replace: bool = False) -> Tokenizer:
    """Train with `train_bpe`, save the tokenizer in a folder, and return it.

    Raises:
        ConfigError, DataError: as `train_bpe`.
        StorageError: as `storage.writing`.
    """
    storage.check_free(folder, KIND, replace=replace)  # before the work, not after it
    trained = train_bpe(texts, vocab_size)
    with storage.writing(folder, KIND, replace=replace) as target:
        trained.save(target.path)
        target.meta.update(vocab_size=trained.vocab_size, fingerprint=trained.fingerprint)
    return Tokenizer.load(folder)


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Return how well a tokenizer fits texts; vocabulary_used_ratio is the share of all ids that occur."""
    documents = size_bytes = tokens = 0
    used: set[int] = set()
    for text in texts:
        ids = tokenizer.encode(text)
        documents += 1
        size_bytes += len(well_formed(text).encode())
        tokens += len(ids)
        used.update(ids)
    return {
        "documents": documents,
        "bytes": size_bytes,
        "tokens": tokens,
        "bytes_per_token": size_bytes / tokens if tokens else 0.0,
        "vocabulary_used_ratio": len(used) / tokenizer.vocab_size,
    }


def _check(vocab_size: int, special_tokens: Sequence[str]) -> None:
    least = 256 + len(special_tokens)
    if not least <= vocab_size <= _MAX_VOCAB_SIZE:
        problem = "has no room for 256 bytes and the special tokens" if vocab_size < least else "is too large"
        allowed = [f"{least} or more", f"{_MAX_VOCAB_SIZE} or less"]
        raise ConfigError(problem, where="vocab_size", got=vocab_size, allowed=allowed)
    for name in special_tokens:
        if len(name) < 2 or name.isspace() or list(special_tokens).count(name) > 1:
            raise ConfigError("must be two characters or longer, and each different", where="special_tokens", got=name)


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Let the library use all cores inside the block; outside it uses one, see `backends.py`."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before
