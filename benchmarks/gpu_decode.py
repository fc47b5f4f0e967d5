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
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import report
import torch
import workers
from gpu_device import bandwidth, facts, sheet_bandwidth, synchronize
from llama import generate, llama_config
from shapes import model_of

CONTENDERS = ("internlm", "internlm eager", "transformers")
TINY = {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128, "context_length": 256}
COLUMNS = {"batch": "5d", "engine": "<15", "first token s": "13.3f", "tokens/s": "9.1f", "roofline": "9.2f"}
Answer = Callable[[list[list[int]], int], list[list[int]]]


def main() -> int:
    """Measure, print, write; return the exit code."""
    if workers.is_worker():
        workers.answer(lambda job: work(argparse.Namespace(**job)))
        return 0
    options = parse_options()
    settings = vars(options) | {"out": None}
    device = workers.run(__file__, settings | {"name": None})
    if "error" in device:
        print(device["error"], file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    table = report.Table(COLUMNS)
    for name in options.only:
        found = workers.run(__file__, settings | {"name": name})
        if "error" in found:
            rows.append({"name": name} | found)
            table.row(None, name, found["error"][:90])
        for row in found.get("rows", []):
            row = compared(row, device["bandwidth"])
            rows.append({"name": name} | row | {"versions": found["versions"]})
            table.row(row["batch"], name, row["first_token_s"], row["tokens_per_s"], row["of_roofline"])
    told = {key: settings[key] for key in ("prompt", "new", "dtype", "cache", "tiny")}
    report.write(options.out, report.result(**device, **told, rows=rows))
    print(options.out)
    return int(any("error" in row for row in rows if row["name"].startswith("internlm")))


def parse_options() -> argparse.Namespace:
    """Return the options of the command."""
    parser = report.parser(__doc__, report.RESULTS / "gpu_decode.json")
    parser.add_argument("--batch", type=int, nargs="+", help="texts at once; default: 1 32 128")
    parser.add_argument("--prompt", type=int, help="tokens; default: 128")
    parser.add_argument("--new", type=int, help="tokens; default: 128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", choices=["plain", "int8"], default="plain", help="form of our keys and values")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a small shape, few tokens")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    options.batch = options.batch or ([1, 3] if options.tiny else [1, 32, 128])
    options.prompt = options.prompt or (16 if options.tiny else 128)
    options.new = options.new or (8 if options.tiny else 128)
    if options.new < 2:
        parser.error("--new must be at least 2: the first is taken out")
    options.dtype = "float32" if options.device == "cpu" else "bfloat16"
    return options


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of one contender; without a name, what the device is and how fast its memory."""
    device = torch.device(options.device)
    if options.name is None:
        found = facts(options.device)
        return {"device": found, "bandwidth": {"measured": bandwidth(device), "data_sheet": sheet_bandwidth(device)}}
    config = model_of("toy", **TINY) if options.tiny else model_of("internlm-7b")
    answer, step_bytes = (transformers if options.name == "transformers" else internlm)(config, device, options)
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
    return {"rows": rows}


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
    limits = Limits(**{**vars(limits), "paged": options.name == "internlm"})
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
    from transformers import LlamaForCausalLM

    torch.set_default_dtype(getattr(torch, options.dtype))
    with device:
        model = LlamaForCausalLM(llama_config(config, config.context_length)).eval()
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed" not in name)
    size = model.dtype.itemsize
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size

    length = options.prompt + options.new // 2
    return (
        lambda prompts, new: generate(model, prompts, new),
        lambda batch: weights + batch * (config.hidden_size * size + per_token * length),
    )


def compared(row: dict[str, Any], bandwidth: dict[str, float | None]) -> dict[str, Any]:
    """Return a row with its speed, and with what it is of the speed at which the memory reads what a step needs."""
    row = row | {"tokens_per_s": row["batch"] / row["step_s"]}
    for name, key in (("measured", "of_roofline"), ("data_sheet", "of_data_sheet")):
        if rate := bandwidth[name]:
            row[key] = row["step_bytes"] / rate / row["step_s"]
    return row


if __name__ == "__main__":
    sys.exit(main())
