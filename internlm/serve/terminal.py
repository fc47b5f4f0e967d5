"""A conversation in the terminal: `internlm chat`.

    chat = Chat(engine, get_template("internlm"), Settings())
    for text in chat.answer("hello"): ...        # streams; the turn is kept for the next question

With a template, every question sees the turns before it; without one (a base model), the model goes on with the text it
is given and nothing is remembered. When the context is full the oldest turns are dropped, and that is said.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from internlm.errors import EngineError, InternLMError, UsageError
from internlm.infer.engine import Engine, Finished, Request
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import Template
from internlm.weights.talk import Talk

HELP = """\
  /clear   forget the conversation
  /help    show this
  /exit    leave (also Ctrl-D)
  Ctrl-C stops an answer; what was said of it is kept."""
HIDDEN = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters: a model must not be able to steer the terminal."""


@dataclass(frozen=True)
class Settings:
    """How answers are written."""

    temperature: float = 0.8
    """0 takes the most probable token."""
    top_p: float = 0.8
    """Probability that the tokens kept have together."""
    max_tokens: int = 512
    """Most tokens of an answer."""
    seed: int | None = None
    """The n-th answer is drawn with seed + n; None: from the engine's seed."""
    system: str | None = None
    """System message; None: the template's own, if it has one."""
    stops: tuple[int, ...] = ()
    """Ids that end an answer, beside eos and those of the template."""


class Chat:
    """One conversation with a model.

    Args:
        engine: with a tokenizer.
        template: chat format; None: plain continuation.
        settings: how answers are written.
        note: told what the user should know (turns dropped, an answer cut).

    Raises:
        UsageError: the template has no place for the system message.
        TokenizerError: the tokenizer lacks a token of the template.
    """

    def __init__(
        self, engine: Engine, template: Template | None, settings: Settings, note: Callable[[str], None] | None = None
    ) -> None:
        if engine.tokenizer is None:
            raise UsageError("talking needs a tokenizer, and the model came without one")
        self.engine, self.template, self.settings = engine, template, settings
        self.tokenizer = engine.tokenizer
        self.note = note or (lambda text: None)
        self.history: list[Message] = []
        self.answers = 0
        self.interrupted = False
        """Set from outside (a signal) to end the answer after its next token."""
        self.last: tuple[int, int, Finished] = (0, 0, "stop")
        """Of the last answer: tokens of the prompt, tokens of the answer, why it ended."""
        if settings.system and (template is None or template.system is None):
            name = "plain continuation" if template is None else f"template {template.name}"
            raise UsageError(f"{name} has no place for a system message", where="--system")
        known = None if template is None else template.name
        self.stops = tuple(Talk(self.tokenizer, known, stops=settings.stops).stop_ids())
        self._prompt("a")  # a template that does not fit says so now, not after the first question

    def answer(self, question: str) -> Iterator[str]:
        """Yield the pieces of an answer; then the turn belongs to the conversation.

        Raises:
            EngineError: the question alone is longer than the context, or the model's numbers are not finite; the
                conversation is as before.
        """
        prompt = self._prompt(question)
        settings = self.settings
        request = Request(
            tokens=prompt,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=None if settings.seed is None else settings.seed + self.answers,
            stop_ids=self.stops,
            continuation=self.template is None,
        )
        self.interrupted = False
        text, count, finished = "", 0, None
        with contextlib.closing(self.engine.stream(request)) as deltas:
            for delta in deltas:
                text, count, finished = text + delta.text, count + len(delta.tokens), delta.finished
                if delta.text:
                    yield delta.text
                if self.interrupted:
                    break
        if finished == "error":
            raise EngineError("the model gives logits that are not finite", do="Its weights are damaged or overflow.")
        self.answers += 1
        self.last = len(prompt), count, finished or "abort"
        if self.template is not None and text:
            self.history += [Message("user", question), Message("assistant", text)]
        if finished == "length":
            room = self.engine.max_length - len(prompt)
            why = "--max-tokens" if settings.max_tokens <= room else "the model's context"
            self.note(f"the answer was cut after {count} tokens ({why})")

    def clear(self) -> None:
        """Forget the conversation."""
        self.history.clear()

    def _prompt(self, question: str) -> list[int]:
        """Return the ids to answer, dropping the oldest turns that leave no room."""
        if self.template is None:
            start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            return start + self.tokenizer.encode(question)
        kept = [] if self.template.single_turn else list(self.history)
        system = [] if self.settings.system is None else [Message("system", self.settings.system)]
        room = self.engine.max_length - min(self.settings.max_tokens, self.engine.max_length // 4)
        dropped = 0
        while True:
            prompt = render_prompt([*system, *kept, Message("user", question)], self.template, self.tokenizer)
            if len(prompt) <= room or not kept:
                break
            del kept[:2]
            dropped += 1
        if len(prompt) >= self.engine.max_length:
            return prompt  # the engine refuses it; the conversation stays as it was
        self.history[:] = kept
        if dropped:
            self.note(f"the context is full: the oldest {dropped} turn{'s' if dropped > 1 else ''} dropped")
        return prompt


def converse(chat: Chat, read_line: Callable[[], str], out: TextIO) -> None:
    """Ask and answer until the input ends or `/exit`.

    Args:
        chat: the conversation.
        read_line: returns the next line; raises EOFError at the end and KeyboardInterrupt on Ctrl-C.
        out: where answers go.
    """
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            chat.note("/exit or Ctrl-D leaves")
            continue
        if line == "/exit":
            return
        if line == "/clear":
            chat.clear()
            chat.note("forgotten")
        elif line == "/help":
            out.write(HELP + "\n")
        elif re.fullmatch(r"/[a-z]+", line):
            chat.note(f"no such command: {line}; /help lists them")
        elif line:
            try:
                say(chat, line, out)
            except InternLMError as error:
                chat.note(str(error))


def say(chat: Chat, question: str, out: TextIO) -> str:
    """Write an answer to `out` while it comes, and return it. Ctrl-C ends the answer, not the program."""
    pieces = []
    with _interruptible(chat):
        for piece in chat.answer(question):
            pieces.append(piece)
            out.write(piece.translate(HIDDEN))
            out.flush()
    out.write("\n")
    out.flush()
    return "".join(pieces)


@contextlib.contextmanager
def _interruptible(chat: Chat) -> Iterator[None]:
    """Let the first Ctrl-C inside the block end the answer, and a second one everything."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def handle(number: int, frame: object) -> None:
        if chat.interrupted:
            raise KeyboardInterrupt
        chat.interrupted = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def note_to_stderr(text: str) -> None:
    """Show a remark apart from the answers."""
    print(f"[{text}]", file=sys.stderr, flush=True)
