"""Decoding on one GPU: our engine beside transformers' generate, at the shape of InternLM-7B with random weights.

    python benchmarks/gpu_decode.py                              # bf16, batch 1 32 128, prompt 128 + 128 new
    python benchmarks/gpu_decode.py --cache int8 --only internlm
    python benchmarks/gpu_decode.py --tiny --device cpu          # the same lines here

Each contender has a process of its own. A run of one new token is the time to the first token of all texts, and is
taken out of the decode speed; figures are medians. The roofline is the time in which the memory reads what a step
needs at least: the weights (of the embedding only a row for each text) and the keys and values of the texts at half of
their answers; its bandwidth is measured here, by the best of some large copies, and the data sheet's stands beside it.
Greedy answers are not compared: contenders have random weights of their own (parity is in the tests).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_work import hardware, synchronize

RESULTS = Path(__file__).parent / "results"
CONTENDERS = ("internlm", "internlm eager", "transformers")
TINY = {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128, "context_length": 256}
SHEETS = {"A100-SXM4-80GB": 2.039e12, "A100 80GB PCIe": 1.935e12, "H100 80GB HBM3": 3.35e12, "H200": 4.8e12}
"""Bytes per second by data sheet; the key is a part of the driver's name for the card."""
Answer = Callable[[list[list[int]], int], list[list[int]]]


def main() -> int:
    """Measure, print, write; return the exit code."""
    options = parse_options()
    if options.worker is not None:
        print(json.dumps(work(options)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: --tiny --device cpu runs the same lines", file=sys.stderr)
        return 1
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(["python", "benchmarks/gpu_decode.py", *sys.argv[1:]]),
        "hardware": hardware(options.device),
        "bandwidth": {"measured": bandwidth(torch.device(options.device)), "data_sheet": sheet(options.device)},
        "prompt": options.prompt, "new": options.new, "dtype": options.dtype, "cache": options.cache, "rows": [],
    }  # fmt: skip
    print(f"{'batch':>5}  {'engine':15} {'first token s':>13} {'tokens/s':>9} {'roofline':>9}")
    for name in options.only:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            print(f"       {name:15} {error[:90]}")
            report["rows"].append({"engine": name, "error": error})
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        report.setdefault("versions", {})[name] = found["versions"]
        for row in found["rows"]:
            show(row, name, report)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(options.out)
    return int(any("error" in row for row in report["rows"] if row["engine"].startswith("internlm")))


def parse_options() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", help="texts at once; default: 1 32 128")
    parser.add_argument("--prompt", type=int, help="tokens; default: 128")
    parser.add_argument("--new", type=int, help="tokens; default: 128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", choices=["plain", "int8"], default="plain", help="form of our keys and values")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a small shape, few tokens")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_decode.json")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch = options.batch or ([1, 3] if options.tiny else [1, 32, 128])
    options.prompt = options.prompt or (16 if options.tiny else 128)
    options.new = options.new or (8 if options.tiny else 128)
    if options.new < 2:
        parser.error("--new must be at least 2: the first is taken out")
    options.dtype = "float32" if options.device == "cpu" else "bfloat16"
    return options


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that are read and written in a large copy: the best of 8."""
    size = 2**31 if device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def sheet(device: str) -> float | None:
    """Return the data sheet's bandwidth, where it is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((value for key, value in SHEETS.items() if key in name), None)


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of one contender."""
    device = torch.device(options.device)
    config = shape(options.tiny)
    answer, step_bytes = (transformers if options.worker == "transformers" else internlm)(config, device, options)
    rows = []
    for batch in options.batch:
        prompts = torch.randint(config.vocab_size, (batch, options.prompt)).tolist()
        answer(prompts, options.new)  # compiled, captured, allocated
        first_s, whole_s = [], []
        for _ in range(options.repeats):
            for new, seconds in ((1, first_s), (options.new, whole_s)):
                start = time.perf_counter()
                found = answer(prompts, new)
                synchronize(device)
                seconds.append(time.perf_counter() - start)
                assert [len(tokens) for tokens in found] == [new] * batch, "every text gets all its tokens"
        first, whole = statistics.median(first_s), statistics.median(whole_s)
        row = {"batch": batch, "first_token_s": first, "step_s": (whole - first) / (options.new - 1)}
        rows.append(row | {"step_bytes": step_bytes(batch), "first_s": first_s, "whole_s": whole_s})
    names = ["torch", "triton", "transformers"] if options.worker == "transformers" else ["torch", "triton"]
    return {"rows": rows, "versions": {name: version(name) for name in names}}


def version(name: str) -> str | None:
    """Return the version of a package, where it is installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def shape(tiny: bool) -> Any:
    """Return the shape of the model."""
    from internlm import config
    from internlm.model.config import ModelConfig

    return config.decode(ModelConfig, dict(TINY) if tiny else {"preset": "internlm-7b"})


def internlm(config: Any, device: torch.device, options: argparse.Namespace) -> tuple[Answer, Callable[[int], int]]:
    """Return our engine's answers, and the bytes that a step reads at least; "eager" attends text by text."""
    from internlm.infer.cache import Cache
    from internlm.infer.engine import Engine, Limits
    from internlm.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(getattr(torch, options.dtype)).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    length = options.prompt + options.new + 1
    batch = max(options.batch)
    room = batch * (length + 64)
    # Prompts come again: one that is found in the cache would look like a fast one.
    limits = Limits.on(device, length=length, batch=batch, cache_tokens=room, share=False, cache=options.cache)
    limits = Limits(**{**vars(limits), "paged": options.worker == "internlm"})
    engine = Engine(model, limits=limits)
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "embedding.weight")
    row = config.hidden_size * model.embedding.weight.element_size()
    per_token = Cache.bytes_per_token(model, rounded=options.cache == "int8")
    del model

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        return [result.tokens for result in engine.generate(prompts, max_tokens=new, temperature=0)]

    return answer, lambda batch: weights + batch * (row + per_token * (options.prompt + options.new // 2))


def transformers(config: Any, device: torch.device, options: argparse.Namespace) -> tuple[Answer, Callable[[int], int]]:
    """Return the same of transformers' Llama with its own greedy loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.context_length,
        attention_bias=config.qkv_bias, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.set_default_dtype(getattr(torch, options.dtype))
    with device:
        model = LlamaForCausalLM(settings).eval()
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed" not in name)
    size = model.dtype.itemsize
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        return out[:, ids.shape[1] :].tolist()

    length = options.prompt + options.new // 2
    return answer, lambda batch: weights + batch * (config.hidden_size * size + per_token * length)


def show(row: dict[str, Any], name: str, report: dict[str, Any]) -> None:
    """Add what follows from a row, keep it and print it."""
    speed = row["batch"] / row["step_s"]
    of_measured = row["step_bytes"] / report["bandwidth"]["measured"] / row["step_s"]
    row = {"engine": name} | row | {"tokens_per_s": speed, "of_roofline": of_measured}
    if report["bandwidth"]["data_sheet"]:
        row["of_data_sheet"] = row["step_bytes"] / report["bandwidth"]["data_sheet"] / row["step_s"]
    report["rows"].append(row)
    print(f"{row['batch']:>5}  {name:15} {row['first_token_s']:>13.3f} {speed:>9.1f} {of_measured:>9.2f}")


if __name__ == "__main__":
    sys.exit(main())
