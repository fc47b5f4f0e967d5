"""The table of mutants fits the tree, and the tool tells what is caught from what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _the_tools_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_every_mutant_changes_one_place_of_its_file_into_other_python() -> None:
    import mutants

    table = mutants.mutants()
    assert len(table) >= 110
    assert len({(mutant.file, mutant.breaks) for mutant in table}) == len(table)
    assert not mutants.problems(table)


def test_a_table_that_has_rotted_is_told(tmp_path: Path) -> None:
    import mutants

    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")

    def told(old: str, new: str, tests: str = "a.py") -> list[str]:
        found = mutants.problems([mutants.Mutant("a.py", "it", old, new, tests)], tmp_path)
        return [line.removeprefix("a.py: it: ") for line in found]

    assert told("x = 1", "x = 2") == []
    assert told("= 1", "= 2") == ["its text occurs 2 times, not once"]
    assert told("z", "= 2") == ["its text occurs 0 times, not once"]
    assert told("x = 1", "x = 1") == ["nothing is changed"]
    assert told("x = 1", "x = ") == ["line 1: invalid syntax"]
    assert told("x = 1", "x = 2", "a.py b.py -k c") == ["there is no b.py"]


@pytest.mark.proof
def test_survivors_are_told_and_a_test_that_does_not_end_has_caught_its_mutant(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "mutants.py").write_text(
        (ROOT / "tools" / "mutants.py")
        .read_text()
        .replace("LEAST_PATIENCE_S = 40.0", "LEAST_PATIENCE_S = 3.0")
        .replace("for name in HEAVY:", "for name in (name for name in HEAVY if 'plugin' in name):")
    )
    for name in ("benchmarks", "internlm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "ours.py").write_text("def down(n):\n    while n > 0:\n        n -= 1\n    return n\n\n\nUNUSED = 1\n")
    (tmp_path / "test_ours.py").write_text("import ours\n\n\ndef test_down():\n    assert ours.down(3) == 0\n")
    (tmp_path / "tools" / "mutants.yaml").write_text(
        "ours.py:\n  tests: test_ours.py\n  mutants:\n"
        "  - {breaks: off by one, old: n > 0, new: n > 1}\n"
        "  - {breaks: for ever, old: n -= 1, new: n -= 0}\n"
        "  - {breaks: nobody looks, old: UNUSED = 1, new: UNUSED = 2}\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "tools/mutants.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=100
        )

    done = run("--out", "found.json")
    assert done.returncode == 1, done.stderr
    assert "2 of 3 caught: 66.7%" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["mutants"], found["caught"]) == (3, 2)
    by = [row["caught_by"] for row in found["rows"]]
    assert by[::2] == ["test_ours.py::test_down", None]
    assert by[1].startswith("no end after")
    assert (tmp_path / "ours.py").read_text().startswith("def down(n):\n    while n > 0:\n        n -= 1\n"), (
        "the tree itself is left alone"
    )
    assert run("--only", "off by one").returncode == 0

    (tmp_path / "test_ours.py").write_text("def test_down():\n    assert False\n")
    done = run()
    assert done.returncode == 1
    assert "fails before anything is broken: pytest test_ours.py" in done.stderr
