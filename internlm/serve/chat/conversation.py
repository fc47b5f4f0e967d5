"""A conversation: turns, settings, and a file that keeps them.

    chat = Chat(answerer, Settings(), system="Be brief.")
    for text in chat.answer("hello"): ...        # streams; the turn is kept for the next question
    chat.save(Path("talk.jsonl"))

When the context is full the oldest turns are dropped, and that is said. A saved conversation is one line of JSON with
the key `messages`, which `internlm data` reads as a conversation to train on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.errors import DataError, InternLMError, StorageError, UsageError
from internlm.infer.request import TooLong
from internlm.serve.chat.answer import Answerer, Facts, Settings
from internlm.text.chat import Message


class Chat:
    """One conversation.

    Args:
        answerer, settings: who answers, and how.
        system: message; None: the chat format's own, if it has one.
        note: told what the user should know (turns dropped, an answer cut).

    Raises:
        EngineError: a setting is out of range.
        UsageError: there is no place for the system message.
    """

    def __init__(
        self,
        answerer: Answerer,
        settings: Settings | None = None,
        system: str | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.answerer = answerer
        self.use(settings or Settings(), system)
        self.note = note or (lambda text: None)
        self.history: list[Message] = []
        """User and assistant in turns."""
        self.answers = 0
        """So far, forgotten ones too; the random stream of the next depends on it."""
        self.last: Facts | None = None
        self._unanswered: str | None = None

    def answer(self, question: str) -> Generator[str]:
        """Yield the pieces of an answer; then the turn belongs to the conversation, also if it is left early.

        Raises:
            EngineError: the question alone is longer than the context, or the answer went wrong; the conversation is
                as before, and `retry` asks again.
        """
        return self._answer(clean(question), list(self.history))

    def retry(self) -> Generator[str]:
        """Yield another answer to the last question, in the place of the one before as soon as it has a text.

        Raises:
            UsageError: nothing was asked.
            EngineError: as `answer`.
        """
        if self._unanswered is not None:
            return self._answer(self._unanswered, list(self.history))
        if not self.history:
            raise UsageError("there is no question to ask again")
        return self._answer(self.history[-2].content, self.history[:-2])

    def undo(self) -> str:
        """Take the last turn out of the conversation, and return its question; UsageError where there is none."""
        if not self.history:
            raise UsageError("there is no turn to take back")
        question = self.history[-2].content
        del self.history[-2:]
        self._unanswered = None
        return question

    def clear(self) -> None:
        """Forget the conversation."""
        self.history.clear()
        self._unanswered = None

    def use(self, settings: Settings, system: str | None) -> None:
        """Write the answers from now on in another way; after an error, as of the class, nothing has changed."""
        system = None if system is None else clean(system)
        self.answerer.check(settings, system)
        self.settings, self.system = settings, system

    def save(self, path: Path) -> None:
        """Write the conversation with its settings.

        Raises:
            StorageError: it cannot be written, or the file is something else than a saved conversation.
        """
        with disk.explained(f"writing {path}"):
            exists = path.exists()
        if exists:
            try:
                _read(path)
            except InternLMError as error:
                problem = "exists and is no saved conversation"
                raise StorageError(problem, where=path, do="Choose another name.") from error
        record = {
            "messages": [{"role": m.role, "content": m.content} for m in [*self._system(), *self.history]],
            "settings": self.settings.as_json(),
            "answers": self.answers,
            "model": self.answerer.name,
        }
        disk.write_text(path, json.dumps(record, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Go on with a saved conversation in the place of this one, with its settings if it has some.

        Raises:
            StorageError, DataError: it cannot be read, or is something else.
            EngineError, UsageError: its settings or its system message do not fit; nothing has changed then.
        """
        record = _read(path)
        messages = [Message(turn["role"], clean(turn["content"])) for turn in record["messages"]]
        system = messages.pop(0).content if messages[:1] and messages[0].role == "system" else None
        self.use(Settings().changed(record["settings"]) if "settings" in record else self.settings, system)
        self.history[:] = messages
        self.answers = record.get("answers", len(messages) // 2)
        self._unanswered = None

    def _system(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system)]

    def _answer(self, question: str, before: list[Message]) -> Generator[str]:
        """Yield an answer after the turns `before`, and keep it with as many of them as there is room for."""
        self._unanswered = question
        seed = self.settings.seed
        settings = replace(self.settings, seed=None if seed is None else (seed + self.answers) % 2**63)
        turn, dropped = _Turn(), 0
        try:
            while True:
                messages = [*self._system(), *before, Message("user", question)]
                try:
                    with contextlib.closing(self.answerer.answer(messages, settings)) as pieces:
                        for piece in pieces:
                            if dropped and not turn.text:
                                self.note(f"the context is full: the oldest {turns(dropped)} dropped")
                            turn.add(piece)
                            yield piece
                    break
                except TooLong:
                    if not before:
                        raise
                    del before[:2]
                    dropped += 1
        except InternLMError:
            raise
        except BaseException:  # left early: by whoever reads, or by Ctrl-C
            self._keep(question, before, turn)
            raise
        self._keep(question, before, turn)

    def _keep(self, question: str, before: list[Message], turn: _Turn) -> None:
        """Make an answer a part of the conversation, and say what is to be said of it."""
        self.answers += 1
        facts = replace(self.answerer.facts, first_s=turn.first_s, seconds=turn.elapsed())
        self.last = facts
        if turn.text:
            self.history[:] = [*before, Message("user", question), Message("assistant", clean(turn.text))]
            self._unanswered = None
        if facts.finished == "length":
            length = self.answerer.length
            used = (facts.prompt_tokens or 0) + (facts.tokens or 0)
            why = "the model's context" if length is not None and used >= length else "max_tokens"
            self.note("the answer was cut" + (f" after {facts.tokens} tokens" if facts.tokens else "") + f" ({why})")
        elif facts.finished == "abort":
            self.note("stopped")
        elif facts.finished != "stop":
            self.note(f"the answer ended early: {facts.finished}")
        elif not turn.text:
            self.note("the answer is empty")


