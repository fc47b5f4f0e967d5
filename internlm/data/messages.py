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
is a DataError; whether calls and results belong together says `internlm.text.tools`.

Other widespread forms are brought into this one first:

    sharegpt     {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}
    alpaca       {"instruction": "Add.", "input": "2 + 3", "output": "5"}
    completion   {"prompt": "2 + 3?", "completion": "5"}, or both as lists of messages

Keys mean what they mean to LLaMA-Factory and TRL. What would be lost (tools, pictures, that an answer is the worse of
two) is an error. Calls of tools are read in OpenAI's form only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from internlm.errors import DataError
from internlm.log import warn_once
from internlm.text.chat import Message, ToolCall
from internlm.text.tools import Tool

logger = logging.getLogger(__name__)

Record = dict[str, Any]
_KEYS = {"assistant": {"tool_calls", "reasoning_content", "weight"}, "tool": {"tool_call_id", "name"}}
"""Keys of a message beside role and content; the name of a result is that of its call, and not written again."""


def read_messages(record: Record, where: str) -> tuple[Message, ...]:
    """Return the messages of a record."""
    turns = _turns(record, "messages", where)
    return tuple(_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1))


def read_tools(record: Record, messages: tuple[Message, ...], where: str) -> tuple[Tool, ...]:
    """Return the tools of a record; a message may call no other."""
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


def read_parallel(record: Record, where: str) -> bool:
    """Return whether the model is told that an answer may hold several calls."""
    found = record.get("parallel_tool_calls")
    if found is not None and not isinstance(found, bool):
        raise DataError("'parallel_tool_calls' is neither true nor false", where=where, got=_shown(found))
    return found is not False


def read_context(record: Record, where: str) -> frozenset[int]:
    """Return the numbers, from 1, of the answers whose `weight` is 0: not all of them may be."""
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
        _string(value, repr(key), where)
    for key in sorted(turn.keys() - {"role", "content"} - _KEYS.get(role, set())):
        if turn[key] is not None:
            warn_once(logger, f"{key!r} of a message of role {role} has no effect")
    calls: tuple[ToolCall, ...] = ()
    if role == "assistant":
        if not isinstance(given, list):
            raise DataError(f"'tool_calls' is {type(given).__name__}, not a list", where=where)
        calls = tuple(_call(call, f"{where}, call {number}") for number, call in enumerate(given, 1))
    call_id = turn.get("tool_call_id") if role == "tool" else None
    if call_id is not None:
        _string(call_id, "'tool_call_id'", where)
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
    id_ = "" if call.get("id") is None else _string(call["id"], "the 'id' of a call", where)
    return ToolCall(id_, function["name"], arguments)


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
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}
LOST = ("chosen", "rejected", "label", "kto_tag", "images", "videos", "audios")
"""Keys that change what a record means: answers to compare, and what is not text."""


@dataclass(frozen=True)
class Dialect:
    """One form of records."""

    keys: tuple[str, ...]
    """By which a record is told: it has all of them."""
    function: Callable[[Record, str], Record]

    def read(self, record: Record, where: str) -> Record:
        """Return a record with `messages`.

        Raises:
            DataError: something is missing, of a wrong type, or would be lost.
        """
        for key in self.keys:
            if key not in record:
                raise DataError(f"has no key {key!r}; its keys: {', '.join(map(str, record))}", where=where)
        return self.function(record, where)


def _sharegpt(record: Record, where: str) -> Record:
    said = _system(record, where)
    for number, turn in enumerate(_turns(record, "conversations", where), 1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            do = "A list of turns with 'role' and 'content' is called 'messages'."
            raise DataError("a turn is an object with 'from' and 'value'", where=place, do=do)
        speaker = _text(turn, "from", place)
        if speaker not in _SPEAKERS:
            do = "Calls of tools are read from 'messages' only."
            raise DataError("no such 'from'", where=place, got=speaker, allowed=_SPEAKERS, do=do)
        for key in sorted(turn.keys() - {"from", "value", "weight"}):
            if turn[key] is not None:
                warn_once(logger, f"{key!r} of a turn in ShareGPT's form has no effect")
        said.append({"role": _SPEAKERS[speaker], "content": _text(turn, "value", place), "weight": turn.get("weight")})
    return _written(record, said, where)


def _alpaca(record: Record, where: str) -> Record:
    said = _system(record, where)
    for number, pair in enumerate(record.get("history") or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("'history' is not a list of pairs, of a question and its answer", where=where)
        said += asked_and_answered(*(_string(text, f"pair {number} of 'history'", where) for text in pair))
    asked = [_text(record, "instruction", where), _text(record, "input", where) if record.get("input") else ""]
    said += asked_and_answered("\n".join(filter(None, asked)), _text(record, "output", where))
    return _written(record, said, where)


def _completion(record: Record, where: str) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        refuse(record, ("history",), where)
        said = asked_and_answered(_text(record, "prompt", where), _text(record, "completion", where))
        return _written(record, [*_system(record, where), *said], where)
    refuse(record, (*LOST, "history", "system"), where)
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


def _system(record: Record, where: str) -> list[Record]:
    return [{"role": "system", "content": _text(record, "system", where)}] if record.get("system") else []


def _written(record: Record, said: list[Record], where: str) -> Record:
    refuse(record, (*LOST, "tools"), where)
    return {"messages": said}


def refuse(record: Record, keys: Collection[str], where: str) -> None:
    """Raise DataError where a record has one of the keys, with a value."""
    for key in keys:
        if record.get(key) not in (None, "", []):
            do = "Take the key away where it means nothing."
            raise DataError(f"has {key!r}, which would be lost in this form", where=where, do=do)


def _turns(record: Record, key: str, where: str) -> list[Any]:
    turns = record.get(key)
    if turns == []:
        raise DataError(f"{key!r} is empty", where=where, do="Drop the record.")
    if not isinstance(turns, list):
        raise DataError(f"{key!r} is {type(turns).__name__}, not a list", where=where)
    return turns


def _text(record: Record, key: str, where: str) -> str:
    return _string(record[key], repr(key), where)


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {type(value).__name__}, not a string", where=where)
    return value
