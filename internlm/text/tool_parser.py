r"""A model's answer → content, thoughts and tool calls, while it comes.

    parser = TaggedParser("<tool_call>", "</tool_call>", known={"add"})
    parser.add('One moment.\n<tool_call>\n{"name": "add", "argu')     # [Text("One moment."), CallBegins(0, "add")]
    parser.add('ments": {"a": 1}}\n</tool_call>')                     # [ArgumentsGrow(0, '{"a": 1}')]
    parser.finish()                                                   # []

However the answer is cut into pieces, the events joined are the same. Every character is looked at once, and nesting is
bounded: a hostile answer costs no more than its length.

What looked like a call and is none comes out as content, character for character; where its arguments have begun to
stream, `CallFails` takes it back. White space before a call, and after the last one, is dropped.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from internlm.text.tool_json import CallScan, ObjectScan


@dataclass(frozen=True)
class Text:
    """Content goes on."""

    text: str


@dataclass(frozen=True)
class Thought:
    """What the model says to itself goes on."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A call of a known tool."""

    index: int
    """Counts the calls of an answer from 0."""
    name: str


@dataclass(frozen=True)
class ArgumentsGrow:
    """The arguments of a call, a JSON object, go on."""

    index: int
    text: str


@dataclass(frozen=True)
class CallFails:
    """A call that has begun is none after all."""

    index: int
    text: str
    """All that the model wrote of it, which is content."""


Event = Text | Thought | CallBegins | ArgumentsGrow | CallFails


class ToolParser:
    """Reads one answer. A subclass has a few states, each a method that reads on from a place in the text.

    Args:
        known: names of the tools that may be called.
        parallel: whether an answer may hold several calls; without, the first ends it.
    """

    def __init__(self, known: Collection[str], parallel: bool = True) -> None:
        self.finished = False
        """Whether nothing that still comes counts: generation may stop."""
        self._known, self._parallel = frozenset(known), parallel
        self._state = self._text
        self._held = ""
        """The end of what came: the beginning of a tag or key, perhaps."""
        self._space: list[str] = []
        """White space at the end of what was said."""
        self._source: list[str] = []
        """The call at hand so far, with the white space before it."""
        self._index = -1
        self._has_begun = False
        self._sink: type[Text] | type[Thought] = Text
        self._out: list[tuple[type[Event], int, list[str]]] = []
        """Events in the making: kind, index of the call, pieces of the text."""

    def add(self, text: str) -> list[Event]:
        """Return what this piece of the answer decides."""
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text) and not self.finished:
            at = self._state(text, at)
        return self._events()

    def finish(self) -> list[Event]:
        """Return what was held back until the end of the answer."""
        if not self.finished:
            self.finished = True
            self._end()
        return self._events()

    def _text(self, text: str, at: int) -> int:
        """Read on at `text[at]`, outside of a call, and return where to go on."""
        raise NotImplementedError

    def _end(self) -> None:
        """Give out what is held back."""
        raise NotImplementedError

    def _emit(self, kind: type[Event], text: str) -> None:
        if self._out and self._out[-1][:2] == (kind, self._index):
            self._out[-1][2].append(text)
        elif text:
            self._out.append((kind, self._index, [text]))

    def _events(self) -> list[Event]:
        out, self._out = self._out, []
        return [_event(kind, index, "".join(pieces)) for kind, index, pieces in out]

    def _say(self, text: str) -> None:
        """Give out text, but for the white space at its end."""
        body = text.rstrip()
        if body:
            self._emit(self._sink, "".join(self._space) + body)
            self._space = []
        self._space.append(text[len(body) :])

    def _open(self, tag: str) -> None:
        """Begin what may become a call."""
        self._source, self._space = [*self._space, tag], []
        self._has_begun = False

    def _begin(self, name: str) -> None:
        self._index += 1
        self._has_begun = True
        self._emit(CallBegins, name)

    def _refuse(self) -> None:
        """Give out as content what looked like a call."""
        self._sink, self._state = Text, self._text
        source, self._source = "".join(self._source), []
        if self._has_begun:
            self._emit(CallFails, source)
        else:
            self._say(source)


class TaggedParser(ToolParser):
    """Reads calls written as start tag, `{"name": …, "arguments": {…}}`, end tag, and the text around them.

    The end tag may be missing where a grammar or a stop token ended the answer.
    """

    def __init__(self, start: str, end: str, known: Collection[str], parallel: bool = True) -> None:
        super().__init__(known, parallel)
        self._start_tag, self._end_tag = start, end
        self._follows_call = False
        self._scan = CallScan()

    def _text(self, text: str, at: int) -> int:
        found = text.find(self._start_tag, at)
        if found < 0:
            found = len(text) - _overlap(text, at, self._start_tag)
            self._held = text[found:]
        if found > at:
            self._say(text[at:found])
            self._follows_call = self._follows_call and text[at:found].isspace()
        if self._held:
            return len(text)
        if found < len(text):
            self._open(self._start_tag)
            self._scan, self._state = CallScan(), self._call
        return min(found + len(self._start_tag), len(text))

    def _call(self, text: str, at: int) -> int:
        scan = self._scan
        end = scan.step(text, at)
        self._source.append(text[at:end])
        if not self._has_begun and scan.name is not None and not scan.is_broken:
            if scan.name not in self._known:
                self._refuse()
                return end
            self._begin(scan.name)
        if self._has_begun:
            self._emit(ArgumentsGrow, scan.take())
        if scan.is_broken:
            self._refuse()
        elif scan.is_whole:
            self._follows_call, self._source = True, []
            self._state = self._closing
            self.finished = not self._parallel
        return end

    def _closing(self, text: str, at: int) -> int:
        if text[at].isspace():
            self._space.append(text[at])
            return at + 1
        if text.startswith(self._end_tag, at):
            self._space, self._state = [], self._text
            return at + len(self._end_tag)
        if len(text) - at < len(self._end_tag) and self._end_tag.startswith(text[at:]):
            self._held = text[at:]
            return len(text)
        self._state = self._text
        return at

    def _refuse(self) -> None:
        super()._refuse()
        self._follows_call = False

    def _end(self) -> None:
        if self._state == self._call:
            self._refuse()
        elif self._state == self._text and self._held:
            self._say(self._held)
            self._follows_call = False
        if not self._follows_call:
            self._emit(Text, "".join(self._space))


