r"""A record of messages, in OpenAI's form for fine-tuning → messages, calls and tools in our words.

    {"messages": [{"role": "user", "content": "2 + 3?"},
                  {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                      "function": {"name": "add", "arguments": "{\"a\": 2, \"b\": 3}"}}]},
                  {"role": "tool", "tool_call_id": "1", "content": "5"},
                  {"role": "assistant", "content": "5"}],
     "tools": [{"type": "function", "function": {"name": "add", "description": "…", "parameters": {…}}}],
     "parallel_tool_calls": false}

Arguments that are a text are learned as they stand; an object is written as Python writes JSON, without escapes for
letters. An answer with `"weight": 0` is context: it is not learned. Whether calls and results belong together is said
by the format that writes them, `internlm.text.tools`.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from internlm.errors import DataError
from internlm.log import warn_once
from internlm.text.chat import Message, ToolCall
from internlm.text.tools import Tool

logger = logging.getLogger(__name__)

_KEYS = {"assistant": {"tool_calls", "reasoning_content", "weight"}, "tool": {"tool_call_id", "name"}}
"""Keys of a message beside role and content; the name of a result is that of its call, and not written again."""


def read_messages(record: dict[str, Any], where: str) -> tuple[Message, ...]:
    """Return the messages of a record.

    Raises:
        DataError: something is missing or of a wrong type.
    """
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError("'messages' is not a list of at least one message", where=where, got=type(turns).__name__)
    return tuple(_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1))


def read_tools(record: dict[str, Any], messages: tuple[Message, ...], where: str) -> tuple[Tool, ...]:
    """Return the tools of a record.

    Raises:
        DataError: something is missing or of a wrong type; two tools have one name, or a message calls another tool.
    """
    for key in ("functions", "function_call"):
        if record.get(key):
            raise _older(key, where)
    found = record.get("tools") or []
    if not isinstance(found, list):
        raise DataError(
            f"'tools' is {type(found).__name__}, not a list", where=where, do="Write the tools as a JSON list."
        )
    tools = tuple(_tool(described, f"{where}, tool {number}") for number, described in enumerate(found, 1))
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise DataError("two tools have one name", where=where, got=", ".join(names))
    for number, message in enumerate(messages, 1):
        for call in message.calls:
            if call.name not in names:
                problem, do = "calls a tool that 'tools' does not name", "Add it: a model calls only what it was told."
                raise DataError(problem, where=f"{where}, message {number}", got=call.name, allowed=names, do=do)
    return tools


def read_parallel(record: dict[str, Any], where: str) -> bool:
    """Return whether the model is told that an answer may hold several calls.

    Raises:
        DataError: the record says neither true nor false.
    """
    found = record.get("parallel_tool_calls")
    if found is not None and not isinstance(found, bool):
        raise DataError("'parallel_tool_calls' is neither true nor false", where=where, got=_shown(found))
    return found is not False


def read_context(record: dict[str, Any], where: str) -> frozenset[int]:
    """Return the numbers, from 1, of the answers whose `weight` is 0: they are context, and not learned.

    Raises:
        DataError: a weight is neither 0 nor 1, or no answer is left to learn.
    """
    answers, context = 0, set()
    for number, turn in enumerate(record["messages"], 1):
        if turn["role"] != "assistant":
            continue
        answers += 1
        weight = turn.get("weight")
        if isinstance(weight, bool) or weight not in (None, 0, 1):
            raise DataError("'weight' is neither 0 nor 1", where=f"{where}, message {number}", got=_shown(weight))
        if weight == 0:
            context.add(answers)
    if context and len(context) == answers:
        raise DataError("no answer is trained on: each has the weight 0", where=where, do="Drop the record.")
    return frozenset(context)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or "role" not in turn or not {"content", "tool_calls", "function_call"} & turn.keys():
        raise DataError("a message is an object with 'role' and 'content'", where=where, got=_shown(turn))
    role, content, thought = turn["role"], _joined(turn.get("content")), turn.get("reasoning_content") or ""
    if role == "function" or turn.get("function_call"):
        raise _older("function_call" if turn.get("function_call") else "role function", where)
    given = turn.get("tool_calls") or []
    if role == "assistant" and given and content is None:
        content = ""
    for key, value in (("role", role), ("content", content), ("reasoning_content", thought)):
        if not isinstance(value, str):
            raise DataError(f"{key!r} is {type(value).__name__}, not a string", where=where)
    for key in sorted(turn.keys() - {"role", "content"} - _KEYS.get(role, set())):
        if turn[key] is not None:
            warn_once(logger, f"{key!r} of a message of role {role} has no effect")
    calls: tuple[ToolCall, ...] = ()
    if role == "assistant":
        if not isinstance(given, list):
            raise DataError(f"'tool_calls' is {type(given).__name__}, not a list", where=where)
        calls = tuple(_call(call, f"{where}, call {number}") for number, call in enumerate(given, 1))
    call_id = turn.get("tool_call_id") if role == "tool" else None
    if call_id is not None and not isinstance(call_id, str):
        raise DataError(f"'tool_call_id' is {type(call_id).__name__}, not a string", where=where)
    role = "system" if role == "developer" else role
    return Message(role, content, calls=calls, call_id=call_id, thought=thought if role == "assistant" else "")


def _joined(content: Any) -> Any:
    """Return a content that is a list of texts, as OpenAI's clients may write it, as one."""
    is_texts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )
    return "".join(part["text"] for part in content) if is_texts else content


def _call(call: Any, where: str) -> ToolCall:
    function = _function(call, where)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(function.get("name"), str) or not isinstance(arguments, str):
        problem = "a call has a 'name', and 'arguments' that are a JSON object or its text"
        raise DataError(problem, where=where, got=_shown(call), do='Without arguments, write "{}".')
    id_ = call.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise DataError(f"the 'id' of a call is {type(id_).__name__}, not a string", where=where)
    return ToolCall(id_ or "", function["name"], arguments)


def _tool(described: Any, where: str) -> Tool:
    function = _function(described, where)
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    for key, value, kind in (("name", name, str), ("description", description, str), ("parameters", parameters, dict)):
        if not isinstance(value, kind) and (key == "name" or value is not None):
            raise DataError(f"{key!r} of a tool is {type(value).__name__}, not {kind.__name__}", where=where)
    for key in sorted(function.keys() - {"type", "name", "description", "parameters"}):
        warn_once(logger, f"{key!r} of a tool has no effect")
    try:
        return Tool.of(str(name), description, parameters)
    except DataError as error:
        raise DataError(str(error), where=where) from error


def _function(value: Any, where: str) -> dict[str, Any]:
    """Return the function of a tool or call, which may stand there without its cover."""
    kind = value.get("type", "function") if isinstance(value, dict) else None
    function = value.get("function", value) if isinstance(value, dict) else None
    if kind != "function" or not isinstance(function, dict):
        problem = "a tool or call is an object with 'type': 'function' and a 'function'"
        raise DataError(problem, where=where, got=_shown(value), do="Only functions are known.")
    return function


def _older(key: str, where: str) -> DataError:
    do = "Write 'tools', 'tool_calls' and messages of role tool."
    return DataError(f"{key} is of OpenAI's older form of calls, which is not read", where=where, do=do)


def _shown(value: Any) -> str:
    """Return a JSON value in at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
