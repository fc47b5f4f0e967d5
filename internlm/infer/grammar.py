r"""Structured output: answers that are JSON, follow a schema, match a regular expression, or are one of several texts.

    grammar = compile("json_schema", '{"type": "object", …}', tokenizer, vocab_size, stop_ids)
    engine.add(Request(tokens=ids, stop_ids=stop_ids, grammar=grammar))

A token may come next when its bytes can go on with the answer; a stop id, when the answer may end. Where nothing more
can follow (after the last brace) the answer ends by itself.

The work behind `Grammar` is llguidance's (https://github.com/guidance-ai/llguidance, 1.9.1); docs/serving.md says why.
It refuses a schema that it cannot follow in full: `not`, `uniqueItems`, `oneOf` that overlaps, unknown formats.

For V = 103,168 on one core of an x86 server a mask takes 0.2 ms, and the first grammar for a tokenizer 0.6 s, to read
its vocabulary. Texts made to hurt got single masks of up to 70 ms, for which the whole batch waits.

Limits: properties come in the schema's order, and keys that it does not name may come twice. A regular expression is of
the Rust kind (https://docs.rs/regex/latest/regex/#syntax: no look-around, no back-references; `\w` and `\d` are
Unicode's) and the whole answer must match. A grammar is Lark as llguidance reads it, or GBNF. With a vocabulary that
puts a space before every text (Llama 1 and 2) an answer loses a space that it begins with (see `TextStream`).
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from internlm.errors import EngineError, install_command
from internlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

_Flags = npt.NDArray[np.bool_]
Kind = Literal["json_object", "json_schema", "labelled_schema", "regex", "choice", "grammar"]

MOST_SIZE = 2**16
"""Characters of a schema, expression, list or grammar."""
MOST_DEPTH = 64
"""Of a schema's own nesting."""
MOST_SECONDS = 5.0
"""For trying a text out."""
_MOST_OPTIONAL = 400
"""The library follows 2000 things at once, and each such property is four (llguidance 1.9: 450 work, 600 do not)."""
_TRIALS = threading.BoundedSemaphore(2)  # processes at once: each may take a core and a gigabyte
_TRIAL = Path(__file__).with_name("grammar_trial.py")
_WHITE_SPACE = r"[ \n\r\t]{0,32}"  # between the parts of JSON; without a bound, weak models write white space for ever
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'  # else only the tokenizer's own split of a text is allowed
_NO_TEXT = "no text that this vocabulary can write matches"
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


