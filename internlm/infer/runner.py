"""One step on the device: hidden states, logits, draws. What they mean for the answers is the engine's.

runner.run(plan) → [Outcome(sequence, token)], one for each sequence of which nothing is left to compute

A GPU is waited for once in a step, when the tokens are read (and again where probabilities are asked for).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.errors import EngineError
from internlm.infer.blocks import Blocks
from internlm.infer.cache import Cache
from internlm.infer.decode import Decoding
from internlm.infer.request import Chance
from internlm.infer.sample import NOT_FINITE, chances, choose, draw
from internlm.infer.schedule import Sequence
from internlm.model.transformer import Transformer
from internlm.runtime import upload


@dataclass(frozen=True)
class Outcome:
    """What comes of a sequence all of whose tokens are computed."""

    sequence: Sequence
    token: int | None = None
    """The next one; None where none is asked for, or there is a problem."""
    chance: Chance | None = None
    """How probable it was, where that is asked for."""
    problem: str | None = None
    """Why there is no token."""


class Runner:
    """Computes steps.

    Args:
        model: whose attention the cache has taken over.
        cache: keys and values.
        blocks: where they lie.
        words: ids that have a meaning; those from here on only pad the vocabulary. None: all.
    """

    def __init__(self, model: Transformer, cache: Cache, blocks: Blocks, words: int | None) -> None:
        self.model, self.cache, self.blocks, self.words = model, cache, blocks, words
        self.decoding: Decoding | None = None
        """What computes steps in which every text goes on by one token."""

    def decode(self, batch: int, length: int) -> None:
        """Have steps in which every text goes on by one token computed by `Decoding`.

        Args:
            batch: most texts of a step.
            length: most tokens of a text.
        """
        self.decoding = Decoding(self.cache, self._logits, batch, length)

    @torch.inference_mode()
    def run(self, plan: list[tuple[Sequence, int]]) -> list[Outcome]:
        """Compute so many tokens of each sequence, and draw for those of which nothing is left."""
        pieces = [sequence.piece(count, self.blocks) for sequence, count in plan]
        logits: Tensor | None = None
        if self.decoding is not None and all(count == 1 for _, count in plan):
            hidden, logits = self.decoding.run(pieces)
        else:
            hidden = self.cache.run(pieces)
        drawing: list[Sequence] = []
        places: list[int] = []
        outcomes: list[Outcome] = []
        row = 0
        for sequence, count in plan:
            self._score_prompt(sequence, hidden[row : row + count])
            row += count
            if sequence.rest == count:
                if sequence.limit:
                    drawing.append(sequence)
                    places.append(row - 1)
                else:
                    outcomes.append(Outcome(sequence))
        if drawing:
            if len(places) < row or logits is None:
                rows = upload(places, torch.int64, hidden.device)
                logits = self._logits(hidden[rows]) if logits is None else logits[rows]
            outcomes += self._draw(drawing, logits)
        return outcomes

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] in fp32; ids that only pad the vocabulary have none."""
        logits = self.model.head.logits(hidden)
        if self.words is not None:
            logits[:, self.words :] = float("-inf")
        return logits

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[Outcome]:
        """Return what comes next of each row of logits [R, V], which are changed."""
        asking = [i for i, s in enumerate(sequences) if s.request.logprobs is not None]
        raw = logits[asking] if asking else None  # a copy: the rows are changed below
        problems: dict[int, str] = {}
        is_finite = logits.amax(-1).isfinite()
        for index, sequence in enumerate(sequences):
            try:
                _edit(sequence, logits[index])
            except Exception as error:  # a grammar is foreign code
                problems[index] = f"{type(error).__name__}: {error}"
        seeds = [draw(s.seed, s.written) if s.request.temperature else 0.0 for s in sequences]
        chosen = choose(logits, [s.request for s in sequences], upload(seeds, torch.float64, logits.device))
        tokens, finite = torch.stack((chosen, is_finite.long())).tolist()
        for index, token in enumerate(tokens):
            if token == NOT_FINITE and index not in problems:
                problem = "nothing may come next" if finite[index] else "the model gives logits that are not finite"
                problems[index] = problem
        told: dict[int, Chance] = {}
        if raw is not None:
            theirs = [max(tokens[i], 0) for i in asking]
            tops = [sequences[i].request.logprobs or 0 for i in asking]
            told = dict(zip(asking, chances(raw, theirs, tops), strict=True))
        return [
            Outcome(sequence, problem=problems[i]) if i in problems else Outcome(sequence, tokens[i], told.get(i))
            for i, sequence in enumerate(sequences)
        ]

    def _score_prompt(self, sequence: Sequence, hidden: Tensor) -> None:
        """Note how probable the prompt's tokens were, from the hidden states [T, D] of the stretch just computed."""
        found = sequence.prompt_chances
        if found is None or len(found) >= sequence.prompt - 1:
            return
        # The state of token p tells of token p + 1; what a preempted text computes again is known already.
        first = len(found) - sequence.computed
        stop = min(hidden.shape[0], sequence.prompt - 1 - sequence.computed)
        if first >= stop:
            return
        logits = self._logits(hidden[first:stop])
        if not bool(logits.amax(-1).isfinite().all()):
            raise EngineError("the model gives logits that are not finite")
        nexts = sequence.tokens[sequence.computed + first + 1 : sequence.computed + stop + 1]
        found += chances(logits, nexts, [sequence.request.prompt_logprobs or 0] * len(nexts))


def _edit(sequence: Sequence, row: Tensor) -> None:
    """Change logits [V] in place by what the request and the tokens before say."""
    history, request = sequence.history, sequence.request
    assert history is not None, "a sequence that runs was admitted"
    history.bias(row)
    if sequence.written < request.min_tokens and request.stop_ids:
        row[[id_ for id_ in request.stop_ids if 0 <= id_ < row.shape[0]]] = float("-inf")
    if sequence.constraint is not None:
        sequence.constraint.mask(row)
    history.penalise(row)
