"""A process among others that `internlm launch`, torchrun or Slurm's srun started: finding, agreeing, ending together.

    with joined():                    # alone: nothing happens
        recipe = together(load)       # an error of one rank is an error of all
        agree(recipe)                 # so is a difference
        ...                           # a failure inside ends this process soon, so that nobody waits for it

torch is imported by what needs it: a verb that never joins does not wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar

from internlm import config
from internlm.errors import ConfigError, InternLMError, TrainingError, first_line

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

JOIN_TIMEOUT_S = 3600
"""Ranks wait so long for the last one to start: nodes may still be loading their images."""
END_TIMEOUT_S = 20
"""A rank that failed is gone after this, whatever its device is doing."""
PARENT = "INTERNLM_LAUNCHER"
"""Variable with the process id of `internlm launch`, for its ranks."""

_was_rank = False


def rank() -> int:
    """Return this process's number among all of the run; 0 when it is alone."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def adopt_slurm() -> None:
    """Give this task of a Slurm step the variables of torchrun, unless RANK is set.

    The port comes from the job id and lies below the range from which systems hand out ports (32768 on Linux).
    """
    here = os.environ
    # SLURM_NTASKS is the job's in the shell of an interactive step, which is one task
    size = here.get("SLURM_STEP_NUM_TASKS") or here.get("SLURM_NTASKS") or "1"
    if "RANK" in here or "SLURM_STEP_NODELIST" not in here or size == "1":
        return
    here["RANK"], here["WORLD_SIZE"], here["LOCAL_RANK"] = here["SLURM_PROCID"], size, here["SLURM_LOCALID"]
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

    A failure gives the group up at once and arms an alarm that ends the process, should something hold it; the others
    see its connections close.

    Raises:
        TrainingError: the others cannot be reached, or one of them ended inside the block.
        ConfigError: a variable is missing, or its value is impossible.
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
            what = re.sub(r"^\[\S+\.cc:\d+\] ", "", first_line(error)).partition(". ")[0]
            raise TrainingError(
                f"rank {os.environ['RANK']} lost the others: {what}",
                do="The first error of another rank says why; if there is none, see runtime.timeout_s.",
            ) from error
        raise
    import torch.distributed as dist

    dist.destroy_process_group()


def end(code: int) -> None:
    """End this process at once, if it was in a group.

    gloo's threads outlive the group, and one that lets go of a tensor while Python shuts down aborts the process: one
    run of ten ended with 134 instead of 0 (torch 2.13).
    """
    if _was_rank:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        os._exit(code)


def ignore_ends() -> None:
    """Let signals that ask to end pass by: this rank ends, and all others with it.

    The first that is gone makes torchrun and srun send SIGTERM to the others, whose exit codes would tell of that.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _join() -> bool:
    """Start the process group that the environment describes; return whether there is one."""
    here = os.environ
    if "RANK" not in here and "WORLD_SIZE" not in here:
        return False
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not here.get(name)]
    if missing and here.get("WORLD_SIZE") != "1":
        raise ConfigError(
            f"{', '.join(missing)} not set", where="environment", do="Start ranks with `internlm launch` or torchrun."
        )
    if here["WORLD_SIZE"] == "1":
        return False
    _check_numbers()
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return False
    if PARENT in here and "TORCHELASTIC_RUN_ID" in here:
        _end_with(int(here[PARENT]))
    if here.get("LOCAL_WORLD_SIZE") != here["WORLD_SIZE"] and "GLOO_SOCKET_IFNAME" not in here:
        # gloo takes the address of the host's name, which is 127.0.1.1 on many systems
        found = interface_towards(here["MASTER_ADDR"]) or interface_towards("192.0.2.1")  # anywhere outside
        here.update({"GLOO_SOCKET_IFNAME": found} if found else {})
    on_gpus = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    try:
        with interruptible():
            dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_TIMEOUT_S))
    except (dist.DistError, RuntimeError) as error:
        place = f"{here['MASTER_ADDR']}:{here['MASTER_PORT']}"
        raise TrainingError(f"the other ranks cannot be reached: {first_line(error)}", where=place) from error
    if on_gpus:
        names = sorted(name for name in here if name.startswith(("NCCL_", "TORCH_NCCL_")))
        settings = " ".join(f"{name}={here[name]}" for name in names)
        version = ".".join(map(str, torch.cuda.nccl.version()))
        logger.info("nccl %s | %s", version, settings or "no NCCL_* variable is set")
    return True


def _check_numbers() -> None:
    """Check numbers of the environment, about which torch says little."""
    here = os.environ
    size = here["WORLD_SIZE"] if here["WORLD_SIZE"].isdecimal() else "0"
    ranges = {"WORLD_SIZE": (1, 10**7), "RANK": (0, int(size) - 1), "MASTER_PORT": (1, 65535)}
    for name, (least, most) in ranges.items():
        if not here[name].isdecimal() or not least <= int(here[name]) <= most:
            raise ConfigError(
                "is no such number",
                where=f"environment: {name}",
                got=here[name],
                allowed=[f"{least} to {most}"],
                do="Start ranks with `internlm launch` or torchrun.",
            )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end this process in a block that waits inside torch, where no handler written in Python runs.

    Without it a process whose partners do not come could not be interrupted for `JOIN_TIMEOUT_S`.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # ignored, or somebody else's
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def join_alone() -> None:
    """Start a process group of this process alone, if it has none: torch shards over a group."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _give_up() -> None:
    """Abandon the process group without waiting for anyone; this process ends soon."""
    from internlm.compat import groups

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(END_TIMEOUT_S)
    abort = threading.Thread(target=groups.abort_groups, daemon=True)
    abort.start()
    abort.join(END_TIMEOUT_S / 4)


