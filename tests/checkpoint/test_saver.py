"""Saving beside the training: what is written is what was there, and no failure costs more than its checkpoint."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import runtime, storage
from internlm.checkpoint import listing, pieces, place, store
from internlm.checkpoint.listing import CheckpointConfig
from internlm.checkpoint.saver import Beside, Saved, Saver
from internlm.errors import ConfigError, StorageError
from internlm.hashed_file import HashedFile
from internlm.model.config import ModelConfig
from tests.models import save_checkpoint

SHAPE = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8)


def beside(step: int, **facts: Any) -> Beside:
    return Beside(SHAPE, None, {"step": step, **facts})


def begin(writer: Saver, step: int, tensors: dict[str, torch.Tensor], **facts: Any) -> None:
    writer.save(f"step-{step:08d}", tensors, beside(step, **facts))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until this is set, no file is written."""
    event = threading.Event()
    write = HashedFile.write

    def wait(self: HashedFile, content: Any) -> None:
        assert event.wait(20)
        write(self, content)

    monkeypatch.setattr(HashedFile, "write", wait)
    return event


def test_tensors_may_change_while_a_checkpoint_is_written(tmp_path: Path, held: threading.Event) -> None:
    tensor = torch.arange(1000.0)
    writer = Saver(tmp_path)
    facts = {"losses": [1.0], "scale": {"value": 2.0}}
    begin(writer, 1, {"model.x": tensor}, **facts)
    assert listing.newest(tmp_path) is None
    writer.copied()
    tensor.zero_()
    facts["losses"].append(3.0)  # type: ignore[attr-defined]
    facts["scale"].clear()
    held.set()
    assert writer.finish() is not None
    found = store.open_checkpoint(tmp_path)
    assert found.meta == {"step": 1, "losses": [1.0], "scale": {"value": 2.0}}
    assert torch.equal(found.weights()["x"].read(), torch.arange(1000.0))


