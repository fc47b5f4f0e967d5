"""The machine under a run: ranks, device, data type, threads, memory allocator.

A process that `internlm launch`, torchrun or Slurm's srun started beside others finds them by its environment:

    with joined():                    # alone: nothing happens
        recipe = together(load)       # an error of one rank is an error of all
        agree(recipe)                 # so is a difference
        ...                           # a failure inside ends this process soon, so that nobody waits for it

On Linux CPUs glibc's allocator maps fresh pages for every large tensor and returns them at once. `tune_allocator`
restarts the process once, visibly, with settings that keep them (measured: `benchmarks/train_cpu.py --allocator`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from internlm.config import require_positive, section
from internlm.errors import ConfigError, InternLMError, TrainingError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")

ALLOCATOR_SETTINGS = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1"
)
_MARK = "INTERNLM_ALLOCATOR"
JOIN_TIMEOUT_S = 3600
"""Ranks wait so long for the last one to start: nodes may still be loading their images."""
END_TIMEOUT_S = 20
"""A rank that failed is gone after this, whatever its device is doing."""
PARENT = "INTERNLM_LAUNCHER"
"""Process id of `internlm launch`, for its ranks."""

_was_rank = False


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
    attention: Literal["auto", "dense", "blocks", "varlen", "flex", "masked"] = "auto"
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


def adopt_slurm() -> None:
    """Give this task of a Slurm step the variables of torchrun; nothing where RANK is set, or outside a step.

    The port comes from the job id and lies below the range from which systems hand out ports (32768 on Linux).
    """
    here = os.environ
    if "RANK" in here or "SLURM_STEP_NODELIST" not in here or int(here.get("SLURM_NTASKS", "1")) < 2:
        return
    here["RANK"], here["WORLD_SIZE"] = here["SLURM_PROCID"], here["SLURM_NTASKS"]
    here["LOCAL_RANK"] = here["SLURM_LOCALID"]
    if here.get("SLURM_STEP_NUM_NODES") == "1":
        here["LOCAL_WORLD_SIZE"] = here["WORLD_SIZE"]
    here.setdefault("MASTER_ADDR", first_host(here["SLURM_STEP_NODELIST"]))
    step = int(here.get("SLURM_STEP_ID", "0"))
    here.setdefault("MASTER_PORT", str(10000 + (int(here.get("SLURM_JOB_ID", "0")) + 1009 * step) % 20000))


def first_host(hosts: str) -> str:
    """Return the first name of Slurm's compressed list: `node[003-005,9],login` → `node003`."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group() if first else hosts)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Run the block in a process group with the other ranks, if there are any.

    A failure gives the group up at once and arms an alarm that ends the process, should a device or another rank hold
    it; the others see its connections close.

    Raises:
        TrainingError: the others cannot be reached, or one of them ended inside the block.
        ConfigError: a variable is missing.
    """
    if not _join():
        yield
        return
    global _was_rank
    _was_rank = True
    try:
        yield
        gather(None)  # all leave together: rank 0 may hold the store of the others
    except BaseException as error:
        _give_up()
        if _is_about_others(error):
            # gloo: `[/build/…/pair.cc:553] Connection closed by peer [10.0.0.2]:4242. This is typically …`
            what = re.sub(r"^\[\S+\.cc:\d+\] ", "", str(error).strip().splitlines()[0]).partition(". ")[0]
            raise TrainingError(
                f"rank {os.environ['RANK']} lost the others: {what}",
                do="The first error of another rank says why; if there is none, see runtime.timeout_s.",
            ) from error
        raise
    import torch.distributed as dist

    dist.destroy_process_group()


def end_rank(code: int) -> None:
    """End this process at once, if it was in a group; else return.

    gloo's threads outlive the group, and one that lets go of a tensor while Python shuts down aborts the process: about
    one run of ten ended with 134 instead of 0 (torch 2.13).
    """
    if _was_rank:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        os._exit(code)


def _join() -> bool:
    """Start the process group that the environment describes; return whether there is one to leave."""
    here = os.environ
    if "RANK" not in here and "WORLD_SIZE" not in here:
        return False
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not here.get(name)]
    if missing and here.get("WORLD_SIZE") != "1":
        raise ConfigError(
            f"{', '.join(missing)} not set", where="environment", do="Start ranks with `internlm launch` or torchrun."
        )
    import torch
    import torch.distributed as dist

    if here["WORLD_SIZE"] == "1" or dist.is_initialized():
        return False
    if here.get(PARENT) == str(os.getppid()):
        _end_with_parent()
    if here.get("LOCAL_WORLD_SIZE") != here["WORLD_SIZE"] and "GLOO_SOCKET_IFNAME" not in here:
        # gloo takes the address of the host's name, which is 127.0.1.1 on many systems
        found = interface_towards(here["MASTER_ADDR"]) or interface_towards("192.0.2.1")  # anywhere outside
        here.update({"GLOO_SOCKET_IFNAME": found} if found else {})
    on_gpus = torch.cuda.is_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(seconds=JOIN_TIMEOUT_S))
    except (dist.DistError, RuntimeError) as error:
        place = f"{here['MASTER_ADDR']}:{here['MASTER_PORT']}"
        raise TrainingError(f"the other ranks cannot be reached: {str(error).splitlines()[0]}", where=place) from error
    if on_gpus:
        names = sorted(name for name in here if name.startswith(("NCCL_", "TORCH_NCCL_")))
        settings = " ".join(f"{name}={here[name]}" for name in names)
        version = ".".join(map(str, torch.cuda.nccl.version()))
        logger.info("nccl %s | %s", version, settings or "no NCCL_* variable is set")
    return True


def join_alone() -> None:
    """Start a process group of this process alone, if it has none: what torch shards, it shards over a group."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _give_up() -> None:
    """Abandon the process group without waiting for anyone, and see to it that this process ends."""
    from internlm import compat

    if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(END_TIMEOUT_S)
    abort = threading.Thread(target=compat.abort_groups, daemon=True)
    abort.start()
    abort.join(END_TIMEOUT_S / 4)


