r"""Records of conversations, in OpenAI's form for fine-tuning or another → messages, calls and tools in our words.

    {"messages": [{"role": "user", "content": "2 + 3?"},
                  {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                      "function": {"name": "add", "arguments": "{\"a\": 2, \"b\": 3}"}}]},
                  {"role": "tool", "tool_call_id": "1", "content": "5"},
                  {"role": "assistant", "content": "5"}],
     "tools": [{"type": "function", "function": {"name": "add", "description": "…", "parameters": {…}}}],
     "parallel_tool_calls": false}

Arguments that are a text are learned as they stand; an object is written as Python writes JSON, without escapes for
letters. An answer with `"weight": 0` is context: it is not learned. What is missing, of a wrong type or means nothing
is a DataError that names the place in the record; whether calls and results belong together says `internlm.text.tools`.

Other forms are brought into this one first:

    sharegpt     {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}
    alpaca       {"instruction": "Add.", "input": "2 + 3", "output": "5"}
    completion   {"prompt": "2 + 3?", "completion": "5"}, or both as lists of messages

Keys mean what they mean to LLaMA-Factory and TRL. What would be lost is an error: pictures, that an answer is the worse
of two, and tools, which are read in OpenAI's form only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

from internlm.errors import DataError
from internlm.log import warn_once
from internlm.text.chat import ROLES, Message, ToolCall
from internlm.text.templates import json_text
from internlm.text.tools import Tool

logger = logging.getLogger(__name__)

T = TypeVar("T")
Record = dict[str, Any]
_KEYS = {"assistant": {"tool_calls", "reasoning_content", "weight"}, "tool": {"tool_call_id", "name"}}
"""Keys of a message beside role and content; the name of a result is that of its call."""


def read_messages(record: Record) -> tuple[Message, ...]:
    """Return the messages of a record."""
    return tuple(_message(turn, f"message {number}") for number, turn in enumerate(_turns(record, "messages"), 1))


def read_tools(record: Record, messages: tuple[Message, ...]) -> tuple[Tool, ...]:
    """Return the tools of a record; a message may call no other."""
    for key in ("functions", "function_call"):
        if record.get(key):
            raise _older(key)
    found = typed(record.get("tools") or [], list, "'tools'", do="Write the tools as a JSON list.")
    tools = tuple(_tool(described, f"tool {number}") for number, described in enumerate(found, 1))
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise DataError("two tools have one name", got=", ".join(names))
    for number, message in enumerate(messages, 1):
        for call in message.calls:
            if call.name not in names:
                problem, do = "calls a tool that 'tools' does not name", "Add it: a model calls only what it was told."
                raise DataError(problem, where=f"message {number}", got=call.name, allowed=names, do=do)
    return tools


def read_parallel(record: Record) -> bool:
    """Return whether an answer may hold several calls."""
    found = record.get("parallel_tool_calls")
    if found is not None and not isinstance(found, bool):
        raise DataError("'parallel_tool_calls' is neither true nor false", got=_shown(found))
    return found is not False


def read_context(record: Record) -> frozenset[int]:
    """Return the numbers, from 1, of the answers of `weight` 0, which not all may have."""
    answers, context = 0, set()
    for number, turn in enumerate(record["messages"], 1):
        if turn["role"] != "assistant":
            continue
        answers += 1
        weight = turn.get("weight")
        if isinstance(weight, bool) or weight not in (None, 0, 1):
            raise DataError("'weight' is neither 0 nor 1", where=f"message {number}", got=_shown(weight))
        if weight == 0:
            context.add(answers)
    if context and len(context) == answers:
        raise DataError("no answer is trained on: each has the weight 0", do="Drop the record.")
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
        typed(value, str, repr(key), where)
    for key in sorted(turn.keys() - {"role", "content"} - _KEYS.get(role, set())):
        if turn[key] is not None:
            warn_once(logger, f"{key!r} of a message of role {role} has no effect")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise DataError("no such role", where=where, got=role, allowed=ROLES)
    call_id = turn.get("tool_call_id") if role == "tool" else None
    if call_id is not None:
        typed(call_id, str, "'tool_call_id'", where)
    if role != "assistant":
        return Message(role, content, call_id=call_id)
    calls = enumerate(typed(given, list, "'tool_calls'", where), 1)
    made = tuple(_call(call, f"{where}, call {number}") for number, call in calls)
    return Message(role, content, calls=made, thought=thought)


def _joined(content: Any) -> Any:
    """Return as one text a content that is a list of texts, as OpenAI's clients may write it."""
    is_texts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )
    return "".join(part["text"] for part in content) if is_texts else content


def _call(call: Any, where: str) -> ToolCall:
    function = _function(call, where)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json_text(arguments)
    if not isinstance(function.get("name"), str) or not isinstance(arguments, str):
        problem = "a call has a 'name', and 'arguments' that are a JSON object or its text"
        raise DataError(problem, where=where, got=_shown(call), do='Without arguments, write "{}".')
    id_ = "" if call.get("id") is None else typed(call["id"], str, "the 'id' of a call", where)
    return ToolCall(id_, function["name"], arguments)


