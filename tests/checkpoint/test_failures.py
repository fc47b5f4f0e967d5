"""Whatever fails while a checkpoint is written: the run goes on, the one before stays, and the next is written."""

from __future__ import annotations

import errno
import gc
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import disk, storage
from internlm.checkpoint import listing, place, store
from internlm.checkpoint.listing import CheckpointConfig
from internlm.checkpoint.place import Place
from internlm.checkpoint.remote import Unreachable
from internlm.checkpoint.saver import Beside, Saver
from internlm.errors import StorageError
from internlm.model.config import ModelConfig
from internlm.text.tokenizer import Tokenizer
from tests.faults.runs import OPERATIONS
from tests.models import save_checkpoint

SHAPE = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8)


class Disk:
    """A disk on which one operation fails: an audit hook, which cannot be taken back, but be silent."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.left, self.code, self.failed = 0, 0, False
        sys.addaudithook(self._see)

    def fail(self, folder: Path, number: int, code: int) -> None:
        """Let the operation of this number on a folder fail, counted from 0."""
        self.folder, self.left, self.code, self.failed = str(folder), number, code, False

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in OPERATIONS or self.folder not in str(arguments[0]):
            return
        self.left -= 1
        if self.left == -1:
            self.failed = True
            raise OSError(self.code, "the disk does not want to", str(arguments[0]))


@pytest.fixture(scope="module")
def one_disk() -> Disk:
    return Disk()


@pytest.fixture
def failing(one_disk: Disk) -> Any:
    yield one_disk
    one_disk.folder = None


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.proof)], ids=["no space", "error"]
)
def test_whichever_file_operation_fails_the_one_before_stays_and_the_next_is_written(
    code: int, failing: Disk, tmp_path: Path, corpus: Path
) -> None:
    tensors = {"model.x": torch.arange(10.0)}
    beside = Beside(SHAPE, Tokenizer.load(corpus / "a" / "tokenizer"), {"step": 1})
    number = failures = 0
    while True:
        folder = tmp_path / str(number)
        writer = Saver(folder)
        writer.save("step-00000001", tensors, beside)
        writer.join()
        failing.fail(folder / "step-00000002", number, code)
        writer.save("step-00000002", tensors, Beside(SHAPE, beside.tokenizer, {"step": 2}))
        second = writer.finish()
        failing.folder = None
        assert second is not None
        if not failing.failed:
            break
        store.open_checkpoint(folder / "step-00000001").verify()
        if second.problem is None:  # what failed was needed for nothing
            store.open_checkpoint(folder / "step-00000002").verify()
        else:
            failures += 1
            assert "the disk does not want to" in second.problem
            assert listing.newest(folder) == folder / "step-00000001"
        writer.save("step-00000003", tensors, Beside(SHAPE, beside.tokenizer, {"step": 3}))
        third = writer.finish()
        assert third is not None
        assert third.problem is None
        listing.retain(folder, CheckpointConfig(keep_last=1))
        assert [path.name for path in folder.iterdir()] == ["step-00000003"], number
        number += 1
    assert failures >= 15


def test_a_manifest_that_the_disk_does_not_give_is_a_damaged_checkpoint(failing: Disk, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step-{step:08d}", {"x": torch.ones(3)}, SHAPE, None, {"step": step})
    failing.fail(tmp_path / "step-00000002" / storage.MANIFEST, 0, errno.EIO)
    assert listing.newest(tmp_path) == tmp_path / "step-00000001"
    failing.fail(tmp_path / "step-00000002" / storage.MANIFEST, 0, errno.EIO)
    assert [found.problem is None for found in listing.survey(tmp_path)] == [True, False]
    failing.fail(tmp_path / "step-00000002" / "tensors", 0, errno.EIO)
    with pytest.raises(StorageError, match="the disk does not want to"):
        store.open_checkpoint(tmp_path).weights("")


def test_a_checkpoint_that_may_not_be_read_is_not_gone_back_behind(
    failing: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step-{step:08d}", {"x": torch.ones(3)}, SHAPE, None, {"step": step})
    newest = tmp_path / "step-00000002"
    for look in (listing.newest, listing.damaged, lambda run: listing.retain(run, CheckpointConfig(keep_last=1))):
        failing.fail(newest / storage.MANIFEST, 0, errno.EACCES)
        with pytest.raises(Unreachable, match=r"step-00000002: may not be read\. Permission is missing"):
            look(tmp_path)
    failing.fail(newest / storage.MANIFEST, 0, errno.EACCES)
    first, second = listing.survey(tmp_path)
    assert (first.problem, second.bytes) == (None, first.bytes)
    assert "Permission is missing" in str(second.problem)

    def locked(folder: Place) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(place, "names", locked)
    with pytest.raises(StorageError, match=r"looking for checkpoints in .* Permission is missing"):
        listing.newest(tmp_path)


def test_a_checkpoint_that_is_removed_while_it_is_looked_at_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step-{step:08d}", {"x": torch.ones(3)}, SHAPE, None, {"step": step})
    sizes = place.sizes

    def after_a_removal(folder: Place) -> dict[str, int]:
        place.remove(tmp_path / "step-00000001")
        return sizes(folder)

    monkeypatch.setattr(place, "sizes", after_a_removal)
    assert [(found.step, found.problem) for found in listing.survey(tmp_path)] == [(2, None)]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_fifty_saves_in_the_background_leave_memory_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first saves make the copies; what the others take and do not give back would be half a copy each, or more."""
    caplog.set_level(logging.WARNING)
    tensors = {f"model.{number}": torch.randn(2**18) for number in range(8)}  # 8 MiB
    writer = Saver(tmp_path)

    def save(step: int) -> None:
        writer.save(f"step-{step:08d}", tensors, Beside(SHAPE, None, {"step": step}))
        writer.finish()
        listing.retain(tmp_path, CheckpointConfig(keep_last=2))

    def held_bytes() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for step in range(1, 6):
        save(step)
    before = held_bytes()
    for step in range(6, 56):
        save(step)
    grown = held_bytes() - before
    assert grown < 4 * 2**20, f"{grown / 2**20:.1f} MiB more after 50 saves of 8 MiB"
    assert len(listing.listed(tmp_path)) == 2


def test_a_file_that_could_not_be_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    disk.write_text(tmp_path / "word", "old")

    def write() -> None:
        with disk.beside(tmp_path / "word") as draft:
            draft.write_text("ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_checkpoint_does_not_take_the_place_of_a_folder_of_another_kind(tmp_path: Path) -> None:
    with storage.writing(tmp_path / "export", "export") as folder:
        (folder.path / "weights").write_text("years")
    with pytest.raises(StorageError, match="not written by this step"):
        storage.check_free(tmp_path / "export", place.KIND, replace=True)
