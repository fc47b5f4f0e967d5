"""One step on the device: hidden states, logits, draws.

runner.run(plan) → [Outcome(text, token)], one for each text of which nothing is left to compute

A GPU is waited for once in a step, when the tokens are read (and again where probabilities are asked for).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.errors import EngineError
from internlm.infer.cache import Cache
from internlm.infer.decode import Decoding
from internlm.infer.request import Chance
from internlm.infer.sample import NOT_FINITE, chances, choose, draw
from internlm.infer.schedule import Text
from internlm.runtime import upload

_BROKEN = "the model gives logits that are not finite"


@dataclass(frozen=True)
class Outcome:
    """What comes of a text all of whose tokens are computed: the next one, unless none is asked for or possible."""

    text: Text
    token: int | None = None
    chance: Chance | None = None
    problem: str | None = None


class Runner:
    """Computes steps of up to `batch` texts of up to `length` tokens; ids from `words` on only pad the vocabulary."""

    def __init__(self, cache: Cache, words: int | None, batch: int, length: int) -> None:
        self.cache, self.words = cache, words
        self.decoding = Decoding(cache, self._logits, batch, length) if cache.paged else None

    @torch.inference_mode()
    def run(self, plan: list[tuple[Text, int]]) -> list[Outcome]:
        """Compute so many tokens of each text, and draw for those of which nothing is left."""
        pieces = [text.piece(count, self.cache.blocks) for text, count in plan]
        logits: Tensor | None = None
        if self.decoding is not None and all(count == 1 for _, count in plan):
            hidden, logits = self.decoding.run(pieces)
        else:
            hidden = self.cache.run(pieces)
        drawing: list[Text] = []
        places: list[int] = []
        outcomes: list[Outcome] = []
        row = 0
        for text, count in plan:
            self._score_prompt(text, hidden[row : row + count])
            row += count
            if text.rest == count:
                if text.limit:
                    drawing.append(text)
                    places.append(row - 1)
                else:
                    outcomes.append(Outcome(text))
        if drawing:
            if len(places) < row or logits is None:
                rows = upload(places, torch.int64, hidden.device)
                logits = self._logits(hidden[rows]) if logits is None else logits[rows]
            outcomes += self._draw(drawing, logits)
        return outcomes

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] in fp32; ids that only pad the vocabulary have none."""
        logits = self.cache.model.head.logits(hidden)
        if self.words is not None:
            logits[:, self.words :] = float("-inf")
        return logits

    def _draw(self, texts: list[Text], logits: Tensor) -> list[Outcome]:
        """Return what comes next of each row of logits [R, V], which are changed."""
        asking = [i for i, s in enumerate(texts) if s.request.logprobs is not None]
        raw = logits[asking] if asking else None  # a copy: the rows are changed below
        problems: dict[int, str] = {}
        is_finite = logits.amax(-1).isfinite()
        for index, text in enumerate(texts):
            try:
                _edit(text, logits[index])
            except Exception as error:  # a grammar is foreign code
                problems[index] = f"{type(error).__name__}: {error}"
        seeds = [draw(s.seed, s.written) if s.request.temperature else 0.0 for s in texts]
        chosen = choose(logits, [s.request for s in texts], upload(seeds, torch.float64, logits.device))
        tokens, finite = torch.stack((chosen, is_finite.long())).tolist()
        for index, token in enumerate(tokens):
            if token == NOT_FINITE:
                problem = "nothing may come next" if finite[index] else _BROKEN
                problems.setdefault(index, problem)
        told: dict[int, Chance] = {}
        if raw is not None:
            theirs = [max(tokens[i], 0) for i in asking]
            tops = [texts[i].request.logprobs or 0 for i in asking]
            told = dict(zip(asking, chances(raw, theirs, tops), strict=True))
        return [
            Outcome(text, problem=problems[i]) if i in problems else Outcome(text, tokens[i], told.get(i))
            for i, text in enumerate(texts)
        ]

    def _score_prompt(self, text: Text, hidden: Tensor) -> None:
        """Note how probable the prompt's tokens were, from the hidden states [T, D] of the stretch just computed."""
        found = text.prompt_chances
        if found is None:
            return
        # The state of token p tells of token p + 1; what a preempted text computes again is known already.
        first = len(found) - text.computed
        stop = min(hidden.shape[0], text.prompt - 1 - text.computed)
        if first >= stop:
            return
        logits = self._logits(hidden[first:stop])
        if not bool(logits.amax(-1).isfinite().all()):
            raise EngineError(_BROKEN)
        nexts = text.tokens[text.computed + first + 1 : text.computed + stop + 1]
        found += chances(logits, nexts, [text.request.prompt_logprobs or 0] * len(nexts))


def _edit(text: Text, row: Tensor) -> None:
    """Change logits [V] in place by what the request and the tokens before say."""
    history, request = text.history, text.request
    assert history is not None, "a text that runs was admitted"
    history.bias(row)
    if text.written < request.min_tokens and request.stop_ids:
        row[[id_ for id_ in request.stop_ids if 0 <= id_ < row.shape[0]]] = float("-inf")
    if text.constraint is not None:
        text.constraint.mask(row)
    history.penalise(row)
