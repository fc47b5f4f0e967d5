"""The machine under a run: device, data type, threads, memory allocator.

On Linux CPUs glibc's allocator maps fresh pages for every large tensor and returns them at once. `tune_allocator`
restarts the process once, visibly, with settings that keep them (measured: `benchmarks/train_cpu.py --allocator`).
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import time
from typing import TYPE_CHECKING, Literal

from internlm.config import require_positive, section
from internlm.errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ALLOCATOR_SETTINGS = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1"
)
_MARK = "INTERNLM_ALLOCATOR"


@section
class RuntimeConfig:
    """How a run uses its machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of matrix products; weights stay in float32. auto: bfloat16 on GPUs, float32 on CPUs (where bfloat16
    is emulated on most and several times slower)."""
    compile: bool = False
    """Compile each block with torch.compile: faster steps after a first step of tens of seconds."""
    attention: Literal["auto", "dense", "blocks", "varlen", "flex", "masked"] = "auto"
    """How attention respects documents; auto picks the fastest that the device has."""
    threads: int | None = None
    """CPU threads of this process; None leaves them to torch."""
    allocator: bool = True
    """On Linux CPUs: restart once with allocator settings that keep pages (also INTERNLM_ALLOCATOR=off)."""

    def __post_init__(self) -> None:
        require_positive(self, "runtime", "threads")


def tune_allocator(wanted: bool) -> None:
    """Restart this process with tuned allocator settings, once, unless that is off, done, or of no use here."""
    if not wanted or os.environ.get(_MARK) or "GLIBC_TUNABLES" in os.environ:
        return
    if platform.libc_ver()[0] != "glibc" or os.environ.get("RANK") is not None:
        return  # launchers of several ranks set the environment themselves
    logger.info("allocator: restarting once with GLIBC_TUNABLES=%s (off: runtime.allocator=false)", ALLOCATOR_SETTINGS)
    os.environ.update({"GLIBC_TUNABLES": ALLOCATOR_SETTINGS, _MARK: "tuned"})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def rank() -> int:
    """Return this process's number among all of the run; 0 when it is alone."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def available_cpus() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinity


def cpp_compiler() -> str | None:
    """Return the compiler that torch.compile uses on CPUs, or None when it is missing."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def resolve_device(config: RuntimeConfig) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: a GPU is asked for and there is none, or compilation without a compiler.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here", where="runtime.device", got="cuda", do="Use device: cpu.")
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if config.compile and name == "cpu" and cpp_compiler() is None:
        raise ConfigError(
            "needs a C++ compiler", where="runtime.compile", got=True, do="Install g++ (or set CXX), or leave it off."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    return torch.device(name)


def resolve_dtype(config: RuntimeConfig, device: torch.device) -> torch.dtype:
    """Return the data type of matrix products."""
    import torch

    name = config.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def seed(value: int) -> None:
    """Start the global random streams of Python and torch (all devices) at a seed."""
    import random

    import torch

    random.seed(value)
    torch.manual_seed(value)


def device_name(device: torch.device) -> str:
    """Return the device's name as people know it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product here: the best of 8, each 2·1024³ (CPU) operations."""
    import torch

    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> tuple[int, int]:
    """Return (most memory this process has held, memory of the device), in bytes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        return 0, 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, total
