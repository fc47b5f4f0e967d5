"""Data parallel on a CPU: two ranks of one thread each, beside one process of two threads, and beside torch DDP.

    python benchmarks/ranks_cpu.py                       # shape A, three rounds
    python benchmarks/ranks_cpu.py --rounds 5 --out benchmarks/results/ranks_cpu_A.json

The model, the step and the settings are those of `train_cpu.py` (fp32, AdamW, clipping, the loss read after each step,
the same allocator settings for all); each rank is pinned to a core of its own. `ddp` is what one would write without
us: `LlamaForCausalLM` of transformers, DistributedDataParallel over gloo, fused AdamW, a plain loop. Every contender
runs in fresh processes, once per round, in an order that turns around every round; a round's figure is the median of
its steps without the first, in tokens per second of all ranks together.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
import workers
from llama import llama_config
from shapes import LEARNING_RATE, STEPS, Shape, step_of

CONTENDERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "replicate 2": (2, {"replicate": 2}),
    "shard 2, zero 2": (2, {"shard": 2, "zero": "2"}),
    "shard 2, zero 3": (2, {"shard": 2, "zero": "3"}),
    "ddp": (2, {}),
}
CORES = 2


def main() -> None:
    """Measure and print."""
    if workers.is_worker():
        workers.answer(do)
        return
    parser = report.parser(__doc__)
    parser.add_argument("--shape", choices=STEPS, default="A")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps per round")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    options = parser.parse_args()
    shape = step_of(options.shape)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for number in range(options.rounds):
        for name in options.only if number % 2 == 0 else options.only[::-1]:
            print(f"round {number + 1} of {options.rounds}: {name} …", file=sys.stderr)
            runs[name].append(run(name, shape, options.steps))
    first = options.only[0]
    print(f"shape {options.shape}, {report.machine()['cpu']}, {CORES} cores")
    table = report.Table({"": "<18", "tokens/s": "8.0f", f"× {first}": f"{len(first) + 2}.3f"})
    rows = []
    speeds = {name: [found["tokens_per_s"] for found in rounds] for name, rounds in runs.items()}
    for name, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found, speeds[first], strict=True))
        row = {"name": name, "tokens_per_s": statistics.median(found), "ratio": ratio}
        rows.append(row | {"rounds": found, "versions": runs[name][0]["versions"]})
        table.row(*row.values())
    facts = {"cores": CORES, "dtype": "float32", "shape": asdict(shape)}
    report.write(options.out, report.result(**facts, rows=rows))


def run(name: str, shape: Shape, steps: int) -> dict[str, Any]:
    """Run a contender in fresh processes, one a rank; return what rank 0 measured."""
    world = CONTENDERS[name][0]
    with tempfile.TemporaryDirectory() as folder:
        job = {"name": name, "shape": asdict(shape), "steps": steps, "folder": folder}
        jobs = [job | {"rank": rank} for rank in range(world)]
        return workers.together(__file__, jobs, timeout_s=1200, variables=workers.on_cpu(CORES // world))[0]


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Be one rank of a contender; return the speed of all together."""
    world, parallel = CONTENDERS[job["name"]]
    shape, steps, folder = Shape(**job["shape"]), job["steps"] + 1, Path(job["folder"])
    if world > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[job["rank"] % len(cores)]})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(CORES // world)
    torch.manual_seed(0)
    if world > 1:
        store = f"file://{job['folder']}/store"
        dist.init_process_group("gloo", init_method=store, rank=job["rank"], world_size=world)
    marks: list[float] = []

    def mark(loss: float | None) -> None:
        marks.append(time.perf_counter())

    if job["name"] == "ddp":
        train_ddp(shape, steps, mark)
    else:
        import random_run

        if job["rank"] == 0:
            random_run.write_shards(folder / "data", shape.vocab_size, shape.seq_len, steps * shape.batch_rows)
        if world > 1:
            dist.barrier()
        random_run.train(shape, steps, folder, mark, parallel=parallel)
    if world > 1:
        dist.barrier()
    spent = [after - before for before, after in itertools.pairwise(marks)][1:]
    return {"tokens_per_s": shape.batch_tokens / statistics.median(spent)}


def train_ddp(shape: Shape, steps: int, mark: Callable[[float | None], None]) -> None:
    """Train transformers' Llama with DistributedDataParallel in a plain loop."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaForCausalLM

    model = DistributedDataParallel(LlamaForCausalLM(llama_config(shape, shape.seq_len, use_cache=False)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.randint(shape.vocab_size, (steps, shape.batch_rows, shape.seq_len))[:, rank::world]
    mark(None)
    for ids in rows:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark(loss.item())


if __name__ == "__main__":
    main()
