"""What ranks send each other in a step, counted on the real step and by formula.

python benchmarks/traffic.py              the whole InternLM-7B on 1,024 ranks: flat ZeRO-3 against Hybrid Zero
python benchmarks/traffic.py --recipes    a step of every recipe that names its number of ranks, all layers

Nothing is timed here: one process stands for one rank (internlm.plan.dryrun).
Results: benchmarks/results/traffic_*.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from internlm import config
from internlm import recipe as recipes
from internlm.cost import traffic
from internlm.parallel.mesh import Layout
from internlm.plan import dryrun
from internlm.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GPUS_PER_NODE = 8
MOST_MICRO_BATCHES = 4
"""Traffic is linear in the number of micro-batches from the second on; a step of 128 takes minutes to trace."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "flat": {"shard": 1024, "zero": "3"},
    "hybrid": {"replicate": 128, "shard": 8, "zero": "2"},
    "hybrid-3": {"replicate": 128, "shard": 8, "zero": "3"},
}


def world_of(recipe: Recipe) -> int | None:
    """Return the number of ranks that a recipe's sizes multiply to; None where one of them takes what is left."""
    sizes = recipe.parallel
    return sizes.pipeline * sizes.replicate * sizes.shard * sizes.context * sizes.tensor or None


def with_micro_batches(recipe: Recipe, world_size: int, most: int) -> Recipe:
    """Return the recipe of a shorter step, with at most so many micro-batches on each rank."""
    data, length = Layout.of(recipe.parallel, world_size).data, recipe.data.seq_len
    micro = recipe.train.micro_rows(length, data) * data * length
    return replace(recipe, train=replace(recipe.train, batch_tokens=min(recipe.train.batch_tokens, most * micro)))


def measure(recipe: Recipe, rank: int, world_size: int) -> dict[str, Any]:
    """Return what a rank's step exchanges, counted and by formula, and stop if they differ.

    The formula knows no experts: their steps are counted only, by group instead of axis.
    """
    started = time.perf_counter()
    step = dryrun.dry_run(recipe, rank, world_size)
    if dryrun.shape_of(recipe).experts is None:
        collectives = traffic.step_traffic(dryrun.run_of(recipe, world_size), rank)
        assert step.exchanges == traffic.by_group(collectives), "the formula is not what the step does"
        exchanges = [
            {"axis": axis, "kind": kind, "calls": calls, "bytes": size}
            for (axis, kind), (calls, size) in sorted(traffic.by_axis(collectives).items())
        ]
    else:
        found = sorted(step.exchanges.items())
        collectives = [traffic.Collective("world", key[2], *sums, *key[:2]) for key, sums in found]
        exchanges = [
            {"ranks": ranks, "apart": stride, "kind": kind, "calls": calls, "bytes": size}
            for (ranks, stride, kind), (calls, size) in found
        ]
    data, length = Layout.of(recipe.parallel, world_size).data, recipe.data.seq_len
    micro_rows = recipe.train.micro_rows(length, data)
    return {
        "rank": rank,
        "ranks": world_size,
        "micro_batches": recipe.train.batch_tokens // length // data // micro_rows,
        "exchanges": exchanges,
        "total": {name: round(value) for name, value in traffic.total(collectives, GPUS_PER_NODE)._asdict().items()},
        "resident_gb": round((8 * step.weights + 8 * step.updated) / 1e9, 2),
        "took_s": round(time.perf_counter() - started, 1),
    }


def compare() -> dict[str, Any]:
    """Return both layouts of the 7B on 1,024 ranks, one and four micro-batches, and their ratios."""
    rows: dict[str, Any] = {}
    for micro_batches in (1, 4):
        for name, parallel in LAYOUTS.items():
            tree = {
                "run": "runs/traffic",
                "model": config.encode(recipes.load(ROOT / "recipes/pretrain/internlm-7b.yaml").value.model),
                "data": {"seq_len": 2048, "train": {"none": {"path": "none"}}},
                "train": {"tokens": 1, "batch_tokens": 1024 * 4096 * micro_batches, "micro_batch_rows": 2},
                "parallel": parallel,
            }
            rows[f"{name}, {micro_batches} micro-batches"] = measure(config.decode(Recipe, tree), 0, 1024)
    ratios = {}
    for micro_batches in (1, 4):
        flat, hybrid = (rows[f"{name}, {micro_batches} micro-batches"]["total"] for name in ("flat", "hybrid"))
        ratios[str(micro_batches)] = {
            name: round(flat[name] / hybrid[name], 2) for name in ("spanning_bytes", "crossing_bytes", "steps")
        }
    return {"rows": rows, "flat over hybrid": ratios}


def every_recipe() -> dict[str, Any]:
    """Return the first and the last rank of every recipe that names its ranks."""
    rows: dict[str, Any] = {}
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        recipe, name = recipes.load(path).value, str(path.relative_to(ROOT))
        world_size = world_of(recipe)
        if recipe.model is None or world_size is None:
            continue
        recipe = with_micro_batches(recipe, world_size, MOST_MICRO_BATCHES)
        rows[name] = [measure(recipe, rank, world_size) for rank in sorted({0, world_size - 1})]
        show(rows[name][0], name)
    return {"rows": rows, "most_micro_batches": MOST_MICRO_BATCHES}


def show(row: dict[str, Any], name: str) -> None:
    """Print a line of the table."""
    sums = row["total"]
    print(
        f"{name:48} {row['ranks']:5} {row['micro_batches']:3} {sums['calls']:6} {sums['steps']:8} "
        f"{sums['sent_bytes'] / 1e9:9.2f} {sums['spanning_bytes'] / 1e9:9.2f} {sums['crossing_bytes'] / 1e9:9.2f} "
        f"{row['resident_gb']:8.1f} {row['took_s']:7.1f}",
        flush=True,
    )


def main() -> None:
    """Run, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", action="store_true", help="every recipe instead of the comparison")
    chosen = parser.parse_args()
    head = ("", "ranks", "mb", "calls", "steps", "sent GB", "spanning", "crossing", "resident", "took s")
    print("{:48} {:>5} {:>3} {:>6} {:>8} {:>9} {:>9} {:>9} {:>8} {:>7}".format(*head))
    result = every_recipe() if chosen.recipes else compare()
    if not chosen.recipes:
        for name, row in result["rows"].items():
            show(row, name)
        print(json.dumps(result["flat over hybrid"], indent=1))
    about = {
        "command": shlex.join(["python", "benchmarks/traffic.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": recipes.versions(),
        "machine": platform.machine(),
        "gpus_per_node": GPUS_PER_NODE,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "units": "exchanges: calls, and bytes of whole tensors, of one rank and step; total: internlm.cost.traffic; "
        "resident: weights, gradients and AdamW moments in GB",
    }
    path = RESULTS / ("traffic_recipes.json" if chosen.recipes else "traffic_7b_1024.json")
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
