"""The layer rule and the laws about imports, read from the sources."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import internlm

PACKAGE = Path(__file__).parents[1] / "internlm"
# The line of rooms stands in the package's docstring, indented; dots and ends of lines separate rooms there.
CORRIDOR = re.findall(r"\w+", " ".join(re.findall(r"^    .+$", str(internlm.__doc__), re.MULTILINE)))
GROUND = set(CORRIDOR[: CORRIDOR.index("text")])
CARRIED = PACKAGE / "weights" / "remote_code"
"""Files that an export carries; Transformers imports them, this package never does."""
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if CARRIED not in path.parents]


def imports(path: Path) -> list[str]:
    """Return every module that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_rooms_before_them(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    assert own in CORRIDOR, f"{path} stands in no room of the corridor"
    for module in imports(path):
        if module.startswith("internlm.") and room(module) in CORRIDOR:
            other = room(module)
            both_ground = own in GROUND and other in GROUND
            assert both_ground or CORRIDOR.index(other) <= CORRIDOR.index(own), f"{path} imports {module}"


def test_the_table_of_rooms_is_what_they_import() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        ours = {room(module) for module in imports(path) if module.startswith("internlm.")}
        used.setdefault(own, set()).update(ours & (set(CORRIDOR) - GROUND - {own}))
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.search(r"## One corridor\n.+?```text\n(.+?)```", text, re.DOTALL)
    assert drawn is not None
    assert re.findall(r"\w+", drawn[1]) == CORRIDOR
    rows = re.findall(r"^\| `(\w+)` \| .+ \|(.*)\|$", text, re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}
    assert list(told) == [name for name in CORRIDOR if name in told], "in the corridor's order"
    assert told == {name: rooms for name, rooms in used.items() if name in CORRIDOR and name not in GROUND}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_named_rooms_know_that_other_ranks_exist(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own not in {"compat", "ranks", "parallel", "optim", "checkpoint", "train", "plan"}:
        assert not [m for m in imports(path) if m.startswith("torch.distributed")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_reference_libraries_stay_at_the_edge(path: Path) -> None:
    for module in imports(path):
        top = module.split(".")[0]
        if top in {"transformers", "peft", "trl", "lm_eval"}:
            assert path.relative_to(PACKAGE).parts[0] == "cli", f"{path} imports {module}"


def test_what_exports_carry_stands_alone() -> None:
    allowed = {"torch", "transformers", "sentencepiece", *sys.stdlib_module_names}
    for path in CARRIED.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert (CARRIED / f"{module}.py").exists() if node.level else module.split(".")[0] in allowed, path
    carried = {path.stem for path in CARRIED.glob("*.py")}
    for path in FILES:
        assert not carried & set(".".join(imports(path)).split(".")), f"{path} imports what exports carry"


@pytest.mark.parametrize("path", [*FILES, *CARRIED.glob("*.py")], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= 60 or node.name == "step", f"{path}:{node.lineno} {node.name} has {size} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_storage_puts_one_file_in_the_place_of_another(path: Path) -> None:
    """What is left: parts of an export that a second run finds again, and logs that are put aside."""
    allowed = {"storage.py", *(f"weights/{name}.py" for name in ("native/write", "adapters", "gguf/model", "files"))}
    aside = {"train/watch/monitor.py", "train/watch/alerts.py", "cli/data.py", "checkpoint/place.py"}
    if str(path.relative_to(PACKAGE)) not in allowed | aside:
        calls = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not {"rename"} & set(calls), f"{path}: storage.beside writes files"
        text = path.read_text(encoding="utf-8")
        assert "os.replace(" not in text, f"{path}: storage.beside writes files"
