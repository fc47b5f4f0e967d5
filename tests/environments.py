"""Virtual environments with other versions of libraries, made once for the long proofs and kept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def environment(name: str, *requirements: str) -> Path:
    """Return the folder of programs of an environment with these; skip where it cannot be made.

    It stays in INTERNLM_PROOF_ENVS, or in the machine's folder of temporary files.
    """
    base = Path(os.environ.get("INTERNLM_PROOF_ENVS") or Path(tempfile.gettempdir()) / "internlm-proof-envs")
    folder = base / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    programs, ready = folder / "bin", folder / "ready"
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(programs / "python"), "-m", "pip", "install", "-q", *requirements],
    ]
    for command in [] if ready.exists() else commands:
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=700, check=True)
        except subprocess.SubprocessError as error:
            pytest.skip(f"no environment {name}: {(getattr(error, 'stderr', '') or str(error)).strip()[-300:]}")
    ready.write_text("", encoding="utf-8")
    return programs
