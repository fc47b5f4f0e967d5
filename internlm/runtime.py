"""The machine under a run: device, data type, threads, memory allocator, seeds.

glibc's allocator maps fresh pages for every large tensor and returns them at once. `tune_allocator` restarts the
process once with settings that keep them (measured: `benchmarks/train_cpu.py --allocator`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internlm import __version__, ranks
from internlm.config import require_positive, section
from internlm.errors import ConfigError, InternLMError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ALLOCATOR_SETTINGS = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1"
)
"""Value of GLIBC_TUNABLES."""
_MARK = "INTERNLM_ALLOCATOR"

AttentionPath = Literal["auto", "dense", "blocks", "varlen", "flex", "masked"]
"""How attention keeps documents apart, see `internlm.model.attention`."""


@section
class RuntimeConfig:
    """How a run uses its machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Data type of matrix products; weights stay in float32. auto: bfloat16 on GPUs, float32 on CPUs (where bfloat16
    is emulated on most and several times slower). tf32: float32 whose products are rounded to 10 bits of mantissa, on
    GPUs. float16: for GPUs without bfloat16, with a loss scale that is found while training."""
    compile: bool = False
    """Compile each block with torch.compile: faster steps after a first step of tens of seconds."""
    attention: AttentionPath = "auto"
    """How attention respects documents; auto picks the fastest that the device has."""
    threads: int | None = None
    """CPU threads of this process; None leaves them to torch."""
    allocator: bool = True
    """On Linux CPUs: restart once with allocator settings that keep pages (also INTERNLM_ALLOCATOR=off)."""
    timeout_s: int = 1800
    """Longest that a rank waits for the others in one exchange before the run fails. Rank 0 may be busy alone for long:
    it hashes every checkpoint."""

    def __post_init__(self) -> None:
        require_positive(self, "runtime", "threads", "timeout_s")


def tune_allocator(wanted: bool) -> None:
    """Restart this process with `ALLOCATOR_SETTINGS` unless that is off, done, or of no use here."""
    if not wanted or os.environ.get(_MARK) or "GLIBC_TUNABLES" in os.environ:
        return
    if platform.libc_ver()[0] != "glibc" or os.environ.get("RANK") is not None:
        return  # launchers of several ranks set the environment themselves
    logger.info("allocator: restarting once with GLIBC_TUNABLES=%s (off: runtime.allocator=false)", ALLOCATOR_SETTINGS)
    os.environ.update({"GLIBC_TUNABLES": ALLOCATOR_SETTINGS, _MARK: "tuned"})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def available_cpus() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinity


def available_memory() -> int:
    """Return the bytes that this process may still take: free memory, and what its control group leaves."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS tells the whole only
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            free = min(free, max(int(Path(limit).read_text()) - int(Path(used).read_text()), 0))
    return free


def cpp_compiler() -> str | None:
    """Return the compiler that torch.compile uses on CPUs, or None."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def choose_device(name: str, where: str, error: type[InternLMError]) -> str:
    """Return the name (auto, cpu, cuda or cuda:N) of a device; "auto" takes a GPU where there is one.

    Raises:
        InternLMError: of the kind `error`: `where` names a device that is not here.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name.startswith("cuda") and not has_gpu:
        raise error("no CUDA device here", where=where, got=name, do="Leave it out, or give cpu.")
    here = ["auto", "cpu"]
    if has_gpu:
        here += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in here:
        raise error("no such device here", where=where, got=name, allowed=here)
    return name


def resolve_device(config: RuntimeConfig) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: a GPU is asked for and there is none for this rank, or compilation without a compiler.
    """
    import torch

    name = choose_device(config.device, "runtime.device", ConfigError)
    if config.compile and name == "cpu" and cpp_compiler() is None:
        raise ConfigError(
            "needs a C++ compiler", where="runtime.compile", got=True, do="Install g++ (or set CXX), or leave it off."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    if name == "cpu" or ranks.world_size() == 1:
        return torch.device(name)
    return _own_gpu()


def _own_gpu() -> torch.device:
    """Return the GPU of this rank among those of its machine, and make it the current one."""
    import torch

    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_NODELIST" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        index = 0  # srun showed each task its own GPU only; ranks that a launcher started inside a task share it
    if index >= count:
        raise ConfigError(
            f"there is no GPU for local rank {index}: this machine shows {count}",
            where="runtime.device",
            do="Start as many ranks as there are GPUs, or use device: cpu.",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def resolve_dtype(config: RuntimeConfig, device: torch.device) -> torch.dtype:
    """Return the data type of matrix products."""
    import torch

    name = config.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a data type as recipes and files have it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def seed(value: int) -> None:
    """Start the random streams of Python and torch (all devices) at a seed."""
    import random

    import torch

    random.seed(value)
    torch.manual_seed(value)


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return (nested) lists of numbers as a tensor on a device, without waiting for it."""
    import torch

    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


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
    """Return the operations per second of a large matrix product here: the best of 8."""
    import torch

    size = {"cpu": 1024 if dtype == torch.float32 else 256}.get(device.type, 8192)  # others are emulated
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
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, total


def versions() -> dict[str, str]:
    """Return the versions that a run depends on, and the commit of this code in a checkout of its own."""
    import subprocess

    import torch

    found = {"internlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    where = Path(__file__).parents[1]
    if (where / ".git").exists():  # else it is installed: a repository further up is someone else's
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "rev-parse", "HEAD"]
            done = subprocess.run(git, cwd=where, capture_output=True, text=True, timeout=5, check=True)
            found["commit"] = done.stdout.strip()
    return found
