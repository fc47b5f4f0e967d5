"""Steps in which every text goes on by one token: the way of GPUs, here kernel by kernel, against the eager one."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.infer.cache import Cache
from internlm.infer.decode import Decoding, batch_sizes
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Request, Result
from internlm.model.config import DynamicScaling, ExpertsConfig, ModelConfig, RopeConfig
from tests.infer.engines import check_blocks
from tests.models import random_model

SHAPE = ModelConfig(
    vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48, context_length=96
)
MODELS = {
    "grouped": SHAPE,
    "biases, tied": replace(SHAPE, qkv_bias=True, output_bias=True, tie_embeddings=True, num_kv_heads=4),
    "a turn of its own for each text": replace(SHAPE, rope=RopeConfig(scaling=DynamicScaling(original_length=16))),
    "normalised queries": replace(SHAPE, qk_norm=True, num_kv_heads=1),
    "experts": replace(SHAPE, experts=ExpertsConfig(count=4, per_token=2)),
}
STRESS = {
    "plenty": Limits(batch=8),
    "no room for all": Limits(batch=8, block=4, length=64, cache_tokens=80, step_tokens=24),
    "chunks of one": Limits(batch=3, block=3, step_tokens=1),
    "chunks between": Limits(batch=5, block=2, step_tokens=7),
}


def requests() -> list[Request]:
    """Return texts of different lengths, some of which begin alike, fork, or ask for probabilities of their prompt."""
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(101, (20,), generator=generator).tolist()
    found = []
    for index, length in enumerate((1, 3, 9, 17, 2, 30)):
        tokens = torch.randint(101, (length,), generator=generator).tolist()
        tokens = beginning + tokens if index % 2 else tokens
        scores = 0 if index == 3 else None
        # Of different lengths: the batch gets smaller and larger.
        found.append(
            Request(
                tokens=tokens, max_tokens=3 + 2 * index, temperature=0, logprobs=1, n=1 + index % 2,
                prompt_logprobs=scores,
            )
        )  # fmt: skip
    return found


def numbers(results: list[Result]) -> torch.Tensor:
    """Return all log-probabilities."""
    given = [c.logprob for r in results for c in (r.logprobs or []) + (r.prompt_logprobs or [])]
    return torch.tensor(given)


@pytest.mark.parametrize(
    ("name", "stress"),
    [
        *[("grouped", stress) for stress in STRESS if stress != "chunks of one"],
        pytest.param("grouped", "chunks of one", marks=pytest.mark.proof),
        *[(name, "chunks between") for name in list(MODELS)[1:]],
    ],
)
def test_ids_and_logits_are_those_of_the_eager_way(name: str, stress: str) -> None:
    model, limits = random_model(MODELS[name]), STRESS[stress]
    eager = Engine(model, limits=limits)
    wanted = eager.generate(requests())
    assert eager.runner.decoding is None
    engine = Engine(model, limits=replace(limits, paged=True))
    got = engine.generate(requests())
    assert [r.tokens for r in got] == [r.tokens for r in wanted]
    assert (numbers(got) - numbers(wanted)).abs().max() < 2e-5
    assert engine.runner.decoding is not None
    if stress == "no room for all":
        assert engine.stats.counters.preemptions > 0
    check_blocks(engine.blocks)


def test_texts_drawn_by_chance_are_those_of_the_eager_way() -> None:
    model = random_model(SHAPE)
    asked = [
        Request(tokens=[1, 2, 3], max_tokens=12, temperature=t, top_p=p, top_k=k, seed=seed, repetition_penalty=1.2)
        for seed, (t, p, k) in enumerate([(1.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 5), (0.0, 1.0, 0)])
    ]
    wanted = Engine(model).generate(asked)
    got = Engine(model, limits=Limits(paged=True)).generate(asked)
    assert [r.tokens for r in got] == [r.tokens for r in wanted]


class NoWord(TorchDispatchMode):
    """Refuses operators that make the host wait for the device, or send it numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for word in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal.default", "is_nonzero", "masked_select"):
            assert word not in name, f"{name} makes the host wait"
        return func(*args, **kwargs or {})


