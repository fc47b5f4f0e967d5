"""A real server on a free port of this machine, in a thread, over a tiny random model."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from internlm.infer.engine import Limits
from internlm.infer.request import Request
from internlm.infer.worker import Worker
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer
from internlm.serve.api.app import make_app
from internlm.serve.api.asked import Served
from internlm.serve.api.gate import Access
from internlm.serve.api.metrics import Metrics
from internlm.serve.api.run import Address, Server, bind, url_of
from internlm.text.training import train_bpe
from internlm.weights.talk import Talk
from tests.infer import engines
from tests.infer.engines import SlowEngine
from tests.processes import Fork, until, wait_for

TOKENIZER = train_bpe(["What is the sum? Say 4 now, 你好 the cat sat on the mat. END"] * 4, 320)
SHAPE = ModelConfig(vocab_size=324, hidden_size=32, num_layers=2, num_heads=2, ffn_size=32, context_length=256)


def random_model(config: ModelConfig = SHAPE) -> Transformer:
    return engines.random_model(config)


_CLIENT = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))


class Script:
    """A grammar that allows these tokens alone; where one is None, it breaks."""

    def __init__(self, tokens: Sequence[int | None]) -> None:
        self.tokens, self.at = tokens, 0

    def start(self) -> Script:
        return Script(self.tokens)

    def mask(self, logits: torch.Tensor) -> None:
        token = self.tokens[self.at]
        if token is None:
            raise RuntimeError("boom")
        logits.fill_(float("-inf"))
        logits[token] = 0.0

    def accept(self, token: int) -> None:
        self.at += 1

    is_complete = False


class ScriptedEngine(SlowEngine):
    """Writes its script, whatever it is asked."""

    script: Sequence[int | None] = ()

    def add(self, request: Request, id: int | None = None) -> int:
        return super().add(replace(request, grammar=Script(self.script)), id)


def scripted(text: str) -> SlowEngine:
    """Return an engine that writes this text and then ends."""
    engine = ScriptedEngine(random_model(replace(SHAPE, context_length=2048)), TOKENIZER)
    engine.script = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    return engine


def slow_engine(pause: float = 0.0, context: int = 256, **limits: Any) -> SlowEngine:
    engine = SlowEngine(random_model(replace(SHAPE, context_length=context)), TOKENIZER, Limits(**limits))
    engine.pause = pause
    return engine


@dataclass
class Running:
    """A server that runs."""

    url: str
    server: Server
    worker: Worker
    engine: SlowEngine
    metrics: Metrics
    thread: threading.Thread

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return _CLIENT.post(self.url + path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return _CLIENT.get(self.url + path, **options)


@contextlib.contextmanager
def serving(
    engine: SlowEngine | None = None,
    *,
    template: str | None = "internlm",
    access: Access | None = None,
    max_waiting: int = 256,
    timeout: float | None = None,
    names: tuple[str, ...] = ("tiny", "alias"),
    drain: float = 5.0,
    address: Address | None = None,
) -> Iterator[Running]:
    """Serve inside the block."""
    engine = engine or slow_engine()
    worker = Worker(engine, max_waiting=max_waiting)
    served = Served(engine, Talk(TOKENIZER, template), names, timeout=timeout)
    address = address or Address(port=0)
    listener = bind(address)
    app = make_app(served, worker, access or Access())
    server = Server(app, worker, address, drain_seconds=drain)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert until(lambda: server.started)
    try:
        yield Running(url_of(address, listener), server, worker, engine, app.state.service.metrics, thread)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        worker.close()


def tell_files(told: str, said: str) -> None:
    """Let the two streams of this process go to files, which others read meanwhile."""
    for number, path in enumerate((told, said), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def until_it_serves(child: Fork, said: Path) -> list[str]:
    """Return what a server says in this file until it listens; the last line tells where."""
    lines: list[str] = []

    def serves() -> bool:
        lines[:] = said.read_text().splitlines(keepends=True) if said.exists() else []
        return any(line.startswith("serving ") and line.endswith("\n") for line in lines)

    wait_for(child, serves)
    last = next(number for number, line in enumerate(lines) if line.startswith("serving "))
    return [line.rstrip("\n") for line in lines[: last + 1]]


def address_in(line: str) -> str:
    """Return the address that a line tells."""
    return next(word for word in line.split() if word.startswith("http"))
