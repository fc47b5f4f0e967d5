"""`internlm doctor`: what is installed, what the machine has, which fast paths are active, what is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys

DESCRIPTION = """Show versions, devices, which attention and compile paths are active, and what is missing.

Exit code 1 when something that every run needs is missing."""

_CORE = ("torch", "numpy", "pydantic", "pyyaml", "safetensors", "tokenizers", "sentencepiece", "jinja2")
_EXTRAS = {
    "matplotlib": ("plot", "no loss plot"),
    "transformers": ("hf", "no `convert --verify`; exports are written all the same"),
    "tensorboard": ("track", "no TensorBoard files; metrics.jsonl is written all the same"),
    "zstandard": ("data", "no .zst input"),
    "gguf": ("gguf", "no GGUF files"),
    "prompt_toolkit": ("chat", "`chat` reads plain lines"),
    "fastapi": ("serve", "no `serve` and `web`"),
    "uvicorn": ("serve", "no `serve` and `web`"),
    "llguidance": ("serve", "answers cannot be held to a schema"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments: none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 when something is missing, or torch cannot be loaded."""
    from internlm import __version__

    missing = [name for name in _CORE if _version(name) is None]
    _row("internlm", __version__)
    _row("python", f"{platform.python_version()} ({sys.executable})")
    _row("system", f"{platform.system()} {platform.machine()}, libc {' '.join(platform.libc_ver()) or 'unknown'}")
    for name in _CORE:
        _row(name, _version(name) or "MISSING: every run needs it")
    for name, (extra, loss) in _EXTRAS.items():
        _row(name, _version(name) or f"not installed: {loss} (pip install 'internlm[{extra}]')")
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


def _devices() -> None:
    import torch

    from internlm import runtime
    from internlm.cost import hardware

    memory = runtime.peak_memory_bytes(torch.device("cpu"))[1]
    cpu = torch.device("cpu")
    peak = runtime.measure_peak(cpu, torch.float32)
    _row("cpu", f"{runtime.device_name(cpu)}, {memory / 2**30:.1f} GiB, {peak / 1e12:.2f} TFLOPS float32 (measured)")
    if not torch.cuda.is_available():
        _row("gpu", "none: training and chat run on the CPU")
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        size = torch.cuda.get_device_properties(index).total_memory / 2**30
        known = hardware.peak_flops(name, "bfloat16")
        dense = (
            f"{known / 1e12:.0f} TFLOPS bfloat16 (data sheet)" if known else "peak not in the table: measured at start"
        )
        _row(f"gpu {index}", f"{name}, {size:.0f} GiB, {dense}")


def _paths() -> None:
    import torch

    from internlm import runtime
    from internlm.compat import products
    from internlm.model import attention

    ids = torch.tensor([[0, 0, 1, 1]])
    for name in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        dtype = torch.bfloat16 if name == "cuda" else torch.float32
        path = attention.arrange(ids.to(name), torch.device(name), dtype).path
        _row(f"attention {name}", f"{path} (packed rows), dense (one document per row)")
    _row(
        "linear cpu",
        "oneDNN" if products.has_onednn_linear() else "default: torch has no oneDNN here, products are slower",
    )
    compiler = runtime.cpp_compiler()
    if compiler:
        _row("compile", f"available (runtime.compile=true; off by default), {compiler}")
    else:
        _row("compile", "not available on the CPU: no C++ compiler found (apt install g++)")
    _row(
        "allocator", os.environ.get("GLIBC_TUNABLES") or "default; training restarts once with tuned settings on Linux"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _row(name: str, value: str) -> None:
    print(f"{name:16}{value}")
