"""One engine for chat, serving, evaluation and rollouts: continuous batching, one token per running request and step.

    engine = Engine.from_folder("export/")
    for delta in engine.stream(Request(tokens=ids, temperature=0, stop_ids=(2,))):
        print(delta.text, end="")

    engine.add(request) → id        engine.step() → deltas        engine.abort(id)        engine.score(tokens)

Requests wait in order, enter and leave between two steps, and do not see each other: an answer depends on its request
and seed alone (up to the rounding of matrix products of different batch sizes). Prompts are run one by one, exactly;
running requests decode together.

Limits: one thread (call it from one place); a prompt is run in one piece; the memory for keys and values is bounded by
`max_batch` and `max_length` only.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internlm.errors import EngineError
from internlm.infer.cache import Cache
from internlm.infer.sample import NOT_FINITE, Rules, choose
from internlm.infer.stream import TextStream
from internlm.model.transformer import Transformer
from internlm.text.tokenizer import Tokenizer
from internlm.weights import transformers
from internlm.weights.load import empty, fill

logger = logging.getLogger(__name__)

Finished = Literal["stop", "length", "abort", "error"]
"""Why an answer ended: a stop token or string came, the length was reached, it was aborted, or the model's numbers were
not finite."""


@dataclass(frozen=True)
class Request:
    """What is asked of the engine."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    max_tokens: int = 256
    """Most tokens to write; less where the context ends before."""
    temperature: float = 1.0
    """0 takes the most probable token. This and the next four: see `Rules`."""
    top_p: float = 1.0
    """Probability that the tokens kept have together."""
    top_k: int = 0
    """Number of tokens kept; 0: all."""
    min_p: float = 0.0
    """Least share of the best token's probability."""
    repetition_penalty: float = 1.0
    """Over 1 makes tokens that were there before less likely."""
    seed: int | None = None
    """Of the random stream; the same seed gives the same answer. None: from the engine's seed and the request's id."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer. They are among the tokens of the result and never in its text."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    continuation: bool = False
    """Whether the answer goes on with the prompt's text instead of beginning one of its own (see `TextStream`)."""

    @property
    def rules(self) -> Rules:
        """How its tokens are chosen."""
        return Rules(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty)


@dataclass(frozen=True)
class Delta:
    """What a step adds to an answer. Text may come later than its tokens (see `TextStream`)."""

    id: int
    tokens: list[int]
    text: str
    finished: Finished | None = None
    """Set in the last delta of a request."""


@dataclass(frozen=True)
class Result:
    """A whole answer."""

    id: int
    tokens: list[int]
    """With the stop token, if one ended it."""
    text: str
    finished: Finished


class _Running:
    """A request that is being served."""

    def __init__(self, id_: int, request: Request, limit: int, seed: int, engine: Engine) -> None:
        self.id, self.request, self.limit = id_, request, limit
        self.rules = request.rules
        self.written: list[int] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.stream: TextStream | None = None
        if engine.tokenizer is not None:
            self.stream = TextStream(engine.tokenizer, request.stop_strings, continuation=request.continuation)
        self.seen: Tensor | None = None
        if request.repetition_penalty != 1:
            self.seen = torch.zeros(engine.model.config.vocab_size, dtype=torch.bool, device=engine.device)
            self.seen[list(request.tokens)] = True

    @property
    def stored(self) -> int:
        """Tokens whose keys are in the cache: all but the newest."""
        return len(self.request.tokens) + len(self.written) - 1

    def draw(self) -> float:
        """Return the next number of the request's random stream."""
        if self.rules.temperature == 0:
            return 0.0
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def take(self, token: int) -> Delta:
        """Add a token and return what that means."""
        if token == NOT_FINITE:
            return self.end("error")
        self.written.append(token)
        if self.seen is not None:
            self.seen[token] = True
        is_stop = token in self.request.stop_ids
        text = self.stream.add([token]) if self.stream is not None and not is_stop else ""
        finished: Finished | None = None
        if is_stop or (self.stream is not None and self.stream.stopped):
            finished = "stop"
        elif len(self.written) >= self.limit:
            finished = "length"
        if finished and self.stream is not None:
            text += self.stream.finish()
        return Delta(self.id, [token], text, finished)

    def end(self, why: Finished) -> Delta:
        """Return the last delta of an answer that ends without a further token."""
        return Delta(self.id, [], self.stream.finish() if self.stream is not None else "", why)


