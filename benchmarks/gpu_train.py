"""Training on one GPU: our Trainer beside plain transformers, at the shape of InternLM-7B and the depth that fits.

    python benchmarks/gpu_train.py --plan                    # what fits, from shapes alone; needs no GPU
    python benchmarks/gpu_train.py                           # all of it: parity, ceilings, contenders
    python benchmarks/gpu_train.py --seq 2048 --rows 4 --recompute none --layers 12 --only ours+compile transformers
    python benchmarks/gpu_train.py --device cpu --preset toy --seq 64 --rows 2 --recompute none   # the same lines here

First the device must compute what the CPU computes in fp32 (`gpu_parity.py`); if it does not, nothing is measured.
Then each contender (`gpu_cases.py`) trains in a process of its own on random tokens: all contenders of a group at the
depth that fits all of them (`gpu_memory.py`), with the same rows, tokens and documents, reading the loss after each
step. A figure is the median over the measured steps, with the 10th and 90th percentile. MFU is useful work
(`internlm.cost.flops`: no recomputation) over the data sheet's dense bf16 peak, and over the best matrix product
measured here; with 8-bit products too, so that all are measured by one yardstick. The breakdown is of two profiled
steps (`gpu_trace.py`); `gap_ms` is a median unprofiled step less the time in which the profiled ones ran something.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_cases import DEEPEST, DEFAULT, SWITCHES, Case, check_name

RESULTS = Path(__file__).parent / "results"
ALLOCATOR = "expandable_segments:True"
"""PYTORCH_CUDA_ALLOC_CONF of every contender, unless it is set already."""
ATTEMPTS = 3
"""Depths that are tried when ours is out of memory, each an eighth less."""


def main() -> int:
    """Measure, print, write; return the exit code."""
    if sys.argv[1:2] == ["--worker"]:
        answer(json.loads(sys.argv[2]))
        return 0
    options = parse_options()
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(["python", "benchmarks/gpu_train.py", *sys.argv[1:]]),
    }
    groups = groups_of(options)
    if options.plan:
        available = options.memory_gib or _card_gib()
        for group in groups:
            plan(group, available)
        return 0
    report["hardware"] = run_worker({"task": "hardware", "device": options.device}, options)
    if "error" in report["hardware"]:
        print(report["hardware"]["error"], file=sys.stderr)
        return 1
    report["allocator"] = environment("")["PYTORCH_CUDA_ALLOC_CONF"]
    if not options.skip_parity:
        report["parity"] = run_worker({"task": "parity", "device": options.device}, options)
        write(report, options.out)
        if not is_equal(report["parity"], options.device) and not options.keep_going:
            return 1
    available = options.memory_gib or report["hardware"].get("memory_gib") or report["hardware"]["host"]["memory_gib"]
    report["groups"] = []
    for group in groups:
        measure(group, available, options, report)
    write(report, options.out)
    draw(report, options.out.with_suffix(".png"))
    print(f"\n{options.out}")
    ours = [row for group in report["groups"] for row in group["rows"] if row["name"].startswith("ours")]
    return 1 if any("error" in row for row in ours) else 0  # a peer that is missing is a row that says why


def parse_options() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="internlm-7b")
    parser.add_argument("--seq", type=int, nargs="+", default=[2048, 8192], help="tokens per row; a group each")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 1], help="rows of a micro-batch, per group")
    parser.add_argument("--recompute", nargs="+", default=["none", "operators"], help="policy of ours, per group")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="blocks, per group; 0: as many as fit")
    parser.add_argument("--documents", type=int, nargs="+", default=[1], help="per row, equally long, per group")
    parser.add_argument("--micro-batches", type=int, default=1, help="per step")
    parser.add_argument("--only", nargs="+", default=list(DEFAULT), metavar="NAME", help=f"+{', +'.join(SWITCHES)}")
    alone = "also ours with compact states alone, as deep as fits; on with the default groups"
    parser.add_argument("--deepest", action=argparse.BooleanOptionalAction, default=None, help=alone)
    parser.add_argument("--torchtitan", action="store_true", help="torchtitan too; a row that says why if it cannot")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, at least 10")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", help="of products; default: bfloat16, on a CPU float32")
    parser.add_argument("--memory-gib", type=float, help="memory to plan for; default: what the device has")
    parser.add_argument("--plan", action="store_true", help="print what fits and end")
    parser.add_argument("--skip-parity", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="measure although the parity failed; it is recorded")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a contender may take")
    parser.add_argument("--verbose", action="store_true", help="show what contenders print")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_train.json", help="JSON file; a PNG goes beside it")
    options = parser.parse_args()
    if options.steps < 10 or options.warmup < 1:
        parser.error("--steps must be at least 10 and --warmup at least 1")
    for name in ("rows", "recompute", "layers", "documents"):
        given = getattr(options, name)
        if len(given) == 1:
            setattr(options, name, given * len(options.seq))
        elif len(given) != len(options.seq):
            if given != parser.get_default(name):
                parser.error(f"--{name}: one value, or one for each of --seq {options.seq}")
            parser.error(f"--{name} is needed for --seq {options.seq}")
    try:
        options.only = [check_name(name) for name in options.only]
    except ValueError as error:
        parser.error(str(error))
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.deepest is None:
        options.deepest = options.seq == parser.get_default("seq")
    return options


def groups_of(options: argparse.Namespace) -> list[list[Case]]:
    """Return the cases, those of a group together."""
    names = options.only + ["torchtitan"] * options.torchtitan
    groups = []
    for number, seq_len in enumerate(options.seq):
        first = Case(
            names[0], options.preset, options.layers[number], seq_len, options.rows[number], options.micro_batches,
            options.documents[number], options.recompute[number], options.dtype, options.device, options.warmup,
            options.steps,
        )  # fmt: skip
        groups.append([replace(first, name=name) for name in names])
    if options.deepest:
        alone = replace(groups[0][0], micro_batches=1, recompute="full", layers=0)
        groups += [[replace(alone, name=name)] for name in DEEPEST]
    return groups


def plan(group: list[Case], available_gib: float) -> tuple[int, dict[str, float]]:
    """Return the depth of a group and what each contender takes; print them."""
    import gpu_memory

    first = group[0]
    full = replace(first, layers=0).shape
    if first.layers:
        kinds = {(case.library, case.states): case for case in group if case.library != "torchtitan"}
        needed = {case.name: gpu_memory.needed_gib(case) for case in kinds.values()}
        layers = first.layers
    else:
        layers, needed = gpu_memory.common_depth(group, available_gib)
    shape = first.at(layers).shape if layers else full
    print(
        f"\n{first.preset}, {layers} of {full.num_layers} blocks ({shape.num_parameters / 1e9:.2f} of "
        f"{full.num_parameters / 1e9:.2f} B parameters), rows {first.micro_rows} × {first.seq_len}, "
        f"documents per row {first.documents}, recompute {first.recompute}"
    )
    for name, gib in needed.items():
        fits = "" if gib <= available_gib else "  ! does not fit"
        print(f"  {name:34} needs {gib:5.1f} of {available_gib:.1f} GiB{fits}")
    print(f"  whole depth, before activations: {whole_depth(full)}")
    return layers, needed


def whole_depth(shape: Any) -> str:
    """Return what weights, gradients and states of the whole model take, in words."""
    sizes = {"float32": 16, "bf16states": 12, "int8states": 10, "all bf16": 8}
    return ", ".join(f"{name} {size * shape.num_parameters / 2**30:.0f} GiB" for name, size in sizes.items())


def measure(group: list[Case], available_gib: float, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run a group and add its figures to the report; ours out of memory: all of it again with fewer blocks."""
    layers, needed = plan(group, available_gib)
    entry: dict[str, Any] = {"planned_layers": layers, "planned_gib": needed, "rows": []}
    report["groups"].append(entry)
    if layers == 0:
        entry["rows"] = [{"name": case.name, "error": "one block does not fit"} for case in group]
        return
    for attempt in range(ATTEMPTS):
        cases = [case.at(layers) for case in group]
        entry |= {"case": {**cases[0].to_json(), "name": None}, "layers": layers, "rows": []}
        entry["parameters"], entry["tokens"] = cases[0].shape.num_parameters, cases[0].batch_tokens
        entry["useful_tflop"] = cases[0].flops / 1e12
        entry["ceilings"] = run_worker({"task": "ceilings", "case": cases[0].to_json()}, options)
        peak = peaks(entry["ceilings"], cases[0], report["hardware"]["device"])
        entry["peak_tflops"] = peak
        for case in cases:
            print(f"{case.name}, {layers} blocks …", file=sys.stderr)
            found = run_worker({"task": "case", "case": case.to_json()}, options)
            entry["rows"].append(summarise(case, found, peak))
            write(report, options.out)
            if is_out_of_memory(found) and case.library == "ours" and layers > 1:
                break
        else:
            break
        if attempt < ATTEMPTS - 1:
            layers = max(1, layers - max(1, layers // 8))
            print(f"out of memory; again with {layers} blocks", file=sys.stderr)
    print_table(entry)


def peaks(ceilings: dict[str, Any], case: Case, device: str) -> dict[str, float | None]:
    """Return what a perfect device would do, in TFLOPS: by data sheet, and as measured, in the case's dtype."""
    from internlm.cost import hardware

    sheet = hardware.peak_flops(device, case.dtype)
    best = ceilings.get("best", {})
    return {"data sheet": sheet and sheet / 1e12, "measured": best.get(case.dtype), "float8": best.get("float8")}


def summarise(case: Case, found: dict[str, Any], peak: dict[str, float | None]) -> dict[str, Any]:
    """Return the row of a contender."""
    row: dict[str, Any] = {"name": case.name, "policy": case.policy}
    if "error" in found:
        return row | {"error": found["error"]}
    times = sorted(found["step_s"])
    middle, tenths = statistics.median(times), statistics.quantiles(times, n=10)
    tflops = case.flops / middle / 1e12
    busy = found["breakdown"]["step_ms"] - found["breakdown"]["ms"]["idle"]
    figures = {
        "tokens_per_s": case.batch_tokens / middle,
        "step_ms": middle * 1e3,
        "step_ms_10_90": [tenths[0] * 1e3, tenths[-1] * 1e3],
        "tflops": tflops,
        "mfu": tflops / peak["data sheet"] if peak["data sheet"] else None,
        "of_measured_ceiling": tflops / peak["measured"] if peak["measured"] else None,
        "gap_ms": max(0.0, middle * 1e3 - busy),
    }
    return row | figures | found


def print_table(entry: dict[str, Any]) -> None:
    """Print the rows of a group."""
    peak = ", ".join(f"{name} {value:.4g}" for name, value in entry["peak_tflops"].items() if value)
    print(f"{entry['tokens']} tokens, {entry['useful_tflop']:.4g} TFLOP a step; peaks in TFLOPS: {peak}")
    head = f"{'tokens/s':>9} {'step ms':>8} {'[10–90 %]':>17} {'TFLOPS':>7} {'MFU':>6} {'of ceiling':>10} {'GiB':>6}"
    print(f"{'':34} {head}")
    for row in entry["rows"]:
        if "error" in row:
            print(f"{row['name']:34} {row['error']}")
            continue
        low, high = row["step_ms_10_90"]
        print(
            f"{row['name']:34} {row['tokens_per_s']:9.0f} {row['step_ms']:8.1f} {f'[{low:.1f}–{high:.1f}]':>17} "
            f"{row['tflops']:7.4g} {percent(row['mfu']):>6} {percent(row['of_measured_ceiling']):>10} "
            f"{row['peak_gib']:6.2f}{'' if row['same_model'] else '  ! another number of parameters'}"
        )
        parts = ", ".join(f"{name} {ms:.4g}" for name, ms in row["breakdown"]["ms"].items() if name != "idle")
        print(f"    {row['policy']}\n    ms: {parts}, gaps {row['gap_ms']:.4g}")
    sys.stdout.flush()


def is_equal(parity: dict[str, Any], device: str) -> bool:
    """Return whether every variant passed; print what did."""
    if "error" in parity:
        print(f"the comparison with the CPU failed: {parity['error']}", file=sys.stderr)
        return False
    failed = [row for row in parity["rows"] if not row["passed"]]
    for row in parity["rows"]:
        said = row.get("error") or f"loss {row['loss_error']:.1e}, gradient {row['gradient_error']:.1e} ({row['path']})"
        print(f"{'ok    ' if row['passed'] else 'FAILED'} {row['variant']:44} {said}")
    if failed:
        print(
            f"{device} does not compute what the CPU computes in {len(failed)} of {len(parity['rows'])} ways. Speed "
            "means nothing before that is mended (--keep-going measures all the same).",
            file=sys.stderr,
        )
    return not failed


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _card_gib() -> float:
    """Return the memory of the GPU here, or of the card that this is written for."""
    import torch
    from gpu_memory import CARD_GIB

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else CARD_GIB


def is_out_of_memory(found: dict[str, Any]) -> bool:
    return "out of memory" in found.get("error", "").lower() or "OutOfMemory" in found.get("error", "")


def write(report: dict[str, Any], path: Path) -> None:
    """Write what there is: a long measurement that is cut off keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw where the time of a step goes, a bar per contender; nothing without matplotlib."""
    from gpu_plot import bars

    drawn = bars(report, path)
    print("no plot: matplotlib is missing, or there is nothing to draw" if drawn is None else f"\n{drawn}")


# Workers: everything that touches the device.


def run_worker(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Do a job in a process of its own; return its result, or `error`."""
    with tempfile.TemporaryDirectory() as cache:
        try:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)],
                env=environment(cache),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=options.timeout,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {options.timeout:.0f} s"}
    if options.verbose:
        print(done.stderr, file=sys.stderr)
    try:
        return json.loads(done.stdout)
    except ValueError:  # it died without a word on stdout
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit {done.returncode}: {lines[-1]}"}


def environment(cache: str) -> dict[str, str]:
    """Return the environment of a worker: a compile cache of its own, the same allocator for all."""
    more = {"TORCHINDUCTOR_CACHE_DIR": cache, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR, **os.environ, **more}


def answer(job: dict[str, Any]) -> None:
    """Do a job and print its result as the one line on stdout; what libraries print goes to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        result = do(job)
    except Exception as error:  # whatever a contender raises becomes its row
        logging.exception("%s failed", job["task"])
        message = (str(error).strip().splitlines() or ["no message"])[0]
        result = {"error": f"{type(error).__name__}: {message}"}
    sys.stdout.flush()
    os.write(stdout, (json.dumps(result) + "\n").encode())


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a job."""
    import gpu_parity
    import gpu_work
    import torch

    device = job["case"]["device"] if "case" in job else job["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here: --plan needs none, and --device cpu measures the CPU")
    if job["task"] == "hardware":
        return gpu_work.hardware(device)
    if job["task"] == "parity":
        return {"rows": gpu_parity.compare(device)}
    case = Case(**job["case"])
    return gpu_work.ceilings(case) if job["task"] == "ceilings" else gpu_work.run_case(case)


if __name__ == "__main__":
    sys.exit(main())
