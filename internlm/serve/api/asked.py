"""OpenAI's requests → the engine's: prompts are rendered and encoded, names and defaults translated, limits checked.

    asked = ask_chat(served, body, grammars.known)        # may take a while for a long text: not on the event loop
    asked.requests                        # for the engine; `replies` turns what comes into a response

Text is text: no string in a message becomes a special token. Ids in a prompt of ids are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from internlm import __version__
from internlm.errors import InternLMError, UsageError
from internlm.infer.engine import Engine
from internlm.infer.request import RULES, Checked, Request
from internlm.serve.api import structure
from internlm.serve.api.fields import INSTEAD
from internlm.serve.api.problems import ApiError, from_error
from internlm.serve.api.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    LegacyChatRequest,
    Sampling,
    StreamOptions,
    TokenizeRequest,
)
from internlm.serve.api.structure import Compile, Wanted
from internlm.serve.api.tooling import ToolUse, tools_of, turns_of
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import TEMPLATES, Part, Template
from internlm.text.tokenizer import Tokenizer, well_formed
from internlm.weights.talk import Talk


@dataclass(frozen=True)
class Served:
    """The model as clients see it.

    Raises:
        UsageError: it came without a tokenizer, or has no name.
        TokenizerError: the tokenizer lacks a token of the chat format.
    """

    engine: Engine
    talk: Talk
    names: tuple[str, ...]
    """The first is its own."""
    timeout: float | None = None
    """Most seconds for an answer."""
    created: int = field(init=False, default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if self.engine.tokenizer is None or self.talk.tokenizer is None:
            raise UsageError("serving needs a tokenizer, and the model came without one", do="Give --tokenizer.")
        if not self.names:
            raise UsageError("a served model needs a name")
        if self.template is not None:
            render_prompt([Message("user", "a")], self.template, self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides an answer beside weights and request: where it differs, a seed may mean another."""
        engine = self.engine
        weight = next(engine.model.parameters())
        parts = (__version__, torch.__version__, engine.model.config, engine.limits, engine.pack, weight.dtype)
        text = repr((*parts, weight.device.type, self.talk.template))
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        assert self.engine.tokenizer is not None, "checked when it was made"
        return self.engine.tokenizer

    @property
    def template(self) -> Template | None:
        """The chat format."""
        return self.talk.format

    def check_name(self, name: str | None) -> str:
        """Return the name that a request asks for, the first where it asks for none, or raise ApiError."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                f"The model {name!r} does not exist here; there is: {known}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return name


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks of the engine."""

    requests: tuple[Checked, ...]
    model: str
    stream: bool
    options: StreamOptions
    is_chat: bool
    echoes: tuple[str, ...] | None = None
    """The text of each prompt, where it is to be repeated before the answer."""
    tools: ToolUse | None = None


def ask_chat(served: Served, body: ChatRequest, compile: Compile) -> Asked:
    """Return what a chat request asks.

    Raises:
        Later: of `compile`.
        ApiError: it cannot be done.
    """
    model = _admit(served, body)
    tokens, use = render_chat(served, body)
    room = served.engine.room(len(tokens))
    most = body.max_completion_tokens or body.max_tokens
    if isinstance(body, LegacyChatRequest) and body.max_length is not None:
        if body.max_length <= len(tokens):
            problem = f"the prompt has {len(tokens)} tokens, and max_length, which counts them, is {body.max_length}"
            raise ApiError(problem, param="max_length", code="context_length_exceeded")
        most = min(body.max_length - len(tokens), most if most is not None else room)
    if most == 0:
        raise ApiError("max_tokens: an answer has at least 1 token", param="max_tokens")
    extra = {
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "continuation": bool(body.continue_final_message),
    }
    request = _request(served, body, tokens, room if most is None else most, extra, compile)
    if use.tools:
        request = _with_tools(request, use, compile)
    checked = _check(served, request, "messages")
    options, tools = body.stream_options or StreamOptions(), use if use.tools else None
    return Asked((checked,), model, bool(body.stream), options, is_chat=True, tools=tools)


def ask_completion(served: Served, body: CompletionRequest, compile: Compile) -> Asked:
    """Return what a completion request asks; errors as of `ask_chat`."""
    model = _admit(served, body)
    prompts, texts = _prompts(served, body)
    given = body.max_completion_tokens or body.max_tokens
    most = 16 if given is None else given
    if most == 0 and not body.echo:
        raise ApiError("max_tokens: 0 is for echo only", param="max_tokens")
    scores = body.logprobs if body.echo else None
    extra = {
        "logprobs": body.logprobs,
        "prompt_logprobs": 0 if scores is None and most == 0 else scores,
        "continuation": True,
    }
    made = (_request(served, body, prompt, most, extra, compile) for prompt in prompts)
    requests = tuple(_check(served, request, "prompt") for request in made)
    options, echoes = body.stream_options or StreamOptions(), tuple(texts) if body.echo else None
    return Asked(requests, model, bool(body.stream), options, is_chat=False, echoes=echoes)


