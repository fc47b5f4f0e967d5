"""Tokens → text while they come: whole characters only, special tokens silent, stop strings cut off.

    stream = TextStream(tokenizer, stop_strings=("END",))
    stream.add(id)           # the text that is decided by now
    stream.finish()          # what was still held back

Held back are the bytes of an unfinished character, and an ending that may become a stop string.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence

from internlm.text.tokenizer import Tokenizer


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: gives the bytes of each token.
        stop_strings: end the answer; the one complete first counts.
        continuation: whether the tokens go on with a text: else the space that some vocabularies put before every text
            is taken off, as `Tokenizer.decode` does.
        include_stop: whether the stop string is a part of the text.
        show_special: whether special tokens have a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        continuation: bool = False,
        include_stop: bool = False,
        show_special: bool = False,
    ) -> None:
        self.stopped = False
        """Whether a stop string came up."""
        self.length = 0
        """Characters of all tokens so far, held back or not."""
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = not continuation and tokenizer.puts_space_first
        self._held = ""
        self._begun = [0] * len(self._stops)
        """Characters of each stop string that the text ends with."""
        self._include_stop, self._skip_special = include_stop, not show_special

    def add(self, id: int) -> str:
        """Return the text that the next token decides; "" once stopped."""
        if self.stopped:
            return ""
        data = self._tokenizer.token_bytes(id, skip_special=self._skip_special)
        if data and self._drops_space:
            self._drops_space = False
            data = data.removeprefix(b" ")
        text = self._decoder.decode(data)
        self.length += len(text)
        return self._release(text) if self._stops else text

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, text: str) -> str:
        """Return what of the held text and `text` cannot belong to a stop string."""
        at = len(self._held)
        self._held += text
        for character in text:
            at += 1
            pairs = zip(self._stops, self._begun, strict=True)
            self._begun = [_further(stop, count, character) for stop, count in pairs]
            whole = [count for stop, count in zip(self._stops, self._begun, strict=True) if count == len(stop)]
            if whole:
                self.stopped = True
                return self._held[: at if self._include_stop else at - max(whole)]
        keep = max(self._begun, default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _further(stop: str, count: int, character: str) -> int:
    """Return how many characters of a stop string a text ends with that ended with `count`, and then goes on."""
    while count and (count == len(stop) or stop[count] != character):
        count = _borders(stop)[count - 1]
    return count + (stop[count] == character)


@functools.lru_cache(1024)
def _borders(stop: str) -> tuple[int, ...]:
    """Return for each beginning of a text how much of it, not all, it also ends with (Knuth, Morris, Pratt 1977).

    A step of 128 answers with 16 stop strings of 1 KiB took 200 ms where each ending was tried out.
    """
    borders = [0]
    for character in stop[1:]:
        count = borders[-1]
        while count and stop[count] != character:
            count = borders[count - 1]
        borders.append(count + (stop[count] == character))
    return tuple(borders)
