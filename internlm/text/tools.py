"""Tool calls between a conversation and a model's text: what a format of them is; `tool_formats` has the three.

    messages = format.render([Message("user", "What is 2 + 3?")], [Tool("add", "Adds numbers.", {...})])
    ids = render_prompt(messages, get_template("chatml"), tokenizer)  # the one renderer, as without tools
    parser = format.parser({"add"})
    parser.add(text), …, parser.finish()                              # events, while the answer comes
    [*history, Message("assistant", "", calls=(call,)), Message("tool", "5", call_id=call.id)]   # once more

Special tokens get in by id: `render` gives them as parts of a message, and content that looks like them stays text.
Read back from an answer they are text: generate with `show_special` where a format has `specials`.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any, Literal

from internlm.errors import DataError
from internlm.log import warn_once
from internlm.text.chat import Message, ToolCall, check_turns, framed
from internlm.text.templates import Frame, Part, Template, json_text, text_of
from internlm.text.tool_json import MAX_DEPTH, is_object
from internlm.text.tool_parser import (
    ArgumentsGrow,
    CallBegins,
    CallFails,
    Event,
    Thought,
    ToolParser,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """What a model may call.

    Raises:
        DataError: the name is not 1 to 64 letters, digits, `_`, `.` or `-`, or the parameters are nested too deep.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of the arguments, an object."""

    @classmethod
    def of(cls, name: str, description: str | None = None, parameters: dict[str, Any] | None = None) -> Tool:
        """Return a tool of which perhaps nothing is known but its name."""
        return cls(name, description or "") if parameters is None else cls(name, description or "", parameters)

    @property
    def text(self) -> str:
        """How every format describes it: a JSON object."""
        return json_text({"name": self.name, "description": self.description, "parameters": self.parameters})

    def __post_init__(self) -> None:
        _check_name(self.name, "tool")
        level: list[Any] = [self.parameters]
        for _ in range(MAX_DEPTH):
            level = [child for value in level for child in _children(value)]
        if level:
            raise DataError(f"the parameters are nested deeper than {MAX_DEPTH} levels", where=f"tool {self.name}")


@dataclass(frozen=True)
class Forced:
    """How an answer is made to be a call."""

    begin: tuple[Part, ...]
    """For `render_prompt(…, begin=)`."""
    kind: Literal["json_schema", "labelled_schema"]
    """As `internlm.infer.grammar` calls it."""
    grammar: dict[str, Any]
    """Of the rest of the answer: a JSON schema, or for each text that it may begin with the schema of what follows."""

    @property
    def text(self) -> str:
        """What the parser must be given first: the answer's tokens do not hold it."""
        return text_of(self.begin)


@dataclass(frozen=True)
class Answer:
    """A whole answer, read."""

    content: str
    thought: str
    calls: tuple[ToolCall, ...]


class ToolFormat:
    """How calls, their results and the tools are written for a chat template, which renders what `render` returns."""

    name: str
    stops: tuple[str, ...] = ()
    """Strings that end an answer, beside the stops of the template."""
    specials: tuple[str, ...] = ()
    """Special tokens that `parser` reads as text."""
    words: tuple[str, ...] = ()
    """What is said around the tools' descriptions, in its order."""
    writes_thoughts = False
    """Whether what an assistant said to itself is written."""

    def __init__(self, template: Template) -> None:
        self.template = template

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), parallel: bool = True) -> list[Message]:
        """Return the conversation as system, user and assistant messages that `chat.render` takes.

        The tools are told in the system message, after its own words. Results of several calls may come in any order.

        Raises:
            DataError: arguments are no JSON object, results and calls do not belong together, or user and assistant do
                not take turns.
        """
        check_turns(messages)  # here: `chat` would count messages that nobody wrote
        for number, message in enumerate(messages, 1):
            for call in message.calls:
                if not isinstance(call.arguments, str) or not is_object(call.arguments.strip()):
                    problem = f"the arguments of {call.name} are no JSON object"
                    raise DataError(problem, where=f"message {number}", got=str(call.arguments)[:80])
        return self._write(messages, tools, parallel)

    def render_history(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), parallel: bool = True
    ) -> list[Message]:
        """Return what `render` does, for prompts, of all that clients send.

        What comes between two answers is one turn, in which each message keeps its frame: results of calls, users, and
        system messages where the template has a place for them. An answer that nobody asked for, a greeting, begins the
        first turn. Arguments that are no JSON object stay: the model shall see its mistake.

        Raises:
            DataError: results and calls do not belong together.
        """
        return _in_turns(self._write(messages, tools, parallel), self.template)

    def _write(self, messages: Sequence[Message], tools: Sequence[Tool], parallel: bool) -> list[Message]:
        at = 1 if messages and messages[0].role == "system" else 0
        written = list(messages[:at])
        if tools:
            written = [self._system(messages[0].content if at else "", tools, parallel)]
        while at < len(messages):
            message = messages[at]
            if message.thought and not self.writes_thoughts:
                warn_once(logger, f"the tool format {self.name} does not write thoughts: they have no effect")
            where = f"message {at + 1}"
            if message.role == "tool":
                raise DataError("a tool's result without a call before it", where=where)
            results: list[str] | None = None
            if message.calls:
                if message.role != "assistant":
                    raise DataError("only an assistant message has calls", where=where, got=message.role)
                for call in message.calls:
                    _check_name(call.name, f"{where}, call")
                results = _results(messages, at)
                written += self._calls(message, results)
            else:
                written.append(self._answer(message) if tools and message.role == "assistant" else message)
            at += 1 + len(results or ())
        return _folded(written) if self.template.system is None and tools else written

    def parser(self, known: Collection[str], parallel: bool = True) -> ToolParser:
        """Return a parser of one answer; `known` names the tools that may be called."""
        raise NotImplementedError

    def schema(self, tools: Sequence[Tool], choice: str) -> Forced | None:
        """Return how to make the model call one tool: any ("required"), or that of this name; None: "auto" and "none".

        Raises:
            DataError: no tool has this name, or there is none.
        """
        if choice in ("auto", "none"):
            return None
        names = [tool.name for tool in tools]
        chosen = [tool for tool in tools if choice in ("required", tool.name)]
        if not chosen:
            raise DataError("no such tool", where="tool_choice", got=choice, allowed=names)
        return self._forced(chosen)

    def _system(self, content: str, tools: Sequence[Tool], parallel: bool) -> Message:
        """Return the system message that tells of the tools."""
        told = self._told(tools, parallel)
        return Message("system", f"{content}\n\n{told}" if content else told)

    def _told(self, tools: Sequence[Tool], parallel: bool) -> str:
        """Return what the system message says of the tools."""
        raise NotImplementedError

    def _calls(self, message: Message, results: list[str] | None) -> list[Message]:
        """Return an assistant message with calls, and their results; None: the conversation ends with the calls."""
        raise NotImplementedError

    def _answer(self, message: Message) -> Message:
        return message

    def _forced(self, tools: Sequence[Tool]) -> Forced:
        raise NotImplementedError


