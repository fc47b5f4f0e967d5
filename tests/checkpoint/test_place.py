"""Checkpoints in a store: complete or not there, whatever the store does. `memory://` and `local://` stand for one."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from internlm import config, storage
from internlm import recipe as recipes
from internlm.checkpoint import listing, pieces, place, remote, store
from internlm.checkpoint.listing import CheckpointConfig
from internlm.checkpoint.remote import Remote, Unreachable
from internlm.checkpoint.saver import Beside, Saved, Saver
from internlm.cli import main
from internlm.errors import ConfigError, StorageError
from internlm.model.config import ModelConfig
from internlm.recipe import Recipe
from internlm.source import open_source
from tests.models import save_checkpoint
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]
SHAPE = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def folder(url: str) -> Remote:
    found = place.at(url)
    assert isinstance(found, Remote)
    return found


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Errors that the store raises, by its method; `skip`: how many writes go well before; `tries`: what was tried."""
    plan: dict[str, Any] = {"skip": 0, "tries": []}

    def around(name: str) -> None:
        work = getattr(MemoryFileSystem, name)

        def wrapped(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
            if plan.get(name) is not None:
                plan["tries"].append(path)
                if len(plan["tries"]) > plan["skip"]:
                    raise plan[name]
            return work(self, path, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, name, wrapped)

    for name in ("open", "cat_file", "ls", "find"):
        around(name)
    return plan


def put(folder: place.Place, step: int, value: float = 1.0, **facts: Any) -> place.Place:
    """Write a checkpoint of one tensor; return it."""
    path = folder / listing.name_of(step)
    save_checkpoint(path, {"model.x": torch.full((4, 3), value)}, SHAPE, None, {"step": step, **facts})
    return path


def value_of(folder: place.Place) -> list[float]:
    return store.open_checkpoint(folder).weights()["x"].read().unique().tolist()


def test_paths_and_file_urls_are_folders_on_a_disk(tmp_path: Path) -> None:
    assert place.at(str(tmp_path)) == tmp_path
    assert place.at(f"file://{tmp_path}") == tmp_path
    assert place.at("memory://a/b/") == Remote("memory://a/b")


@pytest.mark.parametrize("url", ["nonsense://a/b", "memory://me:hidden@host/b"])
def test_urls_that_cannot_be_used_are_refused_with_the_recipe(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(folder=url)
    assert "hidden" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setattr(remote, "_systems", {})
    with pytest.raises(ConfigError, match=r"Install s3fs.*pip install .*\[remote\]"):
        place.at("s3://bucket/run")


def test_what_is_saved_to_a_store_is_read_from_it(folder: Remote) -> None:
    tensors = {"model.x": torch.randn(5, 3), "optim.x.step": torch.tensor(7), "random.cpu": torch.get_rng_state()}
    save_checkpoint(folder / listing.name_of(3), tensors, SHAPE, None, {"step": 3, "tokens": 12})
    found = store.open_checkpoint(folder)
    assert (found.step, found.meta["tokens"], found.config, found.tokenizer_path) == (3, 12, SHAPE, None)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found.load(into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(found.weights()["x"].read(), tensors["model.x"])


def test_nothing_is_written_after_the_manifest(folder: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = Remote.write

    def spy(self: Remote, buffers: Any) -> str:
        assert not listing.is_checkpoint(folder / listing.name_of(1))
        written.append(self.name)
        return write(self, buffers)

    monkeypatch.setattr(Remote, "write", spy)
    put(folder, 1)
    assert written[-1] == storage.MANIFEST
    assert listing.is_checkpoint(folder / listing.name_of(1))


def test_a_file_that_the_store_lost_is_missed_before_the_manifest_is_written(
    folder: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Remote.write

    def lose(self: Remote, buffers: Any) -> str:
        digest = write(self, buffers)
        if self.name.endswith(".safetensors"):
            self.unlink()
        return digest

    monkeypatch.setattr(Remote, "write", lose)
    with pytest.raises(StorageError, match=r"safetensors is missing"):
        put(folder, 1)
    assert storage.MANIFEST not in (folder / listing.name_of(1)).names()


def test_an_interrupted_upload_is_passed_over_and_removed_by_the_next_run(folder: Remote) -> None:
    put(folder, 1)
    half = put(folder, 2)
    assert isinstance(half, Remote)
    (half / storage.MANIFEST).unlink()
    assert listing.newest(folder) == folder / listing.name_of(1)
    assert not listing.damaged(folder), "it never was a checkpoint"
    assert [found.problem is None for found in listing.survey(folder)] == [True, False]
    Saver(folder)
    assert folder.names() == [listing.name_of(1)]


@pytest.mark.parametrize("change", ["cut", "gone", "flipped"])
def test_damage_in_a_store_is_found_before_a_tensor_is_touched(folder: Remote, change: str) -> None:
    path = put(folder, 1)
    assert isinstance(path, Remote)
    (name,) = [name for name in path.sizes() if name.endswith(".safetensors")]
    content = bytearray(path.sizes()[name])
    place.read_into(path / name, 0, memoryview(content))
    content[-1] ^= 1
    if change == "gone":
        (path / name).unlink()
    else:
        (path / name).write([bytes(content)[: -1 if change == "cut" else None]])
    assert listing.is_checkpoint(path) == (change == "flipped")
    into = {"model.x": torch.zeros(4, 3)}
    with pytest.raises(StorageError):
        store.open_checkpoint(path).load(into)
    assert not into["model.x"].any()


def test_a_step_that_is_written_again_holds_nothing_of_the_old_one(folder: Remote) -> None:
    put(folder, 1, 1.0)
    before = set((folder / listing.name_of(1)).sizes())
    put(folder, 1, 2.0)
    assert value_of(folder) == [2.0]
    after = set((folder / listing.name_of(1)).sizes())
    assert len(after) == len(before)
    assert {name for name in before & after if "/" in name} == set(), "a file of tensors is never overwritten"


def begin(writer: Saver, step: int, value: float) -> Saved:
    writer.save(listing.name_of(step), {"model.x": torch.full((4, 3), value)}, Beside(SHAPE, None, {"step": step}))
    saved = writer.finish()
    assert saved is not None
    return saved


@pytest.mark.parametrize("skip", range(5))
def test_a_store_that_fails_costs_one_checkpoint_and_no_more(
    folder: Remote, failing: dict[str, Any], skip: int, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Saver(folder)
    assert begin(writer, 1, 1.0).problem is None
    failing |= {"open": OSError(5, "the server is tired"), "skip": skip}
    saved = begin(writer, 2, 2.0)
    del failing["open"]
    if skip < 4:  # tensors, tensors.json, model.yaml, manifest
        assert "failed 5 times: [Errno 5] the server is tired" in str(saved.problem)
        assert value_of(folder) == [1.0]
    else:
        assert saved.problem is None
    assert caplog.text.count("the server is tired") == (4 if skip < 4 else 0)
    assert begin(writer, 3, 3.0).problem is None
    assert value_of(folder) == [3.0]


def test_a_store_that_fails_for_a_moment_is_asked_again(
    folder: Remote, failing: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.get_rng_state()
    monkeypatch.setattr(remote.time, "sleep", lambda _: failing.pop("open", None))
    failing["open"] = ConnectionResetError("by peer")
    with caplog.at_level(logging.WARNING):
        put(folder, 1)
    assert "uploading failed (by peer); try 2 of 5" in caplog.text
    assert listing.is_checkpoint(folder / listing.name_of(1))
    assert torch.equal(state, torch.get_rng_state())


def test_a_store_that_takes_its_time_to_fail_is_not_asked_for_ever(
    folder: Remote, failing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Saver(folder)
    monkeypatch.setattr(remote, "PATIENCE_S", -1.0)
    failing["open"] = TimeoutError("no answer")
    assert "uploading failed: no answer" in str(begin(writer, 1, 1.0).problem)
    assert len(failing["tries"]) == 1


def test_a_refusal_is_not_asked_twice_and_says_what_to_do(folder: Remote, failing: dict[str, Any]) -> None:
    writer = Saver(folder)
    failing["open"] = PermissionError("Access Denied")
    problem = str(begin(writer, 1, 1.0).problem)
    assert "uploading was refused: Access Denied" in problem
    assert "May these credentials list, read, write and delete there?" in problem
    assert len(failing["tries"]) == 1


class Answer(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (401, 1), (404, 1), (408, 5), (429, 5), (500, 5), (503, 5)])
def test_the_status_decides_whether_to_ask_again(
    folder: Remote, failing: dict[str, Any], status: int, tries: int
) -> None:
    failing["open"] = Answer(status)
    with pytest.raises(Unreachable):
        (folder / "x").write([b"x"])
    assert len(failing["tries"]) == tries


def test_a_run_whose_store_cannot_be_written_does_not_begin(folder: Remote, failing: dict[str, Any]) -> None:
    failing["open"] = PermissionError("Access Denied")
    with pytest.raises(Unreachable, match="was refused"):
        Saver(folder)


@pytest.mark.parametrize("method", ["ls", "find", "cat_file"])
def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(
    folder: Remote, failing: dict[str, Any], method: str
) -> None:
    put(folder, 1)
    failing[method] = ConnectionError("no route")
    for ask in (listing.newest, listing.listed, listing.damaged, listing.survey, store.open_checkpoint):
        with pytest.raises(Unreachable, match="no route"):
            ask(folder)


def test_retention_removes_in_a_store_too(folder: Remote) -> None:
    for step in range(1, 6):
        put(folder, step, tokens=30 * step)
        listing.retain(folder, CheckpointConfig(keep_last=2, keep_every_tokens=60))
    assert folder.names() == [listing.name_of(step) for step in (2, 4, 5)]


def test_many_parts_are_the_same_file(folder: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1000)
    content = torch.randint(0, 256, (12_345,), dtype=torch.uint8).numpy().tobytes()
    file = folder / "x"
    digest = file.write([content[:7], memoryview(content)[7:5000], content[5000:]])
    buffer = memoryview(bytearray(9000))
    assert file.read_into(3000, buffer) == 9000
    assert bytes(buffer) == content[3000:12_000]
    assert file.read_into(12_000, buffer) == 345
    assert file.sha256(len(content)) == digest
    (folder / "whole").write([content])
    assert (folder / "whole").sha256(len(content)) == digest


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    found.close()


def test_two_ranks_write_what_one_rank_reads(recipe: Make, tmp_path: Path, pool: Ranks) -> None:
    trees = {}
    for name, folder in (("here", None), ("there", f"local://{tmp_path}/store")):
        value = recipe(run=str(tmp_path / name), train__tokens=4 * 256, checkpoint__folder=folder, parallel__shard=2)
        pool.run(2, "fit", config.encode(value))
        trees[name] = store.open_checkpoint(tmp_path / name)  # the run's recipe says where
    assert isinstance(trees["there"].path, Remote)
    files = {piece.file.rpartition("/")[2] for entry in trees["there"].index.values() for piece in entry.pieces}
    assert files == {f"{kind}-0000{rank}.safetensors" for kind in ("model", "state") for rank in range(2)}
    mine, other = (dict(trees[name].weights("")) for name in ("here", "there"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name].read(), other[name].read()) for name in mine)
    assert not any(name.startswith("words") for name in trees["there"].path.names())


def test_a_run_goes_on_from_a_store_and_is_listed_and_converted(
    recipe: Make, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"train__tokens": 6 * 256, "checkpoint": {"folder": url, "every_steps": 2}}
    straight = recipes.prepare(recipe(run=str(tmp_path / "straight"), train__tokens=6 * 256))
    straight.fit()
    first = recipes.prepare(recipe(**changes))
    for _ in range(4):
        first.stepper.step()
    first.save()
    assert not (tmp_path / "run" / "checkpoints").exists()
    second = recipes.prepare(recipe(**changes, run=str(tmp_path / "elsewhere")))  # another machine
    assert second.progress.step == 4
    second.fit()
    mine, other = (store.open_checkpoint(run).weights("") for run in (tmp_path / "straight", url))
    assert all(torch.equal(mine[name].read(), other[name].read()) for name in mine)

    third = recipes.prepare(recipe(run=str(tmp_path / "third"), train__tokens=256, init_from=url))
    assert all(torch.equal(other[f"model.{name}"].read(), p.detach()) for name, p in third.parallel.named_parameters())
    assert main(["checkpoints", url, "--verify"]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["checkpoints", str(tmp_path / "elsewhere")]) == 0
    assert main(["convert", url, str(tmp_path / "out"), "--template", "none"]) == 0
    exported = open_source(tmp_path / "out")
    source = open_source(url)
    assert source.state() == source.state()
    assert exported.talk.tokenizer is not None
    assert source.talk.tokenizer is not None
    assert exported.talk.tokenizer.fingerprint == source.talk.tokenizer.fingerprint
    assert source.model(torch.float32)(torch.ones(1, 4, dtype=torch.long)).shape == (1, 4, 32)
    a, b = (dict(s.tensors()) for s in (source, exported))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_of_others_are_not_looked_for_in_a_store(url: str) -> None:
    with pytest.raises(StorageError, match="only runs and checkpoints of ours"):
        open_source(url)


def test_a_local_folder_may_be_named_too(recipe: Make, tmp_path: Path) -> None:
    value = recipe(train__tokens=2 * 256, checkpoint__folder=f"file://{tmp_path}/fast")
    recipes.prepare(value).fit()
    assert listing.newest(listing.folder_of(tmp_path / "run")) == tmp_path / "fast" / listing.name_of(2)
    assert (tmp_path / "fast" / listing.name_of(2) / pieces.FOLDER).is_dir()
