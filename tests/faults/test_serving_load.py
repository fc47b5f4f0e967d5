"""A real `internlm serve` under a crowd: nothing lost, nothing leaked, an orderly end, and an engine that dies.

A slice runs always; `--proof` runs it whole: 10,000 requests, and 20 ends at random moments.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors
from tests.faults import watched_server
from tests.processes import Fork, finish, until
from tests.serve.servers import SHAPE, TOKENIZER, address_in, random_model, until_it_serves

CLIENTS = 64
BYTES_PER_REQUEST = 200
"""How far what is allocated may grow over the second half: 1 MB."""
RESIDENT_PER_REQUEST = 1500
"""How far the memory may grow: the allocator gives pages back and takes them, 4 MB at a time."""
ONE_BY_ONE = 16
"""Texts at once of which each number has code of its own in oneDNN, 0.5 MB a matrix, made when it first occurs."""
UNREAD_SECONDS = 0.5
"""A request that was sent so shortly before the signal may not have been read: its connection is closed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    folders.export(of_tensors(random_model().named_parameters()), SHAPE, path, Talk(TOKENIZER, "internlm"))
    return path


class Process:
    """A server in a process of its own.

    Args:
        model: its folder; streams are written to a new one.
        words: of `internlm serve`.
    """

    def __init__(self, model: Path, folder: Path, *words: str) -> None:
        self._told, said = folder / "told", folder / "said"
        hook = functools.partial(watched_server.install, str(self._told), str(said))
        self.child = Fork("serve", str(model), "--port", "0", *words, hook=hook)
        self.url = address_in(until_it_serves(self.child, said)[-1])

    def held(self) -> dict[str, int]:
        """Return what the process holds."""
        before = self._told.read_text()
        os.kill(self.child.pid, signal.SIGUSR1)
        assert until(lambda: self._told.read_text().removeprefix(before).endswith("\n"), 20)
        found: dict[str, int] = json.loads(self._told.read_text().removeprefix(before))
        return found

    def metric(self, name: str) -> float:
        """Return one figure of /metrics."""
        lines = httpx.get(self.url + "/metrics", timeout=20).text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"internlm:{name} ")))

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits, runs or has blocks."""
        names = ("num_requests_running", "num_requests_waiting", "cache_blocks_used")
        return all(self.metric(name) == 0 for name in names)

    @property
    def memory(self) -> int:
        """Bytes of its own in memory (files that are mapped left out)."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024

    @property
    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.child.pid}/fd"))


@contextlib.contextmanager
def serving(model: Path, *words: str) -> Iterator[Process]:
    with tempfile.TemporaryDirectory() as folder:
        process = Process(model, Path(folder), *words)
        try:
            yield process
        finally:
            process.child.kill()


def crowd(server: Process, requests: int, *words: str, clients: int = CLIENTS) -> subprocess.Popen[str]:
    """Start the clients."""
    command = [sys.executable, "-m", "tests.faults.crowd", server.url, "--requests", str(requests), *words]
    return subprocess.Popen([*command, "--clients", str(clients)], stdout=subprocess.PIPE, text=True)


def growth(samples: list[tuple[int, int]]) -> float:
    """Return how many bytes the memory grew a request over the second half of (requests done, bytes)."""
    half = [sample for sample in samples if sample[0] >= samples[-1][0] / 2]
    return float(np.polyfit(*zip(*half, strict=True), deg=1)[0])


