"""The engine against full forward passes: decoding, batching, stopping, seeds, scores, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from internlm.errors import EngineError, WeightsError
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Request
from internlm.model.config import DynamicScaling, RopeConfig
from internlm.model.transformer import Transformer, build
from tests.infer.engines import MODEL, SHAPE, TOKENIZER, Dictated, check_blocks, finish, prompt
from tests.models import random_model


def full_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.head.logits(model(torch.tensor([ids])))[0]


DEFAULT_SIZES = ((1, 3, 64), (2, 1, 7), (2, 32, 256), (4, 16, 1))


@pytest.mark.parametrize(
    ("kv_heads", "block", "step_tokens"),
    [
        pytest.param(heads, *sizes, marks=[] if (heads, *sizes) in DEFAULT_SIZES else pytest.mark.proof)
        for sizes in ((1, 7), (3, 64), (16, 1), (32, 256))
        for heads in (1, 2, 4)
    ],
)
def test_cached_decoding_has_the_logits_of_a_full_forward_at_every_step(
    kv_heads: int, block: int, step_tokens: int
) -> None:
    model = random_model(replace(SHAPE, num_kv_heads=kv_heads))
    engine = Engine(model, limits=Limits(block=block, step_tokens=step_tokens))
    prompts = [prompt(n) for n in (5, 1, 60, 40)]
    answers = engine.generate(prompts, max_tokens=20, temperature=0, logprobs=100)
    for start, answer in zip(prompts, answers, strict=True):
        expected = full_logits(model, start + answer.tokens)[len(start) - 1 : -1].log_softmax(-1)
        assert answer.logprobs is not None
        assert expected.std() > 0.5
        for chance, token, row in zip(answer.logprobs, answer.tokens, expected, strict=True):
            assert chance.token == token == chance.top[0][0] == int(row.argmax())
            assert chance.logprob == pytest.approx(float(row[token]), abs=5e-5)
            assert [logprob for _, logprob in chance.top] == pytest.approx(row.topk(100).values.tolist(), abs=5e-5)


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    prompts = [prompt(n, seed) for n, seed in [(3, 0), (90, 1), (12, 2), (300, 3), (7, 4), (31, 5), (64, 6)]]
    lengths = [30, 4, 17, 9, 25, 1, 12]
    requests = [Request(tokens=p, max_tokens=n, temperature=0) for p, n in zip(prompts, lengths, strict=True)]
    alone = [Engine(MODEL, limits=Limits(batch=1)).generate([request])[0].tokens for request in requests]
    for batch in (3, 16):
        together = Engine(MODEL, limits=Limits(batch=batch)).generate(requests)
        assert [result.tokens for result in together] == alone


def test_requests_that_arrive_later_change_nothing() -> None:
    requests = [Request(tokens=prompt(10 + i), max_tokens=15, temperature=0) for i in range(6)]
    alone = [Engine(MODEL).generate([request])[0].tokens for request in requests]
    engine = Engine(MODEL, limits=Limits(batch=3))
    got: dict[int, list[int]] = {}
    for request in requests:
        engine.add(request)
        for delta in engine.step() + engine.step():
            got.setdefault(delta.id, []).extend(delta.tokens)
    for id_, deltas in finish(engine).items():
        for delta in deltas:
            got.setdefault(id_, []).extend(delta.tokens)
    assert [got[i] for i in range(6)] == alone


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.3}])
def test_the_same_seed_gives_the_same_answer_alone_and_in_any_batch(settings: dict[str, float]) -> None:
    requests = [Request(tokens=prompt(20, i), max_tokens=15, seed=i, **settings) for i in range(5)]  # type: ignore[arg-type]
    alone = [Engine(MODEL, seed=9).generate([request])[0].tokens for request in requests]
    together = Engine(MODEL, limits=Limits(batch=3), seed=4).generate(requests)
    assert [result.tokens for result in together] == alone
    other = Engine(MODEL).generate([replace(requests[0], seed=77)])[0].tokens
    assert other != alone[0]


def test_without_a_seed_requests_differ_and_the_engine_seed_repeats_them() -> None:
    same = [prompt(8)] * 3
    first = [r.tokens for r in Engine(MODEL, seed=5).generate(same, max_tokens=12)]
    second = [r.tokens for r in Engine(MODEL, seed=5).generate(same, max_tokens=12)]
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 3


def test_the_repetition_penalty_sees_prompt_and_answer() -> None:
    start = prompt(6)
    (answer,) = Engine(MODEL).generate([Request(tokens=start, max_tokens=40, temperature=0, repetition_penalty=1e6)])
    assert len(set(answer.tokens)) == 40
    assert not set(answer.tokens) & set(start)


def test_a_stop_id_ends_the_answer_and_is_not_shown() -> None:
    engine = Engine(MODEL, TOKENIZER)
    free = engine.generate([Request(tokens=prompt(9), max_tokens=12, temperature=0)])[0]
    assert (free.finished, len(free.tokens)) == ("length", 12)
    stop = next(token for i, token in enumerate(free.tokens) if i > 2 and token not in free.tokens[:i])
    cut = free.tokens.index(stop)
    stopped = engine.generate([Request(tokens=prompt(9), max_tokens=12, temperature=0, stop_ids=(stop,))])[0]
    assert stopped.finished == "stop"
    assert stopped.tokens == free.tokens[: cut + 1]
    assert stopped.text == TOKENIZER.decode(free.tokens[:cut], skip_special=True)


def test_a_stop_string_across_tokens_ends_the_answer_and_is_cut_off() -> None:
    engine = Dictated("say END. more")
    deltas = list(engine.stream(Request(tokens=[1], max_tokens=13, temperature=0, stop_strings=("END.", "zzz"))))
    assert "".join(delta.text for delta in deltas) == "say "
    assert deltas[-1].finished == "stop"
    assert len(deltas) == 8
    assert not any("E" in delta.text for delta in deltas)


def test_characters_come_whole() -> None:
    deltas = list(Dictated("你👋").stream(Request(tokens=[1], max_tokens=7, temperature=0)))
    assert [delta.text for delta in deltas] == ["", "", "你", "", "", "", "👋"]


def test_a_character_cut_by_the_length_is_marked() -> None:
    deltas = list(Dictated("a你").stream(Request(tokens=[1], max_tokens=3, temperature=0)))
    assert [delta.text for delta in deltas] == ["a", "", "\ufffd"]
    assert deltas[-1].finished == "length"


def test_ids_that_pad_the_vocabulary_are_never_written() -> None:
    assert TOKENIZER.vocab_size < 300
    engine = Engine(MODEL, TOKENIZER)
    plain = engine.model.head.logits

    def padded(hidden: torch.Tensor) -> torch.Tensor:
        out = plain(hidden)
        out[:, TOKENIZER.vocab_size :] = 1000.0
        return out

    engine.model.head.logits = padded  # type: ignore[method-assign]
    for request in (
        Request(tokens=prompt(3), max_tokens=20, temperature=0),
        Request(tokens=prompt(3), max_tokens=20),
        Request(tokens=prompt(3), max_tokens=20, top_p=0.9),
    ):
        (answer,) = engine.generate([request])
        assert max(answer.tokens) < TOKENIZER.vocab_size


def test_the_context_bounds_the_answer() -> None:
    engine = Engine(MODEL, limits=Limits(length=30))
    (answer,) = engine.generate([Request(tokens=prompt(25), max_tokens=50, temperature=0)])
    assert (answer.finished, len(answer.tokens)) == ("length", 5)
    with pytest.raises(EngineError, match="30 tokens are too many"):
        engine.add(Request(tokens=prompt(30)))
    assert len(engine.generate([Request(tokens=prompt(29), max_tokens=9)])[0].tokens) == 1


def test_abort_ends_running_and_waiting_requests_and_leaves_the_others_alone() -> None:
    requests = [Request(tokens=prompt(10, i), max_tokens=10, temperature=0) for i in range(4)]
    alone = [Engine(MODEL).generate([request])[0].tokens for request in requests]
    engine = Engine(MODEL, limits=Limits(batch=2))
    ids = [engine.add(request) for request in requests]
    got = {id_: [] for id_ in ids}
    for delta in engine.step():
        got[delta.id] += delta.tokens
    engine.abort(ids[0])
    engine.abort(ids[3])
    engine.abort(12345)
    ends = {}
    for id_, deltas in finish(engine).items():
        for delta in deltas:
            got[id_] += delta.tokens
            ends[id_] = delta.finished
    assert ends == {ids[0]: "abort", ids[1]: "length", ids[2]: "length", ids[3]: "abort"}
    assert got[ids[1]] == alone[1]
    assert got[ids[2]] == alone[2]
    assert got[ids[0]] == alone[0][:1]
    engine.abort(ids[1])
    assert engine.step() == []


def test_two_streams_share_the_engine_and_leaving_one_frees_its_slot() -> None:
    requests = [Request(tokens=prompt(10, i), max_tokens=8, temperature=0) for i in range(2)]
    alone = [Engine(MODEL).generate([request])[0].tokens for request in requests]
    engine = Engine(MODEL)
    first, second = engine.stream(requests[0]), engine.stream(requests[1])
    got = [next(second).tokens, next(first).tokens]
    first.close()
    got = got[0] + [token for delta in second for token in delta.tokens]
    assert got == alone[1]
    assert not engine.is_busy


def test_scores_are_the_log_softmax_of_the_model() -> None:
    engine, ids = Engine(MODEL), prompt(50)
    expected = full_logits(MODEL, ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert (engine.score(ids) - expected).abs().max() < 1e-5
    engine.add(Request(tokens=prompt(5), max_tokens=4, temperature=0))
    engine.step()
    assert (engine.score(ids) - expected).abs().max() < 1e-5  # in the middle of an answer
    left = [token for deltas in finish(engine).values() for delta in deltas for token in delta.tokens]
    assert left == Engine(MODEL).generate([prompt(5)], max_tokens=4, temperature=0)[0].tokens[1:]


def test_with_dynamic_scaling_the_base_of_each_request_is_its_own() -> None:
    scaling = RopeConfig(scaling=DynamicScaling(original_length=32))
    model = random_model(replace(SHAPE, rope=scaling))
    requests = [Request(tokens=prompt(n), max_tokens=20, temperature=0) for n in (8, 80, 30)]
    alone = [Engine(model).generate([request])[0].tokens for request in requests]
    assert [r.tokens for r in Engine(model).generate(requests)] == alone
    long = prompt(60)
    expected = full_logits(model, long).log_softmax(-1)[:-1].gather(1, torch.tensor(long[1:])[:, None]).squeeze(1)
    assert (Engine(model).score(long) - expected).abs().max() < 1e-5


def test_weights_are_shared_until_others_are_loaded() -> None:
    model, other = random_model(SHAPE), random_model(SHAPE, seed=2)
    engine = Engine(model)
    assert engine.model.norm.weight.data_ptr() == model.norm.weight.data_ptr()
    before = model.norm.weight.clone()
    engine.load(other.named_parameters())
    assert torch.equal(model.norm.weight, before)
    assert engine.model.norm.weight.data_ptr() != other.norm.weight.data_ptr()
    own = engine.model.norm.weight.data_ptr()
    expected = Engine(other).generate([prompt(7)], max_tokens=9, temperature=0)[0].tokens
    assert engine.generate([prompt(7)], max_tokens=9, temperature=0)[0].tokens == expected
    engine.load(model.named_parameters())
    assert engine.model.norm.weight.data_ptr() == own, "a second load reuses the memory"


def test_packed_layers_give_the_answers_of_plain_ones_and_can_be_loaded_anew() -> None:
    other = random_model(SHAPE, seed=2)
    prompts = [prompt(n) for n in (20, 3)]
    engine = Engine(random_model(SHAPE), pack="fp32")
    for model in (MODEL, other):
        wanted = [r.tokens for r in Engine(model).generate(prompts, max_tokens=12, temperature=0)]
        assert [r.tokens for r in engine.generate(prompts, max_tokens=12, temperature=0)] == wanted
        engine.load(other.named_parameters())
    text = prompt(60)
    for kind, most in (("fp16", 0.02), ("bf16", 0.5), ("int8", 1.0)):
        rounded = Engine(MODEL, pack=kind)  # type: ignore[arg-type]
        away = (rounded.score(text) - Engine(MODEL).score(text)).abs().max()
        assert 0 < away < most
    assert torch.equal(MODEL.norm.weight, random_model(SHAPE).norm.weight), "the given model is left as it is"


def test_the_given_model_is_left_as_it_is() -> None:
    model = random_model(SHAPE)
    ids = torch.tensor([prompt(12)])
    before = model(ids)
    Engine(model).generate([prompt(7)], max_tokens=3)
    after = model(ids)
    assert torch.equal(before, after)
    assert after.requires_grad


def test_weights_do_not_change_under_running_requests() -> None:
    engine = Engine(MODEL)
    engine.add(Request(tokens=prompt(3)))
    with pytest.raises(EngineError, match="running requests"):
        engine.load(MODEL.named_parameters())


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WeightsError, match="is missing"):
        Engine(MODEL).load([("norm.weight", torch.ones(48))])


def test_a_tied_model_is_served() -> None:
    model = random_model(replace(SHAPE, tie_embeddings=True))
    engine = Engine(model)
    (answer,) = engine.generate([prompt(5)], max_tokens=6, temperature=0)
    ids = prompt(5)
    for _ in range(6):
        ids.append(int(full_logits(model, ids)[-1].argmax()))
    assert answer.tokens == ids[5:]
    engine.load(model.named_parameters())
    assert engine.model.head.weight is engine.model.embedding.weight


def test_preempted_requests_give_the_answers_they_give_alone(pytestconfig: pytest.Config) -> None:
    prompts = [prompt(n, 1) for n in (30, 20, 41, 7, 25, 33)]
    settings = {"max_tokens": 28, "top_p": 0.9, "seed": 3}
    alone = [Engine(MODEL).generate([p], **settings)[0].tokens for p in prompts]
    for block, step_tokens in ((4, 16), (1, 5), (16, 256))[: 3 if pytestconfig.getoption("--proof") else 2]:
        tight = Limits(cache_tokens=112, length=96, block=block, step_tokens=step_tokens, batch=4)
        engine = Engine(MODEL, limits=tight)
        assert [r.tokens for r in engine.generate(prompts, **settings)] == alone, tight
        assert engine.stats.counters.preemptions > 0, tight
        check_blocks(engine.blocks)
        assert engine.blocks.free == engine.blocks.count, tight


def test_a_beginning_that_is_in_the_cache_is_not_computed_again() -> None:
    engine = Engine(MODEL, limits=Limits(block=8))
    system = prompt(50)
    wanted = [Engine(MODEL).generate([[*system, i]], max_tokens=10, temperature=0)[0].tokens for i in range(3)]
    for i in range(3):
        deltas = list(engine.stream(Request(tokens=[*system, i], max_tokens=10, temperature=0)))
        assert [token for delta in deltas for token in delta.tokens] == wanted[i]
        assert deltas[0].cached == (48 if i else 0)
        assert all(delta.cached is None for delta in deltas[1:])
    off = Engine(MODEL, limits=Limits(block=8, share=False))
    off.generate([system], max_tokens=1)
    assert next(off.stream(Request(tokens=system, max_tokens=1))).cached == 0


def test_other_weights_find_nothing_in_the_cache() -> None:
    engine = Engine(MODEL, limits=Limits(block=8))
    engine.load(MODEL.named_parameters())
    engine.generate([prompt(50)], max_tokens=1)
    other = random_model(SHAPE, seed=2)
    engine.load(other.named_parameters())
    (delta, *_) = engine.stream(Request(tokens=prompt(50), max_tokens=1, temperature=0))
    assert delta.cached == 0
    assert delta.tokens == Engine(other).generate([prompt(50)], max_tokens=1, temperature=0)[0].tokens


def test_the_answers_of_one_request_share_its_prompt_and_differ() -> None:
    engine = Engine(MODEL, limits=Limits(block=8))
    results = engine.generate([Request(tokens=prompt(50), n=4, max_tokens=12, seed=5)])
    assert [r.index for r in results] == [0, 1, 2, 3]
    assert len({tuple(r.tokens) for r in results}) == 4
    assert engine.stats.counters.cached_tokens == 3 * 48
    alone = Engine(MODEL).generate([Request(tokens=prompt(50), max_tokens=12, seed=5)])
    assert results[0].tokens == alone[0].tokens
    greedy = engine.generate([Request(tokens=prompt(50), n=3, max_tokens=12, temperature=0)])
    assert len({tuple(r.tokens) for r in greedy}) == 1


def test_the_first_answer_of_several_may_end_before_the_others_begin() -> None:
    engine = Engine(MODEL, limits=Limits(block=8, batch=1))
    results = engine.generate([Request(tokens=prompt(20), n=3, max_tokens=1, seed=5)])
    assert [r.finished for r in results] == ["length"] * 3
    id_ = engine.add(Request(tokens=prompt(20), n=3))
    engine.abort(id_)
    assert [delta.finished for delta in engine.step()] == ["abort"] * 3


def test_a_request_ends_when_its_time_is_over() -> None:
    engine = Engine(MODEL, limits=Limits(batch=1))
    long = engine.add(Request(tokens=prompt(5), max_tokens=300, timeout=0.05))
    waiting = engine.add(Request(tokens=prompt(5), max_tokens=300, timeout=0.01))
    ends = {id_: deltas[-1].finished for id_, deltas in finish(engine).items()}
    assert ends == {long: "timeout", waiting: "timeout"}
    assert engine.blocks.free == engine.blocks.count


def test_prompts_are_scored_with_the_answer_and_in_chunks() -> None:
    tokens = prompt(60)
    expected = full_logits(MODEL, tokens).log_softmax(-1)[:-1]
    engine = Engine(MODEL, limits=Limits(block=8, step_tokens=7))
    engine.generate([tokens], max_tokens=1)  # what is in the cache has no probabilities: it is computed again
    (result,) = engine.generate([Request(tokens=tokens, max_tokens=4, temperature=0, prompt_logprobs=2)])
    assert len(result.tokens) == 4
    assert result.prompt_logprobs is not None
    assert [chance.token for chance in result.prompt_logprobs] == tokens[1:]
    for chance, row in zip(result.prompt_logprobs, expected, strict=True):
        assert chance.logprob == pytest.approx(float(row[chance.token]), abs=5e-5)
        assert [token for token, _ in chance.top] == row.topk(2).indices.tolist()


def test_penalties_and_bias_are_openai_s() -> None:
    start = prompt(6)
    engine = Engine(MODEL)
    (first,) = engine.generate([Request(tokens=start, max_tokens=1, temperature=0, logprobs=100)])
    assert first.logprobs is not None
    best, second = first.logprobs[0].top[:2]
    gap = best[1] - second[1]
    for bias, token in ((-gap - 0.01, second[0]), (-gap + 0.01, best[0])):
        (answer,) = engine.generate([Request(tokens=start, max_tokens=1, temperature=0, logit_bias={best[0]: bias})])
        assert answer.tokens == [token]
    (free,) = engine.generate([Request(tokens=start, max_tokens=40, temperature=0)])
    (fresh,) = engine.generate([Request(tokens=start, max_tokens=40, temperature=0, frequency_penalty=2.0)])
    assert max(fresh.tokens.count(t) for t in fresh.tokens) < max(free.tokens.count(t) for t in free.tokens)


def test_stop_ids_cannot_come_before_the_least_length() -> None:
    engine = Engine(MODEL)
    (free,) = engine.generate([Request(tokens=prompt(9), max_tokens=12, temperature=0)])
    stop = free.tokens[0]
    (answer,) = engine.generate(
        [Request(tokens=prompt(9), max_tokens=12, temperature=0, stop_ids=(stop,), min_tokens=5)]
    )
    assert stop not in answer.tokens[:5]
    assert len(answer.tokens) >= 5


def test_a_cache_that_is_too_small_says_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(EngineError, match=r"room for 96 tokens of 576 bytes each, and a text may have 100"):
        Engine(MODEL, limits=Limits(length=100, cache_tokens=100))
    engine = Engine(MODEL, limits=Limits(cache_tokens=100))
    assert engine.length == 96
    assert "longer ones are refused" in caplog.text
    with pytest.raises(EngineError, match="there is room for 96"):
        engine.add(Request(tokens=prompt(96)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(tokens=[]), "the prompt is empty"),
        (Request(tokens=[5, 300]), r"outside the vocabulary \(got 300\).*0 to 299"),
        (Request(tokens=[-1]), "outside the vocabulary"),
        (Request(tokens=[1], max_tokens=0), "max_tokens"),
        (Request(tokens=[1], temperature=-0.1), "temperature"),
        (Request(tokens=[1], temperature=float("nan")), "temperature"),
        (Request(tokens=[1], top_p=0.0), "top_p"),
        (Request(tokens=[1], top_k=-1), "top_k"),
        (Request(tokens=[1], min_p=1.5), "min_p"),
        (Request(tokens=[1], repetition_penalty=0.0), "repetition_penalty"),
        (Request(tokens=[1], seed=-3), "seed"),
        (Request(tokens=[1], n=0), "n:"),
        (Request(tokens=[1], presence_penalty=2.5), "presence_penalty"),
        (Request(tokens=[1], logprobs=101), "logprobs"),
        (Request(tokens=[1], logit_bias={300: 1.0}), "logit_bias"),
        (Request(tokens=[1], logit_bias={3: float("nan")}), "logit_bias"),
        (Request(tokens=[1], timeout=0.0), "timeout"),
        (Request(tokens=[1], stop_strings=("x",)), "need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_anything_runs(request_: Request, message: str) -> None:
    engine = Engine(MODEL)
    with pytest.raises(EngineError, match=message):
        engine.generate([Request(tokens=[1], max_tokens=1), request_])
    assert not engine.is_busy


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(EngineError, match="cannot be empty"):
        Engine(MODEL, TOKENIZER).add(Request(tokens=[1], stop_strings=("",)))


def test_scoring_needs_two_tokens() -> None:
    with pytest.raises(EngineError, match="two tokens"):
        Engine(MODEL).score([1])


def test_a_request_whose_numbers_are_not_finite_ends_alone_and_leaves_nothing_behind() -> None:
    """Its neighbours go on, and its NaN keys reach no later request through masked positions."""
    model = build(SHAPE, 0)
    with torch.no_grad():
        model.embedding.weight[7] = float("nan")  # a damaged row: only prompts with token 7 fail
    engine = Engine(model)
    healthy = [[5], [6] * 40, [8, 9]]
    wanted = [r.tokens for r in engine.generate(healthy, max_tokens=4, temperature=0.0)]
    mixed = [healthy[0], [7] * 60, healthy[1], [5, 7], healthy[2]]
    for temperature in (0.0, 1.0):
        results = engine.generate(mixed, max_tokens=4, temperature=temperature, top_p=0.9, seed=1)
        assert [r.finished for r in results] == ["length", "error", "length", "error", "length"]
        assert [len(r.tokens) for r in results] == [4, 0, 4, 0, 4]
        if temperature == 0:
            assert [r.tokens for r in results[::2]] == wanted
    assert [r.tokens for r in engine.generate(healthy, max_tokens=4, temperature=0.0)] == wanted


def test_with_rounded_keys_an_answer_does_not_depend_on_what_the_cache_holds() -> None:
    """The first piece of a prompt sees its keys as they are found later: by a second request, or by its own chunks."""
    engines = [Engine(MODEL, TOKENIZER, Limits(cache="int8", step_tokens=size)) for size in (256, 32)]
    for seed in range(8):
        asked = Request(tokens=prompt(100, seed), max_tokens=12, temperature=1.0, seed=seed, logprobs=0)
        first, again, chunked = (engine.generate([asked])[0] for engine in (engines[0], *engines))
        assert engines[0].stats.counters.cached_tokens > 0
        for other in (again, chunked):
            assert other.tokens == first.tokens
            assert [c.logprob for c in other.logprobs or ()] == pytest.approx(
                [c.logprob for c in first.logprobs or ()], abs=1e-4
            )