def ask_ids(served: Served, body: TokenizeRequest) -> list[int]:
    """Return the ids of a text, or those that the model would get for a conversation; errors as of `render_chat`."""
    if body.messages is None:
        return encode_text(served, body.prompt or "", special=body.add_special_tokens)
    chat = ChatRequest(
        messages=body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    return render_chat(served, chat)[0]


def render_chat(served: Served, body: ChatRequest) -> tuple[list[int], ToolUse]:
    """Return the ids of a chat request's prompt, after which the answer comes, and its tools.

    Raises:
        ApiError: the model has no chat format, or none that is known here, or it cannot write these messages.
    """
    goes_on = bool(body.continue_final_message)
    if body.add_generation_prompt is not None and body.add_generation_prompt == goes_on:
        text = "goes without continue_final_message" if goes_on else "can be false with continue_final_message alone"
        raise ApiError(f"add_generation_prompt: {text}", param="add_generation_prompt")
    if served.template is None:
        known = "has a chat format that is not known here" if served.talk.foreign is not None else "has no chat format"
        do = f"use /v1/completions, or start the server with --template and one of {', '.join(TEMPLATES)}"
        raise ApiError(f"the model {known}: {do}", code="no_chat")
    use = tools_of(body, served.template.name)
    turns = turns_of(body.messages)
    begin: Sequence[Part] = use.forced.begin if use.forced is not None else ()
    if goes_on:
        begun = turns.pop()
        if begun.role != "assistant" or begun.calls or not begun.content or use.forced is not None:
            text = "the last message must be a text of the assistant's, and no call can be asked for after it"
            raise ApiError(f"continue_final_message: {text}", param="continue_final_message")
        begin = (begun.content,)
    try:
        written = use.format.render_history(turns, use.tools, use.parallel)
        return render_prompt(written, served.template, served.tokenizer, begin), use
    except InternLMError as error:
        raise ApiError(str(error), param="messages") from error


def encode_text(served: Served, text: str, *, special: bool) -> list[int]:
    """Return the ids of a text, beginning with bos if `special` and there is one."""
    bos = served.tokenizer.bos_id
    return ([bos] if special and bos is not None else []) + served.tokenizer.encode(text)


def _prompts(served: Served, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if given and isinstance(given[0], str):
        special = body.add_special_tokens is not False
        return [encode_text(served, text, special=special) for text in given], [well_formed(text) for text in given]
    if not body.echo:
        return given, [""] * len(given)
    skip = body.skip_special_tokens is not False
    try:
        return given, [served.tokenizer.decode(ids, skip_special=skip) for ids in given]
    except InternLMError as error:
        raise ApiError(str(error), param="prompt") from error


def _admit(served: Served, body: Sampling) -> str:
    """Return the model's name, if nothing is asked that cannot be done."""
    nested: list[Body | None] = [body, body.response_format, body.structured_outputs, body.stream_options]
    for part in nested:
        name = part.unsupported if part is not None else None
        if name is not None:
            do = f"; {INSTEAD[name]} is what it has" if name in INSTEAD else ""
            raise ApiError(f"{name}: this server does not support it{do}", param=name, code="unsupported")
    return served.check_name(body.model)


def _request(
    served: Served, body: Sampling, tokens: list[int], most: int, extra: dict[str, Any], compile: Compile
) -> Request:
    """Return the engine's request; what a client leaves out is OpenAI's default."""
    stops = () if body.ignore_eos else tuple(served.talk.stop_ids())
    texts = [body.stop] if isinstance(body.stop, str) else body.stop or []
    limits = [seconds for seconds in (body.timeout, served.timeout) if seconds is not None]
    stop_ids = (*stops, *(body.stop_token_ids or ()))
    wanted = structure.wanted_of(body)
    rules = {name: value for name in RULES if (value := getattr(body, name)) is not None}
    if "top_p" in rules:
        rules["top_p"] = rules["top_p"] or 1e-9  # 0 keeps the most probable token alone
    if "top_k" in rules:
        rules["top_k"] = max(0, rules["top_k"])  # −1 is none to vLLM's clients
    return Request(
        tokens=tokens,
        max_tokens=most,
        n=body.n or 1,
        logit_bias={int(id_): bias for id_, bias in (body.logit_bias or {}).items()},
        seed=None if body.seed is None else body.seed % 2**63,
        stop_ids=stop_ids,
        stop_strings=tuple(map(well_formed, texts)),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        grammar=compile(wanted, stop_ids) if wanted is not None else None,
        timeout=min(limits, default=None),
        show_special=body.skip_special_tokens is False,
        **rules,
        **extra,
    )


def _with_tools(request: Request, use: ToolUse, compile: Compile) -> Request:
    if use.forced is not None:
        if request.grammar is not None:
            raise ApiError("a call that must be made leaves no room for response_format", param="response_format")
        text = json.dumps(use.forced.grammar)
        wanted = Wanted("tools", use.forced.kind, text)
        request = replace(request, grammar=compile(wanted, request.stop_ids))
    # A call in the midst of a sentence is read by its tags, special tokens in some formats: they need a text.
    shown = request.show_special or bool(use.format.specials)
    return replace(request, stop_strings=(*request.stop_strings, *use.format.stops), show_special=shown)


def _check(served: Served, request: Request, prompt: str) -> Checked:
    """Return the request as checked; `prompt` is the field its tokens came from."""
    try:
        return served.engine.check(request)
    except InternLMError as error:
        told = from_error(error)
        told.param = prompt if told.param == "prompt" else told.param
        raise told from error
