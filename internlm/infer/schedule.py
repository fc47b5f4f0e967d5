"""Who computes what in the next step: continuous batching, prompts in chunks, admission, preemption.

    plan = scheduler.plan()                     # [(text, how many of its tokens)]

A text is a prompt and what was written of the answer. `computed` tokens of it are in the cache; the rest is to be
computed, one token for an answer that is being written, many for a prompt (or for a text that lost its place). When
nothing is left, a token is drawn and becomes the rest. A step has a budget of tokens: first everyone who is writing
gets one, then prompts are filled in, the oldest first, and new ones are let in while there is room.

When the cache is full, the youngest running text loses its blocks and waits at the front, to be computed again: the
oldest always goes on, so that everyone ends. What would not fit into the empty cache the engine refuses beforehand.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor

from internlm.infer.blocks import Blocks
from internlm.infer.cache import Piece
from internlm.infer.grammar import Grammar
from internlm.infer.request import Chance, Checked
from internlm.infer.sample import History
from internlm.infer.stream import TextStream

_age = attrgetter("id", "index")


class Text:
    """One text in the making: the `index`-th answer to a request, with the seed of its random stream."""

    def __init__(self, id: int, index: int, request: Checked, seed: int) -> None:
        self.id, self.index, self.request, self.limit, self.seed = id, index, request, request.limit, seed
        self.tokens = list(request.tokens)
        self.prompt = len(self.tokens)
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.table: list[int] = []
        self.leader: Text | None = None
        """The first answer to the same request, whose prompt this one waits for."""
        self.since = time.monotonic()
        self.is_suspect = False
        """Whether a step with it failed: it runs alone until it has succeeded."""
        self.waited: float | None = None
        """Seconds until it ran first; None: it has not."""
        self.cached: int | None = None
        """Tokens of the prompt that were in the cache then."""
        self.told = False
        """Whether a delta went out."""
        self.prompt_chances: list[Chance] | None = [] if request.prompt_logprobs is not None else None
        # What it gets when it is admitted.
        self.turns: Tensor | None = None
        self.kind: object = None
        """Texts of one kind share blocks."""
        self.stream: TextStream | None = None
        self.history: History | None = None
        self.constraint: Grammar | None = None

    @property
    def deadline(self) -> float:
        """When its time is over."""
        return self.since + (self.request.timeout or float("inf"))

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt

    @property
    def rest(self) -> int:
        """Tokens to compute before the next can be drawn."""
        return len(self.tokens) - self.computed

    def piece(self, count: int, blocks: Blocks) -> Piece:
        """Return the stretch of so many tokens that comes next."""
        assert self.turns is not None, "a text gets its rotation when it is admitted"
        end = self.computed + count
        return Piece(self.tokens[self.computed : end], self.computed, self.table, blocks, self.turns)


@dataclass
class Counters:
    """What has happened since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those that were in the cache already."""
    written_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    failed_steps: int = 0


class Scheduler:
    """The waiting and the running.

    Args:
        blocks: of the cache.
        max_batch: most texts that run at once.
        max_step_tokens: most tokens of a step.
        admit: called with a text before it is let in for the first time; False: it failed, and removed the text.
    """

    def __init__(self, blocks: Blocks, max_batch: int, max_step_tokens: int, admit: Callable[[Text], bool]) -> None:
        self.blocks, self.max_batch, self.max_step_tokens = blocks, max_batch, max_step_tokens
        self.waiting: list[Text] = []
        self.running: list[Text] = []
        """The oldest first, as in `waiting`."""
        self.counters = Counters()
        self._admit = admit

    def __iter__(self) -> Iterator[Text]:
        yield from self.running
        yield from self.waiting

    def add(self, text: Text) -> None:
        """Put a new text at the end of the queue."""
        self.waiting.append(text)

    def remove(self, text: Text) -> None:
        """Let a text out, wherever it is."""
        if text in self.running:
            self.running.remove(text)
        elif text in self.waiting:
            self.waiting.remove(text)
        self._release(text)
        for other in self.waiting if text.request.n > 1 else ():
            if other.leader is text:
                other.leader = None  # nobody waits for one that is gone

    def plan(self) -> list[tuple[Text, int]]:
        """Return what the next step computes, with its blocks taken; empty only when nobody waits or runs."""
        suspect = next((text for text in self if text.is_suspect), None)
        if suspect is not None:
            return self._alone(suspect)
        plan: list[tuple[Text, int]] = []
        budget = self.max_step_tokens
        writing_first = sorted(self.running, key=lambda s: s.rest > 1)  # stable: the oldest first in both parts
        for text in writing_first:
            if text not in self.running or budget == 0:
                continue
            count = min(text.rest, budget)
            if self._make_room(text, count, plan):
                plan.append((text, count))
                budget -= count
        while budget and self.waiting and len(self.running) < self.max_batch:
            text = self.waiting[0]
            leader = text.leader
            if leader is not None and not leader.written and leader.computed < leader.prompt:
                break
            if text.turns is None and not self._admit(text):
                continue
            count = self._let_in(text, budget)
            if not count:
                break
            plan.append((text, count))
            budget -= count
        self.counters.steps += 1
        return plan

    def done(self, text: Text, count: int) -> None:
        """Note that tokens of a text are computed."""
        size = self.blocks.size
        filled = (text.computed + count) // size > text.computed // size
        text.computed += count
        if not text.rest:
            text.is_suspect = False
        if filled:
            self.blocks.publish(text.table, text.tokens, text.computed, text.kind)

    def undo(self, texts: list[Text], *, suspect: bool) -> None:
        """Take texts out of the cache, to be computed again."""
        for text in texts:
            if text in self.running:
                self.running.remove(text)
                insort(self.waiting, text, key=_age)
            self._release(text)
            text.is_suspect = suspect

    def _alone(self, text: Text) -> list[tuple[Text, int]]:
        """Return a plan of one text."""
        budget = self.max_step_tokens
        if text in self.running:
            count = min(text.rest, budget)
            return [(text, count)] if self._make_room(text, count, []) else []
        while not (count := self._let_in(text, budget)):
            assert self.running, "one text fits into the empty cache"
            self._preempt(self.running[-1])
        return [(text, count)]

    def _let_in(self, text: Text, budget: int) -> int:
        """Move one of the waiting line to the running; return how many of its tokens are computed, 0: no room."""
        # Every token of a prompt whose probabilities are asked for has to be computed.
        scored = text.prompt_chances is not None and len(text.prompt_chances) < text.prompt - 1
        table = [] if scored else self.blocks.match(text.tokens, text.kind)
        computed = len(table) * self.blocks.size
        # All of a prompt must find room, not its first chunk only: it would be taken back at once.
        needed = self.blocks.needed(len(text.tokens)) - len(table)
        most = self.blocks.needed(text.prompt + text.limit) - len(table)
        more = self.blocks.take(needed, table[-1] if table else None, hint=most)
        if more is None:
            self.blocks.release(table)
            return 0
        self.waiting.remove(text)
        insort(self.running, text, key=_age)
        text.table, text.computed = [*table, *more], computed
        if text.waited is None:
            text.cached, text.waited = computed, time.monotonic() - text.since
            self.counters.prompt_tokens += text.prompt
            self.counters.cached_tokens += computed
        return min(text.rest, budget)

    def _make_room(self, text: Text, count: int, plan: list[tuple[Text, int]]) -> bool:
        """Take the blocks that a running text needs for so many more tokens; False where it had to leave itself."""
        needed = self.blocks.needed(text.computed + count) - len(text.table)
        if needed <= 0:
            return True
        while (more := self.blocks.take(needed, text.table[-1])) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            plan[:] = [entry for entry in plan if entry[0] is not youngest]
            if youngest is text:
                return False
        text.table += more
        return True

    def _preempt(self, text: Text) -> None:
        self.counters.preemptions += 1
        self.undo([text], suspect=False)

    def _release(self, text: Text) -> None:
        self.blocks.release(text.table)
        text.table, text.computed = [], 0