def _is_about_others(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone or late; gloo's are plain RuntimeErrors."""
    import torch.distributed as dist

    words = r"[Cc]onnection (closed|reset)|Broken pipe|Timed out waiting|wait timeout|Socket closed"
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))


def _end_with(launcher: int) -> None:
    """Let Linux send SIGTERM to this process when the launcher is killed: ranks run in sessions of their own.

    Where it is gone already, so is the place where the ranks would meet.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:  # asked after that call: it says nothing about a parent that ended before
        raise TrainingError("the launcher ended before this rank had started", where=f"process {launcher}")


def is_cut_off() -> bool:
    """Return whether the launcher of this rank has ended, and ranks of other machines can go on without it."""
    here = os.environ
    if PARENT not in here or "TORCHELASTIC_RUN_ID" not in here or os.getppid() == int(here[PARENT]):
        return False
    return here.get("LOCAL_WORLD_SIZE") != here.get("WORLD_SIZE")


def interface_towards(host: str) -> str | None:
    """Return the network interface that leads to a host, or None where it is loopback, or unknown."""
    own = address_towards(host)
    if sys.platform != "linux" or own is None or own.startswith("127."):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                address = fcntl.ioctl(probe, 0x8915, name.encode().ljust(256, b"\0"))[20:24]  # SIOCGIFADDR
                if socket.inet_ntoa(address) == own:
                    return name
    return None


def address_towards(host: str) -> str | None:
    """Return this machine's own address on the way to a host, or None where there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, 9))  # a datagram socket sends nothing here
        return str(probe.getsockname()[0])
    return None


def gather(value: T) -> list[T]:
    """Return the value, a small one, of every rank, in their order. Every rank must call it."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def decide(wish: T, share: Callable[[list[T]], list[R]]) -> R:
    """Return what rank 0 makes of the wishes of all: `share` gives each rank its part, in their order."""
    if world_size() == 1:
        return share([wish])[0]
    import torch.distributed as dist

    wishes: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(wish, wishes)
    own: list[Any] = [None]
    dist.scatter_object_list(own, None if wishes is None else share(wishes))
    return own[0]


def local_size() -> int:
    """Return the number of processes of the run on this machine, as its launcher says; 1 where none does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


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
    """Check that all ranks hold the same facts, of which a digest is exchanged, unless they differ.

    Raises:
        ConfigError: on every rank, naming the keys that differ and who holds which value.
    """
    own = json.dumps(dict(config.leaves(facts)), sort_keys=True, default=str)
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


def _ranks(numbers: list[int]) -> str:
    """Return `rank 3` or `ranks 0-2, 5`."""
    spans = [[n for _, n in span] for _, span in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"
