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
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from decode_peers import CONTENDERS

from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.runtime import ALLOCATOR_SETTINGS
from internlm.weights import gguf
from internlm.weights import transformers as folders
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import of_tensors

SHAPE = {"vocab_size": 32000, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "ffn_size": 2048}
GGUF: dict[str, tuple[torch.dtype, Literal["q8_0"] | None]] = {
    "llama.cpp": (torch.float32, None),
    "llama.cpp f16": (torch.float16, None),
    "llama.cpp q8_0": (torch.float32, "q8_0"),
}
"""Files for llama.cpp."""
REFERENCE = "transformers"
OURS = ("internlm", "internlm split", "internlm fp16", "internlm bf16", "internlm int8")


class Contender:
    """A process that answers."""

    def __init__(self, name: str, python: str, folder: Path, threads: int, length: int) -> None:
        self.name = name
        script = str(Path(__file__).parent / "decode_peers.py")
        environment = os.environ | {"GLIBC_TUNABLES": ALLOCATOR_SETTINGS, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, script, name, str(folder), str(threads), str(length)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.failed: str | None = self._reply().get("failed")

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Return seconds and tokens, or why it failed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"the process ended ({self.process.wait()})"}


def measure(contenders: list[Contender], batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each contender, which take turns."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(SHAPE["vocab_size"], (batch, arguments.prompt), generator=generator).tolist()
    runs: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    answers: dict[str, list[list[int]]] = {}
    failed: dict[str, str] = {}
    for turn in range(arguments.repeats + 1):
        for contender in contenders if turn % 2 else reversed(contenders):
            if contender.name in failed:
                continue
            first, whole = contender.answer(prompts, 1), contender.answer(prompts, arguments.new)
            problem = first.get("failed") or whole.get("failed")
            if problem:
                failed[contender.name] = problem
                continue
            answers[contender.name] = whole["tokens"]
            if turn:  # the first one warms up
                speed = batch * (arguments.new - 1) / (whole["seconds"] - first["seconds"])
                runs[contender.name].append((first["seconds"], speed))
    rows = []
    for name, figures in runs.items():
        row: dict[str, Any] = {"batch": batch, "engine": name}
        if name in failed:
            rows.append(row | {"failed": failed[name]})
            continue
        speeds = sorted(speed for _, speed in figures)
        row |= {"prefill_s": statistics.median(first for first, _ in figures), "slowest": speeds[0]}
        row |= {"decode_tokens_per_s": statistics.median(speeds), "fastest": speeds[-1]}
        if REFERENCE in answers:
            row["agreement"] = statistics.mean(
                next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
                for x, y in zip(answers[REFERENCE], answers[name], strict=True)
            )
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one batch size."""
    best = max((r["decode_tokens_per_s"] for r in rows if REFERENCE in r["engine"] and "failed" not in r), default=None)
    for row in rows:
        if "failed" in row:
            print(f"{row['batch']:>5}  {row['engine']:22} {row['failed'][:80]}")
            continue
        speed, spread = row["decode_tokens_per_s"], f"[{row['slowest']:.1f}-{row['fastest']:.1f}]"
        ratio = f"{speed / best:5.2f}" if best else "    –"
        agreement = f"{row['agreement']:.0f}" if "agreement" in row else "–"
        print(
            f"{row['batch']:>5}  {row['engine']:22} {row['prefill_s']:>9.2f} {speed:>9.1f} {spread:>15} {ratio:>6}"
            f" {agreement:>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers; default: this")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()

    config = ModelConfig(**SHAPE, context_length=2048)
    length = arguments.prompt + arguments.new + 32
    length += -length % 32
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        weights = of_tensors(build(config, 0).named_parameters())
        folders.export(weights, config, folder)
        contenders = []
        for name in arguments.only or CONTENDERS:
            if name in GGUF:
                dtype, quantization = GGUF[name]
                out = Path(scratch) / f"gguf-{quantization or str(dtype).removeprefix('torch.').replace('loat', '')}"
                gguf.export(weights, config, out, options=ExportOptions(dtype=dtype), quantization=quantization)
            python = sys.executable if name in OURS else arguments.peer_python
            contender = Contender(name, python, folder, arguments.threads, length)
            if contender.failed:
                print(f"{name}: {contender.failed}")
                rows.append({"engine": name, "failed": contender.failed})
            else:
                contenders.append(contender)
        print(f"{'batch':>5}  {'engine':22} {'prefill s':>9} {'tokens/s':>9} {'':>15} {'× best':>6} {'equal for':>9}")
        for batch in arguments.batch:
            found = measure(contenders, batch, arguments)
            show(found)
            rows += found
        for contender in contenders:
            contender.process.kill()
    if arguments.out:
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads",
            "torch": torch.__version__,
            "shape": SHAPE | {"parameters": config.num_parameters, "dtype": "float32"},
            "prompt": arguments.prompt,
            "new": arguments.new,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
