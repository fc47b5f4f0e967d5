"""Training throughput on the CPU: our Trainer and those of the libraries one would otherwise take, on the same model.

    python benchmarks/train_cpu.py                               # both shapes, three rounds, what is installed here
    python benchmarks/train_cpu.py --peer-python PEERS/bin/python --out results.json
    python benchmarks/train_cpu.py --shape A --only ours litgpt --allocator both

Every contender trains in fp32 with AdamW, gradient clipping at 1.0, untied embeddings and no biases, on full rows of
random tokens, one document each, and reads its loss after every step; all get the same threads and the same allocator
settings. Each runs in a fresh process, once per round; rounds go through the contenders forwards and backwards in
turn, so that a machine that slows down slows all alike. A round's figure is the median of its steps without the first;
the table shows the median over rounds, and the ratio to ours in the same round. The first step, which compiles, is
told apart: in round 1 from an empty cache of torch.compile, later from what round 1 left in it.

Peers: transformers with accelerate, torchtitan (0.3), litgpt. They may sit in a virtual environment of their own, so
that their pins do not meet ours: install the same torch there first, and numpy >= 2 last (litgpt 0.5.9 asks for less,
torchtitan's pyarrow for more; litgpt works with it). A peer that is missing or fails is a row that says why.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
import workers
from shapes import STEPS, Shape, model_of, step_of

WORKER = str(Path(__file__).with_name("train_peers.py"))
ROUND_STEPS = {"A": 8, "B": 3}
LIBRARIES = ("ours", "transformers", "torchtitan", "litgpt")
NAMES = [name for library in LIBRARIES for name in (library, f"{library}+compile")]
REFERENCE = "ours"
PLAIN = "-plain"
"""Ends the name of ours without the allocator settings. Names are folders too, and compilers split paths at spaces."""
Rounds = dict[str, list[dict[str, Any]]]
"""Contender → what each of its rounds gave."""


def main() -> None:
    """Measure and print."""
    options = parse_options()
    names = [name for name in NAMES if name in options.only]
    if options.allocator == "both":
        names += [name + PLAIN for name in names if name.startswith("ours")]
    settings = {"threads": options.threads, "allocator": options.allocator, "dtype": "float32", "shapes": {}}
    rows: list[dict[str, Any]] = []
    for letter in options.shape:
        shape, parameters = step_of(letter), model_of(STEPS[letter][0]).num_parameters
        steps = options.steps or ROUND_STEPS[letter]
        settings["shapes"][letter] = asdict(shape) | {"parameters": parameters, "steps": steps}
        runs: Rounds = {name: [] for name in names}
        found: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as caches:
            for number in range(options.rounds):
                for name in names if number % 2 == 0 else names[::-1]:
                    print(f"shape {letter}, round {number + 1} of {options.rounds}: {name} …", file=sys.stderr)
                    runs[name].append(run(name, shape, steps, options, Path(caches)))
                    print(f"  {runs[name][-1].get('error', 'done')}", file=sys.stderr)
                found = [{"shape": letter} | row for row in summarise(runs, shape)]
                # After every round: a long measurement that is cut off keeps what it has.
                report.write(options.out, report.result(**settings, rows=rows + found))
        rows += found
        print(
            f"\nshape {letter}: {parameters / 1e6:.2f} M parameters, {shape.batch_rows} × {shape.seq_len} tokens a "
            f"step, fp32, threads {options.threads}, allocator settings {options.allocator}, rounds {options.rounds}"
        )
        show(found, parameters, options.threads)


def parse_options() -> argparse.Namespace:
    """Return the options of the command."""
    parser = report.parser(__doc__)
    parser.add_argument("--shape", action="append", choices=STEPS, help="may be repeated; default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="measured steps per round; default: A 8, B 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers; default: this")
    parser.add_argument(
        "--allocator",
        choices=["on", "off", "both"],
        default="on",
        help="our allocator settings, for every contender; both: on for every contender, and ours once more without",
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds one contender may take in a round")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders print, and their tracebacks")
    options = parser.parse_args()
    if min(options.rounds, options.threads, options.steps or 1) < 1:
        parser.error("--rounds, --steps and --threads must be at least 1")
    options.shape = list(dict.fromkeys(options.shape or STEPS))
    return options


def run(name: str, shape: Shape, steps: int, options: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """Run one contender in a process of its own; return its answer, and the load of other jobs beside it."""
    contender = name.removesuffix(PLAIN)
    tuned = options.allocator != "off" and contender == name
    load = os.getloadavg()[0]  # of other jobs, if the machine is not quiet
    found = workers.run(
        WORKER,
        {"name": contender, "shape": asdict(shape), "steps": steps, "threads": options.threads},
        timeout_s=options.timeout,
        python=sys.executable if contender.startswith("ours") else options.peer_python,
        variables=workers.on_cpu(options.threads, tuned) | {"TORCHINDUCTOR_CACHE_DIR": str(caches / name)},
        verbose=options.verbose,
    )
    return {"load": load, **found}


def summarise(runs: Rounds, shape: Shape) -> list[dict[str, Any]]:
    """Return one row per contender: its speed over rounds, and relative to ours in the same rounds."""
    speeds = {name: [speed(run, shape) for run in rounds] for name, rounds in runs.items()}
    rows = []
    for name, rounds in runs.items():
        good = [run for run in rounds if "error" not in run]
        errors = [run["error"] for run in rounds if "error" in run]
        row: dict[str, Any] = {"name": name, "failed": len(errors), "error": (errors or [None])[0], "rounds": rounds}
        if good:
            known = sorted(s for s in speeds[name] if s is not None)
            pairs = [
                mine / reference
                for mine, reference in zip(speeds[name], speeds.get(REFERENCE, []), strict=False)
                if mine and reference
            ]
            later = [run["first_step_s"] for run in rounds[1:] if "error" not in run]
            row |= {
                "tokens_per_s": statistics.median(known),
                "slowest": known[0],
                "fastest": known[-1],
                "ratios": pairs,
                "ratio": statistics.median(pairs) if pairs else None,
                "first_step_s": rounds[0].get("first_step_s"),
                "later_first_step_s": statistics.median(later) if later else None,
                "peak_rss_gib": statistics.median(run["peak_rss_bytes"] for run in good) / 2**30,
                "parameters": good[0]["parameters"],
                "threads": good[0]["threads"],
            }
        rows.append(row)
    return rows


def speed(run: dict[str, Any], shape: Shape) -> float | None:
    """Return tokens per second at the median step of a run; None where it failed."""
    return None if "error" in run else shape.batch_tokens / statistics.median(run["step_s"])


def show(rows: list[dict[str, Any]], parameters: int, threads: int) -> None:
    """Print the rows of one shape."""
    table = report.Table({
        "": f"<{max(len(row['name']) for row in rows)}", "tokens/s": "8.0f", "[min–max]": ">15", "× ours": "6.2f",
        "first step s": "12.1f", "later": "6.1f", "GiB": "5.2f", "× ours per round": "<0",
    })  # fmt: skip
    for row in rows:
        if "tokens_per_s" not in row:
            table.row(row["name"], None, row["error"])
            continue
        table.row(
            row["name"], row["tokens_per_s"], report.spread((row["slowest"], row["fastest"]), ".0f"), row["ratio"],
            row["first_step_s"], row["later_first_step_s"], row["peak_rss_gib"],
            " ".join(f"{ratio:.2f}" for ratio in row["ratios"]) + remark(row, parameters, threads),
        )  # fmt: skip


def remark(row: dict[str, Any], parameters: int, threads: int) -> str:
    """Return what a reader must know beside a row's figures, or nothing."""
    remarks = []
    if row["threads"] != threads:
        remarks.append(f"it ran with {row['threads']} threads")
    if row["parameters"] != parameters:
        remarks.append(f"another model: {row['parameters']:,} parameters")
    if row["failed"]:
        remarks.append(f"{row['failed']} of {len(row['rounds'])} rounds failed: {row['error']}")
    return "".join(f"  ! {text}" for text in remarks)


if __name__ == "__main__":
    main()
