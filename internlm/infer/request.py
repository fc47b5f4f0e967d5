"""What is asked of the engine, and what it gives back: plain data, made and read on any thread.

Request(tokens=ids, temperature=0, stop_ids=(2,))      →      Delta, Delta, …, Delta(finished="stop")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Finished = Literal["stop", "length", "abort", "timeout", "error"]
"""Why an answer ended: a stop token or string came (or a grammar was complete), the length was reached, it was aborted,
its time was over, or something went wrong with this request alone (`Delta.problem` says what)."""


class Constraint(Protocol):
    """What one answer may go on with."""

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of every token that may not come next to −inf, in place. Not all of them."""

    def accept(self, token: int) -> None:
        """Go on by a token."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole, so that nothing may follow."""


class Grammar(Protocol):
    """What every answer to a request must look like; see `internlm.infer.grammar`."""

    def start(self) -> Constraint:
        """Return a constraint at its beginning, one for each answer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the engine."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    max_tokens: int = 256
    """Most tokens to write; less where the context ends before. 0: none, which is for `prompt_logprobs`."""
    n: int = 1
    """Answers to write; the prompt is computed once. Deltas say by `index` which they belong to."""
    temperature: float = 1.0
    """0 takes the most probable token. This and the next: see `Rules`."""
    top_p: float = 1.0
    """Probability that the tokens kept have together."""
    top_k: int = 0
    """Number of tokens kept; 0: all."""
    min_p: float = 0.0
    """Least share of the best token's probability."""
    repetition_penalty: float = 1.0
    """Over 1 makes tokens of prompt and answer less likely."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that are in the answer."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens, once for each time that they are in the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    seed: int | None = None
    """Of the random stream; the same seed gives the same answer. None: from the engine's seed and the request's id."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer. They are among the tokens of the result and never in its text."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    include_stop: bool = False
    """Whether the stop string is a part of the text after all."""
    min_tokens: int = 0
    """Stop ids cannot come before so many tokens."""
    logprobs: int | None = None
    """Tell each token's log-probability before any rule above, and so many of the most probable; None: do not."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens after the first."""
    grammar: Grammar | None = None
    """What the answer must look like."""
    timeout: float | None = None
    """Seconds from `add` after which the answer ends where it is."""
    continuation: bool = False
    """Whether the answer goes on with the prompt's text instead of beginning one of its own (see `TextStream`)."""
    show_special: bool = False
    """Whether special tokens have a text."""


@dataclass(frozen=True)
class Chance:
    """How probable a token was."""

    token: int
    logprob: float
    """Natural logarithm."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, best first, and their log-probabilities."""


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
    """In an answer's first delta, one for each token of the prompt after the first, where they were asked for."""
    cached: int | None = None
    """In an answer's first delta: tokens of the prompt that were in the cache already."""
    problem: str | None = None
    """What went wrong, where it finished with "error"."""


@dataclass(frozen=True)
class Result:
    """A whole answer."""

    id: int
    tokens: list[int]
    """With the stop token, if one ended it."""
    text: str
    finished: Finished
    index: int = 0
    logprobs: list[Chance] | None = None
    prompt_logprobs: list[Chance] | None = None
    problem: str | None = None
