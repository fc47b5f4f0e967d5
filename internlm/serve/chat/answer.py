"""Who answers in a chat: one protocol, for a model in this process (`local.FromEngine`) and for a server.

    for text in answerer.answer([Message("user", "hello")], Settings(temperature=0)):
        print(text, end="")
    answerer.facts        # tokens of prompt and answer, why it ended

Nothing here needs torch: a client starts at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from internlm.errors import EngineError, UsageError
from internlm.infer.client import Client, Refused
from internlm.infer.request import Rules, TooLong
from internlm.text.chat import Message

_TOO_LONG = re.compile(r"refuses \(4\d\d\).*(context|too long|tokens are too many|too many tokens)", re.I | re.S)
"""Such as "maximum context length": servers have no common code for it."""
_NONE = ("none", "default")
_ALWAYS_TOLD = ("temperature", "top_p", "max_tokens")
"""Settings that a server hears of even where they are our defaults."""


@dataclass(frozen=True, kw_only=True)
class Settings(Rules):
    """How answers are written, as of `Request`."""

    temperature: float = 0.8
    top_p: float = 0.8
    max_tokens: int = 512
    seed: int | None = None
    """The n-th answer is drawn with seed + n; None: at random."""
    stop: tuple[str, ...] = ()

    def changed(self, values: Mapping[str, Any]) -> Settings:
        """Return settings with other values, as JSON has them; ranges are the answerer's business.

        Raises:
            UsageError: a name is not known, or a value is of the wrong kind.
        """
        return replace(self, **{name: _of_kind(name, value) for name, value in values.items()})

    def parsed(self, name: str, text: str) -> Settings:
        """Return settings with one value as a person types it (`none`, `default`: the default); errors of `changed`."""
        value: Any = text
        if text in _NONE:
            value = None
        elif name != "stop":
            value = _number(text)
        elif text[:1] in ('"', "["):
            try:
                value = json.loads(text)
            except ValueError as error:
                raise UsageError(f"is no JSON: {error}", where="stop", got=text) from error
        return self.changed({name: value})

    def as_json(self) -> dict[str, Any]:
        """Return all of them as JSON has them."""
        return vars(self) | {"stop": list(self.stop)}


_DEFAULTS = vars(Settings())


def _of_kind(name: str, value: Any) -> Any:
    """Return the value of a setting; None gives the default."""
    if name not in _DEFAULTS:
        raise UsageError("no such setting", got=name, allowed=_DEFAULTS)
    default = _DEFAULTS[name]
    if value is None:
        return default
    if name == "stop":
        texts = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(text, str) and text for text in texts):
            raise UsageError("is no text, and no list of texts", where=name, got=value)
        return texts
    kinds, what = ((int, float), "number") if isinstance(default, float) else ((int,), "whole number")
    if type(value) not in kinds:
        raise UsageError(f"is no {what}", where=name, got=value)
    return value


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@dataclass(frozen=True)
class Facts:
    """What is known of an answer of `tokens`: its first text came after `first_s`, its end after `seconds`."""

    finished: str = "abort"
    """Why it ended: `Finished` of the engine, or what the server says."""
    prompt_tokens: int | None = None
    tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt, those that did not need to be computed."""
    first_s: float | None = None
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """How fast the answer was written, after its first text."""
        if self.tokens is None or self.first_s is None or self.tokens < 2 or self.seconds <= self.first_s:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_s)


class Answerer(Protocol):
    """Who answers."""

    name: str
    """For notes and saved conversations."""
    length: int | None
    """Most tokens of prompt and answer together; None: not known."""
    facts: Facts
    """Of the last answer, as far as it came; the chat fills in the times."""

    def check(self, settings: Settings, system: str | None) -> None:
        """Check what can be checked before a question is asked.

        Raises:
            EngineError: a setting is out of range.
            UsageError: there is no place for a system message.
        """

    def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[str]:
        """Yield the pieces of an answer; the last message is the user's.

        Raises:
            TooLong: before any text; fewer turns may fit.
            EngineError: it cannot be answered, or went wrong on the way.
        """

    def interrupt(self) -> None:
        """End the answer that is being written; called by a signal handler of the thread that reads it.

        Raises:
            KeyboardInterrupt: that is how this one is ended; the facts say "abort" then.
        """


class FromServer:
    """Lets a server answer.

    Raises:
        EngineError: the client knows no model's name and the server tells none.
    """

    length: int | None = None

    def __init__(self, client: Client) -> None:
        self.client = client
        self.name = client.model
        self.facts = Facts()

    def check(self, settings: Settings, system: str | None) -> None:
        """The server checks, with the next question."""

    def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[str]:
        """Yield the pieces of an answer."""
        self.facts = Facts()
        try:
            spoken = [{"role": message.role, "content": message.content} for message in messages]
            given = vars(settings)
            told = {name: given[name] for name in given if name in _ALWAYS_TOLD or given[name] != _DEFAULTS[name]}
            with self.client.chat(spoken, **told) as reply:
                yield from reply
        except EngineError as error:
            said = isinstance(error, Refused) and error.code == "context_length_exceeded"
            if said or _TOO_LONG.search(str(error)):
                raise TooLong(str(error)) from error
            raise
        usage = reply.usage
        self.facts = Facts(
            reply.finished or "stop",
            _count(usage, "prompt_tokens"),
            _count(usage, "completion_tokens"),
            _count(usage, "prompt_tokens_details", "cached_tokens"),
        )

    def interrupt(self) -> None:
        """Leave the wait for the server."""
        raise KeyboardInterrupt


def _count(usage: Any, *path: str) -> int | None:
    """Return a number out of what the server says it used."""
    for key in path:
        usage = usage.get(key) if isinstance(usage, dict) else None
    return usage if isinstance(usage, int) else None