def compile(kind: str, text: str, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> Grammar:
    """Return what answers must look like, for `Request.grammar`.

    Any thread may call it. Most texts are tried out in another process first (`grammar_trial`), which takes a tenth of
    a second and ends after `MOST_SECONDS`.

    Args:
        kind: what `text` is: nothing ("json_object"), a JSON Schema, a JSON object of texts that answers begin with,
            each with the schema of what follows it, a regular expression, a JSON list of texts, a Lark or GBNF grammar.
        tokenizer: gives the bytes of each token; special tokens have none, and are never a part of an answer.
        vocab_size: of the model; ids beyond the tokenizer's are never allowed.
        stop_ids: of the request: allowed where the answer may end, and never as a part of it.

    Raises:
        EngineError: the text is not valid, not supported, too large or matched by nothing; or the library is missing.
    """
    if kind not in get_args(Kind):
        raise EngineError("is no kind of grammar", where="response_format", got=kind, allowed=get_args(Kind))
    where = "response_format" if kind.startswith("json") else kind
    library = _library()
    if len(text) > MOST_SIZE:
        raise EngineError("is too long", where=where, got=f"{len(text)} characters", allowed=[f"up to {MOST_SIZE}"])
    try:
        text.encode()
        lark = _lark(kind, text, where)
        if kind in ("json_schema", "labelled_schema", "regex", "grammar"):
            lark = _try_out(lark, kind, where)
        grammar = library.LLMatcher.grammar_from_lark(lark + _OPTIONS)
    except UnicodeEncodeError as error:
        raise EngineError("has unpaired surrogates, which are no characters", where=where) from error
    size = min(vocab_size, tokenizer.vocab_size)
    limits = library.LLParserLimits(verbose_errors=False)
    matcher = library.LLMatcher(_vocabulary(tokenizer, size), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # what nothing matches has no first token
    if matcher.is_error():
        raise EngineError(_explain(matcher.get_error(), kind), where=where)
    found = Grammar(matcher, {id_ for id_ in stop_ids if 0 <= id_ < size}, _beginnings(tokenizer, size))
    try:
        found.start().mask(torch.zeros(size))
    except EngineError as error:  # what it could begin with ends an answer
        raise EngineError(_NO_TEXT, where=where) from error
    return found


class Grammar:
    """What an answer must look like, and how far it has come.

    What cannot come, and what is too much work to find out, is an EngineError. `begins` says which ids may be the
    first, as far as the grammar leaves a choice.
    """

    def __init__(self, matcher: llguidance.LLMatcher, stops: Collection[int], begins: _Flags) -> None:
        self._matcher, self._stops, self._begins = matcher, list(stops), begins
        self._is_first = True

    def start(self) -> Grammar:
        """Return the grammar at its beginning, one for each answer."""
        return Grammar(self._matcher.deep_copy(), self._stops, self._begins)

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of every token that may not come next to −inf, in place; never all of them."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():  # a dead end, too
            raise EngineError(_explain(self._matcher.get_error(), "grammar"), where="grammar")
        size = len(self._begins)
        allowed = np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)
        if self._is_first and (allowed & self._begins).any():
            allowed &= self._begins
        forbidden = np.ones(logits.shape[0], np.bool_)
        np.logical_not(allowed, out=forbidden[:size])
        forbidden[self._stops] = not self._matcher.is_accepting()  # whatever text they would be
        if forbidden.all():
            raise EngineError("only a token that ends the answer could go on with it", where="grammar")
        logits.masked_fill_(torch.from_numpy(forbidden).to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if not self._matcher.consume_token(token):
            raise EngineError(_explain(self._matcher.get_error(), "grammar"), where="grammar", got=token)
        self._is_first = False

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole, so that nothing may follow."""
        return self._matcher.is_stopped()


class _Vocabulary:
    """A tokenizer in the form that the library asks for; one id more stands for its own end of text."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        entries = [tokenizer.token_bytes(id_) for id_ in range(size)]
        self.tokens = [*entries, b""]
        self.eos_token_id = size

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError  # as nothing is forced; the library wants to find it


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, size: int) -> llguidance.LLTokenizer:
    wrapper: Any = _Vocabulary(tokenizer, size)
    return _library().LLTokenizer(wrapper, n_vocab=size + 1)


@functools.lru_cache(maxsize=4)
def _beginnings(tokenizer: Tokenizer, size: int) -> _Flags:
    """Return which ids do not begin with a space that `TextStream` would cut off."""
    if not tokenizer.puts_space_first:
        return np.ones(size, np.bool_)
    return np.array([not tokenizer.token_bytes(id_).startswith(b" ") for id_ in range(size)])


def _try_out(lark: str, kind: str, where: str) -> str:
    """Return the grammar as Lark once it has compiled in a process that could be stopped."""
    request = json.dumps({"lark": lark, "is_foreign": kind == "grammar"})
    command = [sys.executable, "-P", str(_TRIAL)]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        with _TRIALS:
            done = subprocess.run(command, input=request, stdout=pipe, stderr=nowhere, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"takes over {MOST_SECONDS:g} s to compile", where=where, do="Make it simpler.") from error
    if done.returncode != 0:
        problem = "takes too much memory to compile, or breaks the compiler"
        raise EngineError(problem, where=where, do="Make it simpler.")
    answer = json.loads(done.stdout)
    if answer["problem"] is not None:
        raise EngineError(_explain(answer["problem"], kind), where=where)
    return str(answer["lark"])


def _lark(kind: str, text: str, where: str) -> str:
    """Return the grammar in the library's form of Lark, or what may be GBNF as it is.

    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
    """
    if kind == "json_object":
        return "start: " + _of_schema({"type": "object"})
    if kind == "json_schema":
        schema = _parse(text, where)
        if not isinstance(schema, dict):
            raise EngineError("a JSON Schema is an object", where=where, got=text[:40])
        return "start: " + _of_schema(schema)
    if kind == "labelled_schema":
        schemas = _parse(text, where)
        if not (isinstance(schemas, dict) and schemas and all(isinstance(part, dict) for part in schemas.values())):
            raise EngineError("must be a JSON object of schemas, at least one", where=where)
        begun = " | ".join(f"{json.dumps(label, ensure_ascii=False)} part{n}" for n, label in enumerate(schemas))
        return f"start: {begun}" + "".join(f"\npart{n}: {_of_schema(part)}" for n, part in enumerate(schemas.values()))
    if kind == "regex":
        return f"start: /{_library().regex_to_lark(text, use_ascii='')}/"
    if kind == "choice":
        choices = _parse(text, where)
        if not (isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices)):
            raise EngineError("must be a JSON list of texts, at least one", where=where)
        return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return text


def _of_schema(schema: dict[str, Any]) -> str:
    # The schema's own settings for the library are replaced: it may not switch off that what is unknown is refused.
    settings = {"whitespace_pattern": _WHITE_SPACE, "coerce_one_of": False, "lenient": False}
    return f"%json {json.dumps({**schema, 'x-guidance': settings})}"


def _parse(text: str, where: str) -> Any:
    """Return the JSON value, unless it is nested too deeply or an object in it has too many properties."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise EngineError("is nested too deeply", where=where, allowed=[f"up to {MOST_DEPTH} levels"]) from error
    except ValueError as error:
        raise EngineError(f"is no JSON: {error}", where=where) from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise EngineError("is nested too deeply", where=where, allowed=[f"up to {MOST_DEPTH} levels"])
        objects = [part for part in level if isinstance(part, dict)]
        for part in objects:
            _check_width(part)
        lists = [part for part in level if isinstance(part, list)]
        level = [inner for part in (*lists, *(part.values() for part in objects)) for inner in part]
    return value


def _check_width(part: dict[str, Any]) -> None:
    """Check that the library can follow an object of a schema, which it says in the midst of an answer only."""
    properties, required = part.get("properties"), part.get("required")
    if not isinstance(properties, dict):
        return
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    optional = len(properties.keys() - needed)
    if optional > _MOST_OPTIONAL:
        problem = f"an object has {optional} properties that may be left out, and {_MOST_OPTIONAL} are the most"
        raise EngineError(problem, do="Name those that must come under `required`, or nest them.")


def _explain(message: str, kind: str) -> str:
    """Return a message of the library without the pictures that follow."""
    if message.startswith("NoExtension"):
        return _NO_TEXT
    if message.startswith("panic:"):
        return "is too large or deep for the compiler"
    # Places are those of the Lark text, which only its author has seen.
    message = message if kind == "grammar" else _PLACE.sub("", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), lines[0] if lines else "failed")[:300]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise EngineError(
            "structured output needs llguidance, which is not installed",
            where="response_format",
            do=f"Install it: {install_command('serve')}",
        ) from error
    return llguidance
