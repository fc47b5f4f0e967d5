"""A mixture of experts beside Transformers' Mixtral: forward and backward of one layer, the same weights and tokens.

    python benchmarks/experts_cpu.py
    python benchmarks/experts_cpu.py --out benchmarks/results/experts_cpu.json

Both are run in turn, several rounds; medians are reported, and how far outputs and gradients are apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import report
import torch
from torch import Tensor, nn

from internlm.model.attention import Documents
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.moe import Mixture

ROWS, LENGTH = 4, 1024
SHAPES = {
    "8 experts of 1,408, 2 a token": ModelConfig(
        vocab_size=2, hidden_size=512, num_layers=1, num_heads=8, ffn_size=1408, experts=ExpertsConfig(count=8)
    ),
    "64 experts of 256, 8 a token": ModelConfig(
        vocab_size=2, hidden_size=512, num_layers=1, num_heads=8, ffn_size=256,
        experts=ExpertsConfig(count=64, per_token=8),
    ),
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = [{"layer": name, **measure(shape, options.rounds)} for name, shape in SHAPES.items()]
    report.write(options.out, report.result(tokens=ROWS * LENGTH, rounds=options.rounds, rows=rows))


def measure(shape: ModelConfig, rounds: int) -> dict[str, Any]:
    """Return tokens per second of both, and the largest relative difference of what they compute."""
    torch.manual_seed(0)
    assert shape.experts is not None
    ours = Mixture(shape, shape.experts)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=shape.hidden_size**-0.5)
    theirs = _mixtral(ours, shape, shape.experts)
    x = torch.randn(ROWS, LENGTH, shape.hidden_size)
    direction = torch.randn_like(x)
    nowhere = Documents(None, "dense")
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: ours(x, nowhere),
        "transformers": lambda x: _first(theirs(x)),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, layer in sides.items():
            own = x.clone().requires_grad_()
            started = time.perf_counter()
            out = layer(own)
            out.backward(direction)
            times[name].append(time.perf_counter() - started)
            assert own.grad is not None
            results[name] = out.detach(), own.grad
    tokens = ROWS * LENGTH
    speeds = {name: round(tokens / statistics.median(spent[1:])) for name, spent in times.items()}
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(*results.values(), strict=True)]
    found = {
        "tokens_per_s": speeds,
        "times_faster": round(speeds["ours"] / speeds["transformers"], 2),
        "output_apart": apart[0],
        "gradient_apart": apart[1],
    }
    print(found)
    return found


def _mixtral(ours: Mixture, shape: ModelConfig, experts: ExpertsConfig) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_local_experts=experts.count,
        num_experts_per_tok=experts.per_token,
    )
    config._experts_implementation = "grouped_mm"  # what a whole model takes by itself
    theirs = MixtralSparseMoeBlock(config)
    names = ("w_gate", "w_up", "w_down")
    w_gate, w_up, w_down = (ours.experts.get_submodule(name).get_parameter("weight") for name in names)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([w_gate, w_up], 1))
        theirs.experts.down_proj.copy_(w_down)
    return theirs


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


if __name__ == "__main__":
    main()
