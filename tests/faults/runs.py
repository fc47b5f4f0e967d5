"""Trainings in processes that are killed, or whose disk fails, at a chosen operation.

A `Run` has its ranks in forks of one process that has imported everything. Python tells an audit hook of every file
that is opened, made, renamed or removed: a `Trouble` counts those on checkpoints, and lets one of them be the last, or
fail.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm import config, plot, runtime
from internlm.checkpoint import listing, store
from internlm.checkpoint.store import Checkpoint
from internlm.cli import main
from internlm.hashed_file import HashedFile
from internlm.recipe import Recipe
from internlm.train import trainer
from internlm.weights.weight import tensors
from tests.processes import CONTEXT, free_port

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
WRITE = "write"
"""Ours: a file's content goes to the disk."""
GRACE_S = 15.0
"""For ranks to end by themselves."""
ALIKE = ("step", "tokens", "skipped_steps", "losses", "loader", "random", "loss_scale", "layout", "passed_over")
"""Facts of a checkpoint that no clock has a part in."""


@dataclass(frozen=True)
class Trouble:
    """What happens to the file operations of a rank."""

    first: int
    """Number of the operation that it happens to, from 1."""
    rank: int = 0
    inside: str = "/checkpoints/"
    """Only operations are counted on paths that contain this."""
    code: int | None = None
    """Error that operations fail with; None: the process is killed before the operation."""
    last: int = 10**9
    """Number of the last that fails."""


def watch(trouble: Trouble) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that makes trouble."""
    numbers = itertools.count(1)  # it counts without a lock, from several threads

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in (*OPERATIONS, WRITE) or not isinstance(arguments[0], str | Path):
            return
        path = str(arguments[0])
        in_removal = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # by name, in an open folder
        if trouble.inside not in path and not (in_removal and trouble.code is None):
            return
        if trouble.first <= next(numbers) <= trouble.last:
            if trouble.code is None:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # until it comes
            raise OSError(trouble.code, os.strerror(trouble.code), path)

    return hook


def announce_writes(slow_s: float) -> None:
    """Let hooks know of what goes to the disk, and let it take longer: so much at most for each tensor."""
    begin, write, put = HashedFile.__init__, HashedFile.write, HashedFile._write
    names: dict[int, str] = {}

    def named(self: HashedFile, path: Path) -> None:
        names[id(self)] = str(path)
        begin(self, path)

    def slowly(self: HashedFile, content: Any) -> None:
        if slow_s:
            time.sleep(random.SystemRandom().uniform(0, slow_s))  # the run's own streams are not touched
        write(self, content)

    def audited(self: HashedFile, piece: memoryview) -> None:
        half = len(piece) // 2 // 4096 * 4096  # a kill leaves half of it
        for part in (piece[:half], piece[half:]):
            sys.audit(WRITE, names[id(self)])
            put(self, part)

    HashedFile.__init__, HashedFile.write, HashedFile._write = named, slowly, audited  # type: ignore[method-assign]


def work(recipe: str, rank: int, world: int, port: int, log: str, trouble: Trouble | None, slow_s: float) -> None:
    """Train, as one rank of some."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"INTERNLM_ALLOCATOR": "off"}
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world)}
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    runtime.measure_peak = lambda *_: 1e9
    plot.loss_curve = lambda *_: None
    trainer.SAVE_AGAIN_AFTER_S = (0.1, 0.1, 0.1)
    announce_writes(slow_s)
    if trouble is not None and trouble.rank == rank:
        sys.addaudithook(watch(trouble))
    os._exit(main(["train", recipe]))


class Run:
    """The ranks of one training.

    Args:
        recipe: its file; a log is written beside it.
        world: number of ranks.
        trouble: that one of them has.
        slow_s: seconds that a tensor takes to the disk, at most.
    """

    def __init__(self, recipe: Path, world: int = 1, trouble: Trouble | None = None, slow_s: float = 0.0) -> None:
        self.log = recipe.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        port = free_port()
        self.ranks = [
            CONTEXT.Process(
                target=work, args=(str(recipe), rank, world, port, str(self.log), trouble, slow_s), daemon=True
            )
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def kill(self, *numbers: int) -> None:
        """Kill these ranks; none: all."""
        for number in numbers or range(len(self.ranks)):
            self.ranks[number].kill()

    def wait(self, timeout_s: float = 100) -> list[int]:
        """Return how the ranks ended: exit codes, or the negative signal.

        As a launcher does, it kills those that are left some time after one was killed: who waits for the others to
        start does not hear of it.

        Raises:
            TimeoutError: one did not; all are killed.
        """
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and any(process.is_alive() for process in self.ranks):
            time.sleep(0.02)
            if any(process.exitcode == -signal.SIGKILL for process in self.ranks):
                for process in self.ranks:
                    process.join(GRACE_S)
                self.kill()
                for process in self.ranks:
                    process.join()
        late = [number for number, process in enumerate(self.ranks) if process.exitcode is None]
        if late:
            self.kill(*late)
            raise TimeoutError(f"ranks {late} did not end in {timeout_s} s:\n{self.output}")
        return [int(process.exitcode) for process in self.ranks]

    @property
    def output(self) -> str:
        """What the ranks said."""
        return self.log.read_text() if self.log.exists() else ""


def write_recipe(path: Path, value: Recipe) -> Path:
    """Write a recipe to a file; return the file."""
    path.write_text(config.dump(value))
    return path


def content(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all that a checkpoint holds, with its checksums compared."""
    return dict(tensors(checkpoint.weights(""))), {name: checkpoint.meta[name] for name in ALIKE}


def contents(run: Path) -> dict[int, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Return what the complete checkpoints of a run hold, by step."""
    opened = [store.open_checkpoint(path) for path in listing.listed(run / "checkpoints")]
    return {checkpoint.step: content(checkpoint) for checkpoint in opened}


def assert_same(run: Path, wanted: dict[int, tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
    """Check that every complete checkpoint of a run is bit by bit the one of its step."""
    for step, (found, facts) in contents(run).items():
        state, known = wanted[step]
        assert facts == known, step
        assert found.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items()), step
