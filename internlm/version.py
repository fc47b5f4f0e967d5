"""Which versions of what are here. Nothing is imported before it is asked for."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def installed(name: str) -> str | None:
    """Return the version of a distribution that is installed, or None."""
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this code when it runs from a checkout of its own, and git is there."""
    import subprocess

    where = Path(__file__).parents[1]
    if not (where / ".git").exists():
        return None  # installed: a repository further up is someone else's
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return the versions that a run depends on, and the commit of the code where it is known."""
    import platform

    import torch

    found = {"internlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    known = commit()
    return found if known is None else found | {"commit": known}
