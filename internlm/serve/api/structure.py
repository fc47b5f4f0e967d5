"""What an answer must look like, in the words of OpenAI, LMDeploy and vLLM → the engine's grammar."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from internlm.errors import EngineError, InternLMError
from internlm.infer import grammar
from internlm.infer.engine import Engine
from internlm.infer.request import Grammar
from internlm.serve.api.problems import ApiError
from internlm.serve.api.schema import ResponseFormat, Sampling, Structure

_QUICK = ("json_object", "choice")
"""What is compiled in no time: there is a bound on its size, and no text of it is tried out."""
_MOST_OPTIONAL = 400
"""The library follows 2000 things at once, and each such property is four (llguidance 1.9: 450 work, 600 do not)."""
_FAILED_SECONDS = 60.0
_MOST_KNOWN = 64
"""Each up to 64 kB of text; the library keeps as many."""


class Wanted(NamedTuple):
    """A structure that a client asks for."""

    param: str
    """The field that asks."""
    kind: str
    """As of `internlm.infer.grammar.compile`."""
    text: str


def wanted_of(body: Sampling) -> Wanted | None:
    """Return the one structure that a request asks for, None if it asks for none.

    Raises:
        ApiError: it asks for several.
    """
    found = _found(body)
    if len(found) > 1:
        text = f"an answer has one structure, and {' and '.join(one.param for one in found[:2])} each ask for one"
        raise ApiError(text, param=found[1].param)
    return found[0] if found else None


Compile = Callable[[Wanted, tuple[int, ...]], Grammar]
"""`known` or `compile` of `Grammars`."""


class _Failed(NamedTuple):
    """What was wrong with a structure, and until when that is believed: what took too long may be quicker next time."""

    error: str
    until: float


class Later(Exception):
    """What a request asks for has to be compiled first, which may take seconds."""


class Grammars:
    """The grammars of structures: those compiled last are known, and those that failed, for a time.

    Args:
        engine: its model and tokenizer will write them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: OrderedDict[tuple[str, str, tuple[int, ...]], Grammar | _Failed] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, wanted: Wanted, stop_ids: tuple[int, ...]) -> Grammar:
        """Return the grammar of a structure, if that takes no time.

        Raises:
            Later: `compile` can tell.
            ApiError: it is not valid or not supported.
        """
        found = self._find(wanted, stop_ids)
        if found is None and wanted.kind not in _QUICK:
            raise Later
        return found or self.compile(wanted, stop_ids)

    def compile(self, wanted: Wanted, stop_ids: tuple[int, ...]) -> Grammar:
        """Return the grammar of a structure, as soon as it has been compiled.

        Raises:
            ApiError: it is not valid or not supported.
        """
        already = self._find(wanted, stop_ids)  # others may have asked for it while this waited
        if already is not None:
            return already
        found: Grammar | _Failed
        try:
            _check_width(wanted)
            found = compile(self._engine, wanted, stop_ids)
        except (InternLMError, RecursionError) as error:
            # The next second it would take as long again, and keep a thread from those that can be compiled.
            found = _Failed(str(error), time.monotonic() + _FAILED_SECONDS)
        with self._lock:
            key = wanted.kind, wanted.text, stop_ids
            self._known[key] = found
            self._known.move_to_end(key)
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        if isinstance(found, _Failed):
            raise _refusal(wanted, found.error)
        return found

    def _find(self, wanted: Wanted, stop_ids: tuple[int, ...]) -> Grammar | None:
        """Return the grammar if it is known; None: it has to be compiled."""
        with self._lock:
            found = self._known.get((wanted.kind, wanted.text, stop_ids))
        if not isinstance(found, _Failed):
            return found
        if time.monotonic() < found.until:
            raise _refusal(wanted, found.error)
        return None


def compile(engine: Engine, wanted: Wanted, stop_ids: tuple[int, ...]) -> Grammar:
    """Return the grammar of a structure; the engine's model and tokenizer will write it.

    Raises:
        EngineError, RecursionError: it is not valid or not supported.
    """
    assert engine.tokenizer is not None, "a served model has one"
    return grammar.compile(wanted.kind, wanted.text, engine.tokenizer, engine.model.config.vocab_size, stop_ids)


def _check_width(wanted: Wanted) -> None:
    """Check that the library can follow each object of a schema, which it says in the midst of an answer only.

    Raises:
        EngineError: one has too many properties that may be left out.
    """
    if not wanted.kind.endswith("_schema") or len(wanted.text) > grammar.MOST_SIZE:
        return
    try:
        level = [json.loads(wanted.text)]
    except (ValueError, RecursionError):
        return  # `compile` says what is wrong
    while level:
        for part in level:
            properties = part.get("properties") if isinstance(part, dict) else None
            required = part.get("required") if isinstance(part, dict) else None
            if not isinstance(properties, dict):
                continue
            needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
            optional = len(properties.keys() - needed)
            if optional > _MOST_OPTIONAL:
                problem = f"an object has {optional} properties that may be left out, and {_MOST_OPTIONAL} are the most"
                raise EngineError(problem, do="Name those that must come under `required`, or nest them.")
        parts = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [inner for part in parts for inner in part]


def _refusal(wanted: Wanted, problem: str) -> ApiError:
    return ApiError(f"{wanted.param}: {problem}", param=wanted.param)


def _found(body: Sampling) -> list[Wanted]:
    return [*_of_format(body.response_format), *_of_structure(body.structured_outputs), *_of_guided(body)]


def _of_format(given: ResponseFormat | None) -> Iterator[Wanted]:
    if given is None or given.type == "text":
        return
    name = "response_format"
    if given.type == "json_object":
        yield Wanted(name, "json_object", "")
    elif given.type == "json_schema" and given.json_schema is not None:
        yield from _of_value(name, "json_schema", given.json_schema.schema_)
    else:
        yield from _of_value(name, "regex", given.regex_schema if given.type == "regex_schema" else given.regex)


def _of_structure(given: Structure | None) -> Iterator[Wanted]:
    if given is None:
        return
    name = "structured_outputs"
    if given.json_object:
        yield Wanted(name, "json_object", "")
    yield from _of_value(name, "json_schema", given.json_)
    yield from _of_value(name, "regex", given.regex)
    yield from _of_value(name, "choice", given.choice)
    yield from _of_value(name, "grammar", given.grammar)


def _of_guided(body: Sampling) -> Iterator[Wanted]:
    yield from _of_value("guided_json", "json_schema", body.guided_json)
    yield from _of_value("guided_regex", "regex", body.guided_regex)
    yield from _of_value("guided_choice", "choice", body.guided_choice)
    yield from _of_value("guided_grammar", "grammar", body.guided_grammar)


def _of_value(param: str, kind: str, value: str | dict[str, Any] | list[str] | None) -> Iterator[Wanted]:
    if value is not None:
        yield Wanted(param, kind, value if isinstance(value, str) else json.dumps(value))
