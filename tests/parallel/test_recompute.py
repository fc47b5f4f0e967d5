"""What is computed again is compiled as well, and is the same."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.moe import SideLosses, mixtures
from internlm.model.transformer import build
from internlm.parallel.recompute import RecomputeConfig, recompute
from tests.parallel.conftest import of_proof

SHAPE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 48}
EXPERTS = ExpertsConfig(count=4)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("none", None),
        ("full", None),
        ("operators", None),
        ("full", EXPERTS),
        *of_proof([("none", EXPERTS), ("operators", EXPERTS)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "experts" if value else "dense",
)
def test_blocks_that_are_computed_again_are_compiled(
    kind: Literal["none", "full", "operators"], experts: ExpertsConfig | None
) -> None:
    graphs: list[int] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(sum("linear" in str(node.target) or "Function" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    model, ids = build(ModelConfig(**SHAPE, experts=experts), 0), torch.randint(64, (2, 16))
    for mixture in mixtures(model).values():
        mixture.sides = SideLosses(4, torch.device("cpu"))
    model(ids).square().sum().backward()
    wanted = [parameter.grad for parameter in model.blocks.parameters()]
    model.zero_grad()
    recompute(model, RecomputeConfig(kind=kind))
    for block in model.blocks.values():
        block.compile(backend=look)
    try:
        model(ids).square().sum().backward()
    finally:
        torch.compiler.reset()
    assert graphs
    if not (experts and kind == "operators"):  # there attention and experts are parts of their own
        assert len(graphs) == 1
    for parameter, gradient in zip(model.blocks.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    for mixture in mixtures(model).values():
        assert mixture.sides is not None
        assert mixture.sides.counts[-1] == 2 * ids.numel()  # of two backwards, none twice
