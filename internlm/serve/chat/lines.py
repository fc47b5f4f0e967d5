'''What a person types: lines, texts of several lines, and a file that remembers them.

    read = open_input(InputHistory(state_file()))
    text, is_plain = read_input(read)

Several lines stand between """ and """; where prompt_toolkit is installed, Alt-Enter begins a new line too. Without it
Python's readline edits the line, and where there is no terminal, or a dumb one, lines are just read.
'''

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from internlm import disk
from internlm.errors import StorageError

Read = Callable[[str], str]
"""Shows a prompt and returns what was typed, as `input` does."""

QUOTES = '"""'
_KEPT = 1000
"""Inputs that the file keeps; it grows to twice as many before it is cut."""


def read_input(read: Read) -> tuple[str, bool]:
    """Return the next text, and whether it was typed plainly: a quoted one is never a command.

    Raises:
        EOFError, KeyboardInterrupt: as of `Read`; what was quoted by then is lost.
    """
    line = read("\n> ")
    if not line.lstrip().startswith(QUOTES):
        return line.strip(), True
    lines: list[str] = []
    line = line.lstrip().removeprefix(QUOTES)
    while not line.rstrip().endswith(QUOTES):
        lines.append(line)
        line = read("... ")
    lines.append(line.rstrip().removesuffix(QUOTES))
    return "\n".join(lines).strip("\n"), False


class InputHistory:
    """Texts that were typed, the oldest first, in a file of the user alone; None: just in the process."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.texts: list[str] = []
        if path is None:
            return
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return  # there is none yet; one that may not be read may not be written either
        self.texts = [text for line in lines if isinstance(text := _text_of(line), str)]
        if len(self.texts) > 2 * _KEPT:
            self.texts = self.texts[-_KEPT:]
            try:
                disk.write_text(path, "".join(json.dumps(text) + "\n" for text in self.texts))
                path.chmod(0o600)
            except (StorageError, OSError):
                self.path = None

    def add(self, text: str) -> None:
        """Remember a text, unless it repeats the one before; a file that cannot be written is left alone then."""
        if self.texts[-1:] == [text]:
            return
        self.texts.append(text)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self.path.chmod(0o600)  # it may have been there, for others to read
            with open(descriptor, "a", encoding="utf-8") as file:  # one write: two processes do not mix their lines
                file.write(json.dumps(text) + "\n")
        except OSError:
            self.path = None


def state_file() -> Path | None:
    """Return where inputs are remembered; None where the user has no state folder."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(folder):  # the specification says to ignore a relative one
        folder = os.path.expanduser("~/.local/state")
    return Path(folder) / "internlm" / "chat_history.jsonl" if os.path.isabs(folder) else None


def open_input(history: InputHistory) -> Read:
    """Return the best way to read lines that the terminal and the installed packages offer."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not on_terminal or os.environ.get("TERM", "") in ("", "dumb"):
        return _read_plainly
    for way in (_with_toolkit, _with_readline):
        try:
            return way(history)
        except ImportError:
            continue
    return _read_plainly


def _read_plainly(prompt: str) -> str:
    out = sys.stdout if sys.stdout.isatty() else sys.stderr  # answers may go into a file, and nothing else with them
    with _ending_the_line(out):
        out.write(prompt)
        out.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
    return line.removesuffix("\n")


@contextlib.contextmanager
def _ending_the_line(out: TextIO) -> Iterator[None]:
    """Begin a new line when Ctrl-C or Ctrl-D leaves the cursor behind the prompt."""
    try:
        yield
    except (EOFError, KeyboardInterrupt):
        out.write("\n")
        out.flush()
        raise


def _with_readline(history: InputHistory) -> Read:
    import readline

    readline.set_auto_history(False)

    def read(prompt: str) -> str:
        readline.clear_history()
        for text in history.texts:
            readline.add_history(text)
        with _ending_the_line(sys.stdout):
            return input(prompt)

    return read


def _with_toolkit(history: InputHistory) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class Texts(InMemoryHistory):
        """Shows the texts, and adds nothing to them: a line may be a part of a text."""

        def load_history_strings(self) -> list[str]:
            return history.texts[::-1]

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def read(prompt: str) -> str:
        # A session for each text: it shows what was added since the one before.
        session: PromptSession[str] = PromptSession(history=Texts(), key_bindings=keys, multiline=True)
        return session.prompt(prompt, prompt_continuation="... ")

    return read


def _text_of(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
