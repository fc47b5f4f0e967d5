"""A conversation in the terminal: `internlm chat`.

    screen = Screen(sys.stdout, sys.stderr)
    chat = Chat(answerer, Settings(), note=screen.note)
    Terminal(chat, screen, inputs).converse(read)        # asks and answers until the input ends or `/exit`

Answers go to one stream, all else to the other, so that a file may take the answers.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import textwrap
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TextIO

from internlm.errors import InternLMError, UsageError, did_you_mean
from internlm.serve.chat.conversation import Chat, turns
from internlm.serve.chat.lines import QUOTES, InputHistory, Read, read_input

HIDDEN = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters: a model must not be able to steer the terminal."""
_SHOWN = 60


COMMANDS = {
    "/clear": "",
    "/retry": "",
    "/undo": "",
    "/system": "TEXT",
    "/set": "NAME VALUE",
    "/save": "FILE",
    "/load": "FILE",
    "/stats": "",
    "/help": "",
    "/exit": "",
}
"""What may be typed instead of a question, and what may stand after it; the methods of `Terminal` do it."""


class Screen:
    """Where a conversation is shown: the answers on `out`, all else on `remarks`."""

    def __init__(self, out: TextIO, remarks: TextIO) -> None:
        self.out, self.remarks = out, remarks
        has_colours = remarks.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if has_colours else ("", "")
        self._in_line = False

    def write(self, piece: str) -> None:
        """Show a piece of an answer, at once."""
        piece = piece.translate(HIDDEN)
        self.out.write(piece)
        self.out.flush()
        if piece:
            self._in_line = not piece.endswith("\n")

    def end(self) -> None:
        """End the line that an answer is in."""
        if self._in_line:
            self.out.write("\n")
            self.out.flush()
            self._in_line = False

    def note(self, text: str) -> None:
        """Show a remark, apart from the answers."""
        self.show(f"[{text}]")

    def show(self, text: str) -> None:
        """Show lines that are no answer."""
        self.end()
        self.remarks.write(f"{self._dim}{text.translate(HIDDEN)}{self._plain}\n")
        self.remarks.flush()


def say(chat: Chat, pieces: Generator[str], screen: Screen) -> None:
    """Show an answer of the chat while it comes. Ctrl-C ends it after the current step, twice at once.

    Raises:
        KeyboardInterrupt: at the second Ctrl-C.
        InternLMError: as of `Chat.answer`.
    """
    with _interruptible(chat) as times, contextlib.closing(pieces):
        try:
            for piece in pieces:
                screen.write(piece)
        except KeyboardInterrupt:  # of an answerer that is ended so, wherever the signal found the program
            if times() > 1:
                raise
        finally:
            screen.end()


