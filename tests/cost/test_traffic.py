"""Arithmetic about traffic that needs no step: groups on machines, rings, and the published comparison."""

from __future__ import annotations

import pytest

from internlm.config import decode
from internlm.cost.traffic import Collective, Run, by_axis, step_traffic, total
from internlm.model.config import ModelConfig
from internlm.model.presets import preset

SEVEN = decode(ModelConfig, preset("internlm-7b"))


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "sent", "crossing"),
    [
        ("all-gather", 8, 1, 7 / 8, 0),  # a machine
        ("all-gather", 16, 1, 15 / 16, 15 / 16 * 2 / 16),  # a ring over two: two of its 16 hops
        ("all-reduce", 4, 8, 2 * 3 / 4, 2 * 3 / 4),  # one rank of each of four machines
        ("reduce-scatter", 4, 4, 3 / 4, 3 / 4 * 2 / 4),  # two ranks in each of two
        ("all-to-all", 16, 1, 15 / 16, 8 / 16),  # half of the others are elsewhere
        ("send", 2, 4, 1, 0),
        ("send", 2, 8, 1, 1),
        ("send", 4, 4, 1, 1 / 3),  # of the three boundaries of a pipeline, one is also that of a machine
    ],
)
def test_what_leaves_a_machine_is_told_from_what_stays(
    kind: str, ranks: int, stride: int, sent: float, crossing: float
) -> None:
    one = Collective("shard", kind, 1, 1_000_000, ranks, stride)  # type: ignore[arg-type]
    assert one.sent_bytes == pytest.approx(1e6 * sent)
    assert one.crossing_bytes(8) == pytest.approx(1e6 * crossing)
    assert one.spans_nodes(8) == (crossing > 0)


def test_the_7b_moves_the_bytes_that_its_parameters_say() -> None:
    """Two bytes a parameter gathered, four summed; rows padded to the ranks add less than 2 %."""
    run = Run(model=SEVEN, seq_len=2048, micro_rows=2, micro_batches=1, shard=1024, zero="3")
    found = by_axis(step_traffic(run))
    assert found["shard", "all-gather"][1] == pytest.approx(2 * 2 * SEVEN.num_parameters, rel=0.02)
    assert found["shard", "reduce-scatter"][1] == pytest.approx(4 * SEVEN.num_parameters, rel=0.02)
    alone = Run(model=SEVEN, seq_len=2048, micro_rows=2, micro_batches=1, replicate=1024)
    assert by_axis(step_traffic(alone))["replicate", "all-reduce"][1] == 4 * SEVEN.num_parameters
    assert total(step_traffic(Run(model=SEVEN, seq_len=2048, micro_rows=2, micro_batches=1)), 8).calls == 0


def test_the_work_of_a_step_is_shared_by_its_pipeline_ranks() -> None:
    sizes = {"seq_len": 2048, "micro_rows": 1, "micro_batches": 8, "shard": 8}
    whole = Run(model=SEVEN, zero="1", **sizes)  # type: ignore[arg-type]
    parts = Run(model=SEVEN, pipeline=4, **sizes)  # type: ignore[arg-type]

    def summed(run: Run, places: int) -> int:
        ranks = range(0, 8 * places, 8)
        return sum(e.bytes for rank in ranks for e in step_traffic(run, rank) if e.kind == "reduce-scatter")

    assert summed(whole, 1) == summed(parts, 4)
    sends = [sum(e.calls for e in step_traffic(parts, rank) if e.kind == "send") for rank in (0, 8, 16, 31)]
    assert sends == [8, 16, 16, 8]
