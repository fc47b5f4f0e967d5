"""A model in this process that answers in a chat."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from internlm.errors import EngineError, UsageError
from internlm.infer.engine import Engine
from internlm.infer.request import RULES, Finished, Request, TooLong
from internlm.serve.chat.answer import Facts, Settings
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import Template
from internlm.weights.talk import Talk


def check(settings: Settings, system: str | None, template: Template | None) -> None:
    """Check the ranges, and that a system message has a place, as of `Answerer`, before a model's weights are read."""
    if system is not None and (template is None or template.system is None):
        name = "plain continuation" if template is None else f"template {template.name}"
        raise UsageError(f"{name} has no place for a system message")
    _request(settings).check()


def _request(settings: Settings) -> Request:
    """Return what settings ask for, without a prompt."""
    rules = {name: getattr(settings, name) for name in RULES}
    return Request(tokens=(), max_tokens=settings.max_tokens, seed=settings.seed, stop_strings=settings.stop, **rules)


class FromEngine:
    """Lets an engine answer. With a chat format it sees all messages; without one it goes on with the text of the last.

    Raises:
        UsageError: the engine has no tokenizer.
        TokenizerError: the tokenizer lacks a token of the template.
    """

    def __init__(self, engine: Engine, talk: Talk, name: str = "model") -> None:
        if talk.tokenizer is None:
            raise UsageError("talking needs a tokenizer, and the model came without one")
        self.engine, self.tokenizer, self.name = engine, talk.tokenizer, name
        self.template = talk.format
        self.facts = Facts()
        self.length: int | None = engine.length
        self._stops = tuple(talk.stop_ids())
        self._interrupted = False
        self._prompt([Message("user", "a")], Settings())  # a template that does not fit says so now

    def check(self, settings: Settings, system: str | None) -> None:
        """Check the ranges, and that a system message has a place."""
        check(settings, system, self.template)

    def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[str]:
        """Yield the pieces of an answer."""
        self.facts, self._interrupted = Facts(), False
        prompt = self._prompt(messages, settings)
        request = replace(_request(settings), tokens=prompt, stop_ids=self._stops, continuation=self.template is None)
        id_ = self.engine.add(request)
        count, cached = 0, None
        finished: Finished | None = None
        problem: str | None = None
        try:
            while finished is None:
                # Steps, not `stream`: a long prompt takes many, and Ctrl-C must be heard between them.
                for delta in self.engine.step():
                    if delta.id != id_:
                        continue  # the end of an answer that was left early
                    count, finished, problem = count + len(delta.tokens), delta.finished, delta.problem
                    cached = cached if delta.cached is None else delta.cached
                    if delta.text:
                        yield delta.text
                if self._interrupted:
                    self.engine.abort(id_)
        finally:
            self.engine.abort(id_)
            self.facts = Facts(finished or "abort", len(prompt), count, cached)
        if finished == "error":
            raise EngineError(f"the answer failed: {problem}")

    def interrupt(self) -> None:
        """End the answer after the step that is being computed."""
        self._interrupted = True

    def _prompt(self, messages: Sequence[Message], settings: Settings) -> list[int]:
        """Return the ids to go on from.

        Raises:
            TooLong: they leave less room than `max_tokens` or a quarter of the context, and turns can go.
        """
        if self.template is None:
            start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            return start + self.tokenizer.encode(messages[-1].content)
        if self.template.single_turn:
            messages = [*(message for message in messages[:1] if message.role == "system"), messages[-1]]
        prompt = render_prompt(messages, self.template, self.tokenizer)
        room = self.engine.length - min(settings.max_tokens, self.engine.length // 4)
        if len(prompt) > room and any(message.role == "assistant" for message in messages):
            raise TooLong(f"{len(prompt)} tokens are too many: there is room for {room}")
        return prompt
