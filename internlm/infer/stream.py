"""Tokens → text while they come: whole characters only, special tokens silent, stop strings cut off.

    stream = TextStream(tokenizer, stop_strings=("END",))
    stream.add(id)           # the text that is decided by now
    stream.finish()          # what was still held back

Held back are the bytes of an unfinished character, and an ending that may become a stop string. The pieces joined are
the text decoded at once, up to the first stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from internlm.text.tokenizer import Tokenizer


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: gives the bytes of each token.
        stop_strings: end the answer and are no part of it; the one complete first counts.
        continuation: whether the tokens go on with a text instead of beginning one. It matters with vocabularies that
            put a space before every text: at a beginning it is taken off, as `Tokenizer.decode` does.
        include_stop: whether the stop string is a part of the text after all.
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
        """Characters of all tokens so far, held back or not: where the text of the next one begins."""
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = not continuation and tokenizer.puts_space_first
        self._held = ""
        self._include_stop, self._show_special = include_stop, show_special

    def add(self, id: int) -> str:
        """Return the text that the next token decides; "" once stopped."""
        if self.stopped:
            return ""
        data = self._tokenizer.token_bytes(id, skip_special=not self._show_special)
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
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[0 if self._include_stop else 1]]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
