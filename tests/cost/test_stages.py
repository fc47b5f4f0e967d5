"""Stages of a pipeline by cost."""

from __future__ import annotations

import pytest

from internlm.config import decode
from internlm.cost.flops import stage_layers
from internlm.model.config import ModelConfig
from internlm.model.presets import preset


def test_the_head_takes_blocks_from_the_last_stage() -> None:
    shape = ModelConfig(vocab_size=32000, hidden_size=64, num_layers=16, num_heads=4, ffn_size=128)
    counts = stage_layers(shape, 4, 64)
    assert sum(counts) == 16
    assert counts[-1] == 1  # the head is worth more than the other blocks of a stage
    assert max(counts[:-1]) - min(counts[:-1]) <= 1


@pytest.mark.parametrize(("name", "stages"), [("internlm-7b", 4), ("internlm-7b", 8), ("internlm-20b", 12)])
def test_no_other_split_has_a_shorter_longest_stage(name: str, stages: int) -> None:
    shape = decode(ModelConfig, preset(name))
    counts = stage_layers(shape, stages, 2048)
    assert sum(counts) == shape.num_layers
    assert min(counts) >= 1
    head = (
        2 * shape.embedding_parameters / (2 * (shape.matmul_parameters - shape.embedding_parameters) / shape.num_layers)
    )
    longest = max(*counts[:-1], counts[-1] + head)
    assert longest <= (shape.num_layers + head) / stages + 1


def test_as_many_stages_as_layers_have_one_each() -> None:
    shape = ModelConfig(vocab_size=100, hidden_size=64, num_layers=4, num_heads=4, ffn_size=128)
    assert stage_layers(shape, 4, 64) == [1, 1, 1, 1]
