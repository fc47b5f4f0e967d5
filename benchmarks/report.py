"""What all benchmarks write and print alike.

A result is a JSON object that begins with the same keys, whatever was measured; then come settings and, as a rule,
`rows`, one for each contender and setting.

    command    repeats it; of paths outside the repository only the last part is told
    date       when it was written, in local time
    machine    cpu, cores, memory; gpu where there is one
    versions   of Python and of the packages that took part; a row of another process has its own beside it
    commit     of the checkout, if it is one

Workers import this file, and some run without `internlm` (see `workers.py`): nothing of it is imported at the top.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = {
    name: name
    for name in (
        "internlm", "torch", "triton", "numpy", "transformers", "accelerate", "torchtitan", "litgpt", "tokenizers",
        "sentencepiece",
    )
} | {"llama_cpp": "llama-cpp-python"}  # fmt: skip
"""Module → package, of all that can take part."""


def parser(about: str | None, out: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring and knows `--out`."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = f"default: {out.relative_to(ROOT)}" if out else "default: none is written"
    made.add_argument("--out", type=Path, default=out, help=f"JSON file for the figures; {default}")
    return made


def result(**facts: Any) -> dict[str, Any]:
    """Return a result: what all begin with, and these facts."""
    return {
        "command": command(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(),
        "versions": dict(_told(list(facts.values()))) | versions(),
        "commit": commit(),
    } | facts


def write(path: Path | None, found: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a result, or several, as JSON over what was there; without a path nothing."""
    if path is not None:
        from internlm import disk

        disk.write_text(path, json.dumps(found, indent=1) + "\n")


def command(words: list[str]) -> str:
    """Return the command of a script of ours that was started with these words."""
    return shlex.join(["python", place(os.path.abspath(words[0])), *map(place, words[1:])])


def place(word: str) -> str:
    """Return a path, perhaps with an option and "=" before it, seen from the repository; other words as they are."""
    option, equals, value = word.rpartition("=")
    if not Path(value).is_absolute() and ".." not in Path(value).parts:
        return word
    path = Path(os.path.abspath(value))
    seen = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f"…/{path.name}"
    return option + equals + seen


@functools.cache
def machine() -> dict[str, Any]:
    """Return the hardware and the system, as far as they can be read here."""
    model = platform.processor() or platform.machine()
    facts: dict[str, Any] = {"cores": os.cpu_count()}
    if sys.platform == "linux":
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), model)
        facts["usable_cores"] = len(os.sched_getaffinity(0))
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    # Asked like this, the device is not touched: a context of this process would take memory from the contenders.
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader")
    found = {"gpu": sorted(set(gpus.splitlines()))} if gpus else {}
    return {"cpu": model, **facts, "system": platform.platform(), "libc": " ".join(platform.libc_ver()), **found}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that this process has imported."""
    found = {"python": platform.python_version()}
    for module, package in PACKAGES.items():
        if module in sys.modules:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:  # imported from a folder that was never installed
                found[package] = "unknown"
    return found


def commit() -> str | None:
    """Return the commit of the code; None where this is no checkout: a repository further up is someone else's."""
    return (_output("git", "-C", str(ROOT), "rev-parse", "HEAD") or None) if (ROOT / ".git").exists() else None


def _output(*words: str) -> str:
    """Return what a program prints; nothing where there is none or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _told(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the versions that workers told of their processes, wherever they stand in the facts."""
    if isinstance(value, dict):
        yield from value.get("versions", {}).items()
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _told(part)


def spread(values: Collection[float], form: str) -> str:
    """Return the smallest and the largest of some figures in brackets."""
    return f"[{min(values):{form}}–{max(values):{form}}]"


class Table:
    """Prints rows under a head, as they are measured."""

    def __init__(self, columns: dict[str, str]) -> None:
        """Print the head: title → format of the cells, which says their width too, like "<15", "9.1f" or "7.1%"."""
        self.formats = list(columns.values())
        self.widths = [max(len(title), int(re.findall(r"\d+", form)[0])) for title, form in columns.items()]
        self.row(*columns)

    def row(self, *cells: Any) -> None:
        """Print a row; None is a dash, numbers are set to the right, and one cell too many is a remark."""
        shown = []
        for form, width, cell in zip(self.formats, self.widths, cells, strict=False):
            text = format(cell, form) if isinstance(cell, int | float) else "–" if cell is None else cell
            shown.append(text.ljust(width) if form.startswith("<") else text.rjust(width))
        print("  ".join([*shown, *cells[len(shown) :]]).rstrip(), flush=True)
