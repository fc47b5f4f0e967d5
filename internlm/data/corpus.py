"""The default corpus, there on every machine: the text of the Python standard library that is running.

It has sources, docstrings of modules written in C, and the `pydoc` topics. Left out: tests, what was installed beside
the library, how this Python was built, and files over 500 kB, which are tables.

Whole modules are held out for validation: in the order of a hash of (seed, name), as long as they fit into its share.
Questions for tuning come from the training side alone:

    module       In which module is dedent?                      textwrap
    purpose      What does textwrap.dedent do?                   Remove any common leading whitespace from …
    signature    What is the signature of textwrap.dedent?       dedent(text)

Sources are parsed, not imported: names that a module makes at run time are not asked about.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib
import json
import lzma
import pydoc
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from internlm import storage
from internlm.data.formats import Document
from internlm.data.messages import asked_and_answered
from internlm.errors import ConfigError, DataError
from internlm.text.templates import json_text

KIND = "corpus"
MAX_BYTES = 500_000
MAX_NAMES = 600
"""Names that are asked about: a model of a few million weights learns so many by heart in a minute."""

# Importing these has no side effects, and they have no Python source.
_C_MODULES = ("array", "binascii", "builtins", "cmath", "errno", "gc", "itertools", "marshal", "math", "sys", "time")
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}


class Definition(NamedTuple):
    """A public function or class of the library."""

    module: str
    name: str
    summary: str
    """First sentence of its docstring; empty when there is none."""
    signature: str
    """`name(arguments)`; empty for classes without an __init__ of their own."""


def build(out: str | Path, *, validation_ratio: float = 0.05, seed: int = 1, replace: bool = False) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, questions-<kind>.jsonl and facts.jsonl into a folder; return its facts.

    Args:
        validation_ratio: share of the bytes that is held out, between 0 and 1.
        seed: decides which modules are.

    Raises:
        ConfigError: no text is left on one side. DataError: this Python has no sources of its library.
        StorageError: the folder exists, or the disk is full.
    """
    if not 0 < validation_ratio < 1:
        raise ConfigError("must lie between 0 and 1", where="validation ratio", got=validation_ratio)
    storage.check_free(out, KIND, replace=replace)
    documents = list(library())
    held_out = choose_modules(documents, validation_ratio, seed)
    sides: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents:
        sides["validation" if module_of(document) in held_out else "train"].append(document)
    for side, members in sides.items():
        if not members:
            raise ConfigError(f"leaves no module for {side}", where="validation ratio", got=validation_ratio)
    definitions = unambiguous(documents, held_out)
    questions = ask(definitions)
    with storage.writing(out, KIND, replace=replace) as folder:
        for side, members in sides.items():
            _write(folder.path / f"{side}.jsonl", ({"text": d.text, "source": d.source} for d in members))
        for kind, pairs in questions.items():
            _write(folder.path / f"questions-{kind}.jsonl", ({"messages": asked_and_answered(*pair)} for pair in pairs))
        _write(folder.path / "facts.jsonl", ({"name": d.name, "module": d.module} for d in definitions))
        folder.meta.update(
            python=sys.version.split()[0],
            documents={side: len(members) for side, members in sides.items()},
            bytes={side: sum(d.num_bytes for d in members) for side, members in sides.items()},
            held_out=sorted(held_out),
            names=len(definitions),
            questions={kind: len(pairs) for kind, pairs in questions.items()},
        )
        return folder.meta


