r"""Tool calls between a conversation and a model's text: three formats, each of which renders and parses.

    format = format_of("chatml")                                      # hermes
    messages = format.render([Message("user", "What is 2 + 3?")], [Tool("add", "Adds numbers.", {...})])
    ids = render_prompt(messages, get_template("chatml"), tokenizer)  # the one renderer, as without tools
    parser = format.parser({"add"})
    parser.add(text), …, parser.finish()                              # events, while the answer comes
    [*history, Message("assistant", "", calls=(call,)), Message("tool", "5", call_id=call.id)]   # and once more

    react       InternLM-chat v1.1   Thought:… ⏎ Action:add ⏎ ActionInput:{"a": 2, "b": 3}
    internlm2   InternLM2 and later  <|action_start|><|plugin|> ⏎ {"name": "add", "parameters": {…}}<|action_end|>
    hermes      Hermes, Qwen, ours   <tool_call> ⏎ {"name": "add", "arguments": {…}} ⏎ </tool_call>

Special tokens get in by id, as all structure does: `render` gives them as parts of a message, never as text, and
content that looks like them stays text. InternLM2 was trained on the tokens alone, so a tokenizer that lacks one is an
error of `render_prompt`, and hermes is the format for it. The tags of hermes are text in its own models too. Read back
from an answer they are text in every format: generate with `show_special` where a format has `specials`.

Limits: InternLM2's code interpreter (`<|interpreter|>`) is no tool here; its calls come out as content.
Sources: lagent 0.1 (ReAct: its keys, results as system messages), Qwen2.5's chat template, and
https://github.com/InternLM/InternLM/blob/main/chat/chat_format.md. The words around the descriptions are our own.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from internlm.errors import ConfigError, DataError, did_you_mean
from internlm.log import warn_once
from internlm.text.chat import Framed, Message, ToolCall
from internlm.text.templates import Frame, Part, Special, Template, get_template, text_of
from internlm.text.tool_json import MAX_DEPTH, is_object, moved_schema
from internlm.text.tool_parser import (
    ArgumentsGrow,
    CallBegins,
    CallFails,
    Event,
    ReActParser,
    TaggedParser,
    Text,
    Thought,
    ToolParser,
)

__all__ = [
    "ArgumentsGrow", "CallBegins", "CallFails", "Event", "Text", "Thought", "ToolParser",
    "Answer", "Forced", "Message", "Tool", "ToolCall", "ToolFormat", "FORMATS",
    "collect", "format_of", "get_format", "new_call_id",
]  # fmt: skip

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
        return _json({"name": self.name, "description": self.description, "parameters": self.parameters})

    def __post_init__(self) -> None:
        _check_name(self.name, "tool")
        level: list[Any] = [self.parameters]
        for _ in range(MAX_DEPTH):
            level = [child for value in level for child in _children(value)]
        if level:
            raise DataError(f"the parameters are nested deeper than {MAX_DEPTH} levels", where=f"tool {self.name}")


@dataclass(frozen=True)
class Forced:
    """How an answer is made to be a call: it begins so, and goes on as a grammar says."""

    begin: tuple[Part, ...]
    """For `render_prompt(…, begin=)`."""
    kind: Literal["json_schema", "labelled_schema"]
    """As `internlm.infer.grammar` calls it."""
    grammar: dict[str, Any]
    """Of all the rest of the answer: a JSON schema, or for each text that it may begin with the schema of its rest."""

    @property
    def text(self) -> str:
        """What the parser must be given first, as the answer's tokens do not hold it."""
        return text_of(self.begin)


@dataclass(frozen=True)
class Answer:
    """A whole answer, read."""

    content: str
    thought: str
    calls: tuple[ToolCall, ...]


