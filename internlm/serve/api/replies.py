"""Deltas of the engine → OpenAI's response bodies, whole or in chunks.

    reply = Reply(served, asked)
    reply.opening()                      # chunks that come before any token
    reply.chunks(place, delta)           # those of a delta of the request at `place`
    reply.closing()                      # the usage, where it was asked for
    reply.whole()                        # or, after all deltas were added: one body

A token's log-probability is told when its text is: tokens that belong to a stop string are left out, as their text is.
The stop token is left out of a chat, where OpenAI has none, and told with a completion: who scores texts with `echo`
and `max_tokens` 1, as lm-evaluation-harness does, takes the last token off and counts on there being one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from internlm.infer.request import Chance, Delta, Finished, Request
from internlm.infer.stream import TextStream
from internlm.serve.api.asked import Asked, Served
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


def _token(id: int, chance: Chance | None, stream: TextStream, shift: int = 0) -> Token:
    """Return the next token of a text, which goes on by it."""
    begin = stream.length
    stream.add(id)
    return Token(id, chance, begin + shift)


class _Writing:
    """One answer so far."""

    def __init__(self, stream: TextStream, reader: CallReader | None, stop_ids: Collection[int]) -> None:
        self.stream, self.reader, self.stop_ids = stream, reader, stop_ids
        self.text: list[str] = []
        self.length = 0
        self.tokens = 0
        self.held: list[Token] = []
        self.told: list[Token] = []
        self.finished: Finished | None = None
        self.said: list[Chunk] = []
        """What a stream says of the last delta, where calls are read."""
        self.begun = False

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
        self.text.append(delta.text)
        self.length += len(delta.text)
        self.tokens += len(delta.tokens)
        self.finished = delta.finished
        if self.reader is not None:
            self.said = self.reader.add(delta.text, delta.finished is not None)
        for chance in delta.logprobs or ():
            self.held.append(_token(chance.token, chance, self.stream))
        stopped = delta.finished == "stop" and delta.tokens[-1:] and delta.tokens[-1] in self.stop_ids
        if stopped or self.is_settled or delta.finished in ("length", "abort", "timeout"):
            ready = len(self.held)
        else:
            ready = next((i for i, token in enumerate(self.held) if token.offset >= self.length), len(self.held))
        out, self.held = self.held[:ready], self.held[ready:]
        self.told += out
        return out


class Reply:
    """The response to one HTTP request."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self.served, self.asked = served, asked
        self.id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.cached = 0
        self._answers = [
            _Writing(
                self._stream(request, continuation=request.continuation),
                CallReader(asked.tools) if asked.tools is not None else None,
                () if asked.is_chat else request.stop_ids,
            )
            for request in asked.requests
            for _ in range(request.n)
        ]
        self._first = [0]
        for request in asked.requests:
            self._first.append(self._first[-1] + request.n)
        self._scores: dict[int, list[Chance]] = {}

    @property
    def is_settled(self) -> bool:
        """Whether nothing that still comes counts, since every answer is a call that is whole."""
        return all(answer.is_settled for answer in self._answers)

    @property
    def usage(self) -> Chunk:
        """What was computed so far."""
        prompt = sum(len(request.tokens) for request in self.asked.requests)
        written = sum(answer.tokens for answer in self._answers)
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
        index, text, tokens = self.add(place, delta)
        answer = self._answers[index]
        found: list[Chunk] = []
        logprobs = self._logprobs(place, tokens) if tokens else None
        said: list[Chunk] = [{"text": text}] if text or tokens else []
        if self.asked.is_chat:
            said = [{"delta": {"content": text}}] if text or tokens else []
        if answer.reader is not None:
            said = [{"delta": part} for part in answer.said] or [{"delta": {"content": ""}}] * bool(tokens)
        for part in said:
            found.append(self._chunk([{"index": index, **part, "logprobs": logprobs, "finish_reason": None}]))
            logprobs = None  # told once
        if answer.finished:
            nothing: Chunk = {"delta": {}} if self.asked.is_chat else {"text": ""}
            end = {"index": index, **nothing, "logprobs": None, "finish_reason": answer.reason}
            found.append(self._chunk([end]))
        return found

    def closing(self) -> list[Chunk]:
        """Return what comes after the answers: the usage, where it was asked for."""
        return [{**self._chunk([]), "usage": self.usage}] if self.asked.include_usage else []

    def add(self, place: int, delta: Delta) -> tuple[int, str, list[Token]]:
        """Go on by a delta; return which answer it belongs to, its text, and the tokens whose text is decided."""
        index = self._first[place] + delta.index
        answer = self._answers[index]
        if delta.cached is not None and delta.index == 0:
            self.cached += delta.cached
        if delta.prompt_logprobs is not None:
            self._scores[place] = delta.prompt_logprobs
        tokens, text = answer.add(delta), delta.text
        if not answer.begun and self.asked.echoes is not None:
            prompt = self._prompt_tokens(place)
            text, tokens = self.asked.echoes[place] + text, prompt + tokens
            answer.text.insert(0, self.asked.echoes[place])
            answer.told = prompt + answer.told
        answer.begun = True
        return index, text, tokens

    def whole(self) -> Chunk:
        """Return the body of a response that was not streamed."""
        choices: list[Chunk] = []
        for place, request in enumerate(self.asked.requests):
            for index in range(self._first[place], self._first[place] + request.n):
                answer = self._answers[index]
                text = "".join(answer.text)
                said: Chunk = {"text": text}
                if answer.reader is not None:
                    said = {"message": answer.reader.message()}
                elif self.asked.is_chat:
                    said = {"message": {"role": "assistant", "content": text}}
                logprobs = self._logprobs(place, answer.told)
                choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": answer.reason})
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage}

    def _stream(self, request: Request, *, continuation: bool) -> TextStream:
        """Return what says where tokens begin in their text, which stop strings leave as it is."""
        return TextStream(self.served.tokenizer, continuation=continuation, show_special=request.show_special)

    def _prompt_tokens(self, place: int) -> list[Token]:
        """Return the tokens of a prompt, if it was scored for the client; those not reached in time without a score."""
        request, scores = self.asked.requests[place], self._scores.get(place, ())
        if request.prompt_logprobs is None or request.logprobs is None:
            return []
        stream = self._stream(request, continuation=False)
        # The prompt's offsets count from its own beginning, the answer's from its end: see `_logprobs`.
        length = len(self.asked.echoes[place]) if self.asked.echoes is not None else 0
        missing = [None] * (len(request.tokens) - 1 - len(scores))
        chances = zip(request.tokens, [None, *scores, *missing], strict=True)
        return [_token(id_, chance, stream, -length) for id_, chance in chances]

    def _logprobs(self, place: int, tokens: list[Token]) -> Chunk | None:
        """Return how probable tokens were, in the form of the endpoint."""
        request = self.asked.requests[place]
        if request.logprobs is None:
            return None
        if self.asked.is_chat:
            return {"content": [self._chat_token(token.chance) for token in tokens if token.chance is not None]}
        start = len(self.asked.echoes[place]) if self.asked.echoes is not None else 0
        tops = [None if t.chance is None else self._top(t.chance) for t in tokens] if request.logprobs else None
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [None if t.chance is None else max(t.chance.logprob, _LEAST) for t in tokens],
            "top_logprobs": tops,
            "text_offset": [start + token.offset for token in tokens],
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
        if not self.asked.include_usage:
            return chunk
        return {**chunk, "usage": self.usage if self.asked.usage_each else None}
