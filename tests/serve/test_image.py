"""The images of deploy/, built and run: the server with the rights that compose.yaml gives it, training on two ranks.

Under `--proof`, where Docker or Podman is and `python:3.12-slim` can be had. Three variables hold more words:
INTERNLM_CONTAINERS is the program and options of its own, INTERNLM_IMAGE_BUILD and INTERNLM_IMAGE_RUN are options of
`build` and `run` (an index of wheels, how to reach the network).
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors
from tests.processes import free_port, until
from tests.serve import servers
from tests.serve.servers import TOKENIZER, random_model

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SHAPE = replace(servers.SHAPE, context_length=8192, num_layers=8)
LONG = 4000
"""Tokens of an answer that takes seconds."""
KEY = "a key of the test"
NAME = "internlm-under-test"

pytestmark = [pytest.mark.proof, pytest.mark.timeout(2400)]


def words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


@functools.cache
def program() -> list[str]:
    found = words("INTERNLM_CONTAINERS") or [name for name in ("docker", "podman") if shutil.which(name)][:1]
    if not found or subprocess.run([*found, "info"], capture_output=True, timeout=120).returncode:
        pytest.skip("no Docker or Podman that works here")
    return found


def container(*arguments: str, timeout: float = 120) -> str:
    """Run a command of the program; return what it wrote."""
    done = subprocess.run([*program(), *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return (done.stdout or done.stderr).strip()


def build(file: str, tag: str) -> str:
    # Podman's own format has no health check.
    form = ["--format", "docker"] if Path(program()[0]).name == "podman" else []
    with open(Path(tempfile.gettempdir()) / "internlm-image-build", "w") as lock:  # Podman trips over two at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        container("build", *form, *words("INTERNLM_IMAGE_BUILD"), "-f", f"deploy/{file}", "-t", tag, ".", timeout=2000)
    return tag


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that any user may read, as the image's user must."""
    folder = tmp_path_factory.mktemp("image") / "model"
    folders.export(of_tensors(random_model(SHAPE).named_parameters()), SHAPE, folder, Talk(TOKENIZER))
    for place in (folder.parent, *folder.parents[1:3]):
        place.chmod(0o755)
    return folder


@pytest.fixture
def server(model: Path) -> Iterator[str]:
    """The running server's URL; what may be used is what compose.yaml allows."""
    image = build("serve.Dockerfile", "internlm-serve-under-test")
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["server"]
    assert service["read_only"] is True
    rights = ["--read-only", *(f"--tmpfs={place}" for place in service["tmpfs"])]
    rights += [f"--cap-drop={name}" for name in service["cap_drop"]]
    rights += [f"--security-opt={option}" for option in service["security_opt"]]
    port = free_port()
    outside = ["--publish", f"127.0.0.1:{port}:8000", *words("INTERNLM_IMAGE_RUN")]
    if "--network=host" in outside:
        outside, port = outside[2:], 8000
    container("run", "--detach", "--name", NAME, *rights, *outside, "-e", f"INTERNLM_API_KEY={KEY}",
              "-v", f"{model}:/model:ro", image)  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([*program(), "rm", "--force", NAME], capture_output=True, timeout=120)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def test_the_server_answers_in_its_container_and_ends_what_it_began(server: str) -> None:
    assert until(lambda: is_up(server), 90), container("logs", NAME)
    body = {"model": "model", "prompt": "the cat", "max_tokens": LONG, "ignore_eos": True, "seed": 1}
    assert httpx.post(f"{server}/v1/completions", json=body).status_code == 401
    client = httpx.Client(base_url=server, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    (card,) = client.get("/v1/models").json()["data"]
    body["model"] = card["id"]

    described = json.loads(container("inspect", NAME))[0]["Config"]
    check = (described.get("Healthcheck") or described["HealthCheck"])["Test"]
    assert check[0] == "CMD"
    container("exec", NAME, *check[1:])
    assert container("exec", NAME, "id", "-u") == "10001"
    with pytest.raises(AssertionError, match="Read-only file system"):
        container("exec", NAME, "touch", "/opt/internlm/x")

    answers: list[tuple[float, dict[str, Any]]] = []

    def ask() -> None:
        answer = client.post("/v1/completions", json=body).json()
        answers.append((time.monotonic(), answer))

    asking = threading.Thread(target=ask)
    asking.start()
    assert until(lambda: client.get("/health").json()["running"] == 1)
    begun = time.monotonic()
    container("stop", "--time", "45", NAME)
    asking.join()
    assert time.monotonic() - begun < 40, "ended by itself, not killed"
    ((ended, answer),) = answers
    assert ended > begun + 1, "the answer was under way when the server was told to stop"
    assert answer["usage"]["completion_tokens"] == LONG
    assert json.loads(container("inspect", NAME))[0]["State"]["ExitCode"] == 0


def test_the_training_image_goes_from_text_to_a_checkpoint_of_two_ranks(tmp_path: Path) -> None:
    image = build("train.Dockerfile", "internlm-under-test")
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "ffn_size": 32, "context_length": 32}
    recipe = {
        "run": "run",
        "model": {"vocab_size": 300, **shape},
        "data": {"seq_len": 32, "train": {"text": {"path": "shards"}}},
        "train": {"tokens": 512, "batch_tokens": 64},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.copy(ROOT / "README.md", tmp_path / "text.txt")
    steps = [
        "internlm tokenizer train text.txt --out tokenizer --vocab-size 300",
        "internlm data tokenize text.txt --tokenizer tokenizer --out shards",
        "internlm launch --nproc 2 train recipe.yaml",
        "internlm doctor",
    ]
    mounted = ["--ipc=host", *words("INTERNLM_IMAGE_RUN"), "-v", f"{tmp_path}:/shared", "-w", "/shared"]
    said = container("run", "--rm", *mounted, image, "sh", "-ec", "\n".join(steps), timeout=600)
    assert (tmp_path / "run" / "checkpoints" / "step-00000008").is_dir()
    assert "torch" in said