class Engine:
    """Serves requests with a model.

    Args:
        model: its weights are shared, not copied, until `load` gives the engine its own; the module is left as it is.
        tokenizer: for text in deltas and stop strings; None: tokens only.
        max_batch: most requests that run at once.
        max_length: most tokens of prompt and answer together; None: the model's context.
        seed: for requests without one.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 16,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_length", max_length)):
            if value is not None and value < 1:
                raise EngineError("must be at least 1", where=name, got=value)
        self.tokenizer, self.max_batch, self.seed = tokenizer, max_batch, seed
        self.max_length = max_length or model.config.context_length
        self._use(empty(model.config), model.named_parameters())
        self._owns_weights = False
        self._next_id = 0
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._inboxes: dict[int, list[Delta]] = {}
        self._unclaimed: list[Delta] = []

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        max_batch: int = 16,
        max_length: int | None = None,
        seed: int = 0,
    ) -> Engine:
        """Return an engine for a Transformers folder, with its tokenizer where there is one.

        Args:
            folder: config.json, safetensors, tokenizer.json.
            dtype: of the weights; None: as stored.
            device: where it runs.
            max_batch, max_length, seed: as of the class.
        """
        model = transformers.load(folder, dtype=dtype, device=device)
        return cls(model, Tokenizer.find(folder), max_batch=max_batch, max_length=max_length, seed=seed)

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
        if self._running or self._waiting:
            raise EngineError("weights cannot change under running requests", do="Finish or abort them first.")
        if not self._owns_weights:
            own = ((name, torch.empty_like(shared)) for name, shared in self.model.named_parameters())
            self._use(empty(self.model.config), own)
            self._owns_weights = True
        fill(self.model, tensors)

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            EngineError: the request cannot be served; nothing was queued.
        """
        limit = self._check(request)
        id_, self._next_id = self._next_id, self._next_id + 1
        seed = request.seed if request.seed is not None else ((self.seed << 32) + id_) % 2**63
        self._waiting.append(_Running(id_, request, limit, seed, self))
        return id_

    def abort(self, id: int) -> None:
        """Stop a request; its last delta says "abort". One that has finished, or never was, is left alone."""
        for waiting in self._waiting:
            if waiting.id == id:
                self._waiting.remove(waiting)
                self._deliver(Delta(id, [], "", "abort"))
                return
        for slot, running in enumerate(self._running):
            if running.id == id:
                self._leave(slot)
                self._deliver(running.end("abort"))
                return

    @property
    def is_busy(self) -> bool:
        """Whether requests wait or run, or deltas have not been fetched."""
        return bool(self._running or self._waiting or self._unclaimed)

    def step(self) -> list[Delta]:
        """Advance every running request by one token, let waiting ones in, and return what is new.

        Deltas of requests that `stream` or `generate` watch go to those.
        """
        self._advance()
        deltas, self._unclaimed = self._unclaimed, []
        return deltas

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Return the log-probability of each token after the first, in nats, fp32 [T − 1].

        Raises:
            EngineError: fewer than two tokens, more than `max_length`, or ids outside the vocabulary.
        """
        if len(tokens) < 2:
            raise EngineError("scoring needs at least two tokens", got=len(tokens))
        self._check_tokens(tokens, self.max_length)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.device)
            return self.model.head(self.cache.score(ids)[:, :-1], ids[:, 1:]).logp[0]

    def stream(self, request: Request) -> Generator[Delta]:
        """Yield the deltas of one request; leaving early aborts it. Other requests go on meanwhile."""
        id_ = self.add(request)
        inbox = self._inboxes[id_] = []
        try:
            while True:
                while not inbox:
                    self._advance()
                delta = inbox.pop(0)
                yield delta
                if delta.finished:
                    return
        finally:
            self.abort(id_)
            del self._inboxes[id_]

    def generate(self, requests: Sequence[Request | Sequence[int]], **settings: Any) -> list[Result]:
        """Return the whole answer of each request, in their order.

        Args:
            requests: requests, or prompts as lists of ids.
            settings: fields of `Request`, for the prompts.
        """
        wanted = [r if isinstance(r, Request) else Request(tokens=r, **settings) for r in requests]
        for request in wanted:
            self._check(request)  # all of them, before anything runs
        ids = [self.add(request) for request in wanted]
        inboxes = {id_: self._inboxes.setdefault(id_, []) for id_ in ids}
        try:
            while any(not inbox or not inbox[-1].finished for inbox in inboxes.values()):
                self._advance()
        finally:
            for id_ in ids:
                self.abort(id_)
                del self._inboxes[id_]
        return [_join(id_, inboxes[id_]) for id_ in ids]

    def _advance(self) -> None:
        """Take one step; one that fails ends the running requests, and nothing of what it stored stays."""
        try:
            self._step()
        except BaseException:
            while self._running:
                self._deliver(Delta(self._running.pop().id, [], "", "abort"))
            self.cache.clear()
            raise

    @torch.inference_mode()
    def _step(self) -> None:
        """Decode, let in, sample, deliver, let out."""
        hidden = []
        if self._running:
            newest = torch.tensor([running.written[-1] for running in self._running], device=self.device)
            hidden.append(self.cache.decode(newest, [running.stored for running in self._running])[:, 0])
        while self._waiting and len(self._running) < self.max_batch:
            entering = self._waiting.popleft()
            slot, prompt = len(self._running), list(entering.request.tokens)
            self._running.append(entering)  # before its prompt is run: a failure there must end it too
            self.cache.admit(slot, len(prompt) + entering.limit)
            hidden.append(self.cache.prefill(slot, torch.tensor([prompt], device=self.device))[:, -1])
        if not hidden:
            return
        logits = self.model.head.logits(torch.cat(hidden))  # [B, V], rows as in self._running
        if self.tokenizer is not None:
            logits[:, self.tokenizer.vocab_size :] = float("-inf")  # a padded vocabulary: ids without a token
        draws = torch.tensor([running.draw() for running in self._running], dtype=torch.float64, device=self.device)
        seen = [running.seen for running in self._running]
        chosen = choose(logits, [running.rules for running in self._running], draws, seen).tolist()
        deltas = [running.take(token) for running, token in zip(self._running, chosen, strict=True)]
        for delta in deltas:
            self._deliver(delta)
        for slot in reversed(range(len(deltas))):
            if deltas[slot].finished == "error":
                logger.warning("warning: request %d ended: the model gives logits that are not finite", deltas[slot].id)
                self.cache.wipe(slot)
            if deltas[slot].finished:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        """Free a slot; the last one moves into its place, so that the running ones stay together."""
        last = self._running.pop()
        if slot < len(self._running):
            self._running[slot] = last
            with torch.inference_mode():
                self.cache.move(len(self._running), slot, last.stored)

    def _deliver(self, delta: Delta) -> None:
        self._inboxes.get(delta.id, self._unclaimed).append(delta)

    def _use(self, model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Make `model`, filled with `tensors`, the engine's own."""
        fill(model, tensors)
        self.model = model.requires_grad_(False)
        self.cache = Cache(self.model, self.max_batch, self.max_length)

    def _check(self, request: Request) -> int:
        """Return how many tokens the request may write.

        Raises:
            EngineError: the request cannot be served.
        """
        request.rules.check()
        if request.max_tokens < 1:
            raise EngineError("must be at least 1", where="max_tokens", got=request.max_tokens)
        if request.seed is not None and not 0 <= request.seed < 2**63:
            raise EngineError("is out of range", where="seed", got=request.seed, allowed=["0 to 2**63 - 1"])
        if request.stop_strings and (self.tokenizer is None or "" in request.stop_strings):
            problem = "need a tokenizer" if self.tokenizer is None else "cannot be empty"
            raise EngineError(problem, where="stop_strings", got=request.stop_strings)
        self._check_tokens(request.tokens, self.max_length - 1)
        return min(request.max_tokens, self.max_length - len(request.tokens))

    def _check_tokens(self, tokens: Sequence[int], most: int) -> None:
        vocab = self.model.config.vocab_size
        if not len(tokens):
            raise EngineError("the prompt is empty", do="Begin with bos, if there is nothing else.")
        if len(tokens) > most:
            raise EngineError(
                f"{len(tokens)} tokens are too many: with the answer there is room for {self.max_length}",
                do="Shorten the text, or raise max_length.",
            )
        if not (min(tokens) >= 0 and max(tokens) < vocab):
            wrong = next(id_ for id_ in tokens if not 0 <= id_ < vocab)
            raise EngineError("this id is outside the vocabulary", got=wrong, allowed=[f"0 to {vocab - 1}"])


def _join(id_: int, deltas: list[Delta]) -> Result:
    """Return the whole answer."""
    finished = deltas[-1].finished
    assert finished is not None, "the last delta of an answer says why it ended"
    text = "".join(delta.text for delta in deltas)
    return Result(id_, [token for delta in deltas for token in delta.tokens], text, finished)
