"""`internlm launch … train …`."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex

from internlm.errors import UsageError

DESCRIPTION = """Start a training on several ranks: one process per GPU, or per share of the CPU's cores.

  internlm launch --nproc 8 train recipes/pretrain/internlm-7b.yaml
  internlm launch --nproc 2 --dry-run train RECIPE parallel.tensor=2

On several machines, the same command on each, with its own --node-rank; the master is any free port of the first:

  internlm launch --nproc 8 --nodes 2 --node-rank 0 --master node0:29500 train RECIPE
  internlm launch --nproc 8 --nodes 2 --node-rank 1 --master node0:29500 train RECIPE

These options stand before `train`; what follows it is `train`'s own. When a rank fails the others are stopped, and
the exit code is that of the one that failed; with --max-restarts all start again from the newest checkpoint. SIGTERM,
SIGUSR1 and Ctrl-C let every rank save and end (exit code 75, 75 and 130); the second signal ends them at once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on this machine; default: one per GPU")
    parser.add_argument("--nodes", default="1", metavar="M", help="machines (1), or MIN:MAX of them")
    parser.add_argument("--node-rank", type=int, metavar="K", help="number of this machine, 0 to M - 1")
    parser.add_argument("--master", metavar="HOST:PORT", help="of machine 0, as all machines reach it")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="times that all start again (0)")
    parser.add_argument(
        "--patience", type=float, default=600, metavar="S", help="seconds to save in, before a rank is killed (600)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and its environment; stop")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train RECIPE …", help="what every rank runs")


def option_names() -> list[str]:
    """Return the names of all options but --help."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return re.findall(r"--[a-z-]+", parser.format_usage())


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks and wait for them; return the exit code of the one that failed.

    Raises:
        UsageError: the options, or those of `train`, are wrong.
        TrainingError: the machines did not find each other.
    """
    trained = _parse_train(arguments.command)
    count = arguments.nproc if arguments.nproc is not None else _gpus()
    words = [*options(arguments, count), "-m", "internlm", *arguments.command]
    environment = _environment(count, trained, arguments)
    if arguments.dry_run:
        given = (f"{name}={value}" for name, value in environment.items())
        print(shlex.join([*given, "python", "-m", "torch.distributed.run", *words]))
        return 0
    os.environ.update(environment)
    from internlm.train import launcher

    return launcher.start(words, arguments.patience)


def _parse_train(words: list[str]) -> argparse.Namespace:
    """Return what `train` will read: a mistake is said once and not by every rank."""
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
    trained = cli.parse(parser, words[1:], train.advise)
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
    """Return the options of torch's launcher; raise UsageError where ours are wrong."""
    number, master, restarts = arguments.node_rank, arguments.master, arguments.max_restarts
    least, nodes = _nodes(arguments.nodes)
    for name, value, lowest in (("--nproc", count, 1), ("--nodes", least, 1), ("--max-restarts", restarts, 0)):
        if value < lowest:
            raise UsageError(f"must be at least {lowest}", where=name, got=value)
    if not arguments.patience > 0:
        raise UsageError("must be above 0", where="--patience", got=arguments.patience)
    sizes = ["--nproc-per-node", str(count), *(["--max-restarts", str(restarts)] if restarts else [])]
    if nodes == 1 and master is None:
        # Its own store on a free port, by an address that needs no name service.
        if number not in (None, 0):
            raise UsageError("is for several machines: say how many with --nodes", where="--node-rank", got=number)
        return [*sizes, "--standalone", "--local-addr", "127.0.0.1"]
    if number is None or not 0 <= number < nodes:
        raise UsageError(f"is the number of this machine, 0 to {nodes - 1}", where="--node-rank", got=number)
    host, _, port = (master or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError("is HOST:PORT of machine 0", where="--master", got=master)
    from internlm import ranks

    sizes += ["--nnodes", arguments.nodes]
    wait = ranks.JOIN_TIMEOUT_S
    if not restarts and least == nodes:
        place = ["--node-rank", str(number), "--master-addr", host.strip("[]"), "--master-port", port]
        return [*sizes, *place, "--rdzv-conf", f"timeout={wait}"]
    # Torch's other way keeps the addresses of ranks that are gone. This one numbers the machines itself, and any may be
    # the one whose address the ranks are given.
    own = host.strip("[]") if number == 0 else ranks.address_towards(host.strip("[]"))
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", "internlm"]
    conf = f"is_host={int(number == 0)},join_timeout={wait},last_call_timeout={_LAST_CALL_S}"
    return [*sizes, *place, "--rdzv-conf", conf, *(["--local-addr", own] if own else [])]


_LAST_CALL_S = 30
"""How long MIN machines wait for others before they begin without."""


def _nodes(text: str) -> tuple[int, int]:
    """Return the least and the most machines of `M` or `MIN:MAX`."""
    parts = text.split(":")
    if len(parts) > 2 or not all(re.fullmatch(r"-?\d+", part) for part in parts) or int(parts[0]) > int(parts[-1]):
        raise UsageError("is a number of machines, or MIN:MAX", where="--nodes", got=text)
    return int(parts[0]), int(parts[-1])


def _environment(count: int, trained: argparse.Namespace, arguments: argparse.Namespace) -> dict[str, str]:
    """Return the variables that every rank gets and that are not set: what the user set stays."""
    from internlm import runtime
    from internlm.cli.train import wants_allocator

    wanted = {"OMP_NUM_THREADS": str(max(1, runtime.available_cpus() // count))}
    if arguments.max_restarts or ":" in arguments.nodes:
        # Else ranks that start again meet in the store of those before, and wait for these for ever (torch 2.13)
        wanted["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    tunes = os.environ.get("INTERNLM_ALLOCATOR") is None and platform.libc_ver()[0] == "glibc"
    if tunes and wants_allocator(trained):
        wanted["GLIBC_TUNABLES"] = runtime.ALLOCATOR_SETTINGS
    return {name: value for name, value in wanted.items() if name not in os.environ}
