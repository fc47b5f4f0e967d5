"""Decoding on the CPU: our engine and Transformers' `generate`, in one process, on the same random weights.

    python benchmarks/decode_cpu.py                         # 134 M parameters, fp32, prompt 128 + 64 new, batch 1 and 8
    python benchmarks/decode_cpu.py --out results.json

The two take turns, so that a busy machine slows both; the table shows medians. A run of one new token is the prefill,
and is taken out of the decode speed. Greedy answers are compared token by token: random weights give nearly equal
logits now and then, where the order of a sum decides, so a late difference is not a mistake.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from internlm.infer.engine import Engine, Limits
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.weights import transformers as folders
from internlm.weights.weight import of_tensors

SHAPE = {"vocab_size": 32000, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "ffn_size": 2048}


def timed(answer: Callable[[int], list[list[int]]], new: int) -> tuple[float, float, list[list[int]]]:
    """Return seconds for one new token, for `new` of them, and the answers."""
    started = time.perf_counter()
    answer(1)
    between = time.perf_counter()
    tokens = answer(new)
    return between - started, time.perf_counter() - between, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    config = ModelConfig(**SHAPE, context_length=2048)
    model = build(config, 0)
    with tempfile.TemporaryDirectory() as folder:
        folders.export(of_tensors(model.named_parameters()), config, Path(folder) / "m")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "m").eval()
    # Prompts come again: one found in the cache would look like a fast one.
    engine = Engine(model, limits=Limits(batch=max(arguments.batch), share=False))

    rows: list[dict[str, Any]] = []
    print(f"{'batch':>5} {'engine':14} {'prefill s':>9} {'decode tok/s':>12} {'':>18} {'equal tokens':>13}")
    for batch in arguments.batch:
        ids = torch.randint(
            config.vocab_size, (batch, arguments.prompt), generator=torch.Generator().manual_seed(batch)
        )
        prompts = ids.tolist()

        def ours(new: int, prompts: list[list[int]] = prompts) -> list[list[int]]:
            return [result.tokens for result in engine.generate(prompts, max_tokens=new, temperature=0)]

        def reference(new: int, ids: torch.Tensor = ids) -> list[list[int]]:
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
            return theirs.generate(ids, **options)[:, ids.shape[1] :].tolist()

        runs: dict[str, list[tuple[float, float]]] = {"transformers": [], "internlm": []}
        answers = {}
        for repeat in range(arguments.repeats + 1):
            for name, answer in (("transformers", reference), ("internlm", ours)):
                prefill, whole, answers[name] = timed(answer, arguments.new)
                if repeat:  # the first warms up
                    runs[name].append((prefill, batch * (arguments.new - 1) / (whole - prefill)))
        pairs = [
            a == b
            for x, y in zip(answers["transformers"], answers["internlm"], strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        for name, figures in runs.items():
            prefill = statistics.median(figure[0] for figure in figures)
            speeds = sorted(figure[1] for figure in figures)
            row = {
                "batch": batch,
                "engine": name,
                "prefill_s": prefill,
                "decode_tokens_per_s": statistics.median(speeds),
            }
            rows.append(row | {"slowest": speeds[0], "fastest": speeds[-1], "equal_ratio": sum(pairs) / len(pairs)})
            spread = f"[{speeds[0]:.1f} - {speeds[-1]:.1f}]"
            equal = f"{sum(pairs)}/{len(pairs)}"
            print(f"{batch:>5} {name:14} {prefill:>9.2f} {statistics.median(speeds):>12.1f} {spread:>18} {equal:>13}")
    if arguments.out:
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "shape": SHAPE | {"parameters": config.num_parameters, "dtype": "float32"},
            "prompt": arguments.prompt,
            "new": arguments.new,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