class ToolFormat:
    """How calls, their results and the tools themselves are written for a chat template.

    Args:
        template: the chat template that renders what `render` returns.
    """

    name: str
    stops: tuple[str, ...] = ()
    """Strings that end an answer, beside the stops of the template."""
    specials: tuple[str, ...] = ()
    """Special tokens that `parser` reads as text: generate with `show_special` where there are any."""
    words: tuple[str, ...] = ()
    """What is said around the tools' descriptions, in the order in which it stands there."""

    def __init__(self, template: Template) -> None:
        self.template = template

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), parallel: bool = True) -> list[Message]:
        """Return the conversation as system, user and assistant messages that `chat.render` and `render_prompt` take.

        The tools are told in the system message, after its own words; without tools there the messages stay as they
        are. Results of several calls may come in any order.

        Raises:
            DataError: arguments are no JSON object, or results and calls do not belong together, or user and assistant
                do not take turns.
        """
        _check_turns(messages)
        written: list[Message] = []
        system = messages[0].content if messages and messages[0].role == "system" else ""
        at = 1 if messages and messages[0].role == "system" else 0
        if tools:
            written.append(self._system(system, tools, parallel))
        else:
            written += messages[:at]
        while at < len(messages):
            message = messages[at]
            if message.thought and self.name != ReAct.name:
                warn_once(logger, f"the tool format {self.name} does not write thoughts: they have no effect")
            if message.role == "tool":
                raise DataError("a tool's result without a call before it", where=f"message {at + 1}")
            results: list[str] | None = None
            if message.calls:
                _check_calls(message, at + 1)
                results = _results(messages, at)
                written += self._calls(message, results)
            else:
                written.append(self._answer(message) if tools and message.role == "assistant" else message)
            at += 1 + len(results or ())
        return _folded(written) if self.template.system is None and tools else written

    def parser(self, known: Collection[str], parallel: bool = True) -> ToolParser:
        """Return a parser of one answer; `known` names the tools that may be called."""
        raise NotImplementedError

    def schema(self, tools: Sequence[Tool], choice: str, parallel: bool = True) -> Forced | None:
        """Return how to make the model call a tool: any ("required"), or the one named by `choice`.

        None for "auto" and "none". A forced answer has exactly one call, whatever `parallel` says: the grammar ends
        with its JSON.

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
        raise NotImplementedError

    def _calls(self, message: Message, results: list[str] | None) -> list[Message]:
        """Return an assistant message with calls, and their results; None: the conversation ends with the calls."""
        raise NotImplementedError

    def _answer(self, message: Message) -> Message:
        """Return an assistant message without calls."""
        return message

    def _forced(self, tools: Sequence[Tool]) -> Forced:
        raise NotImplementedError


class Hermes(ToolFormat):
    """Calls as JSON between `<tool_call>` tags, which are text; results in a user message."""

    name = "hermes"
    words = (
        "# Tools\n\nThese functions can be called:\n<tools>\n",
        "\n</tools>\n\nA call is a JSON object with the function's name and arguments, between two tags:\n"
        '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>\n',
        "Several calls may follow one another.",
        "Make one call at most in an answer.",
    )

    def parser(self, known: Collection[str], parallel: bool = True) -> ToolParser:
        """Return a parser of one answer; `known` names the tools that may be called."""
        return TaggedParser("<tool_call>", "</tool_call>", known, parallel)

    def _system(self, content: str, tools: Sequence[Tool], parallel: bool) -> Message:
        before, after, several, one = self.words
        described = "\n".join(f'{{"type": "function", "function": {tool.text}}}' for tool in tools)
        told = before + described + after + (several if parallel else one)
        return Message("system", f"{content}\n\n{told}" if content else told)

    def _calls(self, message: Message, results: list[str] | None) -> list[Message]:
        calls = [f"<tool_call>\n{_call_json(call, 'arguments')}\n</tool_call>" for call in message.calls]
        written = [Message("assistant", "\n".join([message.content] * bool(message.content) + calls), message.name)]
        if results is not None:
            answers = (f"<tool_response>\n{result}\n</tool_response>" for result in results)
            written.append(Message("user", "\n".join(answers)))
        return written

    def _forced(self, tools: Sequence[Tool]) -> Forced:
        return Forced(("<tool_call>\n",), "json_schema", _call_schema(tools, "arguments"))


_START, _END, _PLUGIN = Special("<|action_start|>"), Special("<|action_end|>"), Special("<|plugin|>")


class InternLM2(ToolFormat):
    """Calls as JSON between special tokens; tools in a second system message, results from the environment."""

    name = "internlm2"
    specials = (_START.name, _PLUGIN.name, _END.name)

    def parser(self, known: Collection[str], parallel: bool = True) -> ToolParser:
        """Return a parser of one answer; `known` names the tools that may be called."""
        return TaggedParser(_START.name + _PLUGIN.name, _END.name, known, parallel)

    def _system(self, content: str, tools: Sequence[Tool], parallel: bool) -> Message:
        described = f"[{', '.join(tool.text for tool in tools)}]"
        own = [(("system",), content)] if content else []
        return _chatml("system", [*own, (("system name=", _PLUGIN), described)])

    def _calls(self, message: Message, results: list[str] | None) -> list[Message]:
        parts: list[Part] = [message.content] if message.content else []
        for call in message.calls:
            parts += [_START, _PLUGIN, "\n" + _call_json(call, "parameters"), _END]
        written: list[Message] = [Framed("assistant", text_of(parts), message.name, parts=tuple(parts))]
        if results is not None:
            written.append(_chatml("user", [(("environment name=", _PLUGIN), result) for result in results]))
        return written

    def _forced(self, tools: Sequence[Tool]) -> Forced:
        return Forced((_START, _PLUGIN, "\n"), "json_schema", _call_schema(tools, "parameters"))


class ReAct(ToolFormat):
    """Thought, action and its input as lines that begin with a key; results in system messages; one call at a time."""

    name = "react"
    stops = ("\nResponse:",)
    """What comes after it, a model makes up. A final answer with such a line ends there too."""
    words = (
        "You can use these tools:\n",
        "\n\nTo use one, write\nThought:what has to be found out next\nAction:the tool's name, one of ",
        "\nActionInput:its arguments, a JSON object\nand you are given\nResponse:what the tool returned\n"
        "When you know the answer, or need no tool, write\nThought:why this is the answer\nFinalAnswer:the answer",
    )

    def parser(self, known: Collection[str], parallel: bool = True) -> ToolParser:
        """Return a parser of one answer; `known` names the tools that may be called."""
        return ReActParser(known)

    def _system(self, content: str, tools: Sequence[Tool], parallel: bool) -> Message:
        before, between, after = self.words
        described, names = "\n".join(tool.text for tool in tools), ", ".join(tool.name for tool in tools)
        told = before + described + between + names + after
        return Message("system", f"{content}\n\n{told}" if content else told)

    def _calls(self, message: Message, results: list[str] | None) -> list[Message]:
        if results is None and len(message.calls) > 1:
            raise DataError(
                "the react format has one call in an answer", got=f"{len(message.calls)} calls",
                do="Give the calls one by one, each with its result.",
            )  # fmt: skip
        said = "\n".join(filter(None, (message.thought, message.content)))
        thought = f"Thought:{said}\n" if said else ""
        written = []
        for number, call in enumerate(message.calls):
            text = f"Action:{call.name}\nActionInput:{call.arguments.strip()}"
            written.append(Message("assistant", text if number else thought + text, message.name))
            if results is not None:
                result = f"Response:{results[number]}\n"
                written.append(Framed("user", result, parts=(result,), frame=self.template.system))
        return written

    def _answer(self, message: Message) -> Message:
        if not message.content:
            return message
        thought = f"Thought:{message.thought}\n" if message.thought else ""
        return Message("assistant", f"{thought}FinalAnswer:{message.content}", message.name)

    def _forced(self, tools: Sequence[Tool]) -> Forced:
        if len(tools) == 1:
            begin = f"Action:{tools[0].name}\nActionInput:"
            return Forced((begin,), "json_schema", _arguments_schema(tools[0], ""))
        labelled = {f"{tool.name}\nActionInput:": _arguments_schema(tool, "") for tool in tools}
        return Forced(("Action:",), "labelled_schema", labelled)


FORMATS: dict[str, type[ToolFormat]] = {kind.name: kind for kind in (ReAct, InternLM2, Hermes)}
_USUAL = {"internlm-v1.0": "react", "internlm-v1.1": "react", "internlm2": "internlm2"}
"""Chat template → format, where it is not hermes."""


def get_format(name: str, template: str = "chatml") -> ToolFormat:
    """Return the tool format of this name, for the chat template of that.

    Raises:
        ConfigError: there is no such format, or no such template.
    """
    if name not in FORMATS:
        raise ConfigError("no such tool format", got=name, allowed=FORMATS, do=did_you_mean(name, FORMATS))
    return FORMATS[name](get_template(template))


def format_of(template: str) -> ToolFormat:
    """Return the tool format that models with this chat template are used with.

    Raises:
        ConfigError: there is no such template.
    """
    return get_format(_USUAL.get(template, "hermes"), template)


def new_call_id() -> str:
    """Return an id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


