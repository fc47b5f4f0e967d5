"""The engine at its edges: extreme values, full contexts, bad neighbours, preemption of everything that has a state."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from internlm import runtime
from internlm.errors import EngineError, WeightsError
from internlm.infer.cache import Cache, Piece
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Request
from internlm.model.config import DynamicScaling, RopeConfig
from internlm.model.transformer import build
from tests.infer.engines import MODEL, SHAPE, TOKENIZER, Dictated, check_blocks, finish, prompt
from tests.models import random_model


class Counting:
    """A constraint of even ids alone, which knows how often it was begun."""

    begun = 0

    def start(self) -> Any:
        type(self).begun += 1
        return type(self)()

    def mask(self, logits: torch.Tensor) -> None:
        logits[1::2] = float("-inf")

    def accept(self, token: int) -> None:
        assert token % 2 == 0

    is_complete = False


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-50},
        {"temperature": 1e-50, "top_p": 0.9},
        {"top_k": 1},
        {"top_p": 5e-324},
        {"min_p": 1.0},
        {"temperature": 1e300, "top_k": 1},
    ],
    ids=str,
)
def test_extreme_rules_that_leave_one_token_are_greedy(settings: dict[str, Any]) -> None:
    start = prompt(9)
    wanted = Engine(MODEL).generate([start], max_tokens=12, temperature=0)[0].tokens
    (answer,) = Engine(MODEL).generate([start], max_tokens=12, seed=3, **settings)
    assert (answer.tokens, answer.finished) == (wanted, "length")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e300},
        {"temperature": 1e300, "top_p": 0.5},
        {"temperature": 3e38, "min_p": 0.1},
        {"top_k": 2**70},
        {"top_k": 299, "top_p": 1.0},
        {"repetition_penalty": 1e6, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 1e-6, "presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"logit_bias": dict.fromkeys(range(300), -100.0)},
        {"logit_bias": {i: 100.0 if i % 2 else -100.0 for i in range(300)}},
        {"seed": 2**63 - 1, "n": 3},
        {"stop_ids": (-1, 300, 2**70), "min_tokens": 2**70},
        {"stop_ids": tuple(range(300)), "min_tokens": 5},
        {"max_tokens": 2**70},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_extreme_values_give_a_whole_answer_and_neighbours_do_not_notice(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    quiet = Request(tokens=prompt(7), max_tokens=6, temperature=0)
    wanted = Engine(MODEL).generate([quiet])[0].tokens
    loud = Request(tokens=prompt(5), logprobs=2, **{"max_tokens": 8, "seed": 1, **settings})
    engine = Engine(MODEL, TOKENIZER, Limits(length=40))
    *answers, other = engine.generate([loud, replace(loud, grammar=Counting()), quiet])
    if settings.get("min_tokens") == 5:
        # All ids but those that only pad may stop, so that nothing is left.
        assert [answer.finished for answer in answers] == ["error"] * 2
        assert {answer.problem for answer in answers} == {"nothing may come next"}
    else:
        assert {answer.finished for answer in answers} == {"length"}, caplog.text
        assert {len(answer.tokens) for answer in answers} == {35 if "max_tokens" in settings else 8}
        assert all(0 <= token < TOKENIZER.vocab_size for answer in answers for token in answer.tokens)
        assert len(answers) == 2 * loud.n
        assert all(token % 2 == 0 for answer in answers[loud.n :] for token in answer.tokens)
    assert other.tokens == wanted
    assert engine.stats.counters.failed_steps == 0


@pytest.mark.parametrize("penalty", [0.0, 1e-9, 1e9, float("inf"), float("nan")])
def test_a_repetition_penalty_beyond_single_precision_is_refused(penalty: float) -> None:
    with pytest.raises(EngineError, match="repetition_penalty"):
        Engine(MODEL).check(Request(tokens=[1], repetition_penalty=penalty))


@pytest.mark.parametrize("bias", [float("-inf"), float("inf"), float("nan"), 100.5])
def test_a_bias_out_of_range_is_refused(bias: float) -> None:
    with pytest.raises(EngineError, match="logit_bias"):
        Engine(MODEL).check(Request(tokens=[1], logit_bias={3: bias}))


def test_the_context_can_be_filled_to_the_last_token() -> None:
    engine = Engine(MODEL, limits=Limits(length=33, block=8, cache_tokens=40, step_tokens=7))
    full = prompt(33)
    assert len(engine.score(full)) == 32
    for text in (full, prompt(34)):
        with pytest.raises(EngineError, match="too many"):
            engine.add(Request(tokens=text))
    with pytest.raises(EngineError, match="too many"):
        engine.score(prompt(34))
    (answer,) = engine.generate([Request(tokens=full[:32], max_tokens=50, prompt_logprobs=1, temperature=0)])
    assert (answer.finished, len(answer.tokens), len(answer.prompt_logprobs or ())) == ("length", 1, 31)
    assert answer.tokens == Engine(MODEL).generate([full[:32]], max_tokens=1, temperature=0)[0].tokens


def test_a_prompt_of_one_token_has_no_scores_and_equal_logits_are_all_told() -> None:
    with torch.no_grad():
        model = random_model(SHAPE)
        model.head.weight.zero_()  # every token as probable as any other
    engine = Engine(model)
    (one,) = engine.generate([Request(tokens=[7], max_tokens=0, prompt_logprobs=5)])
    assert (one.tokens, one.prompt_logprobs, one.finished) == ([], [], "length")
    (two,) = engine.generate([Request(tokens=[7, 8], max_tokens=2, temperature=0, logprobs=9, prompt_logprobs=100)])
    even = pytest.approx(-float(torch.tensor(300.0).log()), abs=1e-5)
    assert two.prompt_logprobs is not None
    assert two.logprobs is not None
    for chance in (*two.prompt_logprobs, *two.logprobs):
        assert chance.logprob == even
        assert len({id_ for id_, _ in chance.top}) == len(chance.top)
    assert [len(chance.top) for chance in (*two.prompt_logprobs, *two.logprobs)] == [100, 9, 9]


class Unready(Counting):
    """A grammar of which not every answer can begin."""

    fails = 1

    def start(self) -> Any:
        if type(self).begun == self.fails:
            type(self).begun += 1
            raise MemoryError("no room for a matcher")
        return super().start()


@pytest.mark.parametrize("which", [0, 1])
def test_an_answer_that_cannot_begin_ends_alone(which: int) -> None:
    class Mine(Unready):
        begun, fails = 0, which

    quiet = Request(tokens=prompt(7), max_tokens=6, temperature=0)
    wanted = Engine(MODEL).generate([quiet])[0].tokens
    engine = Engine(MODEL, limits=Limits(batch=2))
    results = engine.generate([quiet, Request(tokens=prompt(40), n=3, max_tokens=4, grammar=Mine()), quiet])
    assert [r.finished for r in results] == [
        "length",
        *("error" if i == which else "length" for i in range(3)),
        "length",
    ]
    assert results[1 + which].problem == "MemoryError: no room for a matcher"
    assert results[0].tokens == results[-1].tokens == wanted
    check_blocks(engine.blocks)
    assert engine.blocks.free == engine.blocks.count


def test_what_came_of_numbers_that_are_not_finite_is_found_by_nobody() -> None:
    model = build(SHAPE, 0)
    row = model.embedding.weight[7].detach().clone()
    with torch.no_grad():
        model.embedding.weight[7] = float("nan")
    engine = Engine(model)
    assert engine.generate([[7] * 60], max_tokens=1)[0].finished == "error"
    with torch.no_grad():
        engine.model.embedding.weight[7] = row
    assert engine.generate([[7] * 60], max_tokens=1)[0].finished == "length"


def test_what_an_answer_needs_is_made_once_however_long_it_waits() -> None:
    class Mine(Counting):
        begun = 0

    engine = Engine(MODEL, limits=Limits(block=4, length=64, cache_tokens=64))
    results = engine.generate(
        [Request(tokens=prompt(40), max_tokens=20, temperature=0), Request(tokens=prompt(41), grammar=Mine())]
    )
    assert engine.stats.counters.steps > 30
    assert results[1].finished == "length"
    assert Mine.begun == 1


def test_who_is_writing_goes_before_a_long_prompt_and_a_step_has_as_many_tokens_as_it_may() -> None:
    engine = Engine(MODEL, limits=Limits(step_tokens=8))
    run, sizes = engine.runner.run, []
    engine.runner.run = lambda plan: (sizes.append(sum(count for _, count in plan)), run(plan))[1]  # type: ignore
    writer = engine.add(Request(tokens=prompt(4), max_tokens=30))
    engine.step()
    engine.add(Request(tokens=prompt(100), max_tokens=1))
    for _ in range(10):
        assert [delta.id for delta in engine.step()] == [writer]
    assert sizes == [4] + [8] * 10


def test_no_more_run_at_once_than_fit_into_the_batch() -> None:
    engine = Engine(MODEL, limits=Limits(batch=2))
    for seed in range(3):
        engine.add(Request(tokens=prompt(4, seed), max_tokens=3))
    while engine.is_busy:
        engine.step()
        assert engine.stats.running <= 2


def test_when_room_runs_out_the_oldest_goes_on() -> None:
    engine = Engine(MODEL, limits=Limits(batch=2, cache_tokens=64, length=48, block=4))
    first, second = (engine.add(Request(tokens=prompt(8, seed), max_tokens=40)) for seed in range(2))
    steps = []
    while engine.is_busy:
        steps.append({delta.id for delta in engine.step()})
    assert engine.stats.counters.preemptions
    assert all(first in ids for ids in steps[:40])
    assert second in steps[-1]


def test_every_answer_ends_where_steps_of_several_always_fail() -> None:
    """Such as memory that suffices for one text at a time."""
    prompts = [prompt(n, 2) for n in (50, 61, 33, 44)]
    wanted = [r.tokens for r in Engine(MODEL).generate(prompts, max_tokens=5, temperature=0)]
    engine = Engine(MODEL, limits=Limits(step_tokens=8, share=False, block=4, length=80, cache_tokens=120))
    plain = engine.cache.run

    def run(pieces: list[Piece]) -> torch.Tensor:
        if len(pieces) > 1:
            raise torch.OutOfMemoryError("no room")
        return plain(pieces)

    engine.cache.run = run  # type: ignore[method-assign]
    for one in prompts:
        engine.add(Request(tokens=one, max_tokens=5, temperature=0))
    got: dict[int, list[int]] = {}
    for _ in range(600):
        for delta in engine.step():
            got.setdefault(delta.id, []).extend(delta.tokens)
    assert list(map(got.get, range(4))) == wanted
    assert not engine.is_busy


def test_after_a_step_that_failed_once_all_run_together_again() -> None:
    engine = Engine(MODEL)
    run, sizes = engine.runner.run, []

    def fails_once(plan: Any) -> Any:
        sizes.append(len(plan))
        if len(sizes) == 2:
            raise RuntimeError("once")
        return run(plan)

    engine.runner.run = fails_once  # type: ignore[method-assign]
    for seed in range(3):
        engine.add(Request(tokens=prompt(4, seed), max_tokens=20))
    while engine.is_busy:
        engine.step()
    assert sizes[:6] == [3, 3, 1, 1, 1, 3]


def test_preempted_answers_keep_penalties_constraints_scores_stop_strings_and_half_characters() -> None:
    """A preempted text is computed again; what is known of it beside its keys and values must not be."""
    common = {"max_tokens": 28, "top_p": 0.95, "seed": 5}
    requests = [
        Request(tokens=prompt(30, 1), frequency_penalty=1.5, repetition_penalty=1.2, **common),  # type: ignore[arg-type]
        Request(tokens=prompt(20, 1), grammar=Counting(), logprobs=3, **common),  # type: ignore[arg-type]
        Request(tokens=prompt(25, 1), prompt_logprobs=2, logprobs=0, **common),  # type: ignore[arg-type]
        Request(tokens=prompt(33, 1), stop_strings=("zzz", "\ufffd\ufffd\ufffd\ufffd\ufffd"), **common),  # type: ignore[arg-type]
        Request(tokens=prompt(21, 1), n=2, logit_bias={3: 5.0}, min_tokens=20, stop_ids=(4, 5, 6), **common),  # type: ignore[arg-type]
    ]
    alone = [result for one in requests for result in Engine(MODEL, TOKENIZER).generate([one])]
    tight = Limits(cache_tokens=112, length=96, block=4, step_tokens=16, batch=4)
    for limits in (tight, replace(tight, share=False, block=1)):
        engine = Engine(MODEL, TOKENIZER, limits)
        together = engine.generate(requests)
        assert engine.stats.counters.preemptions >= 4
        for wanted, got in zip(alone, together, strict=True):
            assert (got.tokens, got.text, got.finished) == (wanted.tokens, wanted.text, wanted.finished)
            for theirs, ours in ((wanted.logprobs, got.logprobs), (wanted.prompt_logprobs, got.prompt_logprobs)):
                assert (theirs is None) == (ours is None)
                for a, b in zip(theirs or (), ours or (), strict=True):
                    assert (a.token, [i for i, _ in a.top]) == (b.token, [i for i, _ in b.top])
                    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert engine.blocks.free == engine.blocks.count


def test_with_dynamic_scaling_texts_of_other_lengths_share_nothing_and_of_the_same_length_all() -> None:
    model = random_model(replace(SHAPE, rope=RopeConfig(scaling=DynamicScaling(original_length=32))))
    start = prompt(48)
    requests = [Request(tokens=start, max_tokens=n, temperature=0) for n in (20, 30, 20, 60, 30)]
    wanted = {n: Engine(model).generate([replace(requests[0], max_tokens=n)])[0].tokens for n in (20, 30, 60)}
    assert wanted[20] != wanted[30][:20] or wanted[30] != wanted[60][:30], "else lengths make no difference here"
    for share, sizes in ((True, [0, 0, 40, 0, 40]), (False, [0] * 5)):
        engine = Engine(model, limits=Limits(block=8, share=share))
        cached = []
        for one in requests:
            deltas = list(engine.stream(one))
            assert [token for delta in deltas for token in delta.tokens] == wanted[one.max_tokens], share
            cached.append(deltas[0].cached)
        assert cached == sizes


@pytest.mark.parametrize(
    ("settings", "text", "finished", "count"),
    [
        ({"stop_strings": ("a",)}, "", "stop", 1),
        ({"stop_strings": ("a",), "include_stop": True}, "a", "stop", 1),
        ({"stop_strings": ("abc", "bc", "b")}, "a", "stop", 2),
        ({"stop_strings": ("cab", "abcabd")}, "ab", "stop", 5),
        ({"stop_strings": ("abcabd",), "include_stop": True}, "abcabcabd", "stop", 9),
        ({"stop_strings": ("zz",)}, "abcabcabd", "length", 9),
        ({"stop_strings": ("dx",)}, "abcabcabd", "length", 9),
        ({"stop_strings": ("bcabcabdx", "abd")}, "abcabc", "stop", 9),
    ],
)
def test_stop_strings_at_every_place(settings: dict[str, Any], text: str, finished: str, count: int) -> None:
    (answer,) = Dictated("abcabcabd").generate([Request(tokens=[1], max_tokens=9, temperature=0, **settings)])
    assert (answer.text, answer.finished, len(answer.tokens)) == (text, finished, count)


def test_each_answer_of_a_request_has_stop_strings_of_its_own() -> None:
    request = Request(tokens=prompt(6), n=6, max_tokens=60, seed=1)
    engine = Engine(MODEL, TOKENIZER)
    free = engine.generate([request])
    stop = free[0].text[5:7]
    for before, after in zip(free, engine.generate([replace(request, stop_strings=(stop,))]), strict=True):
        assert after.text == before.text.split(stop)[0]
        assert (after.finished == "stop") == (stop in before.text)


def test_a_first_answer_that_times_out_or_is_aborted_in_its_prompt_takes_the_others_along() -> None:
    engine = Engine(MODEL, limits=Limits(step_tokens=4, block=4))
    slow = engine.add(Request(tokens=prompt(60), n=3, timeout=0.02))
    gone = engine.add(Request(tokens=prompt(61), n=3))
    other = engine.add(Request(tokens=prompt(9), max_tokens=3, temperature=0))
    engine.step()
    engine.abort(gone)
    time.sleep(0.03)
    found = finish(engine)
    assert [delta.finished for delta in found[slow]] == ["timeout"] * 3
    assert [delta.finished for delta in found[gone]] == ["abort"] * 3
    assert found[other][-1].finished == "length"
    assert engine.blocks.free == engine.blocks.count


def test_a_deadline_that_comes_later_is_kept_when_an_earlier_one_has_passed() -> None:
    engine = Engine(MODEL, limits=Limits(batch=1))
    engine.add(Request(tokens=prompt(5), max_tokens=2, timeout=0.01))
    second = engine.add(Request(tokens=prompt(5), max_tokens=395, timeout=0.06))
    third = engine.add(Request(tokens=prompt(5), max_tokens=40, timeout=3600))
    start = time.monotonic()
    ends = {id_: deltas[-1].finished for id_, deltas in finish(engine).items()}
    assert ends[second] == "timeout"
    assert ends[third] == "length"
    assert time.monotonic() - start > 0.06


def test_loading_keeps_the_counters_and_the_size_of_the_cache_and_lets_the_old_one_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for pack in (None, "fp32"):
        engine = Engine(random_model(SHAPE), pack=pack)  # type: ignore[arg-type]
        engine.generate([prompt(9)], max_tokens=5)
        before, cache = engine.stats, weakref.ref(engine.cache)
        monkeypatch.setattr(runtime, "available_memory", lambda: 1)  # the cache that stands has taken it
        engine.load(random_model(SHAPE, seed=2).named_parameters())
        assert engine.stats == before
        assert before.counters.written_tokens == 5
        assert cache() is None
        monkeypatch.undo()
        with pytest.raises(WeightsError, match="is missing"):
            engine.load([("norm.weight", torch.ones(48))])


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate\nmore"), MemoryError("no room")])
def test_memory_that_ends_while_the_cache_is_made_is_an_error_of_ours(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = random_model(SHAPE), torch.empty

    def empty(size: Any, *rest: Any, **options: Any) -> torch.Tensor:
        if isinstance(size, tuple) and len(size) == 5:
            raise error
        return plain(size, *rest, **options)

    monkeypatch.setattr(torch, "empty", empty)
    needed = (64 + 32) * Cache.bytes_per_token(model) / 2**30
    with pytest.raises(EngineError) as refused:
        Engine(model, limits=Limits(length=64, cache_tokens=64))
    reason = str(error).splitlines()[0]
    assert f"the {needed:.1f} GiB for keys and values cannot be had: {reason}. Give it less" in str(refused.value)


def test_nothing_of_an_answer_is_kept_when_it_has_ended() -> None:
    engine = Engine(MODEL, TOKENIZER)
    watched: list[weakref.ref[Any]] = []
    for number in range(6):
        id_ = engine.add(Request(tokens=prompt(8, number), n=2, max_tokens=4 if number % 2 else 100))
        engine.step()
        watched += [weakref.ref(sequence) for sequence in engine.scheduler]
        if not number % 2:
            engine.abort(id_)
    finish(engine)
    gc.collect()
    assert len(watched) > 12
    assert not any(one() for one in watched)
    assert not engine.is_busy


def test_a_failed_request_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(Unready):
        begun, fails = 0, 0

    with caplog.at_level(logging.WARNING):
        Engine(MODEL).generate([Request(tokens=[3], grammar=Mine())])
    assert "request 0 failed: MemoryError: no room" in caplog.text
