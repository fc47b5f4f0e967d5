"""The server under load on a CPU: how long a client waits, and what a token costs beside the model.

    python benchmarks/serve_load.py                                   # 134 M parameters, prompt 128 + 64 new
    python benchmarks/serve_load.py --pack fp32 fp16 --streams 1 4 16 --out benchmarks/results/serve_load_cpu.json
    python benchmarks/serve_load.py --url http://127.0.0.1:8000       # a server that runs already
    python benchmarks/serve_load.py --only overhead

Waiting: so many streams begin at the same moment, each with a prompt of its own, and go on with the next one when they
have ended; the first round warms up. Time to the first token and between two tokens of a stream, as the client sees
them; server and client share the machine.

Overhead: an engine whose model is nearly nothing (one layer of width 32, the same vocabulary) takes steps, and each
part of a step is timed on its own. What HTTP adds is the processor time of a server over the same model, less that of
the engine alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from shapes import TOY, model_of

from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Request
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors

MODEL = model_of(TOY, context_length=2048)
NOTHING = model_of(TOY, context_length=2048, hidden_size=32, num_layers=1, num_heads=1, ffn_size=32)
QUANTILES = ("p50", "p95", "p99")
COLUMNS = {"pack": "<6", "streams": "7d"}
COLUMNS |= {f"{part} {q}": "12.1f" for part in ("first ms", "between ms") for q in QUANTILES} | {"tokens/s": "8.1f"}
LETTERS = "the quick brown fox jumps over the lazy dog"
SAMPLED = {"temperature": 0.8, "top_p": 0.8}


@functools.cache
def tokenizer() -> Tokenizer:
    """Return a small one: the ids beyond it only pad the vocabulary."""
    return train_bpe([LETTERS] * 4, 280)


def export(config: ModelConfig, folder: Path) -> Path:
    """Write a random model with a tokenizer, and return the folder."""
    weights = of_tensors(build(config, 0).named_parameters())
    folders.export(weights, config, folder, Talk(tokenizer(), None))
    return folder


class Server:
    """A server in a process of its own, until the end of `with`."""

    def __init__(self, folder: Path, pack: str, threads: int) -> None:
        command = [sys.executable, "-m", "internlm", "serve", str(folder), "--port", "0", "--pack", pack]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.child.stderr is not None
        line = next((line for line in self.child.stderr if line.startswith("serving ")), None)
        if line is None:
            raise SystemExit(f"the server ended ({self.child.wait()})")
        self.url = next(word for word in line.split() if word.startswith("http"))

    @property
    def seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()


async def stream(url: str, body: dict[str, Any]) -> list[float]:
    """Ask, and return when the request was sent and each token came."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps(body | {"stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(raw) + raw
    )
    times = [time.perf_counter()]
    async for line in reader:
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            if choice["text"]:
                times.append(time.perf_counter())
        elif line.startswith(b"HTTP") and b" 200 " not in line:
            raise SystemExit(f"{line.decode().strip()}: {(await reader.read()).decode()}")
    writer.close()
    return times


def body(prompt: int, new: int, number: int) -> dict[str, Any]:
    """Return a request whose every token has a text of its own, with a prompt that no other has."""
    draw = random.Random(number)
    letter = tokenizer().encode("x")[0]
    return {
        "prompt": [draw.randrange(200) for _ in range(prompt)],
        "max_tokens": new,
        "ignore_eos": True,
        "temperature": 0,
        "logit_bias": {str(letter): 100},
    }


