"""Tools in a chat request: OpenAI's words for them → those of `internlm.text.tools`, and an answer's calls back.

A call that turns out to be none in the midst of a stream was announced already; what the model wrote of it then comes
as content, and `finish_reason` is not "tool_calls".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from internlm.errors import InternLMError
from internlm.infer.request import Finished
from internlm.serve.api.problems import ApiError
from internlm.serve.api.schema import ChatMessage, ChatRequest, NamedTool
from internlm.text.chat import Message, ToolCall
from internlm.text.tool_formats import format_of
from internlm.text.tool_parser import ArgumentsGrow, CallBegins, CallFails, Event, Text, Thought
from internlm.text.tools import Forced, Tool, ToolFormat, collect, new_call_id


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request that may be called."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    parallel: bool
    forced: Forced | None
    """How an answer is made to be a call, where it must be one."""


class CallReader:
    """Reads the calls of one answer."""

    def __init__(self, use: ToolUse) -> None:
        self._parser = use.format.parser([tool.name for tool in use.tools], use.parallel)
        self._events: list[Event] = self._parser.add(use.forced.text) if use.forced is not None else []
        self._all: list[Event] = []
        self._calls: set[int] = set()
        self.is_settled = False
        """Whether nothing that still comes counts."""

    def add(self, text: str, finished: bool) -> list[dict[str, Any]]:
        """Go on by a piece of the answer; return what a stream says of it."""
        events, self._events = [*self._events, *self._parser.add(text)], []
        self.is_settled = self.is_settled or self._parser.finished
        if finished:
            events += self._parser.finish()
        self._all += events
        return [self._say(event) for event in events]

    def reason(self, finished: Finished) -> str:
        """Return why the answer ended, as OpenAI says it."""
        return "tool_calls" if self._calls and (finished == "stop" or self.is_settled) else finished

    def message(self) -> dict[str, Any]:
        """Return the whole answer."""
        answer = collect(self._all)
        said: dict[str, Any] = {"role": "assistant", "content": answer.content or (None if answer.calls else "")}
        if answer.thought:
            said["reasoning_content"] = answer.thought
        if answer.calls:
            said["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        return said

    def _say(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Text):
            return {"content": event.text}
        if isinstance(event, Thought):
            return {"reasoning_content": event.text}
        if isinstance(event, CallFails):
            self._calls.discard(event.index)
            return {"content": event.text}
        if isinstance(event, ArgumentsGrow):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        assert isinstance(event, CallBegins), "there are five kinds of event"
        self._calls.add(event.index)
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": new_call_id(), "type": "function", "function": function}]}


def tools_of(body: ChatRequest, template: str) -> ToolUse:
    """Return the tools of a request to a model with this chat template.

    Raises:
        ApiError: a tool, or the choice among them, is wrong.
    """
    format_ = format_of(template)
    parallel = body.parallel_tool_calls is not False
    if not body.tools or body.tool_choice == "none":
        return ToolUse(format_, (), parallel, None)
    functions = [tool.function for tool in body.tools]
    names = {function.name for function in functions}
    if len(names) < len(functions):
        raise ApiError("two tools have one name", param="tools")
    choice: str | NamedTool = body.tool_choice or "auto"
    if isinstance(choice, NamedTool):
        choice = choice.function.name
        if choice not in names:
            raise ApiError(f"no such tool: {choice}", param="tool_choice")
    try:
        tools = tuple(Tool.of(function.name, function.description, function.parameters) for function in functions)
        return ToolUse(format_, tools, parallel, format_.schema(tools, choice))
    except InternLMError as error:
        raise ApiError(str(error), param="tools") from error


def turns_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return a conversation in our words; what a user, the assistant or the system says in a row is one message.

    Models learn to take turns, and OpenAI's clients need not.

    Raises:
        ApiError: a message lacks its content.
    """
    groups: list[list[Message]] = []
    for number, message in enumerate(messages):
        if message.content is None and not message.refusal and not message.tool_calls:
            raise ApiError(f"messages.{number}: content is missing", param="messages")
        turn = _turn(message)
        last = groups[-1][-1] if groups else None
        if last is not None and last.role == turn.role != "tool" and not last.calls:
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return [_joined(group) for group in groups]


def _turn(message: ChatMessage) -> Message:
    calls = tuple(
        ToolCall(call.id or "", call.function.name, call.function.arguments.strip() or "{}")
        for call in message.tool_calls or ()
    )
    role = "system" if message.role == "developer" else message.role
    # What `CallReader.message` gave comes back so.
    thought = (message.model_extra or {}).get("reasoning_content") if role == "assistant" else None
    thought = thought if isinstance(thought, str) else ""
    return Message(role, message.text, calls=calls, call_id=message.tool_call_id, thought=thought)


def _joined(group: Sequence[Message]) -> Message:
    """Return what one party says in several messages as one; calls are in the last."""
    content = "\n\n".join(filter(None, (turn.content for turn in group)))
    thought = "\n\n".join(filter(None, (turn.thought for turn in group)))
    return replace(group[-1], content=content, thought=thought)
