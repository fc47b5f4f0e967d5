"""Checkpoints on S3, from a real client to a real server on loopback, with a proxy between them that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import config
from internlm import recipe as recipes
from internlm.checkpoint import listing, remote, store
from internlm.checkpoint.remote import Remote, Unreachable
from internlm.checkpoint.saver import Beside, Saver
from internlm.cli import main
from internlm.model.config import ModelConfig
from internlm.recipe import Recipe
from tests.checkpoint.s3 import BUCKET, SECRET, Rule, Store, train
from tests.processes import finish, start

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
Make = Callable[..., Recipe]
SHAPE = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8)
LARGE = 11 << 18
"""Values of a float32 tensor that takes three parts, of the least size that S3 takes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    found = Store(tmp_path_factory.mktemp("s3") / "moto.log")
    yield found
    found.end()


@pytest.fixture
def folder(server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """Return a place of its own in the store, which works to begin with."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "BLOCK", 5 << 20)
    server.seen.clear()
    yield Remote(f"s3://{BUCKET}/{tmp_path.name}")
    server.rule = lambda method, path, size: None


def begin(writer: Saver, step: int, value: float, size: int = 12) -> str | None:
    """Save a checkpoint in the background; return what went wrong."""
    writer.save(listing.name_of(step), {"model.x": torch.full((size,), value)}, Beside(SHAPE, None, {"step": step}))
    saved = writer.finish()
    assert saved is not None
    return saved.problem


def first(count: int, what: Any, part: str = "partNumber") -> Rule:
    """Return a rule by which so many requests fail."""
    left = [count]

    def rule(method: str, path: str, size: int) -> Any:
        if method != "PUT" or part not in path or left[0] == 0:
            return None
        left[0] -= 1
        return what

    return rule


PROOF = pytest.mark.proof


@pytest.mark.parametrize("what", [503, pytest.param(500, marks=PROOF), "reset", pytest.param(0.5, marks=PROOF)])
def test_parts_that_fail_are_uploaded_again(server: Store, folder: Remote, what: Any) -> None:
    writer = Saver(folder)
    server.rule = first(3, what)
    assert begin(writer, 1, 1.0, LARGE) is None
    assert sum("partNumber" in path for _, path in server.seen) >= (3 if what == 0.5 else 6), "in parts"
    assert store.open_checkpoint(folder).weights()["x"].read().unique().tolist() == [1.0]
    assert not server.uploads(), "what failed was given up"


def test_a_failure_is_said_and_the_next_save_works(
    server: Store, folder: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Saver(folder)
    assert begin(writer, 1, 1.0) is None
    for what, said in ((503, "failed 5 times"), ("reset", "failed 5 times"), (403, "May these credentials")):
        server.rule = first(-1, what, "safetensors")
        problem = begin(writer, 2, 2.0, LARGE if what == "reset" else 12)
        assert said in str(problem)
        assert listing.newest(folder) == folder / listing.name_of(1)
    assert "try 5 of 5" in caplog.text
    server.rule = lambda method, path, size: None
    assert not server.uploads()
    assert not server.keys(f"{folder.name}/{listing.name_of(2)}"), "what was half written is gone"
    assert begin(writer, 3, 3.0) is None
    assert store.open_checkpoint(folder).step == 3
    assert SECRET not in caplog.text


def test_a_refusal_is_asked_once(server: Store, folder: Remote) -> None:
    writer = Saver(folder)
    server.rule = first(-1, 403, "safetensors")
    assert "was refused" in str(begin(writer, 1, 1.0))
    assert sum(method == "PUT" and "safetensors" in path for method, path in server.seen) == 1


def test_a_bucket_that_is_gone_is_named(server: Store, folder: Remote) -> None:
    writer = Saver(folder)
    server.rule = lambda method, path, size: 404
    assert "Is there such a bucket?" in str(begin(writer, 1, 1.0))
    with pytest.raises(Unreachable, match="Is there such a bucket"):
        Saver(Remote("s3://no-such-bucket/run"))


def test_missing_credentials_are_named(server: Store, folder: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setattr(remote, "_systems", {})
    with pytest.raises(Unreachable, match="Give this machine credentials"):
        Saver(folder)


def test_without_an_endpoint_the_client_uses_tls(folder: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(remote, "_systems", {})
    system = remote._system("s3")
    system.connect()
    assert system.s3.meta.endpoint_url.startswith("https://")


def recipe_file(folder: Path, recipe: Recipe) -> Path:
    path = folder / f"{Path(recipe.run).name}.yaml"
    path.write_text(config.dump(recipe))
    return path


@PROOF
@pytest.mark.timeout(400)
def test_a_run_that_is_killed_in_an_upload_goes_on_from_the_one_before(
    server: Store, folder: Remote, recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"train__tokens": 9 * 256, "track__tensorboard": False, "train__trace_every_steps": None}
    there = {"checkpoint": {"folder": str(folder), "every_steps": 3, "keep_last": 9}}
    path = recipe_file(tmp_path, recipe(**changes, **there))
    hit: list[str] = []

    def rule(method: str, path: str, size: int) -> Any:
        if method == "PUT" and listing.name_of(6) in path and "model.yaml" in path:
            hit.append(path)
            os.kill(run[0].pid, signal.SIGKILL)
            return "reset"
        return None

    server.rule = rule
    run = train(path, server)
    assert finish(run[0])[0] == -signal.SIGKILL
    assert hit
    assert server.keys(f"{folder.name}/{listing.name_of(6)}"), "half of it is there"
    assert listing.newest(folder) == folder / listing.name_of(3)
    server.rule = lambda method, path, size: None
    assert main(["train", str(path)]) == 0
    said = "".join(capsys.readouterr())
    assert f"removed what an interrupted save left: {listing.name_of(6)}" in said
    assert f"resuming {folder}/{listing.name_of(3)} at step 3 of 9" in said

    straight = recipe_file(tmp_path, recipe(run=str(tmp_path / "straight"), **changes))
    assert main(["train", str(straight)]) == 0
    mine, other = (store.open_checkpoint(run).weights("") for run in (tmp_path / "straight", folder))
    assert all(torch.equal(mine[name].read(), other[name].read()) for name in mine)
    capsys.readouterr()
    assert main(["checkpoints", str(folder), "--verify", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["step"], one["complete"]) for one in found] == [(3, True), (6, True), (9, True)]


@PROOF
@pytest.mark.timeout(400)
def test_a_run_goes_on_while_the_store_is_down_and_two_ranks_write_what_one_reads(
    server: Store, folder: Remote, recipe: Make, tmp_path: Path
) -> None:
    there = {"checkpoint": {"folder": str(folder), "every_steps": 2, "keep_last": 9}, "parallel": {"shard": 2}}
    value = recipe(train__tokens=6 * 256, train__trace_every_steps=None, **there)
    server.rule = lambda method, path, size: 403 if method == "PUT" and listing.name_of(4) in path else None
    ends = [finish(rank) for rank in train(recipe_file(tmp_path, value), server, 2)]
    said = "\n".join(output for _, output in ends)
    assert [code for code, _ in ends] == [0, 0], said
    assert re.search(f"warning: {listing.name_of(4)} could not be written.*May these credentials", said)
    assert SECRET not in said
    assert [path.name for path in listing.listed(folder)] == [listing.name_of(step) for step in (2, 6)]
    two = store.open_checkpoint(folder)
    assert len({piece.file for entry in two.index.values() for piece in entry.pieces}) == 4  # model and state, of two

    server.rule = lambda method, path, size: None
    longer = config.decode(Recipe, config.encode(value) | {"parallel": {"shard": 1}, "run": str(tmp_path / "one")})
    one = recipes.prepare(longer)
    assert one.progress.step == 6
    weights = two.weights()
    assert all(torch.equal(weights[name].read(), p.detach()) for name, p in one.parallel.named_parameters())


UPLOAD = """
import resource, sys, torch
from internlm.checkpoint import listing, place, remote, store
from internlm.checkpoint.saver import Beside, Saver
from internlm.model.config import ModelConfig
remote.BLOCK = 5 << 20
shape = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8)
folder = place.at(sys.argv[1])
state = {"model.x": torch.ones(int(sys.argv[2]) << 18)}
saver = Saver(folder, background=False)
saver.save(listing.name_of(1), {"model.x": torch.ones(9)}, Beside(shape, None, {"step": 1}))  # all is imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
saver.save(listing.name_of(2), state, Beside(shape, None, {"step": 2}))
assert saver.finish().problem is None
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@PROOF
def test_memory_holds_some_parts_of_an_upload(server: Store, folder: Remote) -> None:
    size = 100
    words = [sys.executable, "-c", UPLOAD, str(folder), str(size)]
    code, said = finish(start(*words, **server.environment))
    assert code == 0, said
    grown = int(said.splitlines()[-1])
    assert grown < 50, f"{grown} MiB for {size} MiB"
    assert listing.is_checkpoint(folder / listing.name_of(2))
