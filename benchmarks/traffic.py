"""What ranks send each other in a step, counted on the real step and by formula.

python benchmarks/traffic.py              the whole InternLM-7B on 1,024 ranks: flat ZeRO-3 against Hybrid Zero
python benchmarks/traffic.py --recipes    a step of every recipe that names its number of ranks, all layers

Nothing is timed here: one process stands for one rank (internlm.plan.dryrun).
Results: benchmarks/results/traffic_*.json.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from typing import Any

import report

from internlm import config
from internlm import recipe as recipes
from internlm.cost import traffic
from internlm.parallel.mesh import Layout
from internlm.plan import dryrun
from internlm.recipe import Recipe

GPUS_PER_NODE = 8
MOST_MICRO_BATCHES = 4
"""Traffic is linear in the number of micro-batches from the second on; a step of 128 takes minutes to trace."""
COLUMNS = {
    "": "<48", "ranks": "5d", "mb": "3d", "calls": "6d", "steps": "8d", "sent GB": "9.2f", "spanning": "9.2f",
    "crossing": "9.2f", "resident": "8.1f", "took s": "7.1f",
}  # fmt: skip
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
        known = sorted(traffic.by_axis(collectives).items())
        exchanges = [{"axis": axis, "kind": kind, "calls": n, "bytes": size} for (axis, kind), (n, size) in known]
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


def compare(table: report.Table) -> dict[str, Any]:
    """Return both layouts of the 7B on 1,024 ranks, one and four micro-batches, and their ratios."""
    rows: list[dict[str, Any]] = []
    for micro_batches in (1, 4):
        tokens = 1024 * 4096 * micro_batches
        for name, parallel in LAYOUTS.items():
            tree = {
                "run": "runs/traffic",
                "model": config.encode(recipes.load(report.ROOT / "recipes/pretrain/internlm-7b.yaml").value.model),
                "data": {"seq_len": 2048, "train": {"none": {"path": "none"}}},
                "train": {"tokens": tokens, "batch_tokens": tokens, "micro_batch_rows": 2},
                "parallel": parallel,
            }
            rows.append({"name": name} | measure(config.decode(Recipe, tree), 0, 1024))
            show(table, rows[-1])
    ratios = {}
    for micro_batches in (1, 4):
        totals = {row["name"]: row["total"] for row in rows if row["micro_batches"] == micro_batches}
        ratios[str(micro_batches)] = {
            name: round(totals["flat"][name] / totals["hybrid"][name], 2)
            for name in ("spanning_bytes", "crossing_bytes", "steps")
        }
    return {"flat_over_hybrid": ratios, "rows": rows}


def every_recipe(table: report.Table) -> dict[str, Any]:
    """Return the first and the last rank of every recipe that names its ranks."""
    rows: list[dict[str, Any]] = []
    for path in sorted((report.ROOT / "recipes").rglob("*.yaml")):
        recipe, name = recipes.load(path).value, str(path.relative_to(report.ROOT))
        world_size = world_of(recipe)
        if recipe.model is None or world_size is None:
            continue
        recipe = with_micro_batches(recipe, world_size, MOST_MICRO_BATCHES)
        found = [{"name": name} | measure(recipe, rank, world_size) for rank in sorted({0, world_size - 1})]
        show(table, found[0])
        rows += found
    return {"most_micro_batches": MOST_MICRO_BATCHES, "rows": rows}


def show(table: report.Table, row: dict[str, Any]) -> None:
    """Print a line of the table."""
    sums = row["total"]
    sizes = [sums[name] / 1e9 for name in ("sent_bytes", "spanning_bytes", "crossing_bytes")]
    counts = [row["ranks"], row["micro_batches"], sums["calls"], sums["steps"]]
    table.row(row["name"], *counts, *sizes, row["resident_gb"], row["took_s"])


def main() -> None:
    """Run, print a table, write the result."""
    parser = report.parser(__doc__, report.RESULTS / "traffic_7b_1024.json")
    more = "every recipe instead of the comparison; its figures go to traffic_recipes.json"
    parser.add_argument("--recipes", action="store_true", help=more)
    options = parser.parse_args()
    if options.recipes and options.out == parser.get_default("out"):
        options.out = report.RESULTS / "traffic_recipes.json"
    table = report.Table(COLUMNS)
    found = every_recipe(table) if options.recipes else compare(table)
    if not options.recipes:
        print(json.dumps(found["flat_over_hybrid"], indent=1))
    about = {
        "gpus_per_node": GPUS_PER_NODE,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "units": "exchanges: calls, and bytes of whole tensors, of one rank and step; total: internlm.cost.traffic; "
        "resident: weights, gradients and AdamW moments in GB",
    }
    report.write(options.out, report.result(**about, **found))
    print(options.out)


if __name__ == "__main__":
    main()
