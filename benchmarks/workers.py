"""Contenders in fresh processes: each answers every job with one line of JSON.

    found = workers.run(SCRIPT, job)                                 a process for one job
    with workers.Worker(SCRIPT) as worker:                           several jobs, in turn with others
        found = worker.ask(job)
    found = workers.together(SCRIPT, jobs, timeout_s=600)            a process for each, which wait for each other

SCRIPT is run as `python SCRIPT --worker`, and there calls `answer`. What goes wrong is a key of the answer, `error`:
a contender that is missing or fails is a row that says why. `versions` are those of the process.

Peers run under `--peer-python`, an interpreter that may not have `internlm`. Hence these files import nothing of it
at their tops: workers, report, shapes, llama, torchtitan_llama, train_peers and decode_peers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

import report

WORD = "--worker"
Job = dict[str, Any]
Answer = dict[str, Any]


class Worker:
    """A process that answers jobs, from the first one until the end of `with`."""

    def __init__(
        self, script: str, *, python: str = sys.executable, variables: dict[str, str] | None = None,
        verbose: bool = False,
    ) -> None:  # fmt: skip
        """Take a file that calls `answer`, who runs it, variables beside ours, and whether its output is shown."""
        self.command = [python, script, WORD]
        self.variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | (variables or {})
        self.verbose = verbose
        self.printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed at the end of `with`
        self.process: subprocess.Popen[str] | None = None

    def ask(self, job: Job, timeout_s: float | None = None) -> Answer:
        """Return the answer to a job, or `error`: what it raised, how it ended, or that it took too long."""
        try:
            self.send(job)
        except OSError as error:  # no such interpreter, or the process has ended
            return {"error": self._end() or in_words(error)}
        return self.receive(timeout_s)

    def send(self, job: Job) -> None:
        """Give it a job."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.printed, text=True,
                env=os.environ | self.variables,
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def receive(self, timeout_s: float | None = None) -> Answer:
        """Return the answer to the job that it has."""
        ready, _, _ = select.select([self.answers], [], [], timeout_s)
        if not ready:
            return {"error": f"not done after {timeout_s:.0f} s"}
        line = self.answers.readline()
        return json.loads(line) if line else {"error": self._end()}

    @property
    def answers(self) -> IO[str]:
        """Where its answers come from."""
        assert self.process is not None, "it was given a job"
        assert self.process.stdout is not None
        return self.process.stdout

    def _end(self) -> str:
        """Return how the process ended, with its last words; nothing where there was none."""
        if self.process is None:
            return ""
        code = self.process.wait()
        self.printed.seek(0)
        return f"exit {code}: {(self.printed.read().strip().splitlines() or ['no message'])[-1]}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()  # not waiting for the end of its pipes: children of its own may hold them
            self.process.wait()
            with contextlib.suppress(OSError), self.process:
                pass
        if self.verbose:
            self.printed.seek(0)
            print(self.printed.read(), file=sys.stderr)
        self.printed.close()


def run(script: str, job: Job, *, timeout_s: float | None = None, **options: Any) -> Answer:
    """Return the answer of a fresh process; options are those of `Worker`."""
    with Worker(script, **options) as worker:
        return worker.ask(job, timeout_s)


def together(script: str, jobs: list[Job], *, timeout_s: float, **options: Any) -> list[Answer]:
    """Return the answers of ranks, which wait for each other: a fresh process for each job.

    Raises:
        RuntimeError: what the first one to fail says; the others may wait for it for ever.
    """
    found: dict[int, Answer] = {}
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(Worker(script, **options)) for _ in jobs]
        for rank, job in zip(ranks, jobs, strict=True):
            rank.send(job)
        while len(found) < len(jobs):
            pipes = {rank.answers: number for number, rank in enumerate(ranks) if number not in found}
            ready, _, _ = select.select(list(pipes), [], [], timeout_s)
            if not ready:
                raise RuntimeError(f"not done after {timeout_s:.0f} s")
            for pipe in ready:
                answer = ranks[pipes[pipe]].receive()
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                found[pipes[pipe]] = answer
    return [found[number] for number in range(len(jobs))]


def on_cpu(threads: int, tuned: bool = True) -> dict[str, str]:
    """Return variables for a contender on a CPU: its threads and, if `tuned`, our allocator settings, for peers too."""
    from internlm.runtime import ALLOCATOR_SETTINGS

    many = str(threads)
    return {"OMP_NUM_THREADS": many, "MKL_NUM_THREADS": many, "GLIBC_TUNABLES": ALLOCATOR_SETTINGS if tuned else ""}


def is_worker() -> bool:
    """Return whether this process was started by `Worker`."""
    return sys.argv[1:] == [WORD]


def answer(do: Callable[[Job], Answer]) -> None:
    """Answer the jobs on standard input until it ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            found = do(json.loads(line))
        except Exception as error:  # whatever a contender raises becomes its row
            logging.exception("the job failed")
            found = {"error": in_words(error)}
        print(json.dumps(found | {"versions": report.versions()}), file=answers)


def in_words(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
