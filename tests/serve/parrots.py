"""Who answers in the tests of the chat: scripts, a model that says one text over and over, and a server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from internlm.errors import EngineError
from internlm.infer.request import TooLong
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer, build
from internlm.serve.chat.answer import Facts, Settings
from internlm.text.chat import Message
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors

TOKENIZER = train_bpe(["What is the sum of the numbers? Be brief, and say 4 now."] * 3, 290)
SHAPE = ModelConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, context_length=128)
ENDLESS = "Be 4你say."


class Parrot:
    """Answers with the next of its lines, and keeps what it was asked. A line that is an error is raised instead."""

    name = "parrot"

    def __init__(self, *lines: str | Exception, length: int | None = None, turns: int = 1000) -> None:
        self.lines, self.length, self.turns = list(lines), length, turns
        self.asked: list[list[Message]] = []
        self.settings: list[Settings] = []
        self.facts = Facts()
        self.interrupted = False

    def check(self, settings: Settings, system: str | None) -> None:
        if settings.temperature < 0:
            raise EngineError("is out of range", where="temperature", got=settings.temperature)

    def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[str]:
        if sum(message.role == "assistant" for message in messages) > self.turns:
            raise TooLong("too long")
        self.asked.append(list(messages))
        self.settings.append(settings)
        self.facts, self.interrupted = Facts(), False
        line = self.lines.pop(0)
        for number, word in enumerate(str(line).split(" ")):
            if self.interrupted:
                return
            yield " " * (number > 0) + word
        if isinstance(line, Exception):
            raise line
        self.facts = Facts("stop", 10 * len(messages), len(line.split(" ")), 4)

    def interrupt(self) -> None:
        self.interrupted = True


def chain_model(text: str, config: ModelConfig) -> Transformer:
    """Return a model whose greedy answers are `text` over and over, whatever is asked."""
    ids = [TOKENIZER.special("<|assistant|>"), *TOKENIZER.encode(text)]
    assert len(set(ids)) == len(ids) <= config.hidden_size, "the next token is a function of the last"
    model = build(config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wo.weight", "w_down.weight", "head.weight", "embedding.weight")):
                parameter.zero_()
        for place, id_ in enumerate(ids):
            model.embedding.weight[id_, place] = 1
            model.head.weight[(ids[1:] + ids[1:2])[place], place] = 20
    return model


def export(model: Transformer, config: ModelConfig, folder: Path, template: str | None = "internlm") -> Path:
    """Write a model as a Transformers folder, and return that."""
    folders.export(of_tensors(model.named_parameters()), config, folder, Talk(TOKENIZER, template))
    return folder


@dataclass
class FakeServer:
    """What a server was asked, and how it behaves."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    turns: int = 1000
    """More answers in a conversation are too many for its context."""
    form: str = "{}"
    """What it makes of the last message."""
    pause_s: float = 0.0
    """Between two words."""
    breaks: bool = False
    """Whether an answer breaks off with an error."""
    usage: Any = field(
        default_factory=lambda: {
            "prompt_tokens": 11,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 8},
        }
    )
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client left in the middle of an answer."""


@contextmanager
def serving() -> Iterator[FakeServer]:
    """Yield a server that says the last message again, word by word."""
    state = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._json(200, {"data": [{"id": "echo"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append(body)
            state.keys.append(self.headers.get("Authorization"))
            if sum(message["role"] == "assistant" for message in body["messages"]) > state.turns:
                self._json(400, {"error": {"message": "This model's maximum context length is 8 tokens", "code": None}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                text = state.form.format(body["messages"][-1]["content"])
                for number, word in enumerate(text.split(" ")):
                    self._event({"choices": [{"index": 0, "delta": {"content": " " * (number > 0) + word}}]})
                    time.sleep(state.pause_s)
                if state.breaks:
                    self._event({"error": {"message": "the \x1b[31mworker\x1b[0m died"}})
                    return
                self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                self._event({"choices": [], "usage": state.usage})
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                state.gone.set()

        def _event(self, data: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        def _json(self, status: int, data: dict[str, Any]) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
