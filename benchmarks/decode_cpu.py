"""Decoding on a CPU: our engine and what one would otherwise take, on the same random weights.

    python benchmarks/decode_cpu.py                                   # 134 M parameters, prompt 128 + 128 new
    python benchmarks/decode_cpu.py --peer-python PEERS/bin/python --batch 1 4 16 --out results.json
    python benchmarks/decode_cpu.py --only internlm transformers --new 32

Every contender has a process of its own, with the same threads and allocator settings; they take turns, so that a
machine that slows down slows all. A run of one new token is the prefill, and is taken out of the decode speed. Greedy
answers are compared with transformers' token by token: random weights give nearly equal logits now and then, where the
order of a sum decides, so a late difference is no mistake of an exact mode; for the packed ones it tells their cost.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import report
import torch
import workers
from decode_peers import CONTENDERS
from shapes import TOY, model_of
from workers import Worker

from internlm.model.transformer import build
from internlm.weights import transformers as folders
from internlm.weights.gguf import model as gguf
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import of_tensors

WORKER = str(Path(__file__).with_name("decode_peers.py"))
GGUF: dict[str, tuple[torch.dtype, Literal["q8_0"] | None]] = {
    "llama.cpp": (torch.float32, None),
    "llama.cpp f16": (torch.float16, None),
    "llama.cpp q8_0": (torch.float32, "q8_0"),
}
"""Files for llama.cpp."""
REFERENCE = "transformers"
COLUMNS = {
    "batch": "5d", "engine": "<22", "prefill s": "9.2f", "tokens/s": "9.1f", "[min–max]": ">15", "× best": "6.2f",
    "equal for": "9.0f",
}  # fmt: skip


def export(names: Iterable[str], scratch: Path) -> None:
    """Write the model for all, and once more for each contender that reads a file of its own."""
    config = model_of(TOY, context_length=2048)
    weights = of_tensors(build(config, 0).named_parameters())
    folders.export(weights, config, scratch / "model")
    for name in names:
        if name in GGUF:
            dtype, quantization = GGUF[name]
            out = scratch / f"gguf-{quantization or str(dtype).removeprefix('torch.').replace('loat', '')}"
            gguf.export(weights, config, out, options=ExportOptions(dtype=dtype), quantization=quantization)


def measure(contenders: dict[str, Worker], batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each contender, which take turns."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(model_of(TOY).vocab_size, (batch, options.prompt), generator=generator).tolist()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    answers: dict[str, list[list[int]]] = {}
    versions: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    for turn in range(options.repeats + 1):
        for name in contenders if turn % 2 else reversed(contenders):
            if name in failed:
                continue
            first, whole = (contenders[name].ask({"prompts": prompts, "new": new}) for new in (1, options.new))
            if problem := first.get("error") or whole.get("error"):
                failed[name] = problem
                continue
            answers[name], versions[name] = whole["tokens"], whole["versions"]
            if turn:  # the first one warms up
                speed = batch * (options.new - 1) / (whole["seconds"] - first["seconds"])
                runs[name].append((first["seconds"], speed))
    rows = []
    for name, figures in runs.items():
        row: dict[str, Any] = {"name": name, "batch": batch}
        if name in failed:
            rows.append(row | {"error": failed[name]})
            continue
        speeds = sorted(speed for _, speed in figures)
        row |= {"prefill_s": statistics.median(first for first, _ in figures), "slowest": speeds[0]}
        row |= {"decode_tokens_per_s": statistics.median(speeds), "fastest": speeds[-1], "versions": versions[name]}
        if REFERENCE in answers:
            row["agreement"] = statistics.mean(
                next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
                for x, y in zip(answers[REFERENCE], answers[name], strict=True)
            )
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], table: report.Table) -> None:
    """Print the rows of one batch size."""
    speeds = [row["decode_tokens_per_s"] for row in rows if REFERENCE in row["name"] and "error" not in row]
    for row in rows:
        if "error" in row:
            table.row(row["batch"], row["name"], row["error"][:80])
            continue
        speed, spread = row["decode_tokens_per_s"], report.spread((row["slowest"], row["fastest"]), ".1f")
        ratio = speed / max(speeds) if speeds else None
        table.row(row["batch"], row["name"], row["prefill_s"], speed, spread, ratio, row.get("agreement"))


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers; default: this")
    options = parser.parse_args()
    length = options.prompt + options.new + 32
    length += -length % 32
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        export(options.only or CONTENDERS, Path(scratch))
        contenders: dict[str, Worker] = {}
        for name in options.only or CONTENDERS:
            python = sys.executable if name.startswith("internlm") else options.peer_python
            worker = stack.enter_context(Worker(WORKER, python=python, variables=workers.on_cpu(options.threads)))
            job = {"name": name, "folder": f"{scratch}/model", "threads": options.threads, "length": length}
            loaded = worker.ask(job)
            if "error" in loaded:
                print(f"{name}: {loaded['error']}")
                rows.append({"name": name} | loaded)
            else:
                contenders[name] = worker
        table = report.Table(COLUMNS)
        for batch in options.batch:
            found = measure(contenders, batch, options)
            show(found, table)
            rows += found
    settings = {name: getattr(options, name) for name in ("threads", "prompt", "new", "repeats")}
    report.write(options.out, report.result(preset=TOY, dtype="float32", **settings, rows=rows))


if __name__ == "__main__":
    main()
