"""One engine for chat, serving, evaluation and rollouts: continuous batching over a cache in blocks.

    engine = Engine.from_folder("export/")
    for delta in engine.stream(Request(tokens=ids, temperature=0, stop_ids=(2,))):
        print(delta.text, end="")

    engine.add(request) → id        engine.step() → deltas        engine.abort(id)        engine.score(tokens)

Requests wait in order, enter and leave between two steps, and do not see each other: an answer depends on its request
and seed alone (up to the rounding of matrix products of different batch sizes). What goes wrong with a request ends
that one: a step that fails is taken back, and those who were in it run alone until they succeed or have failed alone.

Limits: one thread (`Worker` brings others to it).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm import runtime
from internlm.errors import EngineError
from internlm.infer.blocks import Blocks
from internlm.infer.cache import Cache
from internlm.infer.request import Chance, Delta, Finished, Request, Result
from internlm.infer.runner import Runner
from internlm.infer.sample import History
from internlm.infer.schedule import Counters, Scheduler, Sequence, rules_of
from internlm.infer.stream import TextStream
from internlm.model import quant
from internlm.model.quant import Kind
from internlm.model.transformer import Transformer
from internlm.text.tokenizer import Tokenizer
from internlm.weights import transformers
from internlm.weights.load import empty, fill

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 4 * 2**30
_CPU_CACHE_SHARE = 0.25
_GPU_CACHE_SHARE = 0.9
_MOST_TOP = 100
_STREAM_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of a request's answers."""


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on at once."""

    batch: int = 16
    """Most sequences that run at once."""
    length: int | None = None
    """Most tokens of prompt and answer together; None: the model's context."""
    cache_tokens: int | None = None
    """Tokens whose keys and values fit into the cache. None: on a CPU 4 GiB or a quarter of the free memory, on a GPU
    nine tenths of what is left; never more than `batch` + 1 texts of full length need."""
    block: int = 32
    """Tokens of a block: what is shared is shared in whole blocks."""
    step_tokens: int = 256
    """Most tokens of a step: a longer prompt is computed in chunks, and those who write go on between them."""
    share: bool = True
    """Whether texts that begin alike share blocks."""


@dataclass(frozen=True)
class Stats:
    """How the engine is doing."""

    running: int
    waiting: int
    blocks: int
    """Of the cache."""
    blocks_used: int
    """By the running."""
    counters: Counters
    """Since the start."""