_COLONS = (":", "：")
_THOUGHT, _ACTION, _INPUT, _FINAL = (
    tuple(name + colon for name in names for colon in _COLONS)
    for names in (("Thought",), ("Action",), ("ActionInput", "Action Input"), ("FinalAnswer", "Final Answer"))
)


class ReActParser(ToolParser):
    """Reads `Thought:…`, `Action:…`, `ActionInput:…`, `FinalAnswer:…`, each at the beginning of a line.

    All after `FinalAnswer:` is content, and so is text before the first key. A call ends the answer: the model would
    make up the tool's result.
    """

    def __init__(self, known: Collection[str]) -> None:
        super().__init__(known, parallel=False)
        self._is_final = False
        self._at_line = True
        """Whether nothing but white space came in this line."""
        self._drops_space = False
        """Whether nothing was said since the last key."""
        self._spoken: set[type[Event]] = set()
        """What was said already; what goes on with it begins a line of its own."""
        self._name = ""
        self._longest = max(map(len, self._known), default=0) + 16
        self._scan = ObjectScan()

    def _text(self, text: str, at: int) -> int:
        if text[at].isspace():
            self._at_line = self._at_line or text[at] == "\n"
            if not self._drops_space:
                self._space.append(text[at])
            return at + 1
        if self._at_line and not self._is_final:
            key, self._held = _key(text, at, (*_THOUGHT, *_ACTION, *_FINAL))
            if self._held:
                return len(text)
            if key:
                self._section(key)
                return at + len(key)
        end = len(text) if self._is_final else _line_end(text, at)
        self._say(text[at:end])
        self._at_line = self._drops_space = False
        return end

    def _section(self, key: str) -> None:
        """Go over to the part of an answer that a key begins."""
        if key in _ACTION:
            if self._sink is Thought:
                self._space = ["\n"] * (Text in self._spoken)  # in case that it is content
            self._open(key)
            self._name, self._state = "", self._action
            return
        self._sink, self._is_final = (Thought, False) if key in _THOUGHT else (Text, True)
        self._space, self._drops_space, self._at_line = ["\n"] * (self._sink in self._spoken), True, False

    def _say(self, text: str) -> None:
        super()._say(text)
        if not text.isspace():
            self._spoken.add(self._sink)

    def _action(self, text: str, at: int) -> int:
        end = _line_end(text, at)
        self._source.append(text[at:end])
        self._name += text[at:end]
        if len(self._name) > self._longest or (end < len(text) and self._name.strip() not in self._known):
            self._refuse()
            self._at_line = False
        elif end < len(text):
            self._state = self._input
        return end

    def _input(self, text: str, at: int) -> int:
        if text[at].isspace():
            self._source.append(text[at])
            return at + 1
        key, self._held = _key(text, at, _INPUT)
        if self._held:
            return len(text)
        if key:
            self._source.append(key)
            self._scan, self._state = ObjectScan(), self._arguments
        else:
            self._refuse()
            self._at_line = True
        return at + len(key)

    def _arguments(self, text: str, at: int) -> int:
        end = self._scan.step(text, at)
        self._source.append(text[at:end])
        if self._scan.is_broken:
            self._refuse()
            self._at_line = False
            return end
        if not self._has_begun and self._scan.depth:
            self._begin(self._name.strip())
        if self._has_begun:
            self._emit(ArgumentsGrow, text[at:end])
        self.finished = self._scan.is_whole
        return end

    def _refuse(self) -> None:
        super()._refuse()
        self._spoken.add(Text)
        self._drops_space = False

    def _end(self) -> None:
        if self._state != self._text:
            self._source.append(self._held)
            self._refuse()
        elif self._held:
            self._say(self._held)
        if self._sink is Text and not self._is_final:
            self._emit(Text, "".join(self._space))


def _event(kind: type[Event], index: int, text: str) -> Event:
    if kind is Text or kind is Thought:
        return kind(text)
    assert kind is CallBegins or kind is ArgumentsGrow or kind is CallFails, "these have an index"
    return kind(index, text)


def _overlap(text: str, at: int, tag: str) -> int:
    """Return how many characters at the end of `text[at:]` begin `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text) - at), 0, -1) if text.endswith(tag[:n])), 0)


def _line_end(text: str, at: int) -> int:
    """Return where the line of `text[at]` ends."""
    found = text.find("\n", at)
    return len(text) if found < 0 else found


def _key(text: str, at: int, keys: tuple[str, ...]) -> tuple[str, str]:
    """Return the key at `text[at]`, if any, and `text[at:]` where it may become one."""
    found = next((key for key in keys if text.startswith(key, at)), "")
    is_open = not found and any(len(text) - at < len(key) and key.startswith(text[at:]) for key in keys)
    return found, text[at:] if is_open else ""