def decoding(limits: Limits) -> tuple[Engine, Decoding]:
    engine = Engine(random_model(SHAPE), limits=replace(limits, paged=True))
    assert engine.runner.decoding is not None
    return engine, engine.runner.decoding


def test_a_step_says_no_word_between_host_and_device() -> None:
    _, ours = decoding(Limits(batch=4))
    with torch.inference_mode(), NoWord():
        ours._step(4)


def test_rows_that_fill_the_batch_write_to_no_text() -> None:
    engine, ours = decoding(Limits(batch=4, block=4, cache_tokens=100))
    stored = engine.cache._stored
    stored.fill_(7.0)
    ours.warm_up()
    assert (stored[..., : engine.blocks.count * 4, :] == 7).all()
    assert (stored[..., engine.blocks.count * 4, :] != 7).any()
    assert ours._logits.isfinite().all()


def test_a_graph_that_cannot_be_made_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it can be made")
    engine, ours = decoding(Limits(batch=4))
    ours.uses_graphs = True  # as on a GPU; there is none
    with caplog.at_level(logging.WARNING):
        got = engine.generate([[1, 2], [3]], max_tokens=5, temperature=0)
    wanted = Engine(engine.model, limits=Limits()).generate([[1, 2], [3]], max_tokens=5, temperature=0)
    assert [r.tokens for r in got] == [r.tokens for r in wanted]
    assert sum("CUDA graph" in record.message for record in caplog.records) == 1
    assert not ours.uses_graphs


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (24, [1, 2, 4, 8, 16, 24])],
)
def test_batches_are_filled_up_to_one_of_these(most: int, sizes: list[int]) -> None:
    assert batch_sizes(most) == sizes


def test_keys_and_values_in_8_bits_cost_little_and_take_half() -> None:
    model = random_model(replace(SHAPE, num_kv_heads=4, head_dim=32))
    limits = Limits(batch=8, step_tokens=16)
    exact = Engine(model, limits=limits)
    texts = [[*r.tokens, *range(20)] for r in requests()]
    wanted = torch.cat([exact.score(text) for text in texts])
    assert wanted.std() > 0.3
    ways = replace(limits, cache="int8"), replace(limits, cache="int8", paged=True, step_tokens=1)
    for rounded in (Engine(model, limits=way) for way in ways):
        got = torch.cat([rounded.score(text) for text in texts])
        error = (got - wanted).abs()
        # In nats; attention of this model is far sharper than a trained one's.
        assert 0 < error.mean() < 0.03
        assert error.max() < 0.3
        cache, per_token = rounded.cache, Cache.bytes_per_token(model, rounded=True)
        assert cache._scales is not None
        held = cache._stored.nbytes + cache._scales.nbytes
        assert held == (rounded.blocks.count + 1) * rounded.blocks.size * per_token
    assert Cache.bytes_per_token(model) == 2 * 2 * 4 * 32 * 4
    assert per_token == 2 * 2 * 4 * (32 + 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_graphs_on_a_gpu_give_what_the_cpu_gives(name: str) -> None:
    model = random_model(MODELS[name])
    wanted = Engine(model).generate(requests())
    engine = Engine(model.to("cuda"), limits=Limits(batch=8, step_tokens=64))
    got = engine.generate(requests())
    assert engine.runner.decoding is not None
    if name != "experts":  # whose products in fp32 ask the host
        assert engine.runner.decoding._graphs
    assert [r.tokens for r in got] == [r.tokens for r in wanted]
    assert (numbers(got) - numbers(wanted)).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_in_bfloat16_are_close_to_the_eager_way() -> None:
    model = random_model(replace(SHAPE, head_dim=64)).bfloat16().to("cuda")
    texts = [[*r.tokens, 5, 6, 7] for r in requests()]
    limits = Limits(batch=8, step_tokens=1)
    got, wanted = (
        torch.cat([engine.score(text) for text in texts])
        for engine in (Engine(model, limits=replace(limits, paged=paged)) for paged in (True, False))
    )
    assert (got - wanted).abs().mean() < 0.05
