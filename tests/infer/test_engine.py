"""The engine against full forward passes: decoding, batching, stopping, seeds, scores, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from internlm.errors import EngineError, WeightsError
from internlm.infer.engine import Delta, Engine, Request
from internlm.model.config import DynamicScaling, ModelConfig, RopeConfig
from internlm.model.transformer import Transformer, build
from internlm.text.training import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat. 你好 👋 END"] * 4, 300)
SHAPE = ModelConfig(
    vocab_size=300, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=64, context_length=400
)


def random_model(config: ModelConfig = SHAPE, seed: int = 1) -> Transformer:
    model = build(config, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)
    return model


MODEL = random_model()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(100 * seed + length)).tolist()


def full_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.head.logits(model(torch.tensor([ids])))[0]


class Spy(Engine):
    """Keeps the logits of every step."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.steps: list[torch.Tensor] = []
        plain = self.model.head.logits

        def watched(hidden: torch.Tensor) -> torch.Tensor:
            out = plain(hidden)
            self.steps.append(out.clone())
            return out

        self.model.head.logits = watched  # type: ignore[method-assign]


def finish(engine: Engine) -> dict[int, list[Delta]]:
    found: dict[int, list[Delta]] = {}
    while engine.is_busy:
        for delta in engine.step():
            found.setdefault(delta.id, []).append(delta)
    return found


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_decoding_has_the_logits_of_a_full_forward_at_every_step(kv_heads: int) -> None:
    model = random_model(replace(SHAPE, num_kv_heads=kv_heads))
    engine = Spy(model)
    prompts = [prompt(n) for n in (5, 1, 300, 40)]  # 300 + 20 makes the cache grow
    answers = engine.generate(prompts, max_tokens=20, temperature=0)
    for row, (start, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = full_logits(model, start + answer.tokens)[len(start) - 1 : -1]
        got = torch.stack([step[row] for step in engine.steps])
        assert expected.std() > 0.5
        assert (got - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    prompts = [prompt(n, seed) for n, seed in [(3, 0), (90, 1), (12, 2), (300, 3), (7, 4), (31, 5), (64, 6)]]
    lengths = [30, 4, 17, 9, 25, 1, 12]
    requests = [Request(p, max_tokens=n, temperature=0) for p, n in zip(prompts, lengths, strict=True)]
    alone = [Engine(MODEL, max_batch=1).generate([request])[0].tokens for request in requests]
    for max_batch in (2, 3, 16):
        together = Engine(MODEL, max_batch=max_batch).generate(requests)
        assert [result.tokens for result in together] == alone


def test_requests_that_arrive_later_change_nothing() -> None:
    requests = [Request(prompt(10 + i), max_tokens=15, temperature=0) for i in range(6)]
    alone = [Engine(MODEL).generate([request])[0].tokens for request in requests]
    engine = Engine(MODEL, max_batch=3)
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
    requests = [Request(prompt(20, i), max_tokens=25, seed=i, **settings) for i in range(5)]  # type: ignore[arg-type]
    alone = [Engine(MODEL, seed=9).generate([request])[0].tokens for request in requests]
    together = Engine(MODEL, seed=4, max_batch=3).generate(requests)
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
    (answer,) = Engine(MODEL).generate([Request(start, max_tokens=40, temperature=0, repetition_penalty=1e6)])
    assert len(set(answer.tokens)) == 40
    assert not set(answer.tokens) & set(start)


def test_a_stop_id_ends_the_answer_and_is_not_shown() -> None:
    engine = Engine(MODEL, TOKENIZER)
    free = engine.generate([Request(prompt(9), max_tokens=12, temperature=0)])[0]
    assert (free.finished, len(free.tokens)) == ("length", 12)
    stop = next(token for i, token in enumerate(free.tokens) if i > 2 and token not in free.tokens[:i])
    cut = free.tokens.index(stop)
    stopped = engine.generate([Request(prompt(9), max_tokens=12, temperature=0, stop_ids=(stop,))])[0]
    assert stopped.finished == "stop"
    assert stopped.tokens == free.tokens[: cut + 1]
    assert stopped.text == TOKENIZER.decode(free.tokens[:cut], skip_special=True)


class Dictated(Engine):
    """Writes what it is told, so that text can be tested: the most probable token is the next of `script`."""

    def __init__(self, text: str, **settings) -> None:
        super().__init__(MODEL, TOKENIZER, **settings)
        table = {TOKENIZER.token_bytes(i): i for i in range(300) if i < TOKENIZER.vocab_size}
        script = iter([table[bytes([byte])] for byte in text.encode()])

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(len(hidden), 300)
            out[:, next(script)] = 100.0
            return out

        self.model.head.logits = logits  # type: ignore[method-assign]


def test_a_stop_string_across_tokens_ends_the_answer_and_is_cut_off() -> None:
    engine = Dictated("say END. more")
    deltas = list(engine.stream(Request([1], max_tokens=13, temperature=0, stop_strings=("END.", "zzz"))))
    assert "".join(delta.text for delta in deltas) == "say "
    assert deltas[-1].finished == "stop"
    assert len(deltas) == 8
    assert not any("E" in delta.text for delta in deltas)


def test_characters_come_whole() -> None:
    deltas = list(Dictated("你👋").stream(Request([1], max_tokens=7, temperature=0)))
    assert [delta.text for delta in deltas] == ["", "", "你", "", "", "", "👋"]


def test_a_character_cut_by_the_length_is_marked() -> None:
    deltas = list(Dictated("a你").stream(Request([1], max_tokens=3, temperature=0)))
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
    for request in (Request(prompt(3), 20, temperature=0), Request(prompt(3), 20), Request(prompt(3), 20, top_p=0.9)):
        (answer,) = engine.generate([request])
        assert max(answer.tokens) < TOKENIZER.vocab_size


def test_the_context_bounds_the_answer() -> None:
    engine = Engine(MODEL, max_length=30)
    (answer,) = engine.generate([Request(prompt(25), max_tokens=50, temperature=0)])
    assert (answer.finished, len(answer.tokens)) == ("length", 5)
    with pytest.raises(EngineError, match="30 tokens are too many"):
        engine.add(Request(prompt(30)))
    assert len(engine.generate([Request(prompt(29), max_tokens=9)])[0].tokens) == 1


def test_abort_ends_running_and_waiting_requests_and_leaves_the_others_alone() -> None:
    requests = [Request(prompt(10, i), max_tokens=10, temperature=0) for i in range(4)]
    alone = [Engine(MODEL).generate([request])[0].tokens for request in requests]
    engine = Engine(MODEL, max_batch=2)
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
    requests = [Request(prompt(10, i), max_tokens=8, temperature=0) for i in range(2)]
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
    engine.add(Request(prompt(5), max_tokens=4, temperature=0))
    engine.step()
    assert (engine.score(ids) - expected).abs().max() < 1e-5  # in the middle of an answer
    left = [token for deltas in finish(engine).values() for delta in deltas for token in delta.tokens]
    assert left == Engine(MODEL).generate([prompt(5)], max_tokens=4, temperature=0)[0].tokens[1:]


def test_with_dynamic_scaling_the_base_of_each_request_is_its_own() -> None:
    scaling = RopeConfig(scaling=DynamicScaling(original_length=32))
    model = random_model(replace(SHAPE, rope=scaling))
    requests = [Request(prompt(n), max_tokens=20, temperature=0) for n in (8, 80, 30)]
    alone = [Engine(model).generate([request])[0].tokens for request in requests]
    assert [r.tokens for r in Engine(model).generate(requests)] == alone
    long = prompt(60)
    expected = full_logits(model, long).log_softmax(-1)[:-1].gather(1, torch.tensor(long[1:])[:, None]).squeeze(1)
    assert (Engine(model).score(long) - expected).abs().max() < 1e-5


def test_weights_are_shared_until_others_are_loaded() -> None:
    model, other = random_model(), random_model(seed=2)
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


def test_the_given_model_is_left_as_it_is() -> None:
    model = random_model()
    ids = torch.tensor([prompt(12)])
    before = model(ids)
    Engine(model).generate([prompt(7)], max_tokens=3)
    after = model(ids)
    assert torch.equal(before, after)
    assert after.requires_grad


def test_weights_do_not_change_under_running_requests() -> None:
    engine = Engine(MODEL)
    engine.add(Request(prompt(3)))
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


def test_a_step_that_fails_ends_the_running_requests_and_the_next_works() -> None:
    engine = Engine(MODEL)
    plain = engine.model.head.logits

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    engine.model.head.logits = fail  # type: ignore[method-assign]
    engine.add(Request(prompt(4)))
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    engine.model.head.logits = plain  # type: ignore[method-assign]
    assert [delta.finished for delta in engine.step()] == ["abort"]
    assert engine.generate([prompt(4)], max_tokens=2)[0].finished == "length"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt is empty"),
        (Request([5, 300]), r"outside the vocabulary \(got 300\).*0 to 299"),
        (Request([-1]), "outside the vocabulary"),
        (Request([1], max_tokens=0), "max_tokens"),
        (Request([1], temperature=-0.1), "temperature"),
        (Request([1], temperature=float("nan")), "temperature"),
        (Request([1], top_p=0.0), "top_p"),
        (Request([1], top_k=-1), "top_k"),
        (Request([1], min_p=1.5), "min_p"),
        (Request([1], repetition_penalty=0.0), "repetition_penalty"),
        (Request([1], seed=-3), "seed"),
        (Request([1], stop_strings=("x",)), "need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_anything_runs(request_: Request, message: str) -> None:
    engine = Engine(MODEL)
    with pytest.raises(EngineError, match=message):
        engine.generate([Request([1], max_tokens=1), request_])
    assert not engine.is_busy


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(EngineError, match="cannot be empty"):
        Engine(MODEL, TOKENIZER).add(Request([1], stop_strings=("",)))


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
        results = engine.generate([Request(p, max_tokens=4, temperature=temperature, top_p=0.9, seed=1) for p in mixed])
        assert [r.finished for r in results] == ["length", "error", "length", "error", "length"]
        assert [len(r.tokens) for r in results] == [4, 0, 4, 0, 4]
        if temperature == 0:
            assert [r.tokens for r in results[::2]] == wanted
    assert [r.tokens for r in engine.generate(healthy, max_tokens=4, temperature=0.0)] == wanted


@pytest.mark.parametrize("where", ["admit", "prefill"])
def test_running_out_of_memory_on_a_prompt_ends_that_request_and_the_next_works(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(build(SHAPE, 0))

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine.cache, where, fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([[1, 2]], max_tokens=2)
    assert not engine.is_busy
    monkeypatch.undo()
    assert len(engine.generate([[1, 2]], max_tokens=2)[0].tokens) == 2


def test_a_cache_that_could_not_grow_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(build(SHAPE, 0))
    make = engine.cache._new
    calls = iter(range(100))

    def fail_late(slots: int, length: int) -> torch.Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return make(slots, length)

    monkeypatch.setattr(engine.cache, "_new", fail_late)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([[1, 2]], max_tokens=2)
    monkeypatch.undo()
    assert len(engine.generate([[1, 2]], max_tokens=2)[0].tokens) == 2
