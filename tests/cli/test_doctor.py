"""The doctor speaks also where something that every run needs is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
