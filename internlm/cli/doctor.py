"""`internlm doctor`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import sys

from internlm import __version__
from internlm.errors import UsageError, install_command

DESCRIPTION = """Show versions, devices, which attention and compile paths are active, and what is missing.

Exit code 1 when something that every run needs is missing."""

_WITHOUT = {
    "matplotlib": "no loss plot",
    "transformers": "no `convert --verify`; exports are written all the same",
    "tensorboard": "no TensorBoard files; metrics.jsonl is written all the same",
    "zstandard": "no .zst input",
    "gguf": "no GGUF files",
    "s3fs": "no checkpoints in S3",
    "prompt_toolkit": "`chat` reads plain lines",
    "fastapi": "no `serve` and `web`",
    "uvicorn": "no `serve` and `web`",
    "llguidance": "answers cannot be held to a schema",
}
"""What is missing without a package."""
_FOR_DEVELOPERS = ("dev", "proof")
"""Extras that no run uses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments: none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 when something is missing, or torch cannot be loaded."""
    required, optional = packages()
    missing = [name for name in required if _installed(name) is None]
    _row("internlm", __version__)
    _row("python", f"{platform.python_version()} ({sys.executable})")
    _row("system", f"{platform.system()} {platform.machine()}, libc {' '.join(platform.libc_ver()) or 'unknown'}")
    for name in required:
        _row(name, _installed(name) or "MISSING: every run needs it")
    for name, extra in optional.items():
        _row(name, _installed(name) or f"not installed: {_WITHOUT[name]} ({install_command(extra)})")
    if missing:
        return 1  # what follows needs them
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # a library of the system or of CUDA that is not there
        _row("torch", f"BROKEN: installed, and cannot be loaded: {error}")
        return 1
    _devices()
    _paths()
    return 0


def packages() -> tuple[list[str], dict[str, str]]:
    """Return the packages that every run needs, and name → extra of those that some do, as this one declares them.

    Raises:
        UsageError: it runs from its source and was not installed.
    """
    try:
        lines = importlib.metadata.requires("internlm") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError("is not installed", where="internlm", do="In its checkout: pip install -e .") from error
    required: list[str] = []
    optional: dict[str, str] = {}
    for line in lines:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"""extra == ["'](\w+)""", line)
        assert name is not None, "a requirement begins with a name"
        if extra is None:
            required.append(name[0])
        elif extra[1] not in _FOR_DEVELOPERS:
            optional[name[0]] = extra[1]
    return required, optional


def _installed(name: str) -> str | None:
    """Return the version of a distribution that is installed, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> None:
    import torch

    from internlm import runtime
    from internlm.cost.hardware import peak_flops

    cpu = torch.device("cpu")
    memory = runtime.peak_memory_bytes(cpu)[1]
    peak = runtime.measure_peak(cpu, torch.float32)
    _row("cpu", f"{runtime.device_name(cpu)}, {memory / 2**30:.1f} GiB, {peak / 1e12:.2f} TFLOPS float32 (measured)")
    if not torch.cuda.is_available():
        _row("gpu", "none: training and chat run on the CPU")
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        size = torch.cuda.get_device_properties(index).total_memory / 2**30
        known = peak_flops(name, "bfloat16")
        dense = (
            f"{known / 1e12:.0f} TFLOPS bfloat16 (data sheet)" if known else "peak not in the table: measured at start"
        )
        _row(f"gpu {index}", f"{name}, {size:.0f} GiB, {dense}")


def _paths() -> None:
    import torch

    from internlm import runtime
    from internlm.compat import kernels
    from internlm.model import attention

    ids = torch.tensor([[0, 0, 1, 1]])
    for name in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        dtype = torch.bfloat16 if name == "cuda" else torch.float32
        path = attention.arrange(ids.to(name), torch.device(name), dtype).path
        _row(f"attention {name}", f"{path} (packed rows), dense (one document per row)")
    _row(
        "linear cpu",
        "oneDNN" if kernels.has_onednn_linear() else "default: torch has no oneDNN here, products are slower",
    )
    found = runtime.cpp_compiler()
    missing = "not available on the CPU: no C++ compiler found (apt install g++)"
    _row("compile", f"available (runtime.compile=true; off by default), {found}" if found else missing)
    _row(
        "allocator", os.environ.get("GLIBC_TUNABLES") or "default; training restarts once with tuned settings on Linux"
    )


def _row(name: str, value: str) -> None:
    print(f"{name:16}{value}")