def collect(events: Iterable[Event]) -> Answer:
    """Return what the events of one parser come to; calls that failed are content, as the model wrote them."""
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


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise DataError unless user and assistant take turns; `chat` would count messages that nobody wrote."""
    expected = "user"
    for number, message in enumerate(messages, 1):
        if message.role == "system" and number > 1:
            raise DataError("a system message can only be the first", where=f"message {number}")
        if message.role in ("user", "assistant"):
            if message.role != expected:
                problem = "user and assistant must take turns, the user first"
                raise DataError(problem, where=f"message {number}", got=message.role, allowed=[expected])
            expected = "assistant" if message.role == "user" else "user"
        elif message.role == "tool":
            expected = "assistant"


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise DataError("a tool's name is 1 to 64 letters, digits, '_', '.' or '-'", where=where, got=name)


def _check_calls(message: Message, number: int) -> None:
    """Raise DataError unless the calls of a message can be written."""
    where = f"message {number}"
    if message.role != "assistant":
        raise DataError("only an assistant message has calls", where=where, got=message.role)
    for call in message.calls:
        _check_name(call.name, f"{where}, call")
        text = call.arguments
        if not isinstance(text, str) or not is_object(text.strip()):
            problem = f"the arguments of {call.name} are no JSON object"
            raise DataError(problem, where=where, got=str(text)[:80])


def _results(messages: Sequence[Message], at: int) -> list[str] | None:
    """Return the results of the calls of `messages[at]`, in their order; None where the conversation ends with them.

    Results are matched by id, or by order where none has one.
    """
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
    """Return the messages with the system message as a part of the first user message."""
    if len(messages) < 2 or messages[1].role != "user":
        return messages
    system, first = messages[:2]
    return [Message("user", f"{system.content}\n\n{first.content}", first.name), *messages[2:]]


def _chatml(role: str, blocks: list[tuple[tuple[Part, ...], str]]) -> Framed:
    """Return ChatML messages with these headers and contents as one message of a role."""
    frames = [Frame((Special("<|im_start|>"), *header, "\n"), (Special("<|im_end|>"), "\n")) for header, _ in blocks]
    parts: list[Part] = [blocks[0][1]]
    for frame, (_, content) in zip(frames[1:], blocks[1:], strict=True):
        parts += [*frame.suffix, *frame.prefix, content]
    return Framed(role, text_of(parts), parts=tuple(parts), frame=frames[0])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _call_json(call: ToolCall, key: str) -> str:
    return f'{{"name": {_json(call.name)}, "{key}": {call.arguments.strip()}}}'


def _call_schema(tools: Sequence[Tool], key: str) -> dict[str, Any]:
    """Return the JSON schema of a call of any of the tools."""
    schemas = []
    for number, tool in enumerate(tools):
        place = f"/properties/{key}" if len(tools) == 1 else f"/anyOf/{number}/properties/{key}"
        properties = {"name": {"enum": [tool.name]}, key: _arguments_schema(tool, place)}
        required = ["name", key]
        schemas.append(
            {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        )
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _arguments_schema(tool: Tool, place: str) -> dict[str, Any]:
    """Return the schema of a tool's arguments, an object, to stand at `place` of another."""
    return {"type": "object", **moved_schema(tool.parameters, place)}


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
