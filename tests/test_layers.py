"""The layer rule and the laws about imports, read from the sources."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "internlm"
ARCHITECTURE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
CORRIDOR = re.findall(r"\w+", re.findall(r"## One corridor\n.+?```text\n(.+?)```", ARCHITECTURE, re.DOTALL)[0])
GROUND = set(CORRIDOR[: CORRIDOR.index("text")])
CARRIED = PACKAGE / "weights" / "remote_code"
"""Files that an export carries; Transformers imports them, this package never does."""
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if CARRIED not in path.parents]


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Return every node of a file; the trees of all files are made once."""
    return list(ast.walk(ast.parse(text_of(path))))


@functools.cache
def imports(path: Path) -> list[str]:
    """Return every module that a file imports, wherever in the file."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def comes_before(other: str, own: str) -> bool:
    """Return whether a room may be imported: one before, the same one, or both of the ground."""
    return (own in GROUND and other in GROUND) or CORRIDOR.index(other) <= CORRIDOR.index(own)


def test_rooms_import_only_rooms_before_them() -> None:
    wrong = []
    for path in FILES:
        own = room_of(path)
        if own in ("__init__", "__main__"):
            continue
        assert own in CORRIDOR, f"{path} stands in no room of the corridor"
        ours = [m for m in imports(path) if m.startswith("internlm.") and room(m) in CORRIDOR]
        wrong += [f"{path} imports {module}" for module in ours if not comes_before(room(module), own)]
    assert not wrong


def test_every_requirement_is_imported() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.split(r"[^\w-]", line)[0] for line in project["dependencies"]]
    used = {module.partition(".")[0] for path in FILES for module in imports(path)}
    assert not {{"pyyaml": "yaml"}.get(name, name) for name in needed} - used


def test_the_table_of_rooms_is_what_they_import() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        own = room_of(path)
        ours = {room(module) for module in imports(path) if module.startswith("internlm.")}
        used.setdefault(own, set()).update(ours & (set(CORRIDOR) - GROUND - {own}))
    rows = re.findall(r"^\| `(\w+)` \| .+ \|(.*)\|$", ARCHITECTURE, re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}
    assert list(told) == [name for name in CORRIDOR if name in told], "in the corridor's order"
    assert told == {name: rooms for name, rooms in used.items() if name in CORRIDOR and name not in GROUND}


def test_only_the_named_rooms_know_that_other_ranks_exist() -> None:
    knowing = {"compat", "ranks", "parallel", "optim", "checkpoint", "train", "plan"}
    others = [path for path in FILES if room_of(path) not in knowing]
    wrong = [f"{path} imports {m}" for path in others for m in imports(path) if m.startswith("torch.distributed")]
    assert not wrong


def test_reference_libraries_stay_at_the_edge() -> None:
    libraries = {"transformers", "peft", "trl", "lm_eval"}
    others = [path for path in FILES if path.relative_to(PACKAGE).parts[0] != "cli"]
    assert not [f"{path} imports {m}" for path in others for m in imports(path) if m.split(".")[0] in libraries]


def test_what_exports_carry_stands_alone() -> None:
    allowed = {"torch", "transformers", "sentencepiece", *sys.stdlib_module_names}
    for path in CARRIED.glob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert (CARRIED / f"{module}.py").exists() if node.level else module.split(".")[0] in allowed, path
    carried = {path.stem for path in CARRIED.glob("*.py")}
    for path in FILES:
        assert not carried & set(".".join(imports(path)).split(".")), f"{path} imports what exports carry"


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in [*FILES, *CARRIED.glob("*.py")]:
        if (lines := text_of(path).count("\n")) > 500:
            wrong.append(f"{path} has {lines} lines")
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > 60 and node.name != "step":
                    wrong.append(f"{path}:{node.lineno} {node.name} has {size} lines")
    assert not wrong


def test_only_disk_and_storage_put_one_file_in_the_place_of_another() -> None:
    """What is left: parts of an export that a second run finds again, and logs that are put aside."""
    allowed = {
        "storage.py",
        "disk.py",
        *(f"weights/{name}.py" for name in ("native/write", "adapters", "gguf/model", "files")),
    }
    aside = {"train/watch/monitor.py", "train/watch/alerts.py", "cli/data.py", "checkpoint/place.py"}
    others = [path for path in FILES if path.relative_to(PACKAGE).as_posix() not in allowed | aside]
    renames = [
        path
        for path in others
        if "os.replace(" in text_of(path)
        or any(isinstance(node, ast.Attribute) and node.attr == "rename" for node in nodes(path))
    ]
    assert not renames, "disk.beside writes files"
