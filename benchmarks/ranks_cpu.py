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

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_cpu import SHAPES, Shape, machine, write_random_shards

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
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps per round")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in options.only}
    for number in range(options.rounds):
        for name in options.only if number % 2 == 0 else options.only[::-1]:
            print(f"round {number + 1} of {options.rounds}: {name} …", file=sys.stderr)
            speeds[name].append(start(name, options.shape, options.steps))
    first = options.only[0]
    rows = {
        name: {
            "tokens_per_s": round(statistics.median(found)),
            "to_the_first": round(statistics.median(a / b for a, b in zip(found, speeds[first], strict=True)), 3),
            "rounds": [round(speed) for speed in found],
        }
        for name, found in speeds.items()
    }
    print(f"shape {options.shape}, {machine()['cpu']}, {CORES} cores")
    for name, row in rows.items():
        print(f"{name:18}{row['tokens_per_s']:6} tokens/s   {row['to_the_first']:.3f} × {first}")
    if options.out:
        report = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": "python benchmarks/ranks_cpu.py " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "shape": vars(SHAPES[options.shape]),
            "contenders": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def start(name: str, shape: str, steps: int) -> float:
    """Run a contender in fresh processes and return its tokens per second."""
    from internlm.runtime import ALLOCATOR_SETTINGS

    world = CONTENDERS[name][0]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            job = {"name": name, "shape": shape, "steps": steps, "rank": rank, "folder": folder}
            settings = {"GLIBC_TUNABLES": ALLOCATOR_SETTINGS, "INTERNLM_ALLOCATOR": "off"}
            settings["OMP_NUM_THREADS"] = str(CORES // world)
            words = [sys.executable, __file__, "--worker", json.dumps(job)]
            processes.append(subprocess.Popen(words, env=os.environ | settings))
        codes = [process.wait(timeout=1200) for process in processes]
        if any(codes):
            raise SystemExit(f"{name}: a rank ended with {codes}")
        return float((Path(folder) / "speed").read_text())


def work(job: dict[str, Any]) -> None:
    """Be one rank of a contender; rank 0 writes the speed."""
    world, parallel = CONTENDERS[job["name"]]
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
    shape, folder = SHAPES[job["shape"]], Path(job["folder"])
    if job["rank"] == 0:
        write_random_shards(folder / "data", shape, (job["steps"] + 1) * shape.batch_rows)
    if world > 1:
        dist.barrier()
    train = train_ddp if job["name"] == "ddp" else train_ours
    marks = train(shape, job["steps"] + 1, folder, parallel)
    spent = [after - before for before, after in itertools.pairwise(marks)][1:]
    if job["rank"] == 0:
        (folder / "speed").write_text(str(shape.batch_tokens / statistics.median(spent)))
    if world > 1:
        dist.barrier()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may end a process that shuts Python down beside them with SIGABRT


def train_ours(shape: Shape, steps: int, folder: Path, parallel: dict[str, Any]) -> list[float]:
    """Train with the Trainer that a recipe gives; return the time before and after each step."""
    from train_cpu import tree_of

    from internlm import config
    from internlm.recipe import Recipe, prepare

    tree = tree_of(shape, steps, folder) | {"parallel": parallel}
    trainer = prepare(config.decode(Recipe, tree))
    trainer.meter.clear()
    marks = [time.perf_counter()]
    for _ in range(steps):
        trainer.step()
        trainer.meter.read()
        trainer.meter.clear()
        marks.append(time.perf_counter())
    return marks


def train_ddp(shape: Shape, steps: int, folder: Path, parallel: dict[str, Any]) -> list[float]:
    """Train transformers' Llama with DistributedDataParallel in a plain loop."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads, intermediate_size=shape.ffn_size, vocab_size=shape.vocab_size,
        max_position_embeddings=shape.seq_len, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = DistributedDataParallel(LlamaForCausalLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.randint(shape.vocab_size, (steps, shape.batch_rows, shape.seq_len))[:, rank::world]
    marks = [time.perf_counter()]
    for ids in rows:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        marks.append(time.perf_counter())
    return marks


if __name__ == "__main__":
    main()
