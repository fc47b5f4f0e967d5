"""The three formats of tool calls: what a model was trained on, or knows.

    format = format_of("chatml")                     # that of a chat template's models, here hermes

    react       InternLM-chat v1.1   Thought:… ⏎ Action:add ⏎ ActionInput:{"a": 2, "b": 3}
    internlm2   InternLM2 and later  <|action_start|><|plugin|> ⏎ {"name": "add", "parameters": {…}}<|action_end|>
    hermes      Hermes, Qwen, ours   <tool_call> ⏎ {"name": "add", "arguments": {…}} ⏎ </tool_call>

InternLM2 was trained on special tokens alone, so a tokenizer that lacks one is an error of `render_prompt`. The tags of
hermes are text in its own models too. Calls of InternLM2's code interpreter (`<|interpreter|>`) come out as content.
Sources: lagent 0.1 (ReAct: its keys, results as system messages), Qwen2.5's chat template, and
https://github.com/InternLM/InternLM/blob/main/chat/chat_format.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from internlm.errors import ConfigError, DataError
from internlm.text.chat import Message, ToolCall
from internlm.text.templates import Frame, Part, Special, get_template, json_text, text_of
from internlm.text.tool_json import moved_schema
from internlm.text.tool_parser import ReActParser, TaggedParser, ToolParser
from internlm.text.tools import Forced, Tool, ToolFormat


class _Tagged(ToolFormat):
    """Calls as JSON between a start and an end."""

    start: tuple[Part, ...]
    end: Part
    key: str
    """Under which a call has its arguments."""

    def parser(self, known: Collection[str], parallel: bool = True) -> ToolParser:
        """Return a parser of one answer; `known` names the tools that may be called."""
        return TaggedParser(text_of(self.start), text_of([self.end]), known, parallel)

    def _json(self, call: ToolCall) -> str:
        return f'\n{{"name": {json_text(call.name)}, "{self.key}": {call.arguments.strip()}}}'

    def _forced(self, tools: Sequence[Tool]) -> Forced:
        schemas = []
        for number, tool in enumerate(tools):
            place = f"/properties/{self.key}" if len(tools) == 1 else f"/anyOf/{number}/properties/{self.key}"
            properties = {"name": {"enum": [tool.name]}, self.key: _arguments_schema(tool, place)}
            schema = {"type": "object", "properties": properties, "required": [*properties]}
            schemas.append(schema | {"additionalProperties": False})
        return Forced((*self.start, "\n"), "json_schema", schemas[0] if len(schemas) == 1 else {"anyOf": schemas})


class Hermes(_Tagged):
    """Tags are text; results stand in a user message."""

    name = "hermes"
    start, end, key = ("<tool_call>",), "</tool_call>", "arguments"
    words = (
        "# Tools\n\nThese functions can be called:\n<tools>\n",
        "\n</tools>\n\nA call is a JSON object with the function's name and arguments, between two tags:\n"
        '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>\n',
        "Several calls may follow one another.",
        "Make one call at most in an answer.",
    )

    def _told(self, tools: Sequence[Tool], parallel: bool) -> str:
        before, after, several, one = self.words
        described = "\n".join(f'{{"type": "function", "function": {tool.text}}}' for tool in tools)
        return before + described + after + (several if parallel else one)

    def _calls(self, message: Message, results: list[str] | None) -> list[Message]:
        calls = [f"<tool_call>{self._json(call)}\n</tool_call>" for call in message.calls]
        written = [Message("assistant", "\n".join([message.content] * bool(message.content) + calls), message.name)]
        if results is not None:
            answers = (f"<tool_response>\n{result}\n</tool_response>" for result in results)
            written.append(Message("user", "\n".join(answers)))
        return written


class InternLM2(_Tagged):
    """Special tokens; tools in a second system message, results from the environment."""

    name = "internlm2"
    specials = ("<|action_start|>", "<|plugin|>", "<|action_end|>")
    start, end, key = (Special("<|action_start|>"), Special("<|plugin|>")), Special("<|action_end|>"), "parameters"

    def _system(self, content: str, tools: Sequence[Tool], parallel: bool) -> Message:
        described = f"[{', '.join(tool.text for tool in tools)}]"
        own = [(("system",), content)] if content else []
        return _chatml("system", [*own, (("system name=", self.start[1]), described)])

    def _calls(self, message: Message, results: list[str] | None) -> list[Message]:
        parts: list[Part] = [message.content] if message.content else []
        for call in message.calls:
            parts += [*self.start, self._json(call), self.end]
        written = [Message("assistant", text_of(parts), message.name, parts=tuple(parts))]
        if results is not None:
            written.append(_chatml("user", [(("environment name=", self.start[1]), result) for result in results]))
        return written


class ReAct(ToolFormat):
    """Thought, action and its input as lines that begin with a key; results in system messages; one call at a time."""

    name = "react"
    writes_thoughts = True
    stops = ("\nResponse:",)
    """What comes after it, a model makes up."""
    words = (
        "You can use these tools:\n",
        "\n\nTo use one, write\nThought:what has to be found out next\nAction:the tool's name, one of ",
        "\nActionInput:its arguments, a JSON object\nand you are given\nResponse:what the tool returned\n"
        "When you know the answer, or need no tool, write\nThought:why this is the answer\nFinalAnswer:the answer",
    )

    def parser(self, known: Collection[str], parallel: bool = True) -> ToolParser:
        """Return a parser of one answer; `known` names the tools that may be called."""
        return ReActParser(known)

    def _told(self, tools: Sequence[Tool], parallel: bool) -> str:
        before, between, after = self.words
        described, names = "\n".join(tool.text for tool in tools), ", ".join(tool.name for tool in tools)
        return before + described + between + names + after

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
                written.append(Message("user", result, parts=(result,), frame=self.template.system))
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
    """Return the tool format of this name, for the chat template of that; raise ConfigError where one is not known."""
    if name not in FORMATS:
        raise ConfigError("no such tool format", got=name, allowed=FORMATS)
    return FORMATS[name](get_template(template))


def format_of(template: str) -> ToolFormat:
    """Return the tool format that models with this chat template are used with."""
    return get_format(_USUAL.get(template, "hermes"), template)


def _chatml(role: str, blocks: list[tuple[tuple[Part, ...], str]]) -> Message:
    """Return ChatML messages with these headers and contents as one message of a role."""
    frames = [Frame((Special("<|im_start|>"), *header, "\n"), (Special("<|im_end|>"), "\n")) for header, _ in blocks]
    parts: list[Part] = [blocks[0][1]]
    for frame, (_, content) in zip(frames[1:], blocks[1:], strict=True):
        parts += [*frame.suffix, *frame.prefix, content]
    return Message(role, text_of(parts), parts=tuple(parts), frame=frames[0])


def _arguments_schema(tool: Tool, place: str) -> dict[str, Any]:
    """Return the schema of a tool's arguments, an object, to stand at `place` of another."""
    return {"type": "object", **moved_schema(tool.parameters, place)}
