"""The command line as a whole: exit codes, streams that are closed or full, and how long it takes to start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from internlm.cli import VERBS, main
from tests.processes import INTERNLM, environment, forked


def shell(command: str) -> subprocess.CompletedProcess[str]:
    known = environment()
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=known)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_fits_a_screen(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) <= 45


def test_wrong_usage_exits_with_2_and_names_the_nearest_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("doctor >&-", 0, ""),
        ("--help 2>&-", 0, "usage: internlm"),
        ("--help > /dev/full", 1, "No space left on device"),
        ("tokenizer --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("chat none <&-", 2, "Give -p TEXT"),
        ("chat none -p hi >&- 2>&-", 1, ""),
    ],
)
def test_closed_and_full_streams_end_without_a_traceback(command: str, code: int, said: str) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = shell(f"{shlex.join(INTERNLM)} {command}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stdout + done.stderr


def test_only_a_training_takes_its_number_from_the_environment(tmp_path: Path) -> None:
    """A scheduler's variables are there for every process it starts; a number that is none is refused by name."""
    none = str(tmp_path / "none.yaml")
    assert forked("train", none, "--dry-run", RANK="3").stderr.startswith("[rank 3] internlm train: error: ")
    assert forked("convert", none, "out", RANK="3").stderr.startswith("internlm convert: error: ")
    done = forked("train", none, RANK="", WORLD_SIZE="2")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "RANK" in done.stderr


def test_importing_and_asking_for_help_take_under_half_a_second() -> None:
    """Of a processor's time, and the best of three: the machine may be busy."""
    for arguments in (["-c", "import internlm"], ["-m", "internlm", "--help"], ["-m", "internlm", "train", "--help"]):
        spent = []
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = os.times()
            spent.append(sum(after[2:4]) - sum(before[2:4]))  # of children: user and system
        assert 0 < min(spent) < 0.5, arguments


def test_a_model_is_read_without_the_compiler() -> None:
    """It takes more than a second to import, which only who compiles should pay."""
    code = "import sys, internlm.infer.engine, internlm.cli.convert; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart" / "pretrain.yaml"
    assert main(["train", str(recipe), "--dry-run", "optim.lr=7e-3"]) == 0
    assert "0.007" in capsys.readouterr().out
    assert main(["train", "optim.lr=7e-3"]) != 0


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("train r.yaml --optim.lr=1e-3", "without dashes: optim.lr=1e-3"),
        ("train --optim.lr 1e-3 r.yaml seed=1", "without dashes: optim.lr=1e-3"),
        ("train r.yaml --run runs/a", "without dashes: run=runs/a"),
        ("train r.yaml --seed", "without dashes: seed=VALUE"),
        ("train r.yaml --dryrun", "Did you mean '--dry-run'?"),
        ("train r.yaml --nproc=2", "internlm launch --nproc 2 train RECIPE"),
        ("launch train r.yaml --nproc 2", "internlm launch --nproc 2 train RECIPE"),
        ("launch train r.yaml --nproc_per_node 2", "internlm launch --nproc 2 train RECIPE"),
        ("launch --nproc 2 train r.yaml --data.seq_len 8", "without dashes: data.seq_len=8"),
    ],
)
def test_options_of_other_tools_and_in_other_places_are_answered_with_how_they_are_written_here(
    words: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    assert advice in capsys.readouterr().err
