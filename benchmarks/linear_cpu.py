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

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.model.quant import KINDS, pack_weight

SHAPE = {"vocab_size": 32000, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "ffn_size": 2048}
Product = Callable[[Tensor], Tensor]


def layers() -> list[list[tuple[int, int]]]:
    """Return (outputs, inputs) of all layers; those that can be joined are together."""
    d, f = SHAPE["hidden_size"], SHAPE["ffn_size"]
    block = [[(d, d)] * 3, [(d, d)], [(f, d)] * 2, [(d, f)]]
    return block * SHAPE["num_layers"] + [[(SHAPE["vocab_size"], d)]]


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
    weight = torch.randn(SHAPE["ffn_size"], SHAPE["hidden_size"], generator=generator)
    rows = torch.randn(64, SHAPE["hidden_size"], generator=generator)
    exact = rows.double() @ weight.double().t()
    products = {"F.linear": lambda x: F.linear(x, weight)} | {kind: pack_weight(weight, None, kind) for kind in KINDS}
    return {name: ((f(rows) - exact).norm() / exact.norm()).item() for name, f in products.items()}


def measure(rows: int, repeats: int, made: dict[str, list[Product]]) -> dict[str, list[tuple[float, float]]]:
    """Return billions of weights per second of the clock, and of the processors, of every pass by contender."""
    inputs = {width: torch.randn(rows, width) for width in (SHAPE["hidden_size"], SHAPE["ffn_size"])}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9, help="at most 4 rows; a third of it above 16")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    made, found = contenders(), errors()
    results: list[dict[str, object]] = []
    head = f"{'error':>8} {'G/s':>7} {'range':>15} {'G/cpu s':>9} {'× F.linear':>10}"
    print(f"{'threads':>7} {'rows':>4} {'weights':9} {head}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for rows in arguments.rows:
            speeds = measure(rows, arguments.repeats if rows <= 16 else max(3, arguments.repeats // 3), made)
            for name, passes in speeds.items():
                wall, processor = zip(*passes, strict=True)
                # Within a pass: both then ran beside much the same neighbours.
                ratios = [other[1] / plain[1] for other, plain in zip(passes, speeds["F.linear"], strict=True)]
                figures = {
                    "giga_per_s": statistics.median(wall),
                    "slowest": min(wall),
                    "fastest": max(wall),
                    "giga_per_processor_s": statistics.median(processor),
                    "ratio": statistics.median(ratios),
                }
                results.append({"threads": threads, "rows": rows, "weights": name, "error": found[name]} | figures)
                spread = f"[{min(wall):.2f}-{max(wall):.2f}]"
                print(
                    f"{threads:>7} {rows:>4} {name:9} {found[name]:>8.1e} {figures['giga_per_s']:>7.2f} {spread:>15}"
                    f" {figures['giga_per_processor_s']:>9.2f} {figures['ratio']:>10.2f}",
                    flush=True,
                )
    if arguments.out:
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "shape": SHAPE,
            "rows": results,
        }
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
