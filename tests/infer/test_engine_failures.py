"""Steps, constraints and tokenizers that fail: each ends the request that it belongs to, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internlm.infer.cache import Piece
from internlm.infer.engine import Engine
from internlm.infer.request import Request
from tests.infer.engines import MODEL, TOKENIZER, check_blocks, finish, prompt


class Faulty(Engine):
    """Fails in a step in which one token is computed."""

    def __init__(self, token: int, error: Exception, times: int = 10**9) -> None:
        super().__init__(MODEL)
        plain = self.cache.run

        def run(pieces: list[Piece]) -> torch.Tensor:
            nonlocal times
            if times and any(token in piece.tokens for piece in pieces):
                times -= 1
                raise error
            return plain(pieces)

        self.cache.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("a kernel failed")])
def test_a_step_that_fails_ends_only_the_request_that_makes_it_fail(error: Exception) -> None:
    healthy = [prompt(n, 3) for n in (20, 9, 33)]
    assert not any(7 in tokens for tokens in healthy)
    wanted = [r.tokens for r in Engine(MODEL).generate(healthy, max_tokens=6, temperature=0)]
    assert not any(7 in tokens for tokens in wanted)
    engine = Faulty(7, error)
    results = engine.generate([healthy[0], [7] * 12, *healthy[1:]], max_tokens=6, temperature=0)
    assert [r.tokens for r in (results[0], *results[2:])] == wanted
    assert results[1].finished == "error"
    assert str(error) in (results[1].problem or "")
    check_blocks(engine.blocks)
    assert engine.blocks.free == engine.blocks.count


def test_a_step_that_fails_once_costs_nobody_their_answer() -> None:
    prompts = [prompt(20, 3), [7] * 12]
    wanted = [r.tokens for r in Engine(MODEL).generate(prompts, max_tokens=6, temperature=0)]
    engine = Faulty(7, RuntimeError("once"), times=1)
    assert [r.tokens for r in engine.generate(prompts, max_tokens=6, temperature=0)] == wanted
    assert engine.stats.counters.failed_steps == 1


def test_ctrl_c_in_a_step_leaves_an_engine_that_goes_on() -> None:
    engine = Faulty(7, KeyboardInterrupt(), times=1)  # type: ignore[arg-type]
    engine.add(Request(tokens=[7, 8, 9], max_tokens=5, temperature=0))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    (deltas,) = finish(engine).values()
    wanted = Engine(MODEL).generate([[7, 8, 9]], max_tokens=5, temperature=0)[0].tokens
    assert [token for delta in deltas for token in delta.tokens] == wanted


class Countdown:
    """A constraint: three tokens, each one less than the one before."""

    def __init__(self) -> None:
        self.left = [30, 29, 28]

    def mask(self, logits: torch.Tensor) -> None:
        keep = logits[self.left[0]].clone()
        logits.fill_(float("-inf"))
        logits[self.left[0]] = keep

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)

    @property
    def is_complete(self) -> bool:
        return not self.left

    def start(self) -> Any:
        return Countdown()


def test_a_constraint_decides_what_may_come_and_when_it_is_enough() -> None:
    engine = Engine(MODEL)
    free = engine.generate([Request(tokens=prompt(4), max_tokens=9, temperature=0)])[0].tokens
    results = engine.generate(
        [
            Request(tokens=prompt(4), max_tokens=9, n=2, grammar=Countdown()),
            Request(tokens=prompt(4), max_tokens=9, temperature=0),
        ]
    )
    assert [r.tokens for r in results] == [[30, 29, 28], [30, 29, 28], free]
    assert [r.finished for r in results] == ["stop", "stop", "length"]


def test_a_constraint_that_fails_or_leaves_nothing_ends_its_request_alone() -> None:
    class Broken(Countdown):
        def start(self) -> Any:
            return Broken()

        def mask(self, logits: torch.Tensor) -> None:
            raise ValueError("bad grammar")

    class Empty(Broken):
        def start(self) -> Any:
            return Empty()

        def mask(self, logits: torch.Tensor) -> None:
            logits.fill_(float("-inf"))

    engine = Engine(MODEL)
    wanted = engine.generate([Request(tokens=prompt(4), max_tokens=9, temperature=0)])[0].tokens
    broken, empty, other = engine.generate(
        [
            Request(tokens=prompt(4), grammar=Broken()),
            Request(tokens=prompt(4), grammar=Empty()),
            Request(tokens=prompt(4), max_tokens=9, temperature=0),
        ]
    )
    assert (broken.finished, broken.problem) == ("error", "ValueError: bad grammar")
    assert (empty.finished, empty.problem) == ("error", "nothing may come next")
    assert other.tokens == wanted


def test_a_tokenizer_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, TOKENIZER)
    requests = [Request(tokens=prompt(4, i), max_tokens=9, temperature=0) for i in range(2)]
    wanted = [r.tokens for r in engine.generate(requests)]
    bad = next(token for token in wanted[0] if token not in wanted[1])
    plain = type(TOKENIZER).token_bytes

    def fails(self: object, id: int, **options: bool) -> bytes:
        if id == bad:
            raise ValueError("no such piece")
        return plain(TOKENIZER, id, **options)

    monkeypatch.setattr(type(TOKENIZER), "token_bytes", fails)
    first, second = engine.generate(requests)
    assert (first.finished, first.problem) == ("error", "ValueError: no such piece")
    assert second.tokens == wanted[1]