def library() -> Iterator[Document]:
    """Yield every document of the library; `source` is a path, `docstrings:<module>` or `topic:<name>`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for path in sorted(root.rglob("*.py")) if root.is_dir() else []:
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            if path.stat().st_size > MAX_BYTES:
                continue
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a broken link of the distribution, or a source in another encoding
        if text.strip():
            found += 1
            yield Document(text, relative.as_posix())
    if found < 100:
        raise DataError(
            f"this Python ({sys.executable}) has {found} library sources", where=root, do="Use one with its sources."
        )
    for name in _C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not on this platform
        yield Document(pydoc.plain(pydoc.render_doc(module)) + "\n", f"docstrings:{name}")
    try:
        from pydoc_data import topics
    except ImportError:
        return  # some distributions put them into a package of their own
    for name, text in sorted(topics.topics.items()):
        yield Document(text, f"topic:{name}")


def module_of(document: Document) -> str:
    """Return what is held out together: a top-level module or package, or a topic."""
    kind, _, name = document.source.partition(":")
    if name:
        return name if kind == "docstrings" else document.source
    return document.source.split("/")[0].removesuffix(".py")


def choose_modules(documents: Iterable[Document], ratio: float, seed: int) -> set[str]:
    """Return the modules of the validation set."""
    sizes: dict[str, int] = defaultdict(int)
    for document in documents:
        sizes[module_of(document)] += document.num_bytes
    room = ratio * sum(sizes.values())
    chosen = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()):
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return chosen


def unambiguous(documents: Iterable[Document], held_out: set[str]) -> list[Definition]:
    """Return up to MAX_NAMES definitions whose name only one public module defines.

    Every module gives its first name, documented ones before others, then its second, and so on: a guess is rarely
    right.
    """
    by_module: dict[str, list[Definition]] = {}
    where: dict[str, set[str]] = defaultdict(set)
    for document in documents:
        module = _dotted(document.source)
        if module is None:
            continue
        defined = _definitions(module, document.text)
        for definition in defined:
            where[definition.name].add(module)
        if module_of(document) not in held_out:
            by_module[module] = sorted(defined, key=lambda d: (not d.summary, not d.signature))
    unique = [[d for d in ds if len(where[d.name]) == 1 and len(d.name) > 2] for _, ds in sorted(by_module.items())]
    rounds = [d for turn in zip_longest(*unique) for d in turn if d is not None]
    return rounds[:MAX_NAMES]


def ask(definitions: Iterable[Definition]) -> dict[str, list[tuple[str, str]]]:
    """Return (question, answer) pairs by kind."""
    pairs: dict[str, list[tuple[str, str]]] = {"module": [], "purpose": [], "signature": []}
    for d in definitions:
        pairs["module"].append((f"In which module is {d.name}?", d.module))
        if d.summary:
            pairs["purpose"].append((f"What does {d.module}.{d.name} do?", d.summary))
        if d.signature:
            pairs["signature"].append((f"What is the signature of {d.module}.{d.name}?", d.signature))
    return pairs


def compression(path: str | Path) -> dict[str, float]:
    """Return the bits per byte of all documents of a .jsonl file, packed in one stream."""
    with open(path, encoding="utf-8") as file:
        data = b"".join(json.loads(line)["text"].encode() for line in file)
    extreme = 9 | lzma.PRESET_EXTREME
    packed = {"gzip -9": gzip.compress(data, 9, mtime=0), "xz -9e": lzma.compress(data, preset=extreme)}
    return {name: 8 * len(stream) / len(data) for name, stream in packed.items()}


def _dotted(source: str) -> str | None:
    """Return the public module that a source file is, or None."""
    if ":" in source:
        return None
    parts = source.removesuffix(".py").removesuffix("/__init__").split("/")
    hidden = any(part.startswith("_") or part in ("idlelib", "encodings") or "-" in part for part in parts)
    return None if hidden or len(parts) > 2 else ".".join(parts)


def _definitions(module: str, text: str) -> list[Definition]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []  # such as the templates of another Python's grammar
    exported = _exported(tree)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_") or (exported is not None and node.name not in exported):
                continue
            found[node.name] = Definition(module, node.name, _summary(node), _signature(node))
    return list(found.values())


def _exported(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return None


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """Return the first sentence of a docstring, or nothing when it is too long for a summary."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0].rstrip(".") + "." if paragraph else ""
    return sentence if len(sentence) <= 120 else ""


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """Return `name(arguments)` without annotations and without self."""
    function: Any = node
    if isinstance(node, ast.ClassDef):
        function = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if function is None:
            return ""
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    shown = ast.unparse(function.args)
    if isinstance(node, ast.ClassDef):
        first, _, rest = shown.partition(", ")
        shown = rest.removeprefix("/, ") if first == "self" else shown
    text = f"{node.name}({shown})"
    return text if len(text) <= 120 else ""


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json_text(record) + "\n" for record in records)
