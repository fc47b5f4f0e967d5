"""What an answer must look like, in the words of OpenAI, LMDeploy and vLLM → the engine's grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from internlm.errors import InternLMError
from internlm.infer import grammar
from internlm.infer.engine import Engine
from internlm.infer.request import Grammar
from internlm.serve.api.problems import ApiError
from internlm.serve.api.schema import ChatRequest, ResponseFormat, Sampling, Structure


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


def is_slow(body: Sampling) -> bool:
    """Return whether a request asks for what may take seconds to compile."""
    if isinstance(body, ChatRequest) and body.tool_choice not in (None, "none", "auto"):
        return True
    return any(one.kind not in ("json_object", "choice") for one in _found(body))


def compile(engine: Engine, wanted: Wanted, stop_ids: tuple[int, ...]) -> Grammar:
    """Return the grammar of a structure; the engine's model and tokenizer will write it.

    Raises:
        ApiError: it is not valid or not supported.
    """
    assert engine.tokenizer is not None, "a served model has one"
    try:
        vocab_size = engine.model.config.vocab_size
        return grammar.compile(wanted.kind, wanted.text, engine.tokenizer, vocab_size, stop_ids)
    except (InternLMError, RecursionError) as error:
        raise ApiError(f"{wanted.param}: {error}", param=wanted.param) from error


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
