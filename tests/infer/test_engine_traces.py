"""The engine under random traces: whatever comes, goes or breaks, every answer ends once and no block is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.infer.cache import Piece
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Delta, Request
from internlm.model.config import ModelConfig
from tests.infer.engines import check_blocks
from tests.models import random_model

MODEL = random_model(
    ModelConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, context_length=64)
)
BAD = 39
"""A token with which a step fails."""

limits = st.builds(
    lambda batch, length, room, block, step_tokens, share: Limits(
        batch=batch,
        length=length,
        cache_tokens=-(-length // block) * block + room,
        block=block,
        step_tokens=step_tokens,
        share=share,
    ),
    st.integers(1, 5),
    st.integers(8, 24),
    st.integers(0, 40),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([1, 2, 5, 64]),
    st.booleans(),
)
requests = st.builds(
    lambda head, tail, max_tokens, n, seed, temperature: Request(
        tokens=[*range(head), *tail], max_tokens=max_tokens, n=n, seed=seed, temperature=temperature
    ),
    st.integers(0, 8),  # texts that begin alike
    st.lists(st.integers(0, BAD), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 1.0]),
)
actions = st.lists(st.one_of(requests, st.just("step"), st.integers(0, 12)), max_size=25)


class Faulty(Engine):
    """Fails in every step in which the bad token is computed."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(MODEL, limits=limits)
        plain = self.cache.run

        def run(pieces: list[Piece]) -> torch.Tensor:
            if any(BAD in piece.tokens for piece in pieces):
                raise RuntimeError("a bad token")
            return plain(pieces)

        self.cache.run = run  # type: ignore[method-assign]


@dataclass
class Seen:
    """What came of a request."""

    request: Request
    tokens: list[list[int]] = field(default_factory=list)
    ends: list[str | None] = field(default_factory=list)


ALONE: dict[tuple[int, ...], list[int]] = {}


def alone(request: Request, index: int, limit: int) -> list[int]:
    """Return the answer that a request gets when nobody else is there."""
    key = (*request.tokens, -1, request.seed or 0, int(request.temperature), index, limit)
    if key not in ALONE:
        one = Engine(MODEL).generate(
            [Request(tokens=request.tokens, max_tokens=limit, n=index + 1, seed=request.seed,
                     temperature=request.temperature)]
        )  # fmt: skip
        ALONE[key] = one[index].tokens
    return ALONE[key]


def note(seen: dict[int, Seen], deltas: list[Delta]) -> None:
    for delta in deltas:
        one = seen[delta.id]
        assert one.ends[delta.index] is None, "nothing comes after the end"
        one.tokens[delta.index] += delta.tokens
        one.ends[delta.index] = delta.finished


@settings(max_examples=40, deadline=None)
@given(limits, actions)
def test_every_answer_ends_once_as_it_would_alone_and_no_block_is_lost(limits: Limits, actions: list[object]) -> None:
    engine = Faulty(limits)
    seen: dict[int, Seen] = {}
    for action in actions:
        if isinstance(action, Request):
            if len(action.tokens) < (limits.length or 0):
                id_ = engine.add(action)
                seen[id_] = Seen(action, [[] for _ in range(action.n)], [None] * action.n)
        elif isinstance(action, int):
            engine.abort(action)
        else:
            note(seen, engine.step())
        check_blocks(engine.blocks)
        ages = [(s.id, s.index) for s in engine.scheduler.running]
        assert ages == sorted(ages), "the oldest first"
        assert len(ages) <= limits.batch
    aborted = {action for action in actions if isinstance(action, int)}
    # Each step computes a token or ends an answer; failures and preemptions make some be computed again.
    for _ in range(4000):
        if not engine.is_busy:
            break
        note(seen, engine.step())
    assert not engine.is_busy, "every answer ends"
    check_blocks(engine.blocks)
    assert engine.blocks.free == engine.blocks.count
    assert not engine.scheduler.running
    for id_, one in seen.items():
        limit = min(one.request.max_tokens, (limits.length or 0) - len(one.request.tokens))
        for index, (tokens, end) in enumerate(zip(one.tokens, one.ends, strict=True)):
            assert end in ("length", "abort", "error")
            assert end != "abort" or id_ in aborted
            wanted = alone(one.request, index, limit)
            assert tokens == wanted[: len(tokens)]
            if end == "length":
                assert len(tokens) == limit
            if end == "error":
                assert BAD in [*one.request.tokens, *tokens], "who is not to blame does not fail"
            if BAD in one.request.tokens:
                assert end != "length"
