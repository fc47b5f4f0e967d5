"""The README's way, cut short and begun again: what is complete is kept, the rest is gone on with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from internlm.checkpoint import listing
from tests.processes import environment, finish, start, wait_for
from tests.story.test_story import ROOT, shorter

SCRIPT = ROOT / "scripts" / "quickstart.sh"
STAND_IN = """#!/usr/bin/env bash
# Writes its words down, and the folder that it is asked for; ends before that as Ctrl-C does where they have $STOP.
echo "$*" >> "$LOG"
case "$*" in *"$STOP"*) exit 130 ;; esac
while [ $# -gt 1 ]; do
  if [ "$1" = --out ]; then mkdir -p "$2" && touch "$2/manifest.json"; fi
  shift
done
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    "stop", ["data corpus", "tokenizer train", "data/questions-purpose", "pretrain.yaml", "convert"]
)
def test_the_quickstart_takes_no_finished_step_twice_and_no_other_for_finished(stop: str, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "internlm", STAND_IN)

    def taken(stop: str, folder: str) -> tuple[int, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        known = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STOP": stop, "LOG": str(log)}
        done = subprocess.run(["bash", SCRIPT, folder], cwd=tmp_path, env=known, capture_output=True)
        return done.returncode, [line.replace(folder, "FOLDER") for line in log.read_text().splitlines()]

    code, whole = taken("never", "undisturbed")
    assert (code, len(whole)) == (0, 13)
    code, first = taken(stop, "twice")
    assert code == 130
    assert first == whole[: len(first)]
    assert stop in first[-1]
    code, second = taken("never", "twice")
    kept = [words for words in first[:-1] if words.startswith(("data", "tokenizer"))]
    assert (code, kept + second) == (0, whole)
    assert taken("never", "twice") == (0, whole[7:]), "trainings see for themselves that they are finished"


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_the_quickstart_goes_on_with_the_training_that_was_ended(ending: signal.Signals, tmp_path: Path) -> None:
    """The signal goes to all processes of the group, as a terminal's Ctrl-C and the end of a machine do."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    program(tmp_path / "scripts" / "quickstart.sh", shorter(SCRIPT.read_text()))
    run = tmp_path / "runs" / "quickstart"
    overrides = "train.tokens=40960 checkpoint.every_steps=4 train.log_every_steps=2"
    known = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OVERRIDES": overrides}
    command = ["bash", "scripts/quickstart.sh"]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environment(**known), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for(child, lambda: listing.listed(run / "pretrain" / "checkpoints"))
    os.killpg(child.pid, ending)
    code, said = finish(child)
    assert code == (130 if ending == signal.SIGINT else -ending), said
    steps = ["corpus", "tokenizer", *(f"data/{path.name}" for path in (run / "data").iterdir())]
    before = {step: (run / step / "manifest.json").stat().st_mtime_ns for step in steps}
    assert len(before) == 7
    code, said = finish(start(*command, cwd=tmp_path, **known), 400)
    assert code == 0, said
    assert {step: (run / step / "manifest.json").stat().st_mtime_ns for step in steps} == before
    first = re.search(r"^step (\d+)/20 ", said, re.MULTILINE)
    assert first is not None, said
    assert int(first[1]) > 4, "after the checkpoint that was there"
    assert (run / "model" / "config.json").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("left", ["nothing", "a python without pip", "all"])
def test_an_environment_that_was_cut_short_is_completed(left: str, tmp_path: Path) -> None:
    works, log = '#!/bin/sh\necho "$@" >> log\n', tmp_path / "log"
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", "log"):
        (tmp_path / name).touch()
    program(tmp_path / "works", works)
    program(tmp_path / "python3", f"{works}mkdir -p .venv/bin && cp works .venv/bin/python\n")
    if left != "nothing":
        program(tmp_path / ".venv" / "bin" / "python", works if left == "all" else "#!/bin/sh\nexit 1\n")
    made = subprocess.run(
        ["make", "PYTHON=./python3", ".venv/.quickstart"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    said = log.read_text().splitlines()
    assert [words for words in said if "venv" in words] == ([] if left == "all" else ["-m venv .venv"])
    assert said[-1].startswith("-m pip install")
    assert (tmp_path / ".venv" / ".quickstart").exists()
