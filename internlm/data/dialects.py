"""Records of conversations in other widespread forms → the same in OpenAI's, for `internlm.data.messages`.

    sharegpt     {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}
    alpaca       {"instruction": "Add.", "input": "2 + 3", "output": "5"}
    completion   {"prompt": "2 + 3?", "completion": "5"}, or both as lists of messages

Keys mean what they mean to LLaMA-Factory and TRL. What would be lost (tools, pictures, that an answer is the worse of
two) is an error, never passed over.

Limits: calls of tools are read in OpenAI's form only, but for a `completion` of messages, which are that form.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from internlm.errors import DataError
from internlm.log import warn_once

logger = logging.getLogger(__name__)

Record = dict[str, Any]
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
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError("'conversations' is not a list of at least one turn", where=where, got=type(turns).__name__)
    said = _system(record, where)
    for number, turn in enumerate(turns, 1):
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
        said.append((_SPEAKERS[speaker], _text(turn, "value", place)))
    written = _written(record, said, where)
    for turn, message in zip(turns, written["messages"][-len(turns) :], strict=True):
        message["weight"] = turn.get("weight")
    return written


def _alpaca(record: Record, where: str) -> Record:
    said = _system(record, where)
    for number, pair in enumerate(record.get("history") or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("'history' is not a list of pairs, of a question and its answer", where=where)
        said += [
            (role, _string(text, f"pair {number} of 'history'", where)) for role, text in zip(_TURN, pair, strict=True)
        ]
    asked = [_text(record, "instruction", where), _text(record, "input", where) if record.get("input") else ""]
    said += zip(_TURN, ("\n".join(filter(None, asked)), _text(record, "output", where)), strict=True)
    return _written(record, said, where)


def _completion(record: Record, where: str) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        refuse(record, ("history",), where)
        said = _system(record, where)
        said += zip(_TURN, (_text(record, "prompt", where), _text(record, "completion", where)), strict=True)
        return _written(record, said, where)
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
_TURN = ("user", "assistant")


def _system(record: Record, where: str) -> list[tuple[str, str]]:
    """Return the system message that stands beside the turns, if there is one."""
    return [("system", _text(record, "system", where))] if record.get("system") else []


def _written(record: Record, said: Iterable[tuple[str, str]], where: str) -> Record:
    refuse(record, (*LOST, "tools"), where)
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def refuse(record: Record, keys: Collection[str], where: str) -> None:
    """Check that a record has none of the keys, but without a value.

    Raises:
        DataError: it has one.
    """
    for key in keys:
        if record.get(key) not in (None, "", []):
            do = "Take the key away where it means nothing."
            raise DataError(f"has {key!r}, which would be lost in this form", where=where, do=do)


def _text(record: Record, key: str, where: str) -> str:
    return _string(record[key], repr(key), where)


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {type(value).__name__}, not a string", where=where)
    return value
