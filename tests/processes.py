"""Processes that tests start, and how they are waited for.

    done = forked("convert", "gone", "out")           # run to its end: done.returncode, .stdout, .stderr
    done = forked("benchmarks/shapes.py", "--help")   # the same for a Python program
    done = internlm("convert", "gone", "out")         # from nothing: some seconds, most of them imports
    child = Fork("train", "r.yaml")                   # goes on beside the test; finish(child) waits for it
    child = start(*INTERNLM, "train", "r.yaml")       # the same, from nothing
    with serving(folder, "--max-batch", "2") as on:   # `internlm serve`, which listens: on.url, on.child
        ...

None of them knows of ranks, and each has one thread: two that wait for each other on a busy machine take ten times as
long. What is not about the start of a process is tested in a fork of one that has imported everything.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from internlm.cli import main

CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(
        [
            "tests.parallel.cases", "torch.utils.tensorboard", "torch.distributed.checkpoint", "internlm.infer.engine",
            "internlm.weights.transformers", "internlm.train.launcher", "matplotlib.pyplot",
            "internlm.parallel.pipeline", "internlm.parallel.expert", "torch.distributed.fsdp",
            "tests.frozen",
        ]
    )  # fmt: skip

INTERNLM = [sys.executable, "-m", "internlm"]
PASSED_ON = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "PET_", "TORCHELASTIC_")


def environment(**changes: str) -> dict[str, str]:
    """Return the variables of a process that knows of no ranks."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return known | {"OMP_NUM_THREADS": "1"} | changes


def internlm(*words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `internlm` to its end; return exit code and streams."""
    known = environment(**variables)
    return subprocess.run([*INTERNLM, *words], cwd=cwd, env=known, capture_output=True, text=True, timeout=120)


class Fork:
    """`internlm` in a process that need not import anything, and goes on beside the test, with what a `Popen` has.

    The ranks that it launches are forks of it.

    Args:
        words: of the command; or a Python file with its arguments, which is run instead.
        cwd: where it works.
        hook: function of a module, which is called in the process first.
        variables: of its environment.
    """

    def __init__(
        self, *words: str, cwd: Path | None = None, hook: Callable[[], None] | None = None, **variables: str
    ) -> None:
        self.args = words
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [str(Path(self._folder.name, name)) for name in ("output", "errors")]
        given = (words, str(cwd or Path.cwd()), environment(**variables), self._streams, hook)
        self._process = CONTEXT.Process(target=_become, args=given)
        self._process.start()
        self.pid: int = self._process.pid
        self.kill: Callable[[], None] = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        output, errors = [Path(stream).read_text(encoding="utf-8", errors="replace") for stream in self._streams]
        return output, errors


def forked(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `internlm`, or a Python file, to its end in a `Fork`; return exit code and streams."""
    process = Fork(*words, **options)
    try:
        output, errors = process.communicate(120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(words, process.poll() or 0, output, errors)


def _become(
    words: Sequence[str], folder: str, variables: dict[str, str], streams: list[str], hook: Callable[[], None] | None
) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    if hook is not None:
        hook()
    SubprocessHandler._popen = lambda handler, args, env: ForkedRank(args, env)  # type: ignore
    _main(words)


def _main(words: Sequence[str]) -> NoReturn:
    code: Any = 0
    try:
        if words and words[0].endswith(".py"):
            sys.argv, sys.path[0] = list(words), str(Path(words[0]).parent.resolve())
            runpy.run_path(words[0], run_name="__main__")
        else:
            code = main(words)
    except SystemExit as left:  # argparse leaves so
        code = left.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class ForkedRank:
    """A rank with what torch's launcher asks a `Popen` for.

    Args:
        command: of the launcher, `python … -m internlm …`.
        variables: of its environment.
    """

    def __init__(self, command: Sequence[str], variables: dict[str, str]) -> None:
        self.args = command
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for name in PASSED_ON:  # the launcher has handlers
            signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(variables)
        for folder in variables.get("PYTHONPATH", "").split(os.pathsep):
            if (hook := Path(folder, "sitecustomize.py")).is_file():
                exec(hook.read_text(), {})
        _main(command[command.index("internlm") + 1 :])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        seconds = 1e9 if timeout is None else timeout
        until(lambda: self.poll() is not None, seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, seconds)
        return self.returncode


def start(*command: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start a command, whose two streams are one."""
    return subprocess.Popen(
        command, cwd=cwd, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str] | Fork, timeout_s: float = 200) -> tuple[int, str]:
    """Return exit code and output of a process, which is killed when it takes too long."""
    try:
        said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.poll() or 0, "".join(stream or "" for stream in said)


def until(condition: Callable[[], Any], seconds: float = 30.0) -> bool:
    """Wait until a condition holds, and return whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def wait_for(process: subprocess.Popen[str] | Fork, condition: Callable[[], Any], seconds: float = 100.0) -> None:
    """Wait until a condition holds that a process brings about; fail, with what that said, if it does not."""
    until(lambda: condition() or process.poll() is not None, seconds)
    if not condition():
        process.kill()
        raise AssertionError(finish(process))


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def places(world: int) -> list[dict[str, str]]:
    """Return the variables of each rank of a training on this machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def listened_to(port: int) -> bool:
    """Return whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def gone(pids: list[int], within_s: float = 20) -> bool:
    """Return whether processes have ended."""
    return until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), within_s)


class Serving:
    """A server in a process of its own.

    Args:
        words: of `internlm serve`, behind the port.
    """

    def __init__(self, *words: str, **variables: str) -> None:
        command = [*INTERNLM, "serve", *words, "--port", "0"]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**variables))
        self.said: list[str] = []
        """Its lines until it listened."""
        remarks: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_tell, args=(self.child.stderr, remarks), daemon=True).start()
        while not any(line.startswith("serving ") for line in self.said):
            self.said.append(remarks.get(timeout=170))
            assert self.said[-1], self.said
        self.url = next(word for word in self.said[-1].split() if word.startswith("http"))


def _tell(stream: Iterable[str], to: queue.Queue[str]) -> None:
    for line in itertools.chain(stream, [""]):
        to.put(line)


@contextlib.contextmanager
def serving(*words: str | Path, **options: str) -> Iterator[Serving]:
    """Serve a model inside the block."""
    process = Serving(*map(str, words), **options)
    try:
        yield process
    finally:
        process.child.kill()
        process.child.wait()
