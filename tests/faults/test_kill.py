"""Kill -9 at any moment, start again: the run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm import config
from internlm.checkpoint import store
from internlm.cli import main
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from internlm.weights.weight import tensors


def start(recipe: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "internlm", "train", str(recipe)], stderr=subprocess.DEVNULL)


@pytest.mark.timeout(3600)
def test_killed_runs_go_on_from_a_complete_checkpoint_and_end_bitwise_equal(
    recipe: Callable[..., Recipe], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A slice kills a few times; `--proof` a hundred times, over many short runs."""
    kills = 100 if request.config.getoption("--proof") else 3
    changes = {"train__tokens": 60 * 256, "checkpoint": {"every_steps": 3, "keep_last": 2}}
    straight = tmp_path / "straight.yaml"
    straight.write_text(config.dump(recipe(run=str(tmp_path / "straight"), **changes)))
    assert start(straight).wait() == 0
    wanted = dict(tensors(store.open_checkpoint(tmp_path / "straight").weights("")))
    generator = random.Random(1)
    killed = 0
    for attempt in range(1000):
        if killed >= kills:
            break
        run = tmp_path / f"run{attempt}"
        path = tmp_path / f"{attempt}.yaml"
        path.write_text(config.dump(recipe(run=str(run), **changes)))
        while True:
            process = start(path)
            if killed < kills:
                while not (run / "metrics.jsonl").exists() and process.poll() is None:
                    time.sleep(0.01)  # killing the start-up would only prove that Python can be killed
                time.sleep(generator.uniform(0, 1.0))
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
            code = process.wait()
            for left in store.listed(run):
                store.open_checkpoint(left)  # what is listed can be read
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
        checkpoint = store.open_checkpoint(run)
        assert checkpoint.step == 60
        for name, tensor in tensors(checkpoint.weights("")):
            assert torch.equal(tensor, wanted[name]), name
        steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
        assert steps == list(range(1, 61))
    assert killed >= kills


def test_a_full_disk_while_saving_ends_the_run_and_keeps_the_last_checkpoint(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A file size limit, set between two checkpoints, stands for the full disk."""
    path = tmp_path / "r.yaml"
    path.write_text(config.dump(recipe(train__tokens=12 * 256, checkpoint={"every_steps": 4})))
    code = f"""
import resource, signal, sys
from internlm.train.trainer import Trainer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Trainer.save
def full(self):
    if self.progress.step == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    return save(self)
Trainer.save = full
from internlm.cli import main
sys.exit(main(["train", {str(path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in store.listed(tmp_path / "run")] == ["step-00000004"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert start(path).wait() == 0  # there is room again
    assert store.open_checkpoint(tmp_path / "run").step == 12


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "gone.yaml"], 1, "gone.yaml: no such recipe"),
        (["train", "r.yaml", "optim.lrr=1"], 1, "unknown key 'lrr'. Did you mean 'lr'?"),
        (["train", "r.yaml", "train.tokens=many"], 1, "train.tokens (command line): input should be a valid integer"),
        (["train", "r.yaml", "data.train.a.path=nowhere"], 1, "nowhere: no such folder"),
        (["data", "tokenize", "gone.txt", "--tokenizer", "t", "--out", "o"], 1, "no such"),
        (["chat", "nowhere", "-p", "hi"], 1, "nowhere"),
        (["convert", "nowhere", "out"], 1, "nowhere"),
        (["trian", "r.yaml"], 2, "Did you mean 'train'?"),
        ([], 2, "usage"),
        (["data"], 2, "usage"),
    ],
)
def test_bad_input_is_one_clear_line_and_the_right_exit_code(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    words: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yaml").write_text(config.dump(recipe()))
    monkeypatch.chdir(tmp_path)
    try:
        found = main(words)
    except SystemExit as left:  # argparse leaves so
        found = left.code
    assert found == code
    said = capsys.readouterr()
    assert message in said.err + said.out
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_the_exit_code_and_the_line_are_those_of_the_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "internlm", "train", "gone.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["internlm train: error: gone.yaml: no such recipe"]
