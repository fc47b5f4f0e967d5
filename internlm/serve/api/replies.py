"""Deltas of the engine → OpenAI's response bodies, whole or in chunks.

    reply = Reply(served, asked)
    reply.opening()                      # chunks that come before any token
    reply.chunks(place, delta)           # those of a delta of the request at `place`
    reply.closing()                      # the usage, where it was asked for
    reply.whole()                        # or, after all deltas were added: one body

A token's log-probability is told when its text is: tokens of a stop string are left out, as their text is. The stop
token is left out of a chat, where OpenAI has none, and told with a completion: lm-evaluation-harness, which scores
texts with `echo` and `max_tokens` 1, takes the last token off and counts on there being one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from internlm.infer.request import Chance, Delta, Finished, Request
from internlm.infer.stream import TextStream
from internlm.serve.api.asked import Asked, Served
from internlm.serve.api.problems import ApiError
from internlm.serve.api.tooling import CallReader

Chunk = dict[str, Any]
_LEAST = -9999.0
"""What is told of a token that cannot come: JSON knows no −inf."""


class Token(NamedTuple):
    """A token of a text, how probable it was, and where its text begins, in characters."""

    id: int
    chance: Chance | None
    """None for the first of a prompt."""
    offset: int


def _tokens(chances: Iterable[tuple[int, Chance | None]], stream: TextStream, start: int = 0) -> list[Token]:
    """Return the next tokens of a text, which goes on by them and begins at `start`."""
    found: list[Token] = []
    for id_, chance in chances:
        found.append(Token(id_, chance, start + stream.length))
        stream.add(id_)
    return found


class _Writing:
    """One answer so far, the `index`-th of all."""

    def __init__(self, index: int, request: Request, asked: Asked, stream: TextStream, echo: str) -> None:
        self.index, self.request, self.stream, self.echo = index, request, stream, echo
        self.reader = CallReader(asked.tools) if asked.tools is not None else None
        self.stop_ids = () if asked.is_chat else request.stop_ids
        self.text: list[str] = []
        self.length = len(echo)
        self.tokens = 0
        self.held: list[Token] = []
        self.told: list[Token] = []
        self.finished: Finished | None = None
        self.said: list[Chunk] = []
        """What a stream says of the last delta, where calls are read."""

    @property
    def reason(self) -> str | None:
        """Why it ended, as OpenAI says it."""
        if self.reader is None or self.finished is None:
            return self.finished
        return self.reader.reason(self.finished)

    @property
    def is_settled(self) -> bool:
        """Whether nothing that still comes counts, since a call is whole."""
        return self.reader is not None and self.reader.is_settled

    def add(self, delta: Delta) -> list[Token]:
        """Go on by a delta and return the tokens whose text is decided by now."""
        if self.is_settled:  # how much still comes until the engine hears of it is chance
            delta = replace(delta, tokens=[], text="", logprobs=None)
        self.length += len(delta.text)
        self.tokens += len(delta.tokens)
        self.finished = delta.finished
        if self.reader is not None:
            self.said = self.reader.add(delta.text, delta.finished is not None)
        self.held += _tokens(((chance.token, chance) for chance in delta.logprobs or ()), self.stream, len(self.echo))
        stopped = delta.finished == "stop" and delta.tokens[-1:] and delta.tokens[-1] in self.stop_ids
        if stopped or self.is_settled or delta.finished in ("length", "abort", "timeout"):
            ready = len(self.held)
        else:
            ready = next((i for i, token in enumerate(self.held) if token.offset >= self.length), len(self.held))
        out, self.held = self.held[:ready], self.held[ready:]
        return out


class Reply:
    """The response to one HTTP request."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self.served, self.asked = served, asked
        self.id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.cached = 0
        answers = [(place, number) for place, one in enumerate(asked.requests) for number in range(one.n)]
        self._answers: dict[tuple[int, int], _Writing] = {}
        for index, (place, number) in enumerate(answers):
            request, echo = asked.requests[place], asked.echoes[place] if asked.echoes is not None else ""
            stream = self._stream(request, continuation=request.continuation)
            self._answers[place, number] = _Writing(index, request, asked, stream, echo)

    @property
    def is_settled(self) -> bool:
        """Whether nothing that still comes counts, since every answer is a call that is whole."""
        return all(answer.is_settled for answer in self._answers.values())

    @property
    def usage(self) -> Chunk:
        """What was computed so far."""
        prompt = sum(len(request.tokens) for request in self.asked.requests)
        written = sum(answer.tokens for answer in self._answers.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def opening(self) -> list[Chunk]:
        """Return the chunks before the first token: of a chat, who speaks."""
        if not self.asked.is_chat:
            return []
        return [
            self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            for index in range(len(self._answers))
        ]

    def chunks(self, place: int, delta: Delta) -> list[Chunk]:
        """Go on by a delta of the request at `place` and return what a stream says of it."""
        answer, text, tokens = self.add(place, delta)
        found: list[Chunk] = []
        logprobs = self._logprobs(answer.request, tokens) if tokens else None
        said: list[Chunk] = [{"delta": {"content": text}} if self.asked.is_chat else {"text": text}]
        if answer.reader is not None:
            said = [{"delta": part} for part in answer.said] or [{"delta": {"content": ""}}] * bool(tokens)
        elif not (text or tokens):
            said = []
        for part in said:
            found.append(self._chunk([{"index": answer.index, **part, "logprobs": logprobs, "finish_reason": None}]))
            logprobs = None  # told once
        if answer.finished:
            nothing: Chunk = {"delta": {}} if self.asked.is_chat else {"text": ""}
            end = {"index": answer.index, **nothing, "logprobs": None, "finish_reason": answer.reason}
            found.append(self._chunk([end]))
        return found

    def closing(self) -> list[Chunk]:
        """Return what comes after the answers: the usage, where it was asked for."""
        return [{**self._chunk([]), "usage": self.usage}] if self.asked.options.include_usage else []

    def add(self, place: int, delta: Delta) -> tuple[_Writing, str, list[Token]]:
        """Go on by a delta; return the answer it belongs to, its text, and the tokens whose text is decided."""
        if delta.finished == "error":
            raise ApiError(delta.problem or "the answer failed", status=500, code="engine_error")
        answer = self._answers[place, delta.index]
        if delta.cached is not None and delta.index == 0:
            self.cached += delta.cached
        tokens, text = answer.add(delta), delta.text
        if not answer.text:
            tokens, text = self._prompt_tokens(answer.request, delta) + tokens, answer.echo + text
        answer.text.append(text)
        answer.told += tokens
        return answer, text, tokens

    def whole(self) -> Chunk:
        """Return the body of a response that was not streamed."""
        choices: list[Chunk] = []
        for answer in self._answers.values():
            text = "".join(answer.text)
            said: Chunk = {"text": text}
            if answer.reader is not None:
                said = {"message": answer.reader.message()}
            elif self.asked.is_chat:
                said = {"message": {"role": "assistant", "content": text}}
            logprobs = self._logprobs(answer.request, answer.told)
            choices.append({"index": answer.index, **said, "logprobs": logprobs, "finish_reason": answer.reason})
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage}

    def _stream(self, request: Request, *, continuation: bool) -> TextStream:
        """Return what says where tokens begin in their text."""
        return TextStream(self.served.tokenizer, continuation=continuation, show_special=request.show_special)

    def _prompt_tokens(self, request: Request, first: Delta) -> list[Token]:
        """Return the tokens of a prompt that is told to the client; those not reached in time have no score."""
        if self.asked.echoes is None or request.prompt_logprobs is None or request.logprobs is None:
            return []
        scores = first.prompt_logprobs or ()
        missing = [None] * (len(request.tokens) - 1 - len(scores))
        chances = zip(request.tokens, [None, *scores, *missing], strict=True)
        return _tokens(chances, self._stream(request, continuation=False))

    def _logprobs(self, request: Request, tokens: list[Token]) -> Chunk | None:
        """Return how probable tokens were, in the form of the endpoint."""
        if request.logprobs is None:
            return None
        if self.asked.is_chat:
            return {"content": [self._chat_token(token.chance) for token in tokens if token.chance is not None]}
        tops = [None if t.chance is None else self._top(t.chance) for t in tokens] if request.logprobs else None
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [None if t.chance is None else max(t.chance.logprob, _LEAST) for t in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }

    def _chat_token(self, chance: Chance) -> Chunk:
        tops = [self._named(id_, logprob) for id_, logprob in chance.top]
        return {**self._named(chance.token, chance.logprob), "top_logprobs": tops}

    def _named(self, id_: int, logprob: float) -> Chunk:
        data = self._bytes(id_)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}

    def _top(self, chance: Chance) -> dict[str, float]:
        """Return the most probable tokens by their text; of two with one text, the more probable."""
        found: dict[str, float] = {}
        for id_, logprob in chance.top:
            found.setdefault(self._name(id_), max(logprob, _LEAST))
        return found

    def _name(self, id_: int) -> str:
        """Return a token's text, or its bytes as OpenAI writes those that are no text."""
        data = self._bytes(id_)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, id_: int) -> bytes:
        if id_ >= self.served.tokenizer.vocab_size:
            return b""
        return self.served.tokenizer.token_bytes(id_, skip_special=False)

    def _head(self, kind: str) -> Chunk:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": self.served.fingerprint,
        }

    def _chunk(self, choices: list[Chunk]) -> Chunk:
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        chunk: Chunk = {**self._head(kind), "choices": choices}
        if not self.asked.options.include_usage:
            return chunk
        return {**chunk, "usage": self.usage if self.asked.options.continuous_usage_stats else None}