def _is_about_others(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone or late. gloo raises plain RuntimeErrors."""
    import torch.distributed as dist

    words = r"[Cc]onnection (closed|reset)|Broken pipe|Timed out waiting|wait timeout|Socket closed"
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))


def _end_with_parent() -> None:
    """Let Linux send SIGTERM to this process when the launcher is killed: ranks run in sessions of their own."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def interface_towards(host: str) -> str | None:
    """Return the network interface that leads to a host, or None where it is loopback, or unknown."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, 9))  # a datagram socket sends nothing here
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                address = fcntl.ioctl(probe, 0x8915, name.encode().ljust(256, b"\0"))[20:24]  # SIOCGIFADDR
                if address == own and not own.startswith(b"\x7f"):
                    return name
    return None


def gather(value: T) -> list[T]:
    """Return the value of every rank, in their order. Every rank must call it; small values only."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """Return what `work` returns here, once it went well on every rank.

    Raises:
        InternLMError: its own; or a ConfigError with what the first rank that failed said.
    """
    failure = None
    try:
        result = work()
    except InternLMError as error:
        failure = error
    said = gather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, text in enumerate(said):
        if text is not None:
            raise ConfigError(text, where=f"on rank {number}")
    return result


def agree(facts: dict[str, Any]) -> None:
    """Check that all ranks hold the same facts. Only a digest is exchanged, unless they differ.

    Raises:
        ConfigError: on every rank, naming the keys that differ and who holds which value.
    """
    own = json.dumps(dict(_leaves(facts)), sort_keys=True, default=str)
    if len(set(gather(hashlib.sha256(own.encode()).hexdigest()))) == 1:
        return
    everyone = [json.loads(text) for text in gather(own)]
    problems = []
    for key in sorted(set().union(*everyone)):
        holders: dict[str, list[int]] = {}
        for number, known in enumerate(everyone):
            holders.setdefault(json.dumps(known[key]) if key in known else "nothing", []).append(number)
        if len(holders) > 1:
            problems.append(f"{key}: " + "; ".join(f"{value} on {_ranks(who)}" for value, who in holders.items()))
    head = "the ranks differ; give all of them the same recipe, overrides and code"
    raise ConfigError("\n  ".join([head, *problems]))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), value


def _ranks(numbers: list[int]) -> str:
    """Return `rank 3` or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def start_ranks(words: list[str]) -> int:
    """Run torch's launcher with a command line until its ranks have ended; return the exit code of the run.

    The code is that of a rank that failed, or 128 + the signal that ended it or this process.

    Raises:
        TrainingError: the launchers of the nodes did not find each other.
    """
    import torch.distributed as dist
    from torch.distributed import run as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what went wrong is said below, once
    os.environ[PARENT] = str(os.getpid())
    try:
        launcher.main(words)
    except ChildFailedError as error:
        # those that the launcher itself stopped say nothing about why
        failures = {n: f for n, f in error.failures.items() if f.exitcode != -signal.SIGTERM} or error.failures
        for number, failure in sorted(failures.items()):
            code = failure.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            logger.error("internlm launch: rank %d (process %d) %s", number, failure.pid, how)
        # one that was killed comes first: those that lost it end in the same moment, with 1
        code = min(failures.values(), key=lambda failure: (failure.exitcode > 0, failure.timestamp)).exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        logger.error("internlm launch: %s", error.sigval.name)
        return 128 + error.sigval
    except (dist.DistError, RendezvousError) as error:
        raise TrainingError(f"the nodes did not find each other: {str(error).splitlines()[0]}") from error
    return 0


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
        ConfigError: a GPU is asked for and there is none for this rank, or compilation without a compiler.
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
    if name == "cpu" or world_size() == 1:
        return torch.device(name)
    return _own_gpu()


def _own_gpu() -> torch.device:
    """Return the GPU of this rank among those of its machine, and make it the current one.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    import torch

    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_NODELIST" in os.environ:
        index = 0  # srun showed each task its own GPU only
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
    if sys.platform == "win32":
        return 0, 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, total