def test_tensors_may_not_change_before_a_slow_copy_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Saver._copy

    def slow(self: Saver, sources: list[torch.Tensor]) -> Any:
        parts, make = copy(self, sources)
        return parts, lambda: (time.sleep(0.3), make())

    monkeypatch.setattr(Saver, "_copy", slow)
    tensor = torch.ones(3)
    writer = Saver(tmp_path)
    begin(writer, 1, {"model.x": tensor})
    writer.copied()
    tensor.zero_()
    assert writer.finish() is not None
    assert store.open_checkpoint(tmp_path).weights()["x"].read().tolist() == [1.0, 1.0, 1.0]


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, held: threading.Event) -> None:
    writer = Saver(tmp_path)
    begin(writer, 1, {"model.x": torch.ones(3)})
    threading.Timer(0.3, held.set).start()
    waited = writer.save("step-00000002", {"model.x": torch.full((3,), 2.0)}, beside(2))
    assert waited > 0.2
    writer.finish()
    assert [path.name for path in listing.listed(tmp_path)] == ["step-00000001", "step-00000002"]
    assert store.open_checkpoint(tmp_path).weights()["x"].read().tolist() == [2, 2, 2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_leaves_the_run_and_the_checkpoint_before_alone(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Saved] = []
    writer = Saver(tmp_path, after=told.append)
    begin(writer, 1, {"model.x": torch.ones(3)})
    writer.join()

    def fail(self: HashedFile, content: Any) -> None:
        raise OSError(code, "the disk does not want to")

    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", fail)
        begin(writer, 2, {"model.x": torch.zeros(3)})
        last = writer.finish()
    assert last is not None
    assert "the disk does not want to" in str(last.problem)
    assert [saved.problem is None for saved in told] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "what was half written is gone"
    begin(writer, 3, {"model.x": torch.full((3,), 3.0)})
    last = writer.finish()
    assert last is not None
    assert last.problem is None
    assert store.open_checkpoint(tmp_path).step == 3


def test_an_error_that_nobody_thought_of_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Saver(tmp_path)
    monkeypatch.setattr(pieces, "dump", lambda index: 1 // 0)
    begin(writer, 1, {"model.x": torch.ones(3)})
    last = writer.finish()
    assert last is not None
    assert "ZeroDivisionError" in str(last.problem)
    assert not list(tmp_path.iterdir())


def test_without_memory_for_a_copy_the_run_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 100)
    writer = Saver(tmp_path)
    begin(writer, 1, {"model.x": torch.ones(1000)})
    assert listing.newest(tmp_path) is not None
    assert "no memory for a copy" in caplog.text


def test_copies_are_made_once(tmp_path: Path) -> None:
    writer = Saver(tmp_path)
    begin(writer, 1, {"model.x": torch.ones(1000)})
    writer.join()
    assert writer._copies is not None
    first = writer._copies[0].data_ptr()
    begin(writer, 2, {"model.x": torch.ones(1000)})
    writer.finish()
    assert writer._copies[0].data_ptr() == first


def test_tensors_may_have_another_shape_in_the_next_save(tmp_path: Path) -> None:
    writer = Saver(tmp_path)
    for step in (1, 2):
        begin(writer, step, {"model.x": torch.full((step,), 7.0)})
        saved = writer.finish()
        assert saved is not None
        assert saved.problem is None
    assert store.open_checkpoint(tmp_path).weights()["x"].read().tolist() == [7.0, 7.0]


def test_leftovers_of_killed_runs_are_cleared_and_what_was_moved_aside_comes_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-00000001", {"model.x": torch.ones(3)}, SHAPE, None, {"step": 1})
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.replaced-77")
    (tmp_path / "step-00000002.partial-77.1" / "tensors").mkdir(parents=True)
    (tmp_path / "probe").write_bytes(b"killed before it went")
    Saver(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert listing.is_checkpoint(tmp_path / "step-00000001")


def test_a_checkpoint_is_visible_only_with_all_of_it(tmp_path: Path) -> None:
    wrong: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for path in tmp_path.glob("step-????????"):
                try:
                    storage.verify(path)
                except StorageError as error:
                    wrong.append(str(error))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    writer = Saver(tmp_path)
    try:
        for step in range(1, 8):
            begin(writer, step, {"model.x": torch.full((50_000,), float(step))})
        writer.finish()
    finally:
        done.set()
        watcher.join()
    assert not wrong
    assert len(listing.listed(tmp_path)) == 7


def test_a_checkpoint_has_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    missing: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note(file: int) -> None:
        fsync(file)
        synced.add(os.fstat(file).st_ino)

    def look(source: Path, target: Path) -> None:
        missing.extend(str(path) for path in (source, *source.rglob("*")) if path.stat().st_ino not in synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", look)
    save_checkpoint(tmp_path / "step-00000001", {"model.x": torch.ones(3)}, SHAPE, None, {"step": 1})
    assert listing.newest(tmp_path) is not None
    assert not missing
    assert tmp_path.stat().st_ino in synced, "and its name too"


def test_what_a_rank_has_written_is_on_the_disk_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    fsync = os.fsync

    def note(file: int) -> None:
        fsync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", note)
    place.draft_of(tmp_path / "step-00000001", "mark").write("tensors/a", [b"abc", b"defg"])
    (written,) = tmp_path.rglob("a")
    assert synced == {written.stat().st_ino: 7}


def kept(folder: Path, facts: list[dict[str, Any]], **config: Any) -> list[int]:
    """Return the steps that are left of checkpoints with these facts."""
    for step, more in enumerate(facts, 1):
        save_checkpoint(folder / f"step-{step:08d}", {"x": torch.ones(1)}, SHAPE, None, {"step": step, **more})
        listing.retain(folder, CheckpointConfig(**config))
    return [int(path.name[5:]) for path in listing.listed(folder)]


def test_the_newest_and_the_first_of_every_so_many_tokens_are_kept(tmp_path: Path) -> None:
    facts = [{"tokens": 30 * step} for step in range(1, 11)]  # 30, 60, … 300
    assert kept(tmp_path, facts, keep_last=2, keep_every_tokens=100) == [4, 7, 9, 10]


def test_the_best_by_a_metric_is_kept(tmp_path: Path) -> None:
    losses = [5.0, 3.0, 4.0, 3.5, 6.0]
    facts: list[dict[str, Any]] = [measured("valid/loss/a", loss, step) for step, loss in enumerate(losses, start=1)]
    assert kept(tmp_path, facts, keep_last=1, keep_best="valid/loss/a") == [2, 5]


def measured(name: str, value: float, step: int) -> dict[str, Any]:
    """Return what a checkpoint says of a metric that was measured at some step."""
    return {"metrics": {name: value}, "measured_at": {name: step}}


def test_a_checkpoint_is_not_the_best_by_what_was_measured_of_other_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Validated at steps 2 and 4 only: what 1, 3 and 5 say is of the weights before, or of none."""
    facts = [measured("loss", loss, at) for loss, at in ((1.0, 0), (3.0, 2), (3.0, 2), (2.0, 4), (2.0, 4))]
    assert kept(tmp_path, facts, keep_last=1, keep_best="loss") == [4, 5]
    assert kept(tmp_path / "never", [measured("loss", 1.0, 7)] * 3, keep_last=1, keep_best="loss") == [3]
    assert "keeps nothing so far: loss was measured at steps without a checkpoint" in caplog.text


def test_a_metric_that_was_never_measured_keeps_nothing(tmp_path: Path) -> None:
    assert kept(tmp_path, [{}, {}, {}], keep_last=1, keep_best="valid/loss/a") == [3]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("valid/loss/b", "measured as valid/loss/b. Did you mean 'valid/loss/a'?"),
        ("quality", "measured as quality. There are: train/loss, valid/loss/a"),
        ("valid/loss/a", ""),
    ],
)
def test_a_metric_that_nobody_measures_is_told_once_there_was_a_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wanted: str, said: str
) -> None:
    caplog.set_level(logging.WARNING, "internlm")
    assert kept(tmp_path, [{"metrics": {}}], keep_last=1, keep_best=wanted) == [1]
    if wanted.startswith("valid/"):
        kept(tmp_path, [{"metrics": {"train/loss": 3.0}}], keep_last=1, keep_best=wanted)
    assert not caplog.records, "it may still come"
    known = {"train/loss": 3.0, "valid/loss/a": float("nan")}
    kept(tmp_path, [{"metrics": known}] * 3, keep_last=1, keep_best=wanted)
    assert [record.getMessage().partition("nothing is ")[2] for record in caplog.records] == [said] * bool(said)


@pytest.mark.parametrize("where", ["", "s3:/bucket/run", "s3:bucket", "file:/tmp/x"])
def test_a_url_that_is_none_is_no_folder_with_an_odd_name(where: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.folder: must be a path, or a URL with ://"):
        CheckpointConfig(folder=where)
    assert CheckpointConfig(folder="./s3:/bucket/run").of(Path()) == Path("s3:/bucket/run")


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"writing a first file into .*file"):
        Saver(tmp_path / "file")
    Saver(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_damaged_ones_go_with_the_old_ones_but_not_what_is_newer(tmp_path: Path) -> None:
    for step in range(1, 5):
        save_checkpoint(tmp_path / f"step-{step:08d}", {"x": torch.ones(1)}, SHAPE, None, {"step": step})
    for step in (1, 4):
        (tmp_path / f"step-{step:08d}" / storage.MANIFEST).unlink()
    listing.retain(tmp_path, CheckpointConfig(keep_last=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "step-00000001", {"model.x": torch.ones(3)}, SHAPE, None, {"step": 1})
    monkeypatch.setattr(place.shutil, "rmtree", lambda *_, **__: None)
    place.remove(tmp_path / "step-00000001")
    assert (tmp_path / "step-00000001").exists()
    assert listing.newest(tmp_path) is None