class _Turn:
    """The answer that is being written, and its times."""

    def __init__(self) -> None:
        self.text = ""
        self.first_s: float | None = None
        self._start = time.perf_counter()

    def add(self, piece: str) -> None:
        if self.first_s is None:
            self.first_s = self.elapsed()
        self.text += piece

    def elapsed(self) -> float:
        return time.perf_counter() - self._start


def clean(text: str) -> str:
    """Return a text without bytes that were no UTF-8, and NUL; halves of a character that came apart are joined."""
    paired = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return paired.encode("utf-8", "replace").decode().replace("\0", "")


def turns(count: int) -> str:
    """Return `1 turn`, `2 turns`."""
    return f"{count} turn{'s' if count != 1 else ''}"


def _read(path: Path) -> dict[str, Any]:
    """Return a saved conversation, checked but for its settings."""
    with disk.explained(f"reading {path}"):
        data = path.read_bytes()
    try:
        records = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no saved conversation: {error}", where=path) from error
    if len(records) != 1 or not isinstance(records[0], dict) or not isinstance(records[0].get("messages"), list):
        found = f"{len(records)} lines" if len(records) != 1 else "something else"
        raise DataError("is no saved conversation: one line with 'messages' is wanted", where=path, got=found)
    record: dict[str, Any] = records[0]
    turns = [turn if isinstance(turn, dict) else {} for turn in record["messages"]]
    roles = [turn.get("role") for turn in turns]
    offset = int(roles[:1] == ["system"])
    for number, turn in enumerate(turns):
        expected = "system" if number < offset else ("user", "assistant")[(number - offset) % 2]
        if turn.get("tool_calls") or turn.get("role") == "tool":
            problem, do = "belongs to a call of a tool, and the terminal has none", "`internlm serve` has tools."
            raise DataError(problem, where=f"{path}, message {number + 1}", do=do)
        if turn.get("role") != expected or not isinstance(turn.get("content"), str):
            problem = "a text of user and assistant in turns is wanted"
            raise DataError(problem, where=f"{path}, message {number + 1}", got=turn.get("role"), allowed=[expected])
    if (len(turns) - offset) % 2:
        raise DataError("the last question has no answer", where=path, do="Take it off.")
    answers = record.get("answers", 0)
    if not isinstance(record.get("settings", {}), dict) or type(answers) is not int or answers < 0:
        raise DataError("'settings' or 'answers' are something else", where=path)
    return record
