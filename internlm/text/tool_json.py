"""JSON of tool calls: followed while it comes in any pieces, and as something that a grammar can ask for.

Python's own reader wants the whole text, and gives up at a depth that depends on the caller's stack.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100
"""Levels of nesting in the JSON of a call; deeper is no call."""

_BLANKS = re.compile(r"[ \t\n\r]+")
_CHARACTERS = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")


class ObjectScan:
    """Tells, while a text comes, whether it is one JSON object (RFC 8259) of `MAX_DEPTH` levels at most."""

    def __init__(self) -> None:
        self.is_whole = False
        self.is_broken = False
        self.is_key = False
        """Whether the last string or scalar was, or is, a key."""
        self.is_between = False
        """Whether the last step went over a mark or white space."""
        self._closers: list[str] = []
        self._next = "object"
        """What may come: object, value, item (or the end), key, member (or the end), colon, more."""
        self._inside = ""
        """What the last step ended inside of: string, escape, hex or scalar."""
        self._hex_left = 0
        self._scalar: list[str] = []

    @property
    def depth(self) -> int:
        """How many brackets are open."""
        return len(self._closers)

    def step(self, text: str, at: int) -> int:
        """Go over a word, a mark or a part of a string, and return its end; `at` where it cannot stand there."""
        self.is_between = False
        if self._inside == "scalar":
            word = _WORD.match(text, at)
            if word:
                self._scalar.append(word.group())
                return word.end()
            if not _SCALAR.fullmatch("".join(self._scalar)):
                return self._break(at)
            self._inside, self._next = "", "more"
        if self._inside:
            return self._in_string(text, at)
        self.is_between = True
        blanks = _BLANKS.match(text, at)
        return blanks.end() if blanks else self._mark(text[at], at)

    def _in_string(self, text: str, at: int) -> int:
        run = _CHARACTERS.match(text, at) if self._inside == "string" else None
        if run:
            return run.end()
        character = text[at]
        if self._inside == "hex":
            self._hex_left -= 1
            self._inside = "hex" if self._hex_left else "string"
            return at + 1 if character in "0123456789abcdefABCDEF" else self._break(at)
        if self._inside == "escape":
            self._inside, self._hex_left = ("hex", 4) if character == "u" else ("string", 0)
            return at + 1 if character in '"\\/bfnrtu' else self._break(at)
        if character == '"':
            self._inside, self._next = "", "colon" if self.is_key else "more"
            return at + 1
        self._inside = "escape"
        return at + 1 if character == "\\" else self._break(at)

    def _mark(self, mark: str, at: int) -> int:
        """Go over a mark, or to the beginning of a string or scalar."""
        expected, closer = self._next, self._closers[-1] if self._closers else ""
        if mark == closer and expected in ("more", "item" if mark == "]" else "member"):
            self._closers.pop()
            self._next, self.is_whole = "more", not self._closers
        elif mark in "{[" and expected in (("object", "value", "item") if mark == "{" else ("value", "item")):
            self._closers.append("}" if mark == "{" else "]")
            self._next = "member" if mark == "{" else "item"
            if self.depth > MAX_DEPTH:
                return self._break(at)
        elif mark == '"' and expected in ("value", "item", "key", "member"):
            self._inside, self.is_key, self.is_between = "string", expected in ("key", "member"), False
        elif mark == ":" and expected == "colon":
            self._next = "value"
        elif mark == "," and expected == "more":
            self._next = "key" if closer == "}" else "value"
        elif mark in "-0123456789tfn" and expected in ("value", "item"):
            self._inside, self._scalar = "scalar", [mark]
            self.is_key = self.is_between = False
        else:
            return self._break(at)
        return at + 1

    def _break(self, at: int) -> int:
        self.is_broken = True
        return at


class CallScan:
    """Reads `{"name": …, "arguments": {…}}` while it comes, in any order, `parameters` for `arguments` too."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_broken = False
        self.is_whole = False
        self._scan = ObjectScan()
        self._key: list[str] = []
        self._value: list[str] = []
        """The name so far, as JSON."""
        self._field = ""
        """name, arguments, or another key."""
        self._seen: set[str] = set()
        self._is_object = False
        """Whether the arguments began, as an object."""
        self._arguments: list[str] = []

    def take(self) -> str:
        """Return what came of the arguments since the last call."""
        text, self._arguments = "".join(self._arguments), []
        return text

    def step(self, text: str, at: int) -> int:
        """Go on as `ObjectScan.step`; a name that is no string and arguments that are no object break it too."""
        before = self._scan.depth
        end = self._scan.step(text, at)
        self.is_broken = self._scan.is_broken or not self._takes(text[at:end], max(before, self._scan.depth))
        return at if self.is_broken else end

    def _takes(self, piece: str, depth: int) -> bool:
        """Take in a piece, inside so many brackets, and return whether it may stand there."""
        if depth > 1 or not (self._scan.is_between or self._scan.is_key):
            if self._field == "name":
                self._value.append(piece)
                return self._value[0] == '"'
            if self._field == "arguments":
                self._arguments.append(piece)
                is_object, self._is_object = self._is_object or piece == "{", True
                return is_object
        elif not self._scan.is_between:
            self._key.append(piece)
        elif piece == ":":
            return self._begins_field(json.loads("".join(self._key)))
        elif piece in ",}":
            return self._ends_field(is_last=piece == "}")
        return True

    def _begins_field(self, key: str) -> bool:
        self._field = "arguments" if key == "parameters" else key
        self._key = []
        is_new = self._field not in self._seen
        self._seen.add(self._field)
        return is_new

    def _ends_field(self, *, is_last: bool) -> bool:
        if self._field == "name":
            self.name = json.loads("".join(self._value))
        self._field, self.is_whole = "", is_last
        if is_last and "arguments" not in self._seen:
            self._arguments.append("{}")
        return self.name is not None or not is_last


def is_object(text: str) -> bool:
    """Return whether a text is one JSON object and nothing else."""
    scan, at = ObjectScan(), 0
    while at < len(text) and not (scan.is_broken or scan.is_whole):
        at = scan.step(text, at)
    return scan.is_whole and at == len(text)


_NAMES = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keys of a schema with names under them, and a schema under each."""
_DATA = ("const", "enum", "default", "examples")
"""Keys with values under them: a `$ref` there is none."""


def moved_schema(value: Any, place: str) -> Any:
    """Return a schema whose references to its root hold at `place` (a JSON pointer) of another."""
    if isinstance(value, list):
        return [moved_schema(item, place) for item in value]
    if not isinstance(value, dict):
        return value
    moved: dict[str, Any] = {}
    for key, item in value.items():
        if key in _NAMES and isinstance(item, dict):
            moved[key] = {name: moved_schema(inner, place) for name, inner in item.items()}
        else:
            moved[key] = item if key in _DATA else moved_schema(item, place)
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#{place}{reference[1:]}"
    return moved
