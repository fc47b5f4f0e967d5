"""The matrix products of one decoding step on the CPU: plain ones and each kind of packed weights, at 1 to 128 rows.

    python benchmarks/linear_cpu.py                          # 134 M parameters, 1 and 2 threads
    python benchmarks/linear_cpu.py --out results.json

One figure is all products of a token: of 12 blocks and the head, 110 million weights, more than a cache holds. The
contenders take turns, so that a busy machine slows all alike; the table shows medians and ranges in billions of weights
per second (G/s × rows × 2 are GFLOP/s), the same per second of one processor, which waiting for others does not
lengthen, and by it the ratio to plain products in the same pass. Threads that wait for each other should not spin for
that: set OMP_WAIT_POLICY=passive on a busy machine. `error` is the root mean square of what a contender's results
differ from exact ones by, over that of the results, for random weights and rows.

What the kinds cost a trained model in quality: `pack_quality.py`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import report
import torch
import torch.nn.functional as F
from shapes import TOY, model_of
from torch import Tensor

from internlm.model.quant import KINDS, pack_weight

SHAPE = model_of(TOY)
Product = Callable[[Tensor], Tensor]
COLUMNS = {
    "threads": "7d", "rows": "4d", "weights": "<9", "error": "8.1e", "G/s": "7.2f", "[min–max]": ">15",
    "G/cpu s": "9.2f", "× F.linear": "10.2f",
}  # fmt: skip


def layers() -> list[list[tuple[int, int]]]:
    """Return (outputs, inputs) of all layers; those that can be joined are together."""
    d, f = SHAPE.hidden_size, SHAPE.ffn_size
    block = [[(d, d)] * 3, [(d, d)], [(f, d)] * 2, [(d, f)]]
    return block * SHAPE.num_layers + [[(SHAPE.vocab_size, d)]]


def contenders() -> dict[str, list[Product]]:
    """Return every product of a step by contender, on the same random weights."""
    made: dict[str, list[Product]] = {name: [] for name in ("F.linear", *KINDS)}
    for group in layers():
        weights = [torch.randn(shape) * 0.02 for shape in group]
        made["F.linear"] += [lambda x, w=w: F.linear(x, w) for w in weights]
        for kind in KINDS:
            made[kind].append(pack_weight(torch.cat(weights), None, kind))
    return made


def errors() -> dict[str, float]:
    """Return the error of each kind for one layer and 64 rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE.ffn_size, SHAPE.hidden_size, generator=generator)
    rows = torch.randn(64, SHAPE.hidden_size, generator=generator)
    exact = rows.double() @ weight.double().t()
    products = {"F.linear": lambda x: F.linear(x, weight)} | {kind: pack_weight(weight, None, kind) for kind in KINDS}
    return {name: ((f(rows) - exact).norm() / exact.norm()).item() for name, f in products.items()}


def measure(rows: int, repeats: int, made: dict[str, list[Product]]) -> dict[str, list[tuple[float, float]]]:
    """Return billions of weights per second of the clock, and of the processors, of every pass by contender."""
    inputs = {width: torch.randn(rows, width) for width in (SHAPE.hidden_size, SHAPE.ffn_size)}
    fused = [inputs[group[0][1]] for group in layers()]
    separate = [inputs[shape[1]] for group in layers() for shape in group]
    weights = sum(n * k for group in layers() for n, k in group)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for repeat in range(repeats + 1):
        for name, products in made.items():
            given = separate if name == "F.linear" else fused
            started = time.perf_counter(), time.process_time()
            for product, x in zip(products, given, strict=True):
                product(x)
            wall, spent = time.perf_counter() - started[0], time.process_time() - started[1]
            if repeat:  # the first warms up
                speeds[name].append((weights / wall / 1e9, weights / spent / 1e9))
    return speeds


@torch.inference_mode()
def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9, help="at most 4 rows; a third of it above 16")
    options = parser.parse_args()
    made, found = contenders(), errors()
    results: list[dict[str, object]] = []
    table = report.Table(COLUMNS)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for rows in options.rows:
            speeds = measure(rows, options.repeats if rows <= 16 else max(3, options.repeats // 3), made)
            for name, passes in speeds.items():
                wall, processor = zip(*passes, strict=True)
                # Within a pass: both then ran beside much the same neighbours.
                ratios = [other[1] / plain[1] for other, plain in zip(passes, speeds["F.linear"], strict=True)]
                row = {
                    "threads": threads,
                    "rows": rows,
                    "weights": name,
                    "error": found[name],
                    "giga_per_s": statistics.median(wall),
                    "slowest": min(wall),
                    "fastest": max(wall),
                    "giga_per_processor_s": statistics.median(processor),
                    "ratio": statistics.median(ratios),
                }
                results.append(row)
                speed, spread = row["giga_per_s"], report.spread(wall, ".2f")
                table.row(threads, rows, name, found[name], speed, spread, row["giga_per_processor_s"], row["ratio"])
    facts = {"load_average": os.getloadavg(), "capability": torch.backends.cpu.get_cpu_capability(), "preset": TOY}
    report.write(options.out, report.result(**facts, repeats=options.repeats, rows=results))


if __name__ == "__main__":
    main()
