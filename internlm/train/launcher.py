"""Starting the ranks of a training on this machine, and ending them well.

torch's launcher starts them, and starts them again where that was asked for; what is ours is how they end:

    a rank fails             the others get `CRASH_PATIENCE_S` to end by themselves, one that is stopped gets nothing;
                             then all start again, if restarts are left, from the newest checkpoint
    a rank ends on purpose   (75, 130: with a checkpoint) so will the others, who are waited for; no restart
    a signal to us           each rank gets it, saves and ends so; `patience_s` later it is killed; no restart
    a second signal          at once

torch kills after 30 s, forgets the exit codes, and restarts ranks that ended with 75.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from internlm import ranks
from internlm.compat import groups
from internlm.errors import TrainingError, first_line
from internlm.train.stop import EXIT_CODES, Reason

logger = logging.getLogger(__name__)

CRASH_PATIENCE_S = 30.0
"""How long the others may take to end when a rank has failed."""
_AT_ONCE_S = 3.0
"""The same after a second signal: it ends Python's ranks by itself, but not one that waits for a device."""
_ON_PURPOSE = {EXIT_CODES[Reason.PREEMPTED], EXIT_CODES[Reason.INTERRUPTED]}
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")
_LOOK_EVERY_S = 0.05


@dataclass
class _Wishes:
    """What this launcher was asked for by signals."""

    patience_s: float
    before: dict[str, Any] = field(default_factory=dict)
    """Handlers that were there first: whom nohup started keeps ignoring SIGHUP."""
    first: signal.Signals | None = None
    second: float = math.inf
    """When another one came, in seconds since 1970."""
    kill_at: float | None = None
    """When ranks that live are killed."""
    killed: set[int] = field(default_factory=set)
    """Processes that this launcher has killed: how they ended says nothing about why."""