@pytest.mark.timeout(1800)
def test_of_thousands_of_requests_at_once_none_is_lost_and_nothing_stays_behind(
    folder: Path, request: pytest.FixtureRequest, record_property: Any
) -> None:
    """Chats and completions, streams and not, several answers, grammars, wrong requests, clients that leave.

    The cache is so small that answers lose their place and are computed again.
    """
    whole = request.config.getoption("--proof")
    words = ["--max-batch", "16", "--cache-gib", "0.0002", "--max-waiting", str(3 * CLIENTS)]
    with serving(folder, *words) as server:
        for number in (*range(1, ONE_BY_ONE + 1), CLIENTS) if whole else (CLIENTS,):
            warm = crowd(server, 2 * number, clients=number).communicate()[0]
            assert json.loads(warm.splitlines()[-1])["problems"] == []
        assert until(lambda: server.is_idle, 10)
        before, files = server.held(), server.files
        resident: list[tuple[int, int]] = []
        bytes_: list[tuple[int, int]] = []
        told: dict[str, Any] = {}
        clients = crowd(server, 10_000 if whole else 200, "--seed", "2")
        for line in clients.stdout or ():
            told = json.loads(line)
            resident.append((told.get("done", 0), server.memory))
            if whole and "done" in told and len(resident) % 5 == 0:
                bytes_.append((told["done"], server.held()["bytes"]))
        assert clients.wait() == 0
        assert told["problems"] == []
        assert told["outcomes"].keys() == {"answered", "left", "refused"}
        assert sum(told["outcomes"].values()) == (10_000 if whole else 200)
        assert until(lambda: server.is_idle, 10)
        assert server.metric("preemptions_total") > 0, "the cache was too small for all"
        assert server.metric("failed_steps_total") == 0
        assert until(lambda: server.files <= files, 10), "connections are closed"
        after = server.held()
        for kind in ("tasks", "tickets", "ticket objects", "sequences", "jobs", "threads"):
            assert after[kind] <= before[kind], kind
        if whole:
            assert after["objects"] - before["objects"] < 10_000, "not one object a request"
            record_property("bytes a request", round(growth(bytes_)))
            record_property("resident bytes a request", round(growth(resident[:-1])))
            assert growth(bytes_) < BYTES_PER_REQUEST
            assert growth(resident[:-1]) < RESIDENT_PER_REQUEST


def end_under_load(folder: Path, generator: random.Random, drain: float, longest: int) -> None:
    """Stop a server at a random moment and check what became of every request, of so many tokens at most."""
    with serving(folder, "--drain-seconds", str(drain), "--max-waiting", str(3 * CLIENTS)) as server:
        clients = crowd(
            server, 10**6, "--may-end", "--longest", str(longest), "--seed", str(generator.randrange(10**6))
        )
        assert until(lambda: server.metric("num_requests_running") > 8, 20)
        time.sleep(generator.uniform(0, 1))
        stopped = time.monotonic()
        os.kill(server.child.pid, signal.SIGTERM)
        told = json.loads(clients.communicate(timeout=drain + 20)[0].splitlines()[-1])
        assert finish(server.child, 10)[0] == 0
        assert time.monotonic() - stopped < drain + 8
        assert told["problems"] == []
        assert told["outcomes"]["turned away"] == CLIENTS
        assert all(since > stopped - UNREAD_SECONDS for since in told["unanswered"])
        assert (told["cut"] > 0) == (drain < 1), "answers are cut only when the time is over"


@pytest.mark.timeout(1800)
def test_sigterm_under_load_lets_every_answer_end_properly(folder: Path, request: pytest.FixtureRequest) -> None:
    """With time enough they are whole; else they end with "abort", and [DONE]. New requests are turned away."""
    generator = random.Random(3)
    whole = request.config.getoption("--proof")
    for round_ in range(20 if whole else 1):
        end_under_load(folder, generator, drain=0.3 if round_ % 2 else 30, longest=150 if whole else 80)


@pytest.mark.proof  # the same in a thread is always tested
def test_a_second_sigterm_under_load_ends_the_process_at_once(folder: Path) -> None:
    with serving(folder, "--drain-seconds", "60") as server:
        clients = crowd(server, 10**6, "--may-end", "--longest", "200")
        assert until(lambda: server.metric("num_requests_running") > 8, 20)
        os.kill(server.child.pid, signal.SIGTERM)
        time.sleep(0.2)
        assert server.child.poll() is None
        began = time.monotonic()
        os.kill(server.child.pid, signal.SIGTERM)
        finish(server.child, 10)
        assert time.monotonic() - began < 3
        clients.communicate(timeout=10)


def test_when_the_engine_dies_everyone_is_told_and_the_process_ends_with_code_1(folder: Path) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 250, "ignore_eos": True}
    with serving(folder, "--max-batch", "2") as server:
        found: dict[bool, httpx.Response] = {}

        def ask(stream: bool) -> None:
            found[stream] = httpx.post(server.url + "/v1/completions", json={**body, "n": 2, "stream": stream})

        asking = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in asking:
            thread.start()
        assert until(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == 4, 10)
        os.kill(server.child.pid, signal.SIGUSR2)
        for thread in asking:
            thread.join(10)
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()["alive"]) == (503, False)
        refused = httpx.post(server.url + "/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert found[False].status_code == 500
        assert "has died" in found[False].json()["error"]["message"]
        *_, error, end = [line for line in found[True].text.split("\n\n") if line]
        assert "has died" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert end == "data: [DONE]"
        assert finish(server.child, 15)[0] == 1
