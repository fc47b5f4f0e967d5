"""What a message tells a user to do can be done."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from internlm import errors

ROOT = Path(__file__).parents[1]


def test_an_extra_is_installed_as_the_package_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert errors.install_command("serve") == "pip install -c constraints.txt -e '.[serve]'"
    assert (ROOT / "constraints.txt").is_file()
    monkeypatch.chdir(tmp_path)
    assert errors.install_command("serve") == f"pip install -c '{ROOT}/constraints.txt' -e '{ROOT}[serve]'"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "internlm" / "errors.py"))
    assert errors.install_command("serve") == "in a checkout of internlm: pip install -c constraints.txt '.[serve]'"


def test_every_extra_that_a_message_names_is_there() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "internlm").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"""install_command\(["'](\w+)""", text)}
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert named
    assert named <= set(pyproject["project"]["optional-dependencies"])


def test_an_error_without_words_is_named_by_its_kind() -> None:
    assert errors.first_line(TimeoutError()) == "TimeoutError"
    assert errors.first_line(TimeoutError(" \nfirst\nsecond")) == "first"
