"""`internlm checkpoints`: what a run has on disk, as people and as programs read it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from internlm import recipe as recipes
from internlm import storage
from internlm.checkpoint import listing, store
from internlm.cli import main
from tests.conftest import recipe_over
from tests.models import save_checkpoint
from tests.processes import internlm


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    checkpoint = {"every_steps": 2, "keep_last": 3}
    recipes.prepare(recipe_over(corpus, run, train__tokens=6 * 256, checkpoint=checkpoint)).fit()
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a run with checkpoints of steps 2, 4 and 6."""
    return shutil.copytree(trained, tmp_path / "run")


def damage(run: Path, step: int) -> None:
    path = run / "checkpoints" / listing.name_of(step) / "tensors" / "state-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_each_checkpoint_has_a_line_with_what_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "tokens", "loss", "held", "out", "size", "state", "layout"]
    assert [line.split()[0] for line in lines] == ["2", "4", "6"]
    assert all("complete  one rank" in line for line in lines)
    assert lines[2].split()[1] == "1.54k"
    meta = store.open_checkpoint(run).meta
    assert f"{meta['metrics']['train/loss']:.4f}" in lines[2]
    assert max(map(len, lines)) < 80
    numbers = [line[: line.index("complete")] for line in lines]
    assert len({len(cells) for cells in numbers}) == 1, "columns stand under each other"
    assert main(["checkpoints", str(run / "checkpoints")]) == 0
    assert capsys.readouterr().out.splitlines() == [head, *lines]


def test_what_reads_a_run_starts_without_torch(run: Path) -> None:
    for words in (["checkpoints", str(run), "--verify"], ["monitor", str(run), "--once"]):
        done = internlm(*words, PYTHONPROFILEIMPORTTIME="1")
        assert done.returncode == 0, done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "internlm.checkpoint.listing" in imported, "imports are told"
        assert not imported & {"torch", "numpy", "pydantic"}


def test_a_checkpoint_of_a_run_may_be_named_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 4)
    for step, code in ((2, 0), (4, 1)):
        assert main(["checkpoints", str(run / "checkpoints" / listing.name_of(step)), "--verify"]) == code
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", str(step)]
    assert main(["checkpoints", str(run / "checkpoints" / listing.name_of(2) / "tensors")]) == 1


def test_damage_is_found_when_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 4)
    assert main(["checkpoints", str(run)]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert main(["checkpoints", str(run), "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [("damaged" in line, "complete" in line) for line in lines[1:]] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    assert "tensors/state-00000.safetensors is damaged (its SHA-256 differs)" in lines[2]


def test_what_is_not_complete_is_listed_and_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / listing.name_of(2) / storage.MANIFEST).unlink()
    (run / "checkpoints" / listing.name_of(4) / "model.yaml").unlink()
    assert main(["checkpoints", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "has no manifest.json" in lines[1]
    assert lines[1].split()[1:4] == ["–", "–", "–"]
    assert "file model.yaml is missing" in lines[2]
    assert "complete" in lines[3]
    assert main(["checkpoints", str(run), "--verify"]) == 1


def test_what_is_not_a_number_is_null_for_programs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run / "checkpoints" / listing.name_of(2) / storage.MANIFEST
    content = json.loads(manifest.read_text())
    content["meta"]["metrics"]["train/loss"] = math.nan
    del content["digest"]
    manifest.write_text(json.dumps(content))
    assert main(["checkpoints", str(run), "--json"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert json.loads(first, parse_constant=pytest.fail)["metrics"]["train/loss"] is None


def test_programs_read_one_object_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 4)
    assert main(["checkpoints", str(run), "--json", "--verify"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["step"], one["tokens"], one["complete"]) for one in found] == [
        (2, 512, True),
        (4, 1024, False),
        (6, 1536, True),
    ]
    assert found[1]["problem"]
    assert found[0]["problem"] is None
    assert found[2]["metrics"]["train/loss"] > 0
    assert found[0]["layout"]["shard"] == 1
    sizes = [sum(file.stat().st_size for file in Path(one["path"]).rglob("*") if file.is_file()) for one in found]
    assert [one["bytes"] for one in found] == sizes


def test_the_layout_that_wrote_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    shape = store.open_checkpoint(run).config
    meta = {"step": 1, "tokens": 5_000_000_000, "layout": {"replicate": 2, "shard": 8, "tensor": 1}}
    save_checkpoint(tmp_path / "other" / "step-00000001", {"x": torch.ones(3)}, shape, None, meta)
    assert main(["checkpoints", str(tmp_path / "other")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("complete  replicate 2 × shard 8")
    assert line.split()[1] == "5B"


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_where_there_is_none_it_says_so(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["checkpoints", str(tmp_path / name)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "no checkpoints here" in said.err
    assert "internlm train" in said.err