class Engine:
    """Serves requests with a model.

    Args:
        model: its weights are shared, not copied, until `load` gives the engine its own; the module is left as it is.
        tokenizer: for text in deltas and stop strings; None: tokens only.
        limits: how much it takes on at once.
        pack: form of the linear layers on a CPU (`model.quant`): "fp32" is exact ("split" too, for one text at a
            time), "fp16" and "int8" are faster and round the weights. The packed weights are the engine's own; the
            model's are let go. None: as they are.
        seed: for requests without one.

    Raises:
        EngineError: a limit is out of range, the cache has no room for one text of `limits.length`, or the layers
            cannot be packed.
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
        self.limits = limits or Limits()
        for name in ("batch", "length", "cache_tokens", "block", "step_tokens"):
            value = getattr(self.limits, name)
            if value is not None and value < 1:
                raise EngineError("must be at least 1", where=name, got=value)
        self._inboxes: dict[int, list[Delta]] = {}
        self._unclaimed: list[Delta] = []
        self._next_id = 0
        self._use(empty(model.config), model.named_parameters())
        self._owns_weights = False

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        limits: Limits | None = None,
        pack: Kind | None = None,
        seed: int = 0,
    ) -> Engine:
        """Return an engine for a Transformers folder, with its tokenizer where there is one.

        Args:
            folder: config.json, safetensors, tokenizer.json.
            dtype: of the weights; None: as stored.
            device: where it runs.
            limits, pack, seed: as of the class.
        """
        model = transformers.load(folder, dtype=dtype, device=device)
        return cls(model, Tokenizer.find(folder), limits, pack=pack, seed=seed)

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self.model.embedding.weight.device

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy other weights into the engine's own model, one tensor at a time, such as after a policy update.

        Raises:
            EngineError: requests are being served.
            WeightsError: the stream does not fit the model; the engine is then not usable until a good one is loaded.
        """
        if self.scheduler.running or self.scheduler.waiting:
            raise EngineError("weights cannot change under running requests", do="Finish or abort them first.")
        if self.pack is not None:  # packed anew, from a copy
            device = self.device
            self._use(empty(self.model.config), ((name, tensor.to(device, copy=True)) for name, tensor in tensors))
            return
        if not self._owns_weights:
            own = ((name, torch.empty_like(shared)) for name, shared in self.model.named_parameters())
            self._use(empty(self.model.config), own)
            self._owns_weights = True
        self.blocks.forget()
        fill(self.model, tensors)

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            EngineError: the request cannot be served; nothing was queued.
        """
        limit = self.check(request)
        id_, self._next_id = self._next_id, self._next_id + 1
        seed = request.seed if request.seed is not None else ((self.seed << 32) + id_) % 2**63
        leader: Sequence | None = None
        for index in range(request.n):
            sequence = Sequence(id_, index, request, limit, (seed + index * _STREAM_STEP) % 2**64)
            if request.timeout is not None:
                sequence.deadline = time.monotonic() + request.timeout
            sequence.leader = leader
            leader = leader or sequence
            self.scheduler.add(sequence)
        return id_

    def abort(self, id: int) -> None:
        """Stop a request; its last deltas say "abort". One that has finished, or never was, is left alone."""
        for sequence in [s for s in self.scheduler if s.id == id]:
            self._end(sequence, "abort")

    @property
    def is_busy(self) -> bool:
        """Whether requests wait or run, or deltas have not been fetched."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._unclaimed)

    @property
    def stats(self) -> Stats:
        """How the engine is doing."""
        scheduler = self.scheduler
        used = self.blocks.count - self.blocks.free
        counters = replace(scheduler.counters)
        return Stats(len(scheduler.running), len(scheduler.waiting), self.blocks.count, used, counters)

    def step(self) -> list[Delta]:
        """Compute one step for everyone who fits into it, and return what is new.

        Deltas of requests that `stream` or `generate` watch go to those.
        """
        self._advance()
        deltas, self._unclaimed = self._unclaimed, []
        return deltas

    def score(self, tokens: Ordered[int]) -> Tensor:
        """Return the log-probability of each token after the first, in nats, fp32 [T − 1].

        Raises:
            EngineError: fewer than two tokens, more than the engine's length, or ids outside the vocabulary; or the
                model's numbers are not finite.
        """
        if len(tokens) < 2:
            raise EngineError("scoring needs at least two tokens", got=len(tokens))
        (result,) = self.generate([Request(tokens=tokens, max_tokens=0, prompt_logprobs=0)])
        if result.prompt_logprobs is None or result.finished == "error":
            raise EngineError(result.problem or "the text could not be scored")
        return torch.tensor([chance.logprob for chance in result.prompt_logprobs])

    def stream(self, request: Request) -> Generator[Delta]:
        """Yield the deltas of one request; leaving early aborts it. Other requests go on meanwhile."""
        id_ = self.add(request)
        inbox = self._inboxes[id_] = []
        left = request.n
        try:
            while left:
                while not inbox:
                    self._advance()
                delta = inbox.pop(0)
                left -= delta.finished is not None
                yield delta
        finally:
            self.abort(id_)
            del self._inboxes[id_]

    def generate(self, requests: Ordered[Request | Ordered[int]], **settings: Any) -> list[Result]:
        """Return the whole answers of each request, in their order.

        Args:
            requests: requests, or prompts as lists of ids.
            settings: fields of `Request`, for the prompts.
        """
        wanted = [r if isinstance(r, Request) else Request(tokens=r, **settings) for r in requests]
        for request in wanted:
            self.check(request)  # all of them, before anything runs
        ids = [self.add(request) for request in wanted]
        inboxes = {id_: self._inboxes.setdefault(id_, []) for id_ in ids}
        try:
            while any(s.id in inboxes for s in self.scheduler):
                self._advance()
        finally:
            for id_ in ids:
                self.abort(id_)
                del self._inboxes[id_]
        return [
            _join([delta for delta in inboxes[id_] if delta.index == index])
            for id_, request in zip(ids, wanted, strict=True)
            for index in range(request.n)
        ]

    def check(self, request: Request) -> int:
        """Return how many tokens an answer may have. Any thread may ask.

        Raises:
            EngineError: the request cannot be served.
        """
        vocab = self.model.config.vocab_size
        rules_of(request).check()
        for name, good, allowed in (
            ("max_tokens", request.max_tokens >= (0 if request.prompt_logprobs is not None else 1), "1 or more"),
            ("n", 1 <= request.n <= 128, "1 to 128"),
            ("seed", request.seed is None or 0 <= request.seed < 2**63, "0 to 2**63 - 1"),
            ("min_tokens", request.min_tokens >= 0, "0 or more"),
            ("logprobs", request.logprobs is None or 0 <= request.logprobs <= _MOST_TOP, f"0 to {_MOST_TOP}"),
            (
                "prompt_logprobs",
                request.prompt_logprobs is None or 0 <= request.prompt_logprobs <= _MOST_TOP,
                f"0 to {_MOST_TOP}",
            ),
            ("timeout", request.timeout is None or request.timeout > 0, "over 0"),
        ):
            if not good:
                raise EngineError("is out of range", where=name, got=getattr(request, name), allowed=[allowed])
        for id_, bias in request.logit_bias.items():
            if not 0 <= id_ < vocab:
                raise EngineError("this id is outside the vocabulary", where="logit_bias", got=id_)
            if not -100 <= bias <= 100:
                raise EngineError("is out of range", where="logit_bias", got=bias, allowed=["-100 to 100"])
        if request.stop_strings and (self.tokenizer is None or "" in request.stop_strings):
            problem = "need a tokenizer" if self.tokenizer is None else "cannot be empty"
            raise EngineError(problem, where="stop_strings", got=request.stop_strings)
        return self._check_length(request)

    def _check_length(self, request: Request) -> int:
        tokens, vocab = request.tokens, self.model.config.vocab_size
        if not len(tokens):
            raise EngineError("the prompt is empty", where="tokens", do="Begin with bos, if there is nothing else.")
        if len(tokens) > self.length - (request.max_tokens > 0):
            raise EngineError(
                f"{len(tokens)} tokens are too many: with the answer there is room for {self.length}",
                where="tokens",
                do="Shorten the text, or give the engine a greater length.",
            )
        if not (min(tokens) >= 0 and max(tokens) < vocab):
            wrong = next(id_ for id_ in tokens if not 0 <= id_ < vocab)
            problem = "this id is outside the vocabulary"
            raise EngineError(problem, where="tokens", got=wrong, allowed=[f"0 to {vocab - 1}"])
        return min(request.max_tokens, self.length - len(tokens))

    def _advance(self) -> None:
        """Take one step; when it fails, only who makes it fail pays."""
        now = time.monotonic()
        for sequence in [s for s in self.scheduler if s.deadline is not None and now > s.deadline]:
            self._end(sequence, "timeout")
        plan = self.scheduler.plan()
        if not plan:
            return
        try:
            self._compute(plan)
        except Exception as error:
            self.scheduler.counters.failed_steps += 1
            taking_part = [sequence for sequence, _ in plan if sequence in self.scheduler.running]
            if len(plan) > 1:
                self.scheduler.undo(taking_part, suspect=True)
                return
            logger.warning("warning: request %d failed: %s: %s", plan[0][0].id, type(error).__name__, error)
            for sequence in taking_part:
                self._end(sequence, "error", f"{type(error).__name__}: {error}")
        except BaseException:  # Ctrl-C: what was half done is done again
            self.scheduler.undo([sequence for sequence, _ in plan], suspect=False)
            raise

    def _compute(self, plan: list[tuple[Sequence, int]]) -> None:
        """Run the model, deliver, let out."""
        outcomes = self.runner.run(plan)
        for sequence, count in plan:
            self.scheduler.done(sequence, count)
        for outcome in outcomes:
            if outcome.problem is not None:
                self.blocks.disown(outcome.sequence.table)
                logger.warning("warning: request %d ended: %s", outcome.sequence.id, outcome.problem)
                self._end(outcome.sequence, "error", outcome.problem)
            elif outcome.token is None:
                self._end(outcome.sequence, "length")
            else:
                self._take(outcome.sequence, outcome.token, outcome.chance)

    def _take(self, sequence: Sequence, token: int, chance: Chance | None) -> None:
        """Add a token to an answer, and deliver what that means."""
        request = sequence.request
        finished: Finished | None = None
        text = ""
        try:
            sequence.tokens.append(token)
            if sequence.history is not None:
                sequence.history.add(token)
            if token in request.stop_ids:
                finished = "stop"
            else:
                if sequence.stream is not None:
                    text = sequence.stream.add([token])
                    finished = "stop" if sequence.stream.stopped else None
                if sequence.constraint is not None:
                    sequence.constraint.accept(token)
                    if sequence.constraint.is_complete:
                        finished = "stop"
            if finished is None and sequence.written >= sequence.limit:
                finished = "length"
            if finished and sequence.stream is not None:
                text += sequence.stream.finish()
        except Exception as error:
            logger.warning("warning: request %d failed: %s: %s", sequence.id, type(error).__name__, error)
            self._end(sequence, "error", f"{type(error).__name__}: {error}")
            return
        self.scheduler.counters.written_tokens += 1
        delta = Delta(sequence.id, [token], text, finished, sequence.index)
        self._deliver(sequence, delta if chance is None else replace(delta, logprobs=[chance]))
        if finished:
            self.scheduler.remove(sequence)

    def _end(self, sequence: Sequence, why: Finished, problem: str | None = None) -> None:
        """Let a sequence out without a further token."""
        text = ""
        if sequence.stream is not None and why != "error":
            text = sequence.stream.finish()
        self.scheduler.remove(sequence)
        self._deliver(sequence, Delta(sequence.id, [], text, why, sequence.index, problem=problem))

    def _deliver(self, sequence: Sequence, delta: Delta) -> None:
        if not sequence.told:
            sequence.told = True
            delta = replace(delta, cached=sequence.cached, prompt_logprobs=sequence.prompt_chances)
        self._inboxes.get(delta.id, self._unclaimed).append(delta)

    def _admit(self, sequence: Sequence) -> None:
        """Give a sequence what it needs to run."""
        request = sequence.request
        length = sequence.prompt + sequence.limit
        sequence.turns = self.cache.turns(length)
        # Beyond the trained length, dynamic scaling turns each length's keys differently.
        rope = self.model.config.rope
        sequence.kind = None if bool((sequence.turns == self._plain_turns).all()) else (rope, length)
        if self.tokenizer is not None:
            sequence.stream = TextStream(
                self.tokenizer,
                request.stop_strings,
                continuation=request.continuation,
                include_stop=request.include_stop,
                show_special=request.show_special,
            )
        sequence.history = History(
            sequence.rules, request.tokens, self.model.config.vocab_size, self.device, request.logit_bias
        )
        if request.grammar is not None:
            sequence.constraint = request.grammar.start()

    def _use(self, model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Make `model`, filled with `tensors`, the engine's own."""
        fill(model, tensors)
        self.model = model.requires_grad_(False)
        if self.pack is not None:
            quant.pack(self.model, self.pack)
        limits = self.limits
        context = limits.length or model.config.context_length
        tokens = limits.cache_tokens or _cache_tokens(model, (limits.batch + 1) * (context + limits.block))
        fitting = tokens // limits.block * limits.block
        self.length = context
        """Most tokens of prompt and answer together."""
        if fitting < context:
            per_token = Cache.bytes_per_token(model)
            problem = (
                f"the cache has room for {fitting} tokens of {per_token} bytes each, and a text may have {context}"
            )
            if limits.length is not None or not fitting:
                raise EngineError(problem, do="Give it more memory (cache_tokens), or a smaller length.")
            logger.warning("warning: %s: longer ones are refused", problem)
            self.length = fitting
        self.blocks = Blocks(fitting // limits.block, limits.block, share=limits.share)
        self.scheduler = Scheduler(self.blocks, limits.batch, limits.step_tokens, self._admit)
        self.cache = Cache(self.model, fitting)
        words = None if self.tokenizer is None else self.tokenizer.vocab_size
        self.runner = Runner(self.model, self.cache, self.blocks, words)
        self._plain_turns = self.cache.turns(1)


def _cache_tokens(model: Transformer, most: int) -> int:
    """Return how many tokens the cache shall hold by the memory that is free, `most` at most."""
    weight = model.embedding.weight
    if weight.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(weight.device)
        room = free - (1 - _GPU_CACHE_SHARE) * total
    else:
        room = min(_CPU_CACHE_BYTES, _CPU_CACHE_SHARE * runtime.available_memory())
    return min(most, max(int(room) // Cache.bytes_per_token(model), 0))


def _join(deltas: list[Delta]) -> Result:
    """Return the whole answer."""
    first, last = deltas[0], deltas[-1]
    assert last.finished is not None, "the last delta of an answer says why it ended"
    asked = any(delta.logprobs is not None for delta in deltas)
    return Result(
        id=last.id,
        tokens=[token for delta in deltas for token in delta.tokens],
        text="".join(delta.text for delta in deltas),
        finished=last.finished,
        index=last.index,
        logprobs=[chance for delta in deltas for chance in delta.logprobs or ()] if asked else None,
        prompt_logprobs=first.prompt_logprobs,
        problem=last.problem,
    )
