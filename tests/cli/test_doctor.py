"""The doctor speaks also where something that every run needs is missing."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from internlm.cli import doctor, main

HIDING = """
import importlib.metadata, sys
hidden = {modules!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ImportError("libnothing.so.1: cannot open shared object file")
sys.meta_path.insert(0, Hide())
known = importlib.metadata.version
def version(name):
    if name in {packages!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
from internlm.cli import main
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("modules", "packages", "said"),
    [
        (("pydantic",), ("pydantic",), "pydantic        MISSING"),
        (("yaml",), ("pyyaml",), "pyyaml          MISSING"),
        (("torch",), ("torch",), "torch           MISSING"),
        (("torch",), (), "torch           BROKEN: installed, and cannot be loaded: libnothing.so.1"),
    ],
    ids=["no-pydantic", "no-yaml", "no-torch", "torch-does-not-load"],
)
def test_what_is_missing_is_a_line_and_not_a_traceback(
    modules: tuple[str, ...], packages: tuple[str, ...], said: str
) -> None:
    program = HIDING.format(modules=modules, packages=packages)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert said in done.stdout
    assert "Traceback" not in done.stderr


def test_what_is_needed_is_what_the_package_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch<2.14,>=2.11",
        's3fs>=2024.6; extra == "remote"',
        "ruff; extra == 'dev'",
        'x-y[z]>=1; extra == "plot"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert doctor.packages() == (["torch"], {"s3fs": "remote", "x-y": "plot"})


def test_every_package_of_an_extra_has_a_line_on_what_is_missing_without_it() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    lines = [line for extra, lines in extras.items() if extra not in doctor._FOR_DEVELOPERS for line in lines]
    assert {re.split(r"[\[<>=;]", line)[0] for line in lines} == set(doctor._WITHOUT)


def test_a_source_that_was_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def requires(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert main(["doctor"]) == 2
    assert "internlm: is not installed. In its checkout: pip install -e ." in capsys.readouterr().err