def _tool(described: Any, where: str) -> Tool:
    function = _function(described, where)
    kinds: dict[str, type] = {"name": str, "description": str, "parameters": dict}
    for key, kind in kinds.items():
        if key == "name" or function.get(key) is not None:
            typed(function.get(key), kind, f"{key!r} of a tool", where)
    for key in sorted(function.keys() - {"type", *kinds}):
        warn_once(logger, f"{key!r} of a tool has no effect")
    try:
        return Tool.of(function["name"], function.get("description"), function.get("parameters"))
    except DataError as error:
        raise DataError(str(error), where=where) from error


def _function(value: Any, where: str) -> dict[str, Any]:
    """Return the function of a tool or call; it may lack its cover."""
    kind = value.get("type", "function") if isinstance(value, dict) else None
    function = value.get("function", value) if isinstance(value, dict) else None
    if kind != "function" or not isinstance(function, dict):
        problem = "a tool or call is an object with 'type': 'function' and a 'function'"
        raise DataError(problem, where=where, got=_shown(value), do="Only functions are known.")
    return function


def _older(key: str, where: str | None = None) -> DataError:
    do = "Write 'tools', 'tool_calls' and messages of role tool."
    return DataError(f"{key} is of OpenAI's older form of calls, which is not read", where=where, do=do)


def _shown(value: Any) -> str:
    text = json_text(value)
    return text if len(text) <= 80 else text[:79] + "…"


_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}
LOST = ("chosen", "rejected", "label", "kto_tag", "images", "videos", "audios")
"""Keys that change what a record means: answers to compare, and what is not text."""


class Dialect(NamedTuple):
    """One form of records."""

    keys: tuple[str, ...]
    """By which a record is told: it has all of them."""
    read: Callable[[Record], Record]
    """Returns it as one with `messages`; raises DataError where something is missing, misshapen or would be lost."""


def _sharegpt(record: Record) -> Record:
    said = []
    for number, turn in enumerate(_turns(record, "conversations"), 1):
        where = f"turn {number}"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            do = "A list of turns with 'role' and 'content' is called 'messages'."
            raise DataError("a turn is an object with 'from' and 'value'", where=where, do=do)
        speaker = text_under(turn, "from", where=where)
        if speaker not in _SPEAKERS:
            do = "Calls of tools are read from 'messages' only."
            raise DataError("no such 'from'", where=where, got=speaker, allowed=_SPEAKERS, do=do)
        for key in sorted(turn.keys() - {"from", "value", "weight"}):
            if turn[key] is not None:
                warn_once(logger, f"{key!r} of a turn in ShareGPT's form has no effect")
        content = text_under(turn, "value", where=where)
        said.append({"role": _SPEAKERS[speaker], "content": content, "weight": turn.get("weight")})
    return _written(record, said)


def _alpaca(record: Record) -> Record:
    said: list[Record] = []
    question, answer = text_under(record, "instruction"), text_under(record, "output")
    for number, pair in enumerate(record.get("history") or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("'history' is not a list of pairs, of a question and its answer")
        said += asked_and_answered(*(typed(text, str, f"pair {number} of 'history'") for text in pair))
    asked = [question, text_under(record, "input") if record.get("input") else ""]
    return _written(record, said + asked_and_answered("\n".join(filter(None, asked)), answer))


def _completion(record: Record) -> Record:
    prompt, completion = value_of(record, "prompt"), value_of(record, "completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        refuse(record, ("history",))
        return _written(record, asked_and_answered(text_under(record, "prompt"), text_under(record, "completion")))
    if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in prompt):
        told = "the assistant's messages of a 'prompt' are trained on as those of its 'completion' are"
        warn_once(logger, f"{told}, but for those of weight 0")
    return record | {"messages": [*prompt, *completion]}


DIALECTS = {
    "sharegpt": Dialect(("conversations",), _sharegpt),
    "alpaca": Dialect(("instruction", "output"), _alpaca),
    "completion": Dialect(("prompt", "completion"), _completion),
}


def asked_and_answered(question: str, answer: str) -> list[Record]:
    """Return a question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _written(record: Record, said: list[Record]) -> Record:
    refuse(record, (*LOST, "tools"))
    system = [{"role": "system", "content": text_under(record, "system")}] if record.get("system") else []
    return {"messages": system + said}


def refuse(record: Record, keys: Collection[str]) -> None:
    """Raise DataError where a record has one of the keys, with a value."""
    for key in keys:
        if record.get(key) not in (None, "", []):
            do = "Take the key away where it means nothing."
            raise DataError(f"has {key!r}, which would be lost in this form", do=do)


def _turns(record: Record, key: str) -> list[Any]:
    turns = typed(value_of(record, key), list, repr(key))
    if not turns:
        raise DataError(f"{key!r} is empty", do="Drop the record.")
    return turns


def value_of(record: Record, key: str, do: str | None = None) -> Any:
    """Return what a record has under a key; raise DataError where it has not that key."""
    if key not in record:
        raise DataError(f"has no key {key!r}; its keys: {', '.join(map(str, record)) or 'none'}", do=do)
    return record[key]


def text_under(record: Record, key: str, do: str | None = None, where: str | None = None) -> str:
    """Return the text that a record has under a key, as `value_of`."""
    return typed(value_of(record, key, do), str, repr(key), where)


def typed(value: Any, kind: type[T], name: str, where: str | None = None, do: str | None = None) -> T:
    """Return a value; raise DataError where it is of another type."""
    if not isinstance(value, kind):
        kinds: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
        raise DataError(f"{name} is {type(value).__name__}, not {kinds[kind]}", where=where, do=do)
    return value
