"""Complete or absent: folders, manifests, crashes, full disks."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from internlm import disk, storage
from internlm.checkpoint import place
from internlm.errors import StorageError, WeightsError


def make(target: Path, content: str = "hello", **options: bool) -> None:
    with storage.writing(target, "thing", **options) as folder:
        (folder.path / "a.txt").write_text(content)
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "b.txt").write_text("b")
        folder.meta["n"] = 1


def test_a_written_folder_is_complete_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    make(tmp_path / "x")
    assert storage.read_manifest(tmp_path / "x", "thing") == {"n": 1}
    storage.verify(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> None:
        with storage.writing(tmp_path / "x", "thing") as folder:
            (folder.path / "a").write_text("a")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_existing_content_is_replaced_only_when_asked_and_only_its_own_kind(tmp_path: Path) -> None:
    make(tmp_path / "x", "old")
    with pytest.raises(StorageError, match="exists already"):
        make(tmp_path / "x", "new")
    make(tmp_path / "x", "new", replace=True)
    assert (tmp_path / "x" / "a.txt").read_text() == "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(StorageError, match="not written by this step"):
        make(tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "half manifest"])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "x")
    if damage == "truncate":
        (tmp_path / "x" / "a.txt").write_text("hell")
    elif damage == "delete":
        (tmp_path / "x" / "sub" / "b.txt").unlink()
    elif damage == "manifest":
        (tmp_path / "x" / "manifest.json").unlink()
    else:
        text = (tmp_path / "x" / "manifest.json").read_text()
        (tmp_path / "x" / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(StorageError):
        storage.read_manifest(tmp_path / "x", "thing")


def test_a_manifest_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(StorageError, match="something else"):
        storage.read_manifest(tmp_path, "thing")


def test_the_present_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    make(Path("."))
    assert storage.is_complete(tmp_path / "x", "thing")


@pytest.mark.parametrize("mark", ["partial-9999999", "replaced-9999999", "partial-r0123456789abcdef"])
def test_leftovers_are_found_whatever_the_name(mark: str, tmp_path: Path) -> None:
    make(tmp_path / "run[1]", "old")
    (tmp_path / f"run[1].{mark}").mkdir()
    make(tmp_path / "run[1]", replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run[1]"]


def test_folders_that_people_name_like_leftovers_stay(tmp_path: Path) -> None:
    make(tmp_path / "x", "old")
    names = ["x.partial-results", "x.partial-20260101", "x.partial-part-9999999", "x.partial-rest", "x.replaced-notes"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years")
    make(tmp_path / "x", replace=True)
    for name in names:
        assert (tmp_path / name / "thesis.txt").read_text() == "years"


def test_beside_checkpoints_too_only_leftovers_are_cleared(tmp_path: Path) -> None:
    ours = ["step-00000010.partial-0123abcd.7", "step-00000005.replaced-9999999"]
    theirs = ["mine.partial-results", "step-00000010.partial-notes", "step-00000010.replaced-notes"]
    for name in ("step-00000005", *ours, *theirs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a")
    assert place.clear(tmp_path) == ours[:1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["step-00000005", *theirs])


@pytest.mark.parametrize("resume", [None, "the same"])
@pytest.mark.parametrize("replace", [False, True])
def test_what_took_the_name_meanwhile_stays_and_what_was_written_is_kept(
    replace: bool, resume: str | None, tmp_path: Path
) -> None:
    def late() -> None:
        with storage.writing(tmp_path / "x", "thing", replace=replace, resume=resume) as folder:
            (folder.path / "a.txt").write_text("hours of work")
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "thesis.txt").write_text("years")

    with pytest.raises(StorageError, match=r"x: exists and was not written .* What was written is complete: ") as said:
        late()
    assert (tmp_path / "x" / "thesis.txt").read_text() == "years"
    kept = Path(str(said.value).rpartition("complete: ")[2])
    assert set(tmp_path.iterdir()) == {kept, tmp_path / "x"}
    storage.verify(kept)
    assert (kept / "a.txt").read_text() == "hours of work"


def test_of_two_writers_of_a_name_the_later_one_replaces_only_when_asked(tmp_path: Path) -> None:
    for replace in (False, True):
        target = tmp_path / str(replace)
        refused = contextlib.nullcontext() if replace else pytest.raises(StorageError, match="exists already")
        with refused, storage.writing(target, "thing", replace=replace, resume="late") as folder:
            (folder.path / "a.txt").write_text("late")
            make(target, "early")
        assert (target / "a.txt").read_text() == ("late" if replace else "early")


def test_files_that_were_added_to_a_folder_are_not_replaced_with_it(tmp_path: Path) -> None:
    make(tmp_path / "x", "old")
    (tmp_path / "x" / "sub" / "mine.txt").write_text("years")
    (tmp_path / "x" / "link").symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"x: holds files that were added to it.*: link, sub/mine\.txt\. Move them"):
        make(tmp_path / "x", "new", replace=True)
    assert (tmp_path / "x" / "sub" / "mine.txt").read_text() == "years"
    (tmp_path / "x" / "sub" / "mine.txt").unlink()
    (tmp_path / "x" / "link").unlink()
    make(tmp_path / "x", "new", replace=True)
    assert (tmp_path / "x" / "a.txt").read_text() == "new"


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x", "old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError):
        make(tmp_path / "x", "new", replace=True)
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_held_folder_is_refused_to_other_processes_until_its_holder_dies(tmp_path: Path) -> None:
    code = f"from internlm import disk; disk.hold({str(tmp_path)!r}); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=rf"another process works in this folder \(process {holder.pid} on "):
        disk.hold(tmp_path)
    holder.kill()
    holder.communicate()
    disk.hold(tmp_path)
    disk.hold(tmp_path)  # the holder may claim it again


def test_flipped_bits_are_found_by_verify(tmp_path: Path) -> None:
    make(tmp_path / "x")
    (tmp_path / "x" / "a.txt").write_text("jello")
    storage.read_manifest(tmp_path / "x", "thing")  # the size is right
    with pytest.raises(StorageError, match=r"a\.txt is damaged"):
        storage.verify(tmp_path / "x")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(StorageError, match="something else"):
        storage.read_manifest(tmp_path / "x", "checkpoint")


def test_a_killed_writer_leaves_the_old_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    make(tmp_path / "x", "old")
    code = f"""
        import os, signal
        from internlm import disk, storage
        with storage.writing({str(tmp_path / "x")!r}, "thing", replace=True) as folder:
            (folder.path / "a.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2  # the leftover
    make(tmp_path / "x", "new", replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk is full"), storage.writing(tmp_path / "x", "thing"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StorageError, match="MiB left"):
        disk.require_space(tmp_path / "x" / "y", 1 << 60, "the checkpoint")


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    disk.write_text(tmp_path / "d" / "f", "one")
    disk.write_text(tmp_path / "d" / "f", "two")
    assert (tmp_path / "d" / "f").read_text() == "two"
    assert len(list((tmp_path / "d").iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_folder_that_cannot_be_claimed_for_want_of_room_is_named(tmp_path: Path) -> None:
    (tmp_path / disk.LOCK).symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"writing .*lock"):
        disk.hold(tmp_path)


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = {"ß": [1, None, {"b": 2.5}]}
    disk.write_json(tmp_path / "deep" / "a.json", content)
    assert disk.read_json(tmp_path / "deep" / "a.json") == content
    assert "ß" in (tmp_path / "deep" / "a.json").read_text(encoding="utf-8")
    assert disk.read_json(tmp_path / "none.json") == disk.read_json(tmp_path / "deep" / "a.json" / "x") == {}


@pytest.mark.parametrize("text", ["[1]", "3", "", "{", '{"a": 1', "\xff", "[" * 100_000])
def test_a_file_that_holds_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"a\.json: cannot be read: .*Copy the file again"):
        disk.read_json(path, WeightsError)


@pytest.mark.parametrize("there", [None, "empty", "complete"])
def test_a_link_stays_one_and_what_it_leads_to_is_written(there: str | None, tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.parent.mkdir()
    link.symlink_to(real)
    if there == "empty":
        real.mkdir()
    if there == "complete":
        make(real, "old")
        with pytest.raises(StorageError, match="exists already"):
            make(link)
    make(link, "new", replace=True)
    assert link.is_symlink()
    assert (real / "a.txt").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}, "nothing is left beside"
    assert {path.name for path in real.parent.iterdir()} == {"real"}


def test_a_file_behind_a_link_is_written_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for text in ("old", "new"):
        disk.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "file").read_text() == text