class Agent(LocalElasticAgent):
    """Torch's agent for the ranks of one machine, with another end. It overrides what torch's documentation offers."""

    def __init__(self, *arguments: Any, wishes: _Wishes, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._wishes = wishes

    def _start_workers(self, worker_group: Any) -> Any:
        started = super()._start_workers(worker_group)
        for name, before in self._wishes.before.items():  # in place of those that torch has just set
            signal.signal(getattr(signal, name), signal.SIG_IGN if before == signal.SIG_IGN else self._hear)
        return started

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the ranks, and note from when on they are killed."""
        wishes, name = self._wishes, signal.Signals(number)
        wishes.kill_at = time.monotonic() + (wishes.patience_s if wishes.first is None else _AT_ONCE_S)
        if wishes.first is not None:
            wishes.second = min(wishes.second, time.time())
        wishes.first = wishes.first or name
        if not self._living():
            raise SignalException(f"{name.name} while no rank was there", name)
        self._send(signal.SIGTERM if name.name == "SIGHUP" else name)

    def _monitor_workers(self, worker_group: Any) -> Any:
        failed = {process.poll() for process in self._processes()} - {None, 0}
        if failed:
            self._await_end(CRASH_PATIENCE_S if failed - _ON_PURPOSE else self._wishes.patience_s)
        elif self._wishes.kill_at is not None and time.monotonic() > self._wishes.kill_at:
            self._await_end(0)
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            self._decide_on_restart(result.failures)
        return result

    def _await_end(self, patience_s: float) -> None:
        """Wait for all ranks of this machine to end, and kill those that do not."""
        wishes, begun = self._wishes, time.monotonic()
        while living := self._living():
            late_s = time.monotonic() - (wishes.kill_at or begun + patience_s)
            if late_s > CRASH_PATIENCE_S:
                return  # not even a kill ends a process that waits for a broken device
            for process in living:
                if late_s > 0 or _is_stopped(process.pid):
                    wishes.killed.add(process.pid)
                    _kill(process.pid, signal.SIGKILL)
            time.sleep(_LOOK_EVERY_S)

    def _decide_on_restart(self, failures: dict[int, Any]) -> None:
        """Keep torch from starting ranks again that have ended on purpose, and say so where it will."""
        on_purpose = {failure.exitcode for failure in failures.values()} <= _ON_PURPOSE
        if self._wishes.first is None and on_purpose and self._worker_group.spec.rdzv_handler.num_nodes_waiting():
            self._remaining_restarts += 1  # they made room for a machine that wants to join
        elif self._wishes.first is not None or on_purpose:
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            _tell(_own(failures, self._wishes.killed))
            most = self._worker_group.spec.max_restarts
            number = most - self._remaining_restarts + 1
            logger.warning("internlm launch: all ranks start again (%d of %d times)", number, most)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *arguments: Any, **options: Any) -> None:
        # Ranks live here when they make room for a machine that joins: they save first.
        self._send(death_sig)
        self._await_end(self._wishes.patience_s)
        super()._shutdown(death_sig, *arguments, **options)

    def _processes(self) -> list[Any]:
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [handler.proc for handler in handlers.values()]

    def _living(self) -> list[Any]:
        return [process for process in self._processes() if process.poll() is None]

    def _send(self, number: signal.Signals) -> None:
        for process in self._living():
            _kill(process.pid, number)


def _kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a rank and what it started: each rank leads a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped (SIGSTOP): it would not end by itself."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def start(words: list[str], patience_s: float) -> int:
    """Run torch's launcher with a command line until its ranks have ended; return the exit code of the run.

    The code is that of a rank that failed, or 128 + the signal that ended it or this process; 75 or 130 where all
    ranks have ended on purpose. Variables PET_*, which are torchrun's options to others (Kubeflow sets them), are
    dropped: the command line says everything. `patience_s`: how long ranks may take to end that were asked to.

    Raises:
        TrainingError: the launchers of the nodes did not find each other.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what went wrong is said below, once
    foreign = sorted(name for name in os.environ if name.startswith("PET_"))
    for name in foreign:
        del os.environ[name]
    if foreign:
        logger.warning("warning: %s have no effect on internlm launch", ", ".join(foreign))
    os.environ[ranks.PARENT] = str(os.getpid())
    known = [name for name in _SIGNALS if hasattr(signal, name)]  # Windows lacks some
    wishes = _Wishes(patience_s, {name: signal.getsignal(getattr(signal, name)) for name in known})
    try:
        with ranks.interruptible(), groups.launcher_agent(functools.partial(Agent, wishes=wishes)):
            torchrun.main(words)
    except ChildFailedError as error:
        return report(error.failures, wishes.first, wishes.killed, wishes.second)
    except SignalException as error:
        logger.error("internlm launch: %s", error.sigval.name)
        return 128 + error.sigval
    except (dist.DistError, RendezvousError) as error:
        raise TrainingError(
            f"the nodes did not find each other: {first_line(error)}",
            do="Give every node the same --nodes and --master, and a port that is free on machine 0.",
        ) from error
    return 0


def report(
    failures: dict[int, Any],
    asked: signal.Signals | None = None,
    killed: Collection[int] = (),
    hurried: float = math.inf,
) -> int:
    """Say how ranks ended that failed, by their number; return the exit code of the run.

    `asked` is the signal that this process got and passed on, `killed` are processes that were killed from here, and
    `hurried` is when another signal came: who ends at once takes the others' connections along, and they fail.
    """
    codes = {failure.exitcode for failure in failures.values()}
    since = min(failure.timestamp for failure in failures.values())
    is_wanted = asked is not None and (codes <= _ON_PURPOSE | {0, -asked, -signal.SIGTERM} or since + 1 > hurried)
    if asked is not None and is_wanted and asked.name != "SIGQUIT":
        # who was ended by the signal had not begun to train: nothing is lost
        logger.info("internlm launch: %s: all ranks have ended", asked.name)
        return EXIT_CODES[Reason.INTERRUPTED if asked == signal.SIGINT else Reason.PREEMPTED]
    if codes <= _ON_PURPOSE:
        return int(max(codes))
    failures = _own(failures, killed)
    _tell(failures)
    # one that was killed comes first: those that lost it end in the same moment, with 1
    code = min(failures.values(), key=lambda failure: (failure.exitcode > 0, failure.timestamp)).exitcode
    return int(code if code > 0 else 128 - code)


def _own(failures: dict[int, Any], killed: Collection[int]) -> dict[int, Any]:
    """Return those that no launcher ended, as far as there are any: the others say nothing about why."""
    ended = (failure.exitcode == -signal.SIGTERM or failure.pid in killed for failure in failures.values())
    return {n: failures[n] for n, is_ended in zip(failures, ended, strict=True) if not is_ended} or failures


def _tell(failures: dict[int, Any]) -> None:
    signals = {each.value: each.name for each in signal.Signals}  # most real-time signals have no name
    for number, failure in sorted(failures.items()):
        code = failure.exitcode
        how = f"ended with exit code {code}" if code >= 0 else f"was ended by {signals.get(-code, f'signal {-code}')}"
        logger.error("internlm launch: rank %d (process %d) %s", number, failure.pid, how)