def new_call_id() -> str:
    """Return an id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


def collect(events: Iterable[Event]) -> Answer:
    """Return what the events of one parser come to; calls that failed are content."""
    content: list[str] = []
    thought: list[str] = []
    calls: dict[int, tuple[str, list[str]]] = {}
    for event in events:
        if isinstance(event, CallBegins):
            calls[event.index] = (event.name, [])
        elif isinstance(event, ArgumentsGrow):
            calls[event.index][1].append(event.text)
        elif isinstance(event, CallFails):
            del calls[event.index]
            content.append(event.text)
        else:
            (thought if isinstance(event, Thought) else content).append(event.text)
    made = tuple(ToolCall(new_call_id(), name, "".join(pieces)) for name, pieces in calls.values())
    return Answer("".join(content), "".join(thought), made)


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise DataError("a tool's name is 1 to 64 letters, digits, '_', '.' or '-'", where=where, got=name)


def _results(messages: Sequence[Message], at: int) -> list[str] | None:
    """Return the results of the calls of `messages[at]` in their order, None where the conversation ends with these."""
    calls, where = messages[at].calls, f"message {at + 1}"
    following = list(takewhile(lambda message: message.role == "tool", messages[at + 1 :]))
    if not following and at + 1 == len(messages):
        return None
    for number, message in enumerate(following, at + 2):
        if not isinstance(message.content, str):
            raise DataError("the content is not a text", where=f"message {number}", got=message.content)
    ids = [call.id for call in calls]
    given = [message.call_id for message in following]
    if all(id_ is None for id_ in given) and len(given) == len(ids):
        return [message.content for message in following]
    if len(set(ids)) < len(ids) or len(given) != len(ids) or set(given) != set(ids):
        raise DataError(
            "each call needs one result, with its id, right after it", where=where, got=given, allowed=ids,
            do="Give a message of role tool for every call.",
        )  # fmt: skip
    by_id = {message.call_id: message.content for message in following}
    return [by_id[id_] for id_ in ids]


def _folded(messages: list[Message]) -> list[Message]:
    """Return messages with that of the system as a part of the first that is a user's own."""
    at = next((n for n, one in enumerate(messages) if one.role == "user" and not one.parts), None)
    if at is None:
        return messages
    system, first = messages[0], messages[at]
    told = Message("user", f"{system.content}\n\n{first.content}", first.name)
    return [*messages[1:at], told, *messages[at + 1 :]]


def _in_turns(messages: list[Message], template: Template) -> list[Message]:
    """Return messages as `ToolFormat.render_history` says."""
    if template.single_turn:
        return messages
    begun = 1 if messages and messages[0].role == "system" else 0
    found = messages[:begun]
    numbered = enumerate(messages[begun:])
    for answers, turn in groupby(numbered, lambda item: item[0] > 0 and item[1].role == "assistant"):
        members = [message for _, message in turn]
        roles = {message.role for message in members}
        can_be_one = not answers and roles != {"assistant"} and ("system" not in roles or template.system)
        found += [_together(members, template)] if can_be_one and (len(members) > 1 or "system" in roles) else members
    return found


def _together(turn: Sequence[Message], template: Template) -> Message:
    """Return messages, each in its own frame, as one of the user's."""
    usual = {"system": template.system, "user": template.user, "assistant": template.assistant}
    parts: list[Part] = []
    for message in turn:
        frame = usual[message.role]
        assert frame is not None, "who calls this has seen that there is one"
        parts += framed(message, frame)
    return Message("user", text_of(parts), parts=tuple(parts), frame=Frame((), ()))


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
