"""Break the code in many small ways, one at a time, and see whether a test notices.

    python tools/mutants.py                          # all of them: about twenty minutes on two cores
    python tools/mutants.py --only infer/blocks.py   # those of a file, or those whose words hold this text

`mutants.yaml` is the table: faults such as engineers make, each a text that occurs once in its file and what stands
there instead, with the tests that an engineer would run for that file. All happens in a copy of the tree. The tests
must pass before anything is broken. A mutant is caught when a test fails, cannot be collected, or does not end.

A survivor is a hole in the tests, or no fault at all; then the table is wrong. The exit code is 1 when less than 90 %
are caught.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".yaml")
ENOUGH = 0.9
"""Share of the mutants that must be caught."""
LEAST_PATIENCE_S = 40.0
"""Before tests count as hanging; or `SLOWER` times what they take unchanged."""
SLOWER = 6
HEAVY = (
    "anyio.pytest_plugin", "hypothesis", "pydantic", "schemathesis.pytest.plugin", "tokenizers", "torch",
    "torch.distributed.fsdp", "torch.distributed.pipelining", "xdist.plugin",
)  # fmt: skip
"""Imported once, before anything else: each run of tests is a fork that has them, which is most of its time."""
PYTEST = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-seed=0")


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    file: str
    """Path from the root."""
    breaks: str
    """What is wrong then, in a few words."""
    old: str
    new: str
    tests: str
    """Arguments of pytest, as one would type them."""


@dataclass(frozen=True)
class Outcome:
    """What the tests said."""

    caught_by: str | None
    """The test that failed, or what else went wrong; None: nothing did."""
    seconds: float


def mutants(table: Path = TABLE) -> list[Mutant]:
    """Return the table."""
    found = yaml.safe_load(table.read_text(encoding="utf-8"))
    return [
        Mutant(file, row["breaks"], row["old"], row["new"], row.get("tests", entry["tests"]))
        for file, entry in found.items()
        for row in entry["mutants"]
    ]


def problems(chosen: list[Mutant], root: Path = ROOT) -> list[str]:
    """Return what does not fit the tree: texts that do not occur once, changes that are none or no Python."""
    found = []
    for mutant in chosen:
        text = (root / mutant.file).read_text(encoding="utf-8") if (root / mutant.file).is_file() else ""
        times = text.count(mutant.old)
        if times != 1:
            found.append(f"{mutant.file}: {mutant.breaks}: its text occurs {times} times, not once")
        elif mutant.old == mutant.new:
            found.append(f"{mutant.file}: {mutant.breaks}: nothing is changed")
        else:
            try:
                compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
            except SyntaxError as error:
                found.append(f"{mutant.file}: {mutant.breaks}: line {error.lineno}: {error.msg}")
        for path in re.findall(r"\S+\.py", mutant.tests):
            if not (root / path).is_file():
                found.append(f"{mutant.file}: {mutant.breaks}: there is no {path}")
    return found


class Copy:
    """A copy of the tree, in which tests are run and files broken.

    Args:
        folder: an empty one.
        root: what is copied, without what begins with a dot.
    """

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.root = folder / "tree"
        shutil.copytree(root, self.root, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "site"))

    def test(self, tests: str, limit_s: float | None = None) -> Outcome:
        """Run tests as they stand; those that take longer than the limit count as failed."""
        for name in HEAVY:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        begun = time.monotonic()
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if not child:
                self._become_pytest(tests, said.fileno())
            problem = None
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                if limit_s is not None and time.monotonic() > begun + limit_s:
                    problem = f"no end after {limit_s:.0f} s"
                    os.killpg(child, signal.SIGKILL)  # with the ranks and workers that it started
                    ended = os.waitpid(child, 0)
                    break
                time.sleep(0.02)
            if ended[1] and problem is None:
                said.seek(0)
                problem = _failed(said.read().decode(errors="replace"))
        return Outcome(problem, time.monotonic() - begun)

    def _become_pytest(self, tests: str, out: int) -> NoReturn:
        """Run tests in this process, a fork of the tool's, and end it."""
        code = 1
        try:
            os.setsid()
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(self.root)
            os.environ |= {"PYTHONPATH": str(self.root)}
            ours = {str(ROOT / "tools"), str(ROOT / "benchmarks")}
            sys.path[:] = [str(self.root), *(path for path in sys.path if path not in ours)]
            sys.dont_write_bytecode = False  # of the copy: most of its files are the same every time
            sys.modules["__main__"] = types.ModuleType("__main__")  # else spawned processes would run this one again
            import pytest

            code = int(pytest.main([*PYTEST, *shlex.split(tests)]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def break_and_test(self, mutant: Mutant, limit_s: float) -> Outcome:
        """Run the tests of a mutant with it in place; the file is whole again afterwards."""
        path = self.root / mutant.file
        whole = path.read_text(encoding="utf-8")
        try:
            self._write(path, whole.replace(mutant.old, mutant.new))
            return self.test(mutant.tests, limit_s)
        finally:
            self._write(path, whole)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Python compares times by the second: what it compiled of the other text may look like this one's.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def _failed(said: str) -> str:
    """Return the test that pytest names first, else its last line."""
    named = re.search(r"^(?:FAILED|ERROR) (\S+\.py\b.*?)(?: - |$)", said, re.MULTILINE)
    return named[1] if named else (said.strip().splitlines() or ["nothing was said"])[-1][:120]


def survey(chosen: list[Mutant], copy: Copy) -> list[tuple[Mutant, Outcome]]:
    """Run the tests unchanged, then each mutant; print a line for each.

    Raises:
        SystemExit: tests fail before anything is broken.
    """
    import report

    unchanged: dict[str, float] = {}
    for tests in dict.fromkeys(mutant.tests for mutant in chosen):
        whole = copy.test(tests)
        if whole.caught_by is not None:
            raise SystemExit(f"fails before anything is broken: pytest {tests}\n{whole.caught_by}")
        unchanged[tests] = whole.seconds
        print(f"{whole.seconds:6.1f} s unchanged: {tests}", flush=True)
    table = report.Table({"": "7", "file": "<33", "what is wrong": "<62", "s": "5.1f", "min left": "8.0f"})
    found = []
    left = sum(unchanged[mutant.tests] for mutant in chosen)
    for number, mutant in enumerate(chosen, 1):
        usual = unchanged[mutant.tests]
        outcome = copy.break_and_test(mutant, max(LEAST_PATIENCE_S, SLOWER * usual))
        found.append((mutant, outcome))
        left -= usual
        caught = "SURVIVED" if outcome.caught_by is None else f"caught by {outcome.caught_by}"
        file = mutant.file.removeprefix("internlm/")
        table.row(f"{number}/{len(chosen)}", file, mutant.breaks, outcome.seconds, left / 60, caught)
    return found


def main() -> int:
    """Run the mutants; return 1 where too few are caught."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report

    parser = report.parser(__doc__)
    parser.add_argument("--only", default="", help="part of `file: what is wrong`")
    asked = parser.parse_args()
    chosen = [mutant for mutant in mutants() if asked.only in f"{mutant.file}: {mutant.breaks}"]
    if wrong := problems(chosen):
        raise SystemExit("\n".join(wrong))
    if not chosen:
        raise SystemExit(f"no mutant holds {asked.only!r}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        found = survey(chosen, Copy(Path(folder)))
    rows = [{"file": m.file, "breaks": m.breaks, "tests": m.tests, **asdict(outcome)} for m, outcome in found]
    caught = sum(outcome.caught_by is not None for _, outcome in found)
    print(f"{caught} of {len(found)} caught: {caught / len(found):.1%}")
    report.write(asked.out, report.result(mutants=len(found), caught=caught, share=caught / len(found), rows=rows))
    return int(caught / len(found) < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
