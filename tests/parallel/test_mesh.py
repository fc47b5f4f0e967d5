"""The axes: where a rank stands, and which sizes are refused, before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.errors import ConfigError
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.parallel.mesh import Layout, ParallelConfig
from internlm.parallel.recompute import RecomputeConfig, chosen
from internlm.train.step import TrainConfig

SHAPE = ModelConfig(vocab_size=96, hidden_size=32, num_layers=4, num_heads=8, num_kv_heads=4, ffn_size=48)
sizes = st.integers(1, 5)


@given(sizes, sizes, sizes, sizes, sizes)
def test_every_rank_has_a_place_of_its_own_and_tensor_ranks_are_neighbours(
    pipeline: int, replicate: int, shard: int, context: int, tensor: int
) -> None:
    layout = Layout(pipeline, replicate, shard, context, tensor)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert places == sorted(places)
    rows = {(p.replicate, p.shard): layout.data_rank(rank) for rank, p in enumerate(places)}
    assert sorted(rows.values()) == list(range(layout.data))
    for rank, place in enumerate(places):
        assert layout.data_rank(rank) == rows[place.replicate, place.shard]
        assert place.tensor == rank % tensor


def test_shard_takes_the_ranks_that_are_left() -> None:
    config = ParallelConfig(replicate=128, tensor=1)
    assert Layout.of(config, 1024) == Layout(replicate=128, shard=8)
    assert Layout.of(ParallelConfig(pipeline=2, tensor=4), 1024).shard == 128


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (
            {"tensor": 3}, 2,
            "parallel: tensor 3 needs a multiple of 3 ranks, and this run has 2 ranks. Start 3 ranks (internlm launch "
            "--nproc), or set parallel.tensor so that the product divides 2.",
        ),
        (
            {"pipeline": 2, "context": 2}, 6,
            "parallel: pipeline 2 × context 2 = 4 needs a multiple of 4 ranks, and this run has 6 ranks. Start 8 ranks "
            "(internlm launch --nproc), or set parallel.pipeline, parallel.context so that the product divides 6.",
        ),
        (
            {"shard": 4, "replicate": 2}, 4,
            "parallel: replicate 2 × shard 4 = 8 needs exactly 8 ranks, and this run has 4 ranks. Start 8 ranks "
            "(internlm launch --nproc), or set parallel.replicate, parallel.shard so that the product is 4 (shard 0 "
            "takes the ranks that are left).",
        ),
        (
            {"shard": 1}, 2,
            "parallel: shard 1 needs exactly 1 rank, and this run has 2 ranks. Start 1 rank (internlm launch --nproc), "
            "or set parallel.shard so that the product is 2 (shard 0 takes the ranks that are left).",
        ),
        (
            {"replicate": 8}, 1,
            "parallel: replicate 8 needs a multiple of 8 ranks, and this run has 1 rank. Start 8 ranks (internlm "
            "launch --nproc), or set parallel.replicate so that the product divides 1.",
        ),
    ],
)  # fmt: skip
def test_sizes_that_do_not_make_the_world_are_named(config: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Layout.of(ParallelConfig(**config), world)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"tensor": 3}, {}, r"tensor 3 does not divide model.num_heads 8.*model.num_kv_heads 4"),
        ({"tensor": 8}, {}, r"tensor 8 does not divide model.num_kv_heads 4"),
        ({"context": 3}, {}, "context 3 does not divide data.seq_len 64"),
        ({"context": 16, "tensor": 8}, {}, "tensor 8 does not divide the tokens of a context rank 4"),
        ({"pipeline": 8}, {}, "8 pipeline stages have only 4 layers"),
        ({"pipeline": 4}, {"micro": 8}, "a pipeline of 4 needs as many micro-batches per step, and there are 2"),
        ({"pipeline": 2}, {"tie_embeddings": True}, "tie_embeddings"),
        ({"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2}, {"rows": 5}, "5 micro-batches are no"),
        ({"pipeline": 2, "schedule": "zero-bubble"}, {"rows": 5}, "5 micro-batches do not divide over 2 rounds of"),
        ({"float8": True, "tensor": 2}, {}, "float8 needs multiples of 16, and model.ffn_size / tensor is 24"),
        ({"float8": True, "tensor": 4}, {}, "model.num_kv_heads × model.head_dim / tensor is 4"),
        ({"float8": True, "context": 8}, {}, "the tokens of a micro-batch on a rank is 8"),
        (
            {"pipeline": 2, "schedule": "zbv", "stages_per_rank": 2, "recompute": RecomputeConfig(kind="full")}, {},
            "schedule zbv parts .*recompute full",
        ),
        ({"replicate": 4, "shard": 1, "expert": 2}, {"experts": 4}, "expert 2 does not divide shard 1 × context 1"),
        ({"context": 4, "expert": 4}, {"experts": 6}, "expert 4 does not divide model.experts.count 6"),
        ({"context": 8, "expert": 1}, {"experts": 4, "ffn": 44}, "4 experts cannot be cut over the 8 ranks"),
        ({"context": 4, "expert": 4}, {}, "expert needs a model with experts"),
        ({"replicate": 2, "optimizer": "all"}, {"experts": 4}, "optimizer all does not cut the states of experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_so_is_refused_with_the_numbers(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    options = ParallelConfig(**config)
    world = 1
    for name in ("pipeline", "replicate", "context", "tensor"):
        world *= getattr(options, name)
    shape = ModelConfig(
        vocab_size=96, hidden_size=32, num_layers=4, num_heads=8, num_kv_heads=4, ffn_size=changes.get("ffn", 48),
        tie_embeddings=changes.get("tie_embeddings", False),
        experts=ExpertsConfig(count=changes["experts"]) if "experts" in changes else None,
    )  # fmt: skip
    layout, micro = Layout.of(options, world), changes.get("micro", 1)
    with pytest.raises(ConfigError, match=message):
        layout.check(options, shape, 64, micro, changes.get("rows", 16) // layout.data // micro)


def test_rows_of_a_step_divide_into_micro_batches_on_every_rank() -> None:
    assert TrainConfig(tokens=1024, batch_tokens=12 * 64, micro_batch_rows=3).micro_rows(64, 2) == 3
    train = TrainConfig(tokens=1024, batch_tokens=16 * 64, micro_batch_rows=16)
    with pytest.raises(ConfigError, match="does not divide the 8 rows of a step on each rank"):
        train.micro_rows(64, 2)
    with pytest.raises(ConfigError, match="are 16 rows, which do not divide over 3 ranks"):
        train.micro_rows(64, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 0}, "parallel.tensor"),
        ({"shard": -1}, "parallel.shard"),
        ({"schedule": "zbv"}, "stages_per_rank"),
        ({"schedule": "1f1b", "stages_per_rank": 2}, "stages_per_rank"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**fields)


def test_a_share_of_the_blocks_is_spread_evenly() -> None:
    assert chosen(8, 0.5) == [1, 3, 5, 7]
    assert chosen(8, 1.0) == list(range(8))
    assert chosen(8, 0.0) == []
    assert chosen(10, 0.3) == [3, 6, 9]
    assert all(len(chosen(32, n / 32)) == n for n in range(33))
    with pytest.raises(ConfigError, match="ratio"):
        RecomputeConfig(ratio=1.5)
