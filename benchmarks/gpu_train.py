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
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_memory
import gpu_plot
import report
import torch
import workers
from gpu_cases import DEEPEST, DEFAULT, SWITCHES, Case, check_name

WORKER = str(Path(__file__).with_name("gpu_work.py"))
ALLOCATOR = "expandable_segments:True"
"""PYTORCH_CUDA_ALLOC_CONF of every contender, unless it is set already."""
ATTEMPTS = 3
"""Depths that are tried when ours is out of memory, each an eighth less."""
COLUMNS = {
    "": "<34", "tokens/s": "9.0f", "step ms": "8.1f", "[10–90 %]": ">17", "TFLOPS": "7.4g", "MFU": "6.1%",
    "of ceiling": "10.1%", "GiB": "6.2f",
}  # fmt: skip


def main() -> int:
    """Measure, print, write; return the exit code."""
    options = parse_options()
    groups = groups_of(options)
    if options.plan:
        available = options.memory_gib or _card_gib()
        for group in groups:
            plan(group, available)
        return 0
    device = run_worker({"task": "device", "device": options.device}, options)
    if "error" in device:
        print(f"{device['error']}; --plan needs no GPU", file=sys.stderr)
        return 1
    facts: dict[str, Any] = {"device": device, "allocator": variables("")["PYTORCH_CUDA_ALLOC_CONF"], "groups": []}
    if not options.skip_parity:
        facts["parity"] = run_worker({"task": "parity", "device": options.device}, options)
        report.write(options.out, report.result(**facts))
        if not is_equal(facts["parity"], options.device) and not options.keep_going:
            return 1
    available = options.memory_gib or device.get("memory_gib") or report.machine()["memory_gib"]
    for group in groups:
        measure(group, available, options, facts)
    report.write(options.out, report.result(**facts))
    drawn = gpu_plot.bars(facts, options.out.with_suffix(".png"))
    print("no plot: matplotlib is missing, or there is nothing to draw" if drawn is None else f"\n{drawn}")
    print(options.out)
    ours = [row for group in facts["groups"] for row in group["rows"] if row["name"].startswith("ours")]
    return 1 if any("error" in row for row in ours) else 0  # a peer that is missing is a row that says why


def parse_options() -> argparse.Namespace:
    """Return the options of the command."""
    parser = report.parser(__doc__, report.RESULTS / "gpu_train.json")
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


def measure(group: list[Case], available_gib: float, options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Run a group and add its figures to the facts; ours out of memory: all of it again with fewer blocks."""
    layers, needed = plan(group, available_gib)
    entry: dict[str, Any] = {"planned_layers": layers, "planned_gib": needed, "rows": []}
    facts["groups"].append(entry)
    if layers == 0:
        entry["rows"] = [{"name": case.name, "error": "one block does not fit"} for case in group]
        return
    for attempt in range(ATTEMPTS):
        cases = [case.at(layers) for case in group]
        entry |= {"case": {**cases[0].to_json(), "name": None}, "layers": layers, "rows": []}
        entry["parameters"], entry["tokens"] = cases[0].shape.num_parameters, cases[0].batch_tokens
        entry["useful_tflop"] = cases[0].flops / 1e12
        entry["ceilings"] = run_worker({"task": "ceilings", "case": cases[0].to_json()}, options)
        peak = peaks(entry["ceilings"], cases[0], facts["device"]["name"])
        entry["peak_tflops"] = peak
        for case in cases:
            print(f"{case.name}, {layers} blocks …", file=sys.stderr)
            found = run_worker({"task": "case", "case": case.to_json()}, options)
            entry["rows"].append(summarise(case, found, peak))
            report.write(options.out, report.result(**facts))
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
    from internlm.cost.hardware import peak_flops

    sheet = peak_flops(device, case.dtype)
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
    table = report.Table(COLUMNS)
    for row in entry["rows"]:
        if "error" in row:
            table.row(row["name"], row["error"])
            continue
        spread = report.spread(row["step_ms_10_90"], ".1f")
        figures = [row["tokens_per_s"], row["step_ms"], spread, row["tflops"], row["mfu"]]
        remark = [] if row["same_model"] else ["! another number of parameters"]
        table.row(row["name"], *figures, row["of_measured_ceiling"], row["peak_gib"], *remark)
        parts = ", ".join(f"{name} {ms:.4g}" for name, ms in row["breakdown"]["ms"].items() if name != "idle")
        print(f"    {row['policy']}\n    ms: {parts}, gaps {row['gap_ms']:.4g}", flush=True)


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


def _card_gib() -> float:
    """Return the memory of the GPU here, or of the card that this is written for."""
    if not torch.cuda.is_available():
        return gpu_memory.CARD_GIB
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def is_out_of_memory(found: dict[str, Any]) -> bool:
    return "out of memory" in found.get("error", "").lower() or "OutOfMemory" in found.get("error", "")


def run_worker(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Do a job in a process of its own; return its answer."""
    with tempfile.TemporaryDirectory() as cache:
        return workers.run(
            WORKER, job, timeout_s=options.timeout, variables=variables(cache), verbose=options.verbose
        )  # fmt: skip


def variables(cache: str) -> dict[str, str]:
    """Return a worker's variables: a compile cache of its own, the same allocator for all."""
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)
    return {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTORCH_CUDA_ALLOC_CONF": allocator}


if __name__ == "__main__":
    sys.exit(main())
