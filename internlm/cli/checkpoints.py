"""`internlm checkpoints`."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internlm.checkpoint.listing import Found

DESCRIPTION = """\
List the checkpoints of a run: step, tokens, loss, size, layout, and whether they are complete.

  internlm checkpoints runs/a
  internlm checkpoints s3://bucket/run
  internlm checkpoints runs/a --verify        reads every file and compares its SHA-256

Exit code 1: there is none, or --verify found one that is damaged."""

_HEAD = ("step", "tokens", "loss", "held out", "size", "state", "layout")
_SIDES = ">>>>><<"
"""Of the columns: numbers stand at the right."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="DIR", help="a run, or its checkpoints folder")
    parser.add_argument("--verify", action="store_true", help="compare checksums too")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    from internlm.checkpoint import listing
    from internlm.errors import StorageError

    found = listing.survey(arguments.run, verify=arguments.verify)
    if not found:
        raise StorageError(
            "no checkpoints here", where=arguments.run, do="Give the folder of a run of `internlm train`."
        )
    if arguments.json:
        for one in found:
            print(json.dumps(_facts(one)))
    else:
        rows = [_HEAD, *(_row(one) for one in found)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        for row in rows:
            cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, _SIDES, widths, strict=True)]
            print("  ".join(cells).rstrip())
    return 1 if arguments.verify and any(one.problem for one in found) else 0


def _facts(found: Found) -> dict[str, Any]:
    """Return what --json says of a checkpoint."""
    meta = found.meta
    return {
        "path": str(found.path),
        "step": found.step,
        "tokens": meta.get("tokens"),
        "metrics": {name: value if math.isfinite(value) else None for name, value in meta.get("metrics", {}).items()},
        "bytes": found.bytes,
        "complete": found.problem is None,
        "problem": found.problem,
        "layout": meta.get("layout"),
    }


def _row(found: Found) -> tuple[str, ...]:
    """Return the cells of a checkpoint."""
    from internlm.log import quantity, size

    metrics = found.meta.get("metrics", {})
    held_out = [value for name, value in sorted(metrics.items()) if name.startswith("valid/loss/")]
    layout = {name: size for name, size in found.meta.get("layout", {}).items() if size > 1}
    return (
        str(found.step),
        quantity(found.meta["tokens"]) if "tokens" in found.meta else "–",
        _number(metrics.get("train/loss")),
        _number(held_out[0] if held_out else None),
        size(found.bytes),
        found.problem or "complete",
        " × ".join(f"{name} {size}" for name, size in layout.items()) or "one rank",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
