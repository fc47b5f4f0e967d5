"""A pool of processes that become the ranks of one small distributed job after another.

Starting a Python process with torch takes seconds: these are forks of one that has imported everything, and stay for
some jobs. Each job has a process group of its own. A job that fails, or takes too long, takes the pool with it, and the
next job starts a new one.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import inspect
import os
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from internlm import plot, runtime
from tests.processes import CONTEXT

MOST_JOBS = 12
"""Of one pool: the threads of gloo outlive their groups, dozens of them, and each wakes a hundred times a second."""


class Ranks:
    """Processes that run functions of `cases.py`."""

    def __init__(self) -> None:
        self.members: list[tuple[Any, Connection]] = []
        self.jobs = 0

    def run(self, world_size: int, name: str, *arguments: Any, timeout_s: float = 120) -> list[Any]:
        """Return what a function of `cases.py` returns on each rank, in a process group of its own.

        Raises:
            RuntimeError: with the traceback of the first rank that failed.
            TimeoutError: it took too long.
        """
        if self.jobs >= MOST_JOBS:
            self.close()
        self.jobs += 1
        while len(self.members) < world_size:
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(there,), daemon=True)
            process.start()
            self.members.append((process, here))
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, connection) in enumerate(self.members[:world_size]):
                connection.send((name, arguments, rank, world_size, os.path.join(folder, "store")))
            try:
                return self._collect(world_size, time.monotonic() + timeout_s)
            except BaseException:
                self.close()
                raise

    def _collect(self, world_size: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < world_size:
            for rank, (process, connection) in enumerate(self.members[:world_size]):
                if rank in results or not connection.poll(0.005):
                    if not process.is_alive() and not connection.poll(0):
                        raise RuntimeError(f"rank {rank} died with {process.exitcode}")
                    continue
                good, value = connection.recv()
                if not good:
                    raise RuntimeError(f"rank {rank}: {value}")
                results[rank] = value
            if time.monotonic() > deadline:
                raise TimeoutError(f"only ranks {sorted(results)} of {world_size} came to an end")
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self.members:
            connection.close()
            process.kill()
            process.join()
        self.members.clear()
        self.jobs = 0


def forget(modules: dict[str, Any]) -> None:
    """Clear torch's caches of what it knows about meshes: their groups are gone with the job."""
    for name in [name for name in modules if name.startswith("torch.distributed")]:
        for value in list(vars(modules[name]).values()):
            if not isinstance(value, type) and inspect.isroutine(getattr(type(value), "cache_clear", None)):
                value.cache_clear()
    clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear is not None:
        clear()
    dispatcher = getattr(DTensor, "_op_dispatcher", None)
    propagate = getattr(getattr(dispatcher, "sharding_propagator", None), "propagate_op_sharding", None)
    if propagate is not None:
        propagate.cache_clear()


def serve(connection: Connection) -> None:
    """Run what is asked for until the other end closes."""
    torch.set_num_threads(1)
    os.environ["INTERNLM_ALLOCATOR"] = "off"
    cases = importlib.import_module("tests.parallel.cases")
    runtime.measure_peak = functools.cache(runtime.measure_peak)  # once for all jobs
    plot.loss_curve = lambda *_: None  # which takes 0.5 s
    gc.collect()
    gc.freeze()  # what is imported stays: the collection after each job need not look at it
    while True:
        try:
            name, arguments, rank, world_size, store = connection.recv()
        except EOFError:
            return
        try:
            os.environ["RANK"] = str(rank)
            if world_size > 1:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=world_size,
                    timeout=datetime.timedelta(seconds=300),
                )
            torch.manual_seed(0)
            answer = True, getattr(cases, name)(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            forget(sys.modules)
            gc.collect()
        connection.send(answer)
