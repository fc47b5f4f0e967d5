"""One engine for chat, serving, evaluation and rollouts: continuous batching over a cache in blocks.

    engine = Engine.of(open_source("export/"))
    for delta in engine.stream(Request(tokens=ids, temperature=0, stop_ids=(2,))):
        print(delta.text, end="")

    engine.add(request) → id        engine.step() → deltas        engine.abort(id)        engine.score(tokens)

Requests wait in order, enter and leave between two steps, and do not see each other: an answer depends on its request
and seed alone (up to the rounding of matrix products of different batch sizes). What goes wrong with a request ends
that one: a step that fails is taken back, and those who were in it run alone until they succeed or have failed alone.
One thread; `Worker` brings others to it.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from internlm.errors import EngineError
from internlm.infer.blocks import Blocks
from internlm.infer.cache import Cache
from internlm.infer.limits import Limits as Limits  # of the engine's public face
from internlm.infer.limits import cache_tokens
from internlm.infer.paged import works_on
from internlm.infer.placement import Placement
from internlm.infer.request import Chance, Checked, Delta, Finished, Request, Result, TooLong
from internlm.infer.runner import Runner
from internlm.infer.sample import History
from internlm.infer.schedule import Counters, Scheduler, Text
from internlm.infer.stream import TextStream
from internlm.model import quant
from internlm.model.config import DynamicScaling
from internlm.model.quant import Kind
from internlm.model.transformer import Transformer, empty
from internlm.text.tokenizer import Tokenizer
from internlm.weights.load import fill

if TYPE_CHECKING:
    from internlm.source import Source

logger = logging.getLogger(__name__)

_STREAM_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Stats:
    """How the engine is doing: texts, blocks of the cache, and what has happened since the start."""

    running: int
    waiting: int
    blocks: int
    blocks_used: int
    counters: Counters


class Engine:
    """Serves requests with a model.

    Args:
        model: its weights are shared, not copied, until `load` gives the engine its own; the module is left as it is,
            but on a GPU some of its parameters become views of a larger tensor (`quant.lay_together`). One that was
            packed while it was read becomes the engine's.
        tokenizer: for text in deltas and stop strings; None: tokens only.
        limits: None: what suits the device.
        pack: form of the linear layers on a CPU (`model.quant`), which are then the engine's own; None: as they are.
        seed: for requests without one.

    Raises:
        EngineError: a limit is out of range or beyond memory, or the layers cannot be packed.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        limits: Limits | None = None,
        *,
        pack: Kind | None = None,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.pack, self.seed = tokenizer, pack, seed
        self.limits = limits or Limits.on(model.embedding.weight.device)
        self.limits.check()
        self._unclaimed: list[Delta] = []
        self.ids = itertools.count()
        """Of requests to come; any thread may take one."""
        self._next_deadline = float("inf")
        self._cache_tokens: int | None = None
        if model.head.packed is None:
            if model.embedding.weight.device.type == "cuda":
                quant.lay_together(model)
            own = empty(model.config)
            fill(own, model.named_parameters(), pack)
            self._use(own)
        elif pack is not None:
            self._use(model)
        else:
            raise EngineError("the model is packed", where="pack", do="Say which kind, for weights to come.")
        self._owns_weights = False

    @classmethod
    def of(
        cls,
        source: Source,
        place: Placement = Placement(),  # noqa: B008 (frozen)
        limits: Limits | None = None,
        *,
        seed: int = 0,
    ) -> Engine:
        """Return an engine for a model that was opened, with its tokenizer where there is one; see the class.

        Raises:
            WeightsError, StorageError: the weights do not fit, or are damaged.
            EngineError: as of the class.
        """
        limits = limits or Limits.on(place.device)
        limits.check_on(torch.device(place.device))  # now, not after the weights were read
        model = source.model(place.dtype, place.device, place.pack)
        return cls(model, source.talk.tokenizer, limits, pack=place.pack, seed=seed)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.embedding.weight.device

    def warm_up(self) -> None:
        """Make on a GPU what is otherwise made when it is first needed: the graphs of all batch sizes."""
        if self.runner.decoding is not None:
            self.runner.decoding.warm_up()

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy other weights into the engine's own model, one tensor at a time.

        Raises:
            EngineError: requests are being served.
            WeightsError: the stream does not fit the model; the engine is of no use until a good one is loaded.
        """
        if self.scheduler.running or self.scheduler.waiting:
            raise EngineError("weights cannot change under running requests", do="Finish or abort them first.")
        if self.pack is not None:  # packed anew, from a copy
            device = self.device
            self._renew((name, tensor.to(device, copy=True)) for name, tensor in tensors)
            return
        if not self._owns_weights:
            self._renew((name, torch.empty_like(shared)) for name, shared in self.model.named_parameters())
            self._owns_weights = True
        self.blocks.forget()
        fill(self.model, tensors)

    def add(self, request: Request, id: int | None = None) -> int:
        """Queue a request and return its id, which may be taken from `ids` beforehand; errors as of `check`."""
        checked = self.check(request)
        id_ = next(self.ids) if id is None else id
        seed = request.seed if request.seed is not None else ((self.seed << 32) + id_) % 2**63
        leader: Text | None = None
        for index in range(request.n):
            text = Text(id_, index, checked, (seed + index * _STREAM_STEP) % 2**64)
            self._next_deadline = min(self._next_deadline, text.deadline)
            text.leader = leader
            leader = leader or text
            self.scheduler.add(text)
        return id_

    def abort(self, *ids: int) -> None:
        """End requests with deltas that say "abort"; those that have ended, or never were, are left alone."""
        gone = set(ids)
        for text in [s for s in self.scheduler if s.id in gone]:
            self._end(text, "abort")

    @property
    def is_busy(self) -> bool:
        """Whether requests wait or run, or deltas have not been fetched."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._unclaimed)

    @property
    def stats(self) -> Stats:
        """How the engine is doing."""
        scheduler, blocks = self.scheduler, self.blocks
        counters = replace(scheduler.counters)
        return Stats(len(scheduler.running), len(scheduler.waiting), blocks.count, blocks.count - blocks.free, counters)

    def step(self) -> list[Delta]:
        """Compute one step and return what is new."""
        self._advance()
        deltas, self._unclaimed = self._unclaimed, []
        return deltas

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Return the log-probability of each token after the first, in nats, fp32 [T − 1].

        Raises:
            EngineError: there are fewer than two, the request cannot be served, or logits are not finite.
        """
        if len(tokens) < 2:
            raise EngineError("scoring needs at least two tokens", got=len(tokens))
        (result,) = self.generate([Request(tokens=tokens, max_tokens=0, prompt_logprobs=0)])
        if result.prompt_logprobs is None or result.finished == "error":
            raise EngineError(result.problem or "the text could not be scored")
        return torch.tensor([chance.logprob for chance in result.prompt_logprobs])

    def stream(self, request: Request) -> Generator[Delta]:
        """Yield the deltas of one request; leaving early aborts it. Other requests go on meanwhile."""
        id_, left = self.add(request), request.n
        try:
            while left:
                own = self._claim({id_})
                if not own:
                    self._advance()
                for delta in own:
                    left -= delta.finished is not None
                    yield delta
        finally:
            self.abort(id_)
            self._claim({id_})

    def generate(self, requests: Sequence[Request | Sequence[int]], **settings: Any) -> list[Result]:
        """Return the whole answers of each request, in their order; `settings` are the fields of those given as ids."""
        wanted = [r if isinstance(r, Request) else Request(tokens=r, **settings) for r in requests]
        ids = [self.add(request) for request in [*map(self.check, wanted)]]  # all are checked before anything runs
        answers: dict[tuple[int, int], list[Delta]] = {
            (id_, index): [] for id_, request in zip(ids, wanted, strict=True) for index in range(request.n)
        }
        try:
            while any((text.id, text.index) in answers for text in self.scheduler):
                self._advance()
        finally:
            self.abort(*ids)
            for delta in self._claim(set(ids)):
                answers[delta.id, delta.index].append(delta)
        return [Result.of(deltas) for deltas in answers.values()]

    def _claim(self, ids: Collection[int]) -> list[Delta]:
        """Return the deltas of these requests that nobody has fetched, and take them out."""
        own = [delta for delta in self._unclaimed if delta.id in ids]
        self._unclaimed = [delta for delta in self._unclaimed if delta.id not in ids]
        return own

    def check(self, request: Request) -> Checked:
        """Return the request as one that can be served, with a copy of its tokens. Any thread may ask.

        Raises:
            TooLong: the prompt leaves no room for an answer.
            EngineError: the request cannot be served.
        """
        if isinstance(request, Checked):
            return request
        request.check()
        if request.stop_strings and self.tokenizer is None:
            raise EngineError("need a tokenizer", where="stop_strings", got=request.stop_strings)
        tokens = tuple(request.tokens)
        if not tokens:
            raise EngineError("the prompt is empty", where="tokens", do="Begin with bos, if there is nothing else.")
        if len(tokens) > self.length - (request.max_tokens > 0):
            room = f"in the context there is room for {self.length}, the answer included"
            raise TooLong(f"{len(tokens)} tokens are too many: {room}", where="tokens", do="Shorten the prompt.")
        last = self.model.config.vocab_size - 1
        for where, ids in (("logit_bias", request.logit_bias), ("tokens", tokens)):
            if ids and not (min(ids) >= 0 and max(ids) <= last):
                wrong = next(id_ for id_ in ids if not 0 <= id_ <= last)
                problem = "this id is outside the vocabulary"
                raise EngineError(problem, where=where, got=wrong, allowed=[f"0 to {last}"])
        limit = min(request.max_tokens, self.length - len(tokens))
        return Checked(**{**vars(request), "tokens": tokens}, limit=limit)

    def room(self, prompt: int) -> int:
        """Return how many tokens an answer to a prompt of so many may have for which nobody gives a limit.

        With dynamic scaling that is up to the trained length, where the prompt leaves room there: all keys of a text
        are turned for the length it may come to, and one that might become longer is another from its first token on.
        """
        scaling = self.model.config.rope.scaling
        trained = scaling.original_length if isinstance(scaling, DynamicScaling) else self.length
        return max(1, (min(trained, self.length) if prompt < trained else self.length) - prompt)

    def _advance(self) -> None:
        """Take one step; when it fails, only who makes it fail pays."""
        now = time.monotonic()
        if now > self._next_deadline:
            for text in [s for s in self.scheduler if now > s.deadline]:
                self._end(text, "timeout")
            self._next_deadline = min((s.deadline for s in self.scheduler), default=float("inf"))
        plan = self.scheduler.plan()
        if not plan:
            return
        try:
            self._compute(plan)
        except Exception as error:
            self.scheduler.counters.failed_steps += 1
            taking_part = [text for text, _ in plan if text in self.scheduler.running]
            if len(plan) > 1:
                self.scheduler.undo(taking_part, suspect=True)
                return
            for text in taking_part:
                self._fail(text, error)
        except BaseException:  # Ctrl-C: what was half done is done again
            self.scheduler.undo([text for text, _ in plan], suspect=False)
            raise

    def _compute(self, plan: list[tuple[Text, int]]) -> None:
        outcomes = self.runner.run(plan)
        for text, count in plan:
            self.scheduler.done(text, count)
        for outcome in outcomes:
            if outcome.problem is not None:
                self.blocks.disown(outcome.text.table)
                self._fail(outcome.text, outcome.problem)
            elif outcome.token is None:
                self._end(outcome.text, "length")
            else:
                self._take(outcome.text, outcome.token, outcome.chance)

    def _take(self, text: Text, token: int, chance: Chance | None) -> None:
        """Add a token to an answer, and deliver what that means."""
        request = text.request
        finished: Finished | None = None
        said = ""
        try:
            text.tokens.append(token)
            if text.history is not None:
                text.history.add(token)
            if token in request.stop_ids:
                finished = "stop"
            else:
                if text.stream is not None:
                    said = text.stream.add(token)
                    finished = "stop" if text.stream.stopped else None
                if text.constraint is not None:
                    text.constraint.accept(token)
                    if text.constraint.is_complete:
                        finished = "stop"
            if finished is None and text.written >= text.limit:
                finished = "length"
            if finished and text.stream is not None:
                said += text.stream.finish()
        except Exception as error:
            self._fail(text, error)
            return
        self.scheduler.counters.written_tokens += 1
        self._deliver(text, Delta(text.id, [token], said, finished, text.index, [chance] if chance else None))

    def _end(self, text: Text, why: Finished, problem: str | None = None) -> None:
        """Let a text out without a further token."""
        said = ""
        if text.stream is not None and why != "error":
            said = text.stream.finish()
        self._deliver(text, Delta(text.id, [], said, why, text.index, problem=problem))

    def _fail(self, text: Text, problem: Exception | str) -> None:
        said = problem if isinstance(problem, str) else f"{type(problem).__name__}: {problem}"
        logger.warning("warning: request %d failed: %s", text.id, said)
        self._end(text, "error", said)

    def _deliver(self, text: Text, delta: Delta) -> None:
        if not text.told:
            text.told = True
            known = text.prompt_chances
            delta = replace(delta, cached=text.cached, waited=text.waited, prompt_logprobs=known)
        self._unclaimed.append(delta)
        if delta.finished:
            self.scheduler.remove(text)

    def _admit(self, text: Text) -> bool:
        """Give a text what it needs to run; return False where that fails and it ends."""
        request, config = text.request, self.model.config
        length = text.prompt + text.limit
        try:
            text.turns = self.cache.turns(length)
            # Beyond the trained length, dynamic scaling turns each length's keys differently.
            text.kind = None if text.turns is self.cache.turns(1) else length
            if self.tokenizer is not None:
                text.stream = TextStream(
                    self.tokenizer,
                    request.stop_strings,
                    continuation=request.continuation,
                    include_stop=request.include_stop,
                    show_special=request.show_special,
                )
            text.history = History(request, config.vocab_size, self.device)
            if request.grammar is not None:
                text.constraint = request.grammar.start()
        except Exception as error:  # a grammar is foreign code, and memory may be short
            self._fail(text, error)
            return False
        return True

    def _renew(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Begin anew with a model filled with `tensors`, and a cache as large as the last one."""
        model, counters = empty(self.model.config), self.scheduler.counters
        fill(model, tensors, self.pack)
        del self.model, self.cache, self.runner
        gc.collect()  # model and cache hold each other, and there may be no room for two of them
        self._use(model)
        self.scheduler.counters = counters

    def _use(self, model: Transformer) -> None:
        """Make `model` the engine's own, with a cache beside it."""
        self.model = model.requires_grad_(False)
        if self.device.type == "cuda":
            quant.join(self.model)
        limits = self.limits
        context = limits.length or model.config.context_length
        if self._cache_tokens is None:
            self._cache_tokens = cache_tokens(model, limits, context)
        fitting = self._cache_tokens // limits.block * limits.block
        self.length = context
        """Most tokens of prompt and answer together."""
        rounded = limits.cache == "int8"
        if fitting < context:
            room = f"{fitting} tokens of {Cache.bytes_per_token(model, rounded=rounded)} bytes each"
            problem = f"the cache has room for {room}, and a text may have {context}"
            if limits.length is not None or not fitting:
                raise EngineError(problem, where="length", do="Give the cache more memory, or texts a smaller length.")
            logger.warning("warning: %s: longer ones are refused", problem)
            self.length = fitting
        paged = works_on(self.device) if limits.paged is None else limits.paged
        self.blocks = Blocks(fitting // limits.block, limits.block, share=limits.share, grow=not paged)
        self.scheduler = Scheduler(self.blocks, limits.batch, limits.step_tokens, self._admit)
        self.cache = Cache(self.model, self.blocks, paged=paged, rounded=rounded)
        words = None if self.tokenizer is None else self.tokenizer.vocab_size
        self.runner = Runner(self.cache, words, limits.batch, self.length)
