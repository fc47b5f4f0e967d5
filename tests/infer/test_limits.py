"""How much memory the cache of an engine may have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from internlm import runtime
from internlm.errors import EngineError
from internlm.infer import limits as limits_module
from internlm.infer.cache import Cache
from internlm.infer.engine import Engine, Limits
from internlm.model.config import DynamicScaling, ModelConfig, RopeConfig
from tests.models import random_model

MODEL = random_model(
    ModelConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, ffn_size=16, context_length=64)
)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(cache_tokens=10**12),
            "cache_tokens: 2.38e+05 GiB are asked for, and only 1.5 GiB are free on cpu. Give",
        ),
        (
            Limits(cache_bytes=2 * 2**30),
            "cache_bytes: 2 GiB are asked for, and only 1.5 GiB are free on cpu. Give less",
        ),
        (Limits(cache_bytes=2**63), "only 1.5 GiB are free on cpu"),
    ],
)
def test_a_cache_beyond_the_free_memory_is_refused_before_anything_is_taken(
    limits: Limits, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 3 * 2**29)
    monkeypatch.setattr("internlm.infer.engine.Blocks", lambda *_, **__: pytest.fail("blocks were made"))
    monkeypatch.setattr("internlm.infer.engine.Cache.__init__", lambda *_, **__: pytest.fail("the cache was made"))
    with pytest.raises(EngineError) as refused:
        Engine(MODEL, limits=limits)
    assert message in str(refused.value)


def test_bytes_are_as_many_tokens_as_they_have_room_for() -> None:
    per_token = Cache.bytes_per_token(MODEL)
    engine = Engine(MODEL, limits=Limits(cache_bytes=100 * per_token, block=4))
    assert engine.blocks.count * 4 == 100
    assert limits_module.cache_tokens(MODEL, Limits(cache_bytes=101 * per_token - 1), 64) == 100
    rounded = Engine(MODEL, limits=Limits(cache_bytes=100 * per_token, block=4, cache="int8"))
    assert rounded.blocks.count * 4 == 100 * per_token // Cache.bytes_per_token(MODEL, rounded=True) // 4 * 4


def test_the_cache_is_given_in_tokens_or_in_bytes() -> None:
    with pytest.raises(EngineError, match="cache_bytes: cannot be given together with cache_tokens"):
        Engine(MODEL, limits=Limits(cache_bytes=2**20, cache_tokens=100))


def test_memory_that_is_not_there_is_refused_before_weights_are_read() -> None:
    class Unread:
        def model(self, *place: object) -> None:
            raise AssertionError("weights are read")

    with pytest.raises(EngineError, match=r"cache_bytes: .*are asked for, and only"):
        Engine.of(Unread(), limits=Limits(cache_bytes=2**60))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="batch: must be at least 1"):
        Engine.of(Unread(), limits=Limits(batch=0))  # type: ignore[arg-type]


def test_an_answer_without_a_limit_goes_to_the_end_or_to_the_trained_length() -> None:
    """Beyond that, dynamic scaling would turn all keys for a length which such an answer seldom comes to."""
    assert Engine(MODEL, limits=Limits(length=100)).room(60) == 40
    rope = RopeConfig(scaling=DynamicScaling(original_length=64))
    engine = Engine(random_model(replace(MODEL.config, rope=rope)), limits=Limits(length=100))
    assert [engine.room(prompt) for prompt in (11, 63, 64, 99, 100, 200)] == [53, 1, 36, 1, 1, 1]
    short = Engine(engine.model, limits=Limits(length=50))
    assert short.room(11) == 39
