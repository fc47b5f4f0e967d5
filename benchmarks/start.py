"""What one waits for before anything happens, and the memory it takes: commands, the first step, the first answer.

    python benchmarks/start.py
    python benchmarks/start.py --repeats 7 --only train --out results.json

Each line is a process of its own, from its start until it prints what was waited for; the contenders take turns, so
that a slow moment slows all. The first turn warms up the disk. Memory is the most that the process held until it
ended. The model is tiny: what is left are imports and set-up. transformers' Trainer, where it is installed, does the
same step of the same shape. The size of a wheel and the number of packages that it needs are told at the end.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import report

COLUMNS = {"": "<28", "seconds": "8.3f", "[min–max]": ">16", "MiB": "6.0f"}
RECIPE = """
run: RUN
model: {vocab_size: 512, hidden_size: 64, num_layers: 2, num_heads: 2, ffn_size: 128}
data: {seq_len: 64, train: {docs: {path: TOKENS}}}
train: {tokens: 512, batch_tokens: 256, log_every_steps: 1}
"""
TRAINER = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

class Said(TrainerCallback):
    def on_step_end(self, *_, **__):
        print("step 1", flush=True)

shape = LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(512, (4, 64))]
options = TrainingArguments(sys.argv[1], max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True)
Trainer(LlamaForCausalLM(shape), options, train_dataset=rows, callbacks=[Said()]).train()
"""


@dataclass(frozen=True)
class Start:
    """A command, in which TURN is the number of the turn, and what it prints when the waiting is over; "": it ends."""

    words: list[str]
    until: str = ""


def starts(folder: Path) -> dict[str, Start]:
    """Return what is measured, by name, over a tiny corpus, run and model that are made in a folder."""
    python, internlm = sys.executable, [sys.executable, "-m", "internlm"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("RUN", str(folder / "made")).replace("TOKENS", str(folder / "tokens")))
    docs, tokenizer = str(report.ROOT / "docs"), str(folder / "tokenizer")
    for words in (
        ["tokenizer", "train", docs, "--out", tokenizer, "--vocab-size", "512"],
        ["data", "tokenize", docs, "--tokenizer", tokenizer, "--out", str(folder / "tokens")],
        ["train", str(recipe)],
        ["convert", str(folder / "made"), str(folder / "model")],
    ):
        subprocess.run([*internlm, *words], check=True, capture_output=True)
    found = {
        "python -c pass": Start([python, "-c", "pass"]),
        "import internlm": Start([python, "-c", "import internlm"]),
        "internlm --help": Start([*internlm, "--help"]),
        "internlm serve --help": Start([*internlm, "serve", "--help"]),
        "internlm monitor --once": Start([*internlm, "monitor", str(folder / "made"), "--once"]),
        "internlm checkpoints": Start([*internlm, "checkpoints", str(folder / "made")]),
        "import torch": Start([python, "-c", "import torch"]),
        "internlm train": Start([*internlm, "train", str(recipe), f"run={folder / 'run-TURN'}"], "step 1"),
        "internlm chat": Start([*internlm, "chat", str(folder / "model"), "-p", "A recipe is", "--max-tokens", "1"]),
    }
    if find_spec("transformers") and find_spec("accelerate"):
        found["transformers Trainer"] = Start([python, "-c", TRAINER, str(folder / "trainer-TURN")], "step 1")
    return found


def measure(start: Start, turn: int) -> tuple[float, float]:
    """Return the seconds until a command says what is waited for, and the most memory it held, in MiB."""
    words = [word.replace("TURN", str(turn)) for word in start.words]
    began = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None, "it is a pipe"
    waited, said = 0.0, []
    for line in child.stdout:
        said.append(line)
        if start.until and not waited and start.until in line:
            waited = time.perf_counter() - began
    _, status, usage = os.wait4(child.pid, 0)
    if status or (start.until and not waited):
        raise RuntimeError(f"{' '.join(words)}:\n{''.join(said)}")
    return waited or time.perf_counter() - began, usage.ru_maxrss / 1024


def wheel_bytes(folder: Path) -> int:
    """Return the size of the wheel of this checkout."""
    source = folder / "source"  # a build leaves a folder beside what it reads
    shutil.copytree(report.ROOT / "internlm", source / "internlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(report.ROOT / name, source)
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run([sys.executable, *words], check=True)
    return next(folder.glob("*.whl")).stat().st_size


def main() -> int:
    """Measure, print a table, write the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (5)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="lines that hold one of these words")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        chosen = {n: s for n, s in starts(Path(scratch)).items() if any(word in n for word in options.only)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
        for turn in range(options.repeats + 1):
            for name, start in chosen.items():
                measured = measure(start, turn)
                if turn:
                    found[name].append(measured)
        table, rows = report.Table(COLUMNS), []
        for name, runs in found.items():
            seconds, memory = [run[0] for run in runs], max(run[1] for run in runs)
            table.row(name, statistics.median(seconds), report.spread(seconds, ".3f"), memory)
            rows.append({"name": name, "seconds": statistics.median(seconds), "all": seconds, "mib": memory})
        needs = [need for need in importlib.metadata.requires("internlm") or [] if "extra ==" not in need]
        size = wheel_bytes(Path(scratch) / "wheel")
    names = [re.split(r"[^\w-]", need)[0] for need in needs]
    print(f"wheel {size:,} bytes, {len(needs)} packages: {', '.join(names)}")
    cost: dict[str, Any] = {"wheel_bytes": size, "packages": needs}
    report.write(options.out, report.result(repeats=options.repeats, rows=rows, **cost))
    return 0


if __name__ == "__main__":
    sys.exit(main())