def wait_of(url: str, streams: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return how long clients wait when so many streams are open."""
    runs: list[list[float]] = []

    async def client(number: int, rounds: int) -> None:
        for round_ in range(rounds):
            seed = random.getrandbits(60) + number + round_
            runs.append(await stream(url, body(options.prompt, options.new, seed)))

    async def all_clients(rounds: int) -> None:
        await asyncio.gather(*(client(number, rounds) for number in range(streams)))

    asyncio.run(all_clients(1))
    runs.clear()
    began = time.perf_counter()
    asyncio.run(all_clients(options.rounds))
    seconds = time.perf_counter() - began
    tokens = sum(len(times) - 1 for times in runs)
    assert tokens == streams * options.rounds * options.new, "every token was seen"
    return {
        "streams": streams,
        "first_token_ms": quantiles([times[1] - times[0] for times in runs]),
        "between_tokens_ms": quantiles([b - a for times in runs for a, b in itertools.pairwise(times[1:])]),
        "tokens_per_s": tokens / seconds,
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    return {q: float(np.percentile(seconds, int(q[1:]))) * 1e3 for q in QUANTILES}


class Clock:
    """Adds up the time in functions, each without those that are called in it and are timed too."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._inner = [0.0]

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a method of an object from now on."""
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            began = time.thread_time()
            try:
                return plain(*given, **named)
            finally:
                spent = time.thread_time() - began
                self.spent[part] += spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, name, timed)


def small_engine(batch: int) -> Engine:
    """Return an engine over nearly nothing."""
    return Engine(build(NOTHING, 0), tokenizer(), Limits(batch=batch, cache_tokens=(batch + 1) * 1024, length=1024))


def begin(engine: Engine, batch: int, count: int, **rules: Any) -> None:
    """Let `batch` answers begin that have so many steps to go."""
    for number in range(batch):
        engine.add(Request(tokens=[number + 1] * 64, max_tokens=count + 10, **rules))
    for _ in range(8):
        engine.step()


def steps(engine: Engine, batch: int, count: int) -> float:
    """Take so many steps, and return the seconds of this thread, which other processes do not lengthen."""
    began = time.thread_time()
    for _ in range(count):
        assert len(engine.step()) == batch, "everyone gets a token in a step"
    return time.thread_time() - began


def overhead_of(batch: int, count: int, **rules: Any) -> dict[str, Any]:
    """Return what a step costs beside the model, in µs: whole and in parts."""
    engine, clock = small_engine(batch), Clock()
    clock.watch(engine.cache, "run", "prepare")
    clock.watch(engine.model.head, "logits", "model")
    for block in engine.model.blocks.values():
        clock.watch(block, "forward", "model")
    clock.watch(engine.scheduler, "plan", "schedule")
    clock.watch(engine.runner, "_draw", "sample")
    clock.watch(engine.runner, "run", "prepare")
    clock.watch(engine, "_take", "detokenise and deliver")
    begin(engine, batch, count, **rules)
    clock.spent.clear()
    whole = steps(engine, batch, count)
    model = clock.spent.pop("model")
    parts = dict(clock.spent) | {"rest": whole - model - sum(clock.spent.values())}
    own = whole - model
    return {
        "batch": batch,
        **rules,
        "model_us_per_step": model / count * 1e6,
        "overhead_us_per_step": own / count * 1e6,
        "overhead_us_per_token": own / count / batch * 1e6,
        "parts_us_per_token": {part: spent / count / batch * 1e6 for part, spent in parts.items()},
    }


def http_of(folder: Path, streams: int, count: int) -> dict[str, Any]:
    """Return what HTTP adds to a token, in µs of processor time, with so many streams."""
    alone = small_engine(streams)
    begin(alone, streams, count, temperature=0)
    engine = steps(alone, streams, count) / (count * streams)
    with Server(folder, "none", 1) as server:

        async def rounds(number: int) -> None:
            asked = [stream(server.url, body(64, count, number * streams + i)) for i in range(streams)]
            await asyncio.gather(*asked)

        asyncio.run(rounds(0))
        before, began = server.seconds, time.perf_counter()
        asyncio.run(rounds(1))
        spent, seconds = server.seconds - before, time.perf_counter() - began
    served = spent / (count * streams)
    return {
        "streams": streams,
        "server_us_per_token": served * 1e6,
        "engine_us_per_token": engine * 1e6,
        "http_us_per_token": (served - engine) * 1e6,
        "tokens_per_s": count * streams / seconds,
    }


def waits(scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print how long clients wait."""
    rows = []
    table = report.Table(COLUMNS)
    folder = scratch if options.url else export(MODEL, scratch / "model")
    for pack in options.pack if not options.url else ["–"]:
        with contextlib.ExitStack() as stack:
            server = None if options.url else stack.enter_context(Server(folder, pack, options.threads))
            for streams in options.streams:
                url = options.url if server is None else server.url
                row = {"pack": pack, **wait_of(url, streams, options)}
                waits_ms = [row[part][q] for part in ("first_token_ms", "between_tokens_ms") for q in QUANTILES]
                table.row(pack, streams, *waits_ms, row["tokens_per_s"])
                rows.append(row)
    return rows


def overheads(scratch: Path, count: int) -> dict[str, Any]:
    """Measure and print what a token costs beside the model."""
    torch.set_num_threads(1)
    rows = [overhead_of(b, count, **rules) for b in (1, 16) for rules in ({"temperature": 0.0}, SAMPLED)]
    parts = rows[0]["parts_us_per_token"]
    table = report.Table(dict.fromkeys(("batch", "temperature", "µs a token", *parts, "model µs a step"), "11.4g"))
    for row in rows:
        times = [row["overhead_us_per_token"], *(row["parts_us_per_token"][part] for part in parts)]
        table.row(row["batch"], row["temperature"], *times, row["model_us_per_step"])
    http = [http_of(export(NOTHING, scratch / f"nothing{s}"), s, count) for s in (1, 16)]
    table = report.Table(dict.fromkeys(http[0], "20.4g"))
    for row in http:
        table.row(*row.values())
    return {"engine": rows, "http": http}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--url", help="measure this server's waits; default: start one")
    parser.add_argument("--pack", nargs="+", default=["fp32", "fp16"], choices=["fp32", "fp16", "bf16", "int8", "none"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="of the overhead's measurement")
    parser.add_argument("--only", choices=["waits", "overhead"])
    options = parser.parse_args()
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.only != "overhead":
            facts["rows"] = waits(Path(scratch), options)
        if options.only != "waits" and not options.url:
            facts["overhead"] = overheads(Path(scratch), options.steps)
    settings = {"preset": TOY, "threads": options.threads, "prompt": options.prompt, "new": options.new}
    report.write(options.out, report.result(**settings, **facts))


if __name__ == "__main__":
    main()
