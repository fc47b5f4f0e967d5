"""What an answer must look like, in the words of OpenAI, LMDeploy and vLLM → the engine's grammar."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from internlm.errors import InternLMError
from internlm.infer import grammar
from internlm.infer.engine import Engine
from internlm.infer.grammar import Grammar
from internlm.serve.api.problems import ApiError
from internlm.serve.api.schema import ResponseFormat, Sampling, Structure

_QUICK = ("json_object", "choice")
"""What is compiled in no time: there is a bound on its size, and no text of it is tried out."""
_FAILED_SECONDS = 60.0
_MOST_KNOWN = 64
"""Each up to 64 kB of text."""


class Wanted(NamedTuple):
    """A structure that a client asks for."""

    param: str
    """The field that asks."""
    kind: str
    """As of `internlm.infer.grammar.compile`."""
    text: str


def wanted_of(body: Sampling) -> Wanted | None:
    """Return the one structure that a request asks for, if any; ApiError where it asks for several."""
    found = [
        Wanted(param, kind, value if isinstance(value, str) else json.dumps(value))
        for param, kind, value in _fields(body)
        if value is not None
    ]
    if len(found) > 1:
        text = f"an answer has one structure, and {found[0].param} and {found[1].param} each ask for one"
        raise ApiError(text, param=found[1].param)
    return found[0] if found else None


def _fields(body: Sampling) -> list[tuple[str, str, Any]]:
    """Return all that may ask for a structure: the field, the kind and the value, None where it does not ask."""
    form = body.response_format or ResponseFormat(type="text")
    own = body.structured_outputs or Structure()
    schema = form.json_schema.schema_ if form.json_schema is not None else None
    return [
        ("response_format", "json_object", "" if form.type == "json_object" else None),
        ("response_format", "json_schema", schema if form.type == "json_schema" else None),
        ("response_format", "regex", form.regex if form.type == "regex" else None),
        ("response_format", "regex", form.regex_schema if form.type == "regex_schema" else None),
        ("structured_outputs", "json_object", "" if own.json_object else None),
        ("structured_outputs", "json_schema", own.json_),
        ("structured_outputs", "regex", own.regex),
        ("structured_outputs", "choice", own.choice),
        ("structured_outputs", "grammar", own.grammar),
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
    ]


Compile = Callable[[Wanted, tuple[int, ...]], Grammar]
"""`known` or `compile` of `Grammars`."""


class _Failed(NamedTuple):
    """What was wrong with a structure, until when: what took too long may be quicker next time."""

    error: str
    until: float


class Later(Exception):
    """What a request asks for has to be compiled first, which may take seconds."""


class Grammars:
    """The grammars of an engine's structures: those compiled last are known, and those that failed, for a time."""

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
        """Return the grammar of a structure as soon as it has been compiled; ApiError as of `known`."""
        already = self._find(wanted, stop_ids)  # others may have asked for it while this waited
        if already is not None:
            return already
        found: Grammar | _Failed
        try:
            found = compile(self._engine, wanted, stop_ids)
        except InternLMError as error:
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
    """Return the grammar of a structure, or raise EngineError; the engine's model and tokenizer will write it."""
    assert engine.tokenizer is not None, "a served model has one"
    return grammar.compile(wanted.kind, wanted.text, engine.tokenizer, engine.model.config.vocab_size, stop_ids)


def _refusal(wanted: Wanted, problem: str) -> ApiError:
    return ApiError(f"{wanted.param}: {problem}", param=wanted.param)
