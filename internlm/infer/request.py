"""What is asked of the engine, and what it gives back: plain data, made and read on any thread.

Request(tokens=ids, temperature=0, stop_ids=(2,))      →      Delta, Delta, …, Delta(finished="stop")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from internlm.errors import EngineError

if TYPE_CHECKING:  # a client knows the rules, and starts without torch
    from internlm.infer.grammar import Grammar

MOST_ANSWERS = 128
MOST_TOP = 100
"""Most probable tokens that a request may ask to be told."""

Finished = Literal["stop", "length", "abort", "timeout", "error"]
"""Why an answer ended; "stop": a stop token or string came, or a grammar was complete; "error": see `Delta.problem`."""


class TooLong(EngineError):
    """A prompt leaves no room for an answer; a shorter one may."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the next token of an answer is chosen."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """The smallest set of most probable tokens with this probability together stays."""
    top_k: int = 0
    """So many most probable tokens stay; 0 keeps all."""
    min_p: float = 0.0
    """Tokens under this share of the most probable one's probability go."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens of prompt and answer, multiplies the negative (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens of the answer."""
    frequency_penalty: float = 0.0
    """The same, once for each time they are there."""

    @property
    def is_filtered(self) -> bool:
        """Whether anything beside the temperature narrows the choice."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def check(self) -> None:
        """Check the ranges; EngineError names the first value outside."""
        self._check(
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0, up to 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            # Beyond these, logits are no longer told apart in fp32.
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "1e-6 to 1e6"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
        )

    def _check(self, *ranges: tuple[str, bool, str]) -> None:
        for name, good, allowed in ranges:
            if not good:
                raise EngineError("is out of range", where=name, got=getattr(self, name), allowed=[allowed])


RULES = tuple(rule.name for rule in fields(Rules))
"""Their names."""


@dataclass(frozen=True, kw_only=True)
class Request(Rules):
    """What is asked of the engine."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    max_tokens: int = 256
    """Most tokens to write; less where the context ends before. 0 is for `prompt_logprobs`."""
    n: int = 1
    """Answers to write; the prompt is computed once."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """Of the random stream; None: from the engine's seed and the request's id."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, among its tokens and never in its text."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it, …"""
    include_stop: bool = False
    """… unless this says so."""
    min_tokens: int = 0
    """Stop ids cannot come before so many tokens."""
    logprobs: int | None = None
    """Tell each token's log-probability before any rule, and so many of the most probable; None: do not."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens after the first."""
    grammar: Grammar | None = None
    timeout: float | None = None
    """Seconds from `add` after which the answer ends where it is."""
    continuation: bool = False
    """Whether the answer goes on with the prompt's text instead of beginning one of its own."""
    show_special: bool = False
    """Whether special tokens have a text."""

    def check(self) -> None:
        """Check the ranges, as far as they do not depend on a model."""
        super().check()
        scores, most = self.prompt_logprobs, f"0 to {MOST_TOP}"
        self._check(
            ("max_tokens", self.max_tokens >= (0 if scores is not None else 1), "1 or more"),
            ("n", 1 <= self.n <= MOST_ANSWERS, f"1 to {MOST_ANSWERS}"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_TOP, most),
            ("prompt_logprobs", scores is None or 0 <= scores <= MOST_TOP, most),
            ("timeout", self.timeout is None or self.timeout > 0, "over 0"),
        )
        if "" in self.stop_strings:
            raise EngineError("cannot be empty", where="stop_strings", got=self.stop_strings)
        for bias in self.logit_bias.values():
            if not -100 <= bias <= 100:
                raise EngineError("is out of range", where="logit_bias", got=bias, allowed=["-100 to 100"])


@dataclass(frozen=True, kw_only=True)
class Checked(Request):
    """A request that an engine can serve (`Engine.check`): nobody looks through its prompt again."""

    limit: int
    """Tokens that an answer may have: `max_tokens`, or as many as the context has room for."""


@dataclass(frozen=True)
class Chance:
    """How probable a token was, in natural logarithms."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, best first, each with its own."""


@dataclass(frozen=True)
class Delta:
    """What a step adds to an answer. Text may come later than its tokens (see `TextStream`)."""

    id: int
    tokens: list[int]
    text: str
    finished: Finished | None = None
    """Set in the last delta of an answer."""
    index: int = 0
    """Which of a request's `n` answers."""
    logprobs: list[Chance] | None = None
    """One for each of `tokens`, where they were asked for."""
    prompt_logprobs: list[Chance] | None = None
    """In an answer's first delta, for each token of the prompt after the first, where they were asked for."""
    cached: int | None = None
    """In the first: tokens of the prompt that were in the cache already."""
    waited: float | None = None
    """In the first: seconds from `add` to its first step; None: it ended before."""
    problem: str | None = None
    """What went wrong, where it finished with "error"."""


class Result(Delta):
    """A whole answer, as one delta; among its tokens is the stop token, if one ended it."""

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Result:
        """Return the whole answer that its deltas are the pieces of."""
        first, last = deltas[0], deltas[-1]
        assert last.finished is not None, "the last delta of an answer says why it ended"
        asked = any(delta.logprobs is not None for delta in deltas)
        return cls(
            last.id,
            [token for delta in deltas for token in delta.tokens],
            "".join(delta.text for delta in deltas),
            last.finished,
            last.index,
            [chance for delta in deltas for chance in delta.logprobs or ()] if asked else None,
            first.prompt_logprobs,
            first.cached,
            first.waited,
            last.problem,
        )
