"""`internlm launch --nproc N … train RECIPE [key=value …]`: one command that starts the ranks of a training."""

from __future__ import annotations

import argparse
import os
import platform
import shlex

from internlm.errors import UsageError

DESCRIPTION = """Start a training on several ranks: one process per GPU, or per share of the CPU's cores.

  internlm launch --nproc 8 train recipes/pretrain/internlm-7b.yaml
  internlm launch --nproc 2 --dry-run train RECIPE parallel.tensor=2

On several machines, the same command on each, with its own --node-rank; the master is any free port of the first:

  internlm launch --nproc 8 --nodes 2 --node-rank 0 --master node0:29500 train RECIPE
  internlm launch --nproc 8 --nodes 2 --node-rank 1 --master node0:29500 train RECIPE

These options stand before `train`; what follows it is `train`'s own. When a rank fails the others are stopped, and
the exit code is that of the one that failed. Ctrl-C and SIGTERM go to every rank."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on this machine; default: one per GPU")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="machines (1)")
    parser.add_argument("--node-rank", type=int, metavar="K", help="number of this machine, 0 to M - 1")
    parser.add_argument("--master", metavar="HOST:PORT", help="of machine 0, as all machines reach it")
    parser.add_argument("--dry-run", action="store_true", help="print the command and its environment; stop")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train RECIPE …", help="what every rank runs")


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks and wait for them; return the exit code of the one that failed.

    Raises:
        UsageError: the options, or those of `train`, are wrong.
        TrainingError: the machines did not find each other.
    """
    from internlm import ranks

    trained = _parse_train(arguments.command)
    count = arguments.nproc if arguments.nproc is not None else _gpus()
    words = [*options(arguments, count), "-m", "internlm", *arguments.command]
    environment = _environment(count, trained)
    if arguments.dry_run:
        print(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *_PYTHON, *words]))
        return 0
    os.environ.update(environment)
    return ranks.start(words)


_PYTHON = ("python", "-m", "torch.distributed.run")


def _parse_train(words: list[str]) -> argparse.Namespace:
    """Return what `train` will read, so that a mistake is said once and not by every rank."""
    from internlm import cli
    from internlm.cli import train

    if not words or words[0] != "train":
        raise UsageError(
            "only train runs on several ranks",
            got=" ".join(words) or None,
            do="Write: internlm launch … train RECIPE …",
        )
    parser = argparse.ArgumentParser(prog="internlm launch … train")
    train.add_arguments(parser)
    trained = cli.parse(parser, words[1:])
    if trained.dry_run:
        raise UsageError(
            "train --dry-run needs no ranks",
            do="Write: internlm train RECIPE … --dry-run; or --dry-run before train, to see what launch does.",
        )
    return trained


def _gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise UsageError("there is no GPU here to count", where="--nproc", do="Say how many ranks to start.")
    return count


def options(arguments: argparse.Namespace, count: int) -> list[str]:
    """Return the options of torch's launcher.

    Raises:
        UsageError: sizes are not positive, or an option of several machines is missing or wrong.
    """
    nodes, number, master = arguments.nodes, arguments.node_rank, arguments.master
    for name, value in (("--nproc", count), ("--nodes", nodes)):
        if value < 1:
            raise UsageError("must be at least 1", where=name, got=value)
    if nodes == 1 and master is None:
        # Its own store on a free port, by an address that needs no name service.
        if number not in (None, 0):
            raise UsageError("is for several machines: say how many with --nodes", where="--node-rank", got=number)
        return ["--nproc-per-node", str(count), "--standalone", "--local-addr", "127.0.0.1"]
    if number is None or not 0 <= number < nodes:
        raise UsageError(f"is the number of this machine, 0 to {nodes - 1}", where="--node-rank", got=number)
    host, _, port = (master or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError("is HOST:PORT of machine 0", where="--master", got=master)
    from internlm.ranks import JOIN_TIMEOUT_S

    sizes = ["--nproc-per-node", str(count), "--nnodes", str(nodes), "--node-rank", str(number)]
    place = ["--master-addr", host.strip("[]"), "--master-port", port]
    return [*sizes, *place, "--rdzv-conf", f"timeout={JOIN_TIMEOUT_S}"]


def _environment(count: int, trained: argparse.Namespace) -> dict[str, str]:
    """Return the variables that every rank gets and that are not set here: what the user set stays."""
    from internlm import runtime
    from internlm.cli.train import wants_allocator

    wanted = {"OMP_NUM_THREADS": str(max(1, runtime.available_cpus() // count))}
    tunes = os.environ.get("INTERNLM_ALLOCATOR") is None and platform.libc_ver()[0] == "glibc"
    if tunes and wants_allocator(trained):
        wanted["GLIBC_TUNABLES"] = runtime.ALLOCATOR_SETTINGS
    return {name: value for name, value in wanted.items() if name not in os.environ}