@contextlib.contextmanager
def _interruptible(chat: Chat) -> Iterator[Callable[[], int]]:
    """Let the first Ctrl-C inside the block end the answer, and others raise; yield how to count them."""
    count = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: count  # only the main thread may set handlers
        return

    def handle(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        chat.answerer.interrupt()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: count
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal:
    """Reads questions and commands, and shows answers; `inputs` remembers what was typed."""

    def __init__(self, chat: Chat, screen: Screen, inputs: InputHistory) -> None:
        self.chat, self.screen, self.inputs = chat, screen, inputs
        self.file: Path | None = None
        """Where the conversation was saved or loaded last."""
        self._leaving = False

    def converse(self, read: Read) -> None:
        """Ask and answer until the input ends or `/exit`."""
        while not self._leaving:
            with contextlib.suppress(KeyboardInterrupt):  # whenever it is pressed: it must not cost the conversation
                self._take(read)

    def _take(self, read: Read) -> None:
        try:
            text, is_plain = read_input(read)
        except EOFError:
            self._leaving = True
            return
        except KeyboardInterrupt:
            self.screen.note("/exit or Ctrl-D leaves")
            return
        if not text.strip():
            return
        self.inputs.add(text)
        try:
            if is_plain:
                self._do(text)
            else:
                say(self.chat, self.chat.answer(text), self.screen)
        except InternLMError as error:
            self.screen.note(str(error))

    def _do(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if text in ("end", "exit"):
            name, argument = {"end": "/clear", "exit": "/exit"}[text], ""
            self.screen.note(f"{text} means {name} here; {QUOTES}{text}{QUOTES} asks it")
        if not re.fullmatch(r"/[a-z]+", name):  # a path is a question, not a command
            say(self.chat, self.chat.answer(text), self.screen)
            return
        if name not in COMMANDS:
            advice = did_you_mean(name, COMMANDS)
            raise UsageError(f"no such command: {name}. {advice + ' ' if advice else ''}/help lists them")
        if argument and not COMMANDS[name]:
            raise UsageError("nothing stands after this command", where=name, got=argument)
        getattr(self, name[1:])(argument.strip())

    def clear(self, _: str) -> None:
        """Forget the conversation."""
        self.chat.clear()
        self.screen.note("forgotten")

    def retry(self, _: str) -> None:
        """Another answer to the last question."""
        say(self.chat, self.chat.retry(), self.screen)

    def undo(self, _: str) -> None:
        """Take back the last turn."""
        question = " ".join(self.chat.undo().split())
        self.screen.note(f"taken back: {question if len(question) <= _SHOWN else question[: _SHOWN - 1] + '…'}")

    def system(self, argument: str) -> None:
        """System message; none: the format's own."""
        if argument:
            self.chat.use(self.chat.settings, None if argument == "none" else argument)
        shown = "the chat format's own" if self.chat.system is None else self.chat.system
        self.screen.note(f"system message: {shown}")

    def set(self, argument: str) -> None:
        """Change how answers are written; alone it shows the settings."""
        name, _, value = re.sub(r"\s*=\s*", " ", argument, count=1).partition(" ")
        if name:  # without a value this says only whether there is such a setting
            changed = self.chat.settings.parsed(name, value.strip() or "none")
            self.chat.use(changed if value.strip() else self.chat.settings, self.chat.system)
        told = self.chat.settings.as_json()
        for key in [name] if name else told:
            shown = "none" if told[key] in (None, []) else told[key]
            self.screen.show(f"{key:19}{shown}")

    def save(self, argument: str) -> None:
        """Write the conversation to a file."""
        path = self._path(argument, "/save")
        self.chat.save(path)
        self.file = path
        self.screen.note(f"saved in {path}")

    def load(self, argument: str) -> None:
        """Go on with a saved one."""
        path = self._path(argument, "/load")
        self.chat.load(path)
        self.file = path
        self.screen.note(f"{turns(len(self.chat.history) // 2)} loaded from {path}")

    def _path(self, argument: str, command: str) -> Path:
        if "\0" in argument:
            raise UsageError("no file has such a name", where=command, got=argument)
        if argument:
            return Path(os.path.expanduser(argument))
        if self.file is None:
            raise UsageError("a file is wanted", where=command, do=f"Say {command} FILE.")
        return self.file

    def stats(self, _: str) -> None:
        """Tokens, speed, context."""
        facts, length = self.chat.last, self.chat.answerer.length
        lines = [("turns", str(len(self.chat.history) // 2)), ("model", self.chat.answerer.name)]
        if facts is not None:
            speed, used = facts.tokens_per_s, (facts.prompt_tokens or 0) + (facts.tokens or 0)
            share = "" if length is None else f" of {length} ({used / length:.0%})"
            cached = "" if facts.cached_tokens is None else f", {facts.cached_tokens} cached"
            lines += [
                ("prompt", f"{_shown(facts.prompt_tokens)} tokens{cached}"),
                ("answer", f"{_shown(facts.tokens)} tokens, {facts.finished}"),
                ("first text", "none" if facts.first_s is None else f"after {facts.first_s:.2f} s"),
                ("speed", "unknown" if speed is None else f"{speed:.1f} tokens/s"),
                ("context", f"{used or '?'}{share} tokens used"),
            ]
        self.screen.show("\n".join(f"{name:12}{value}" for name, value in lines))

    def help(self, _: str) -> None:
        """Show this."""
        width = max(shutil.get_terminal_size().columns, 36)
        lines = []
        for name, argument in COMMANDS.items():
            head, about = f"{name} {argument}", (getattr(self, name[1:]).__doc__ or "").rstrip(".")
            lines += textwrap.wrap(f"{head:18} {about[:1].lower()}{about[1:]}", width - 1, subsequent_indent=" " * 19)
        lines += textwrap.wrap(_KEYS, width - 1)
        self.screen.show("\n".join(lines))

    def exit(self, _: str) -> None:
        """Leave (also Ctrl-D)."""
        self._leaving = True


_KEYS = (
    f"Several lines stand between {QUOTES} and {QUOTES}, or come with Alt-Enter where prompt_toolkit is installed. "
    "Ctrl-C stops an answer; what was said of it is kept."
)


def _shown(count: int | None) -> str:
    return "?" if count is None else str(count)
