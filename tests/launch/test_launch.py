"""Ranks started by `internlm launch` and torchrun: they give one process's loss, and they end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import run

from internlm.checkpoint import listing
from tests.launch.conftest import LAUNCH, STEPS, losses
from tests.processes import INTERNLM, Fork, children, finish, free_port, gone, listened_to, start, wait_for

TORCHRUN = [run.__file__, "--standalone", "--nproc-per-node", "2", "-m", "internlm"]
LONG = ["train.tokens=1e9", "checkpoint.every_steps=5"]


def ranks_of(process: subprocess.Popen[str] | Fork, path: Path) -> list[int]:
    """Return the ranks of a launcher when there is a checkpoint."""
    wait_for(process, lambda: listing.newest(path.parent / "run" / "checkpoints"))
    ranks = children(process.pid)
    assert len(ranks) == 2
    return ranks


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "launcher", ["internlm-launch", "torchrun", pytest.param("torchrun-from-nothing", marks=pytest.mark.proof)]
)
def test_two_ranks_give_the_loss_of_one_process(launcher: str, path: Path, alone: list[float]) -> None:
    """With `internlm launch` whatever options of torchrun are in the environment."""
    folder = path.parent / "two"
    words = ["train", str(path), f"run={folder}"]
    if launcher == "torchrun":
        code, output = finish(Fork(*TORCHRUN, *words))
    elif launcher == "torchrun-from-nothing":
        code, output = finish(start(sys.executable, *TORCHRUN, *words))
    else:
        code, output = finish(Fork(*LAUNCH, *words, PET_NNODES="2", PET_MAX_RESTARTS="3"))
    assert code == 0, output
    assert ("PET_MAX_RESTARTS, PET_NNODES have no effect" in output) == (launcher == "internlm-launch")
    assert "2 ranks: shard 2" in output
    assert output.count("step 1/2 ") == 1  # rank 0 alone speaks, and as if it were alone
    assert any(line.startswith("step 1/2 ") for line in output.splitlines())
    assert len(alone) == STEPS
    assert losses(folder) == pytest.approx(alone, rel=1e-5)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Return two network namespaces that see each other as 10.83.0.1 and 10.83.0.2."""
    names = [f"internlm-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"il{os.getpid() % 100000}x{number}" for number in range(2)]
    made = f"""set -e
ip link add {ends[0]} type veth peer name {ends[1]}
for i in 0 1; do name=internlm-{os.getpid()}-$i end=il{os.getpid() % 100000}x$i
ip netns add $name; ip link set $end netns $name; ip -n $name addr add 10.83.0.$((i + 1))/24 dev $end
ip -n $name link set $end up; ip -n $name link set lo up; done"""
    done = subprocess.run(["sh", "-c", made], capture_output=True, text=True)
    try:
        if done.returncode:
            pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", ends[0]], capture_output=True)


@pytest.mark.proof
@pytest.mark.timeout(240)
@pytest.mark.skipif(not Path("/proc/self/ns/net").exists(), reason="needs Linux")
def test_two_nodes_find_each_other_and_train(nodes: list[str], path: Path, alone: list[float]) -> None:
    folder = path.parent / "nodes"
    processes = []
    for number, name in enumerate(nodes):
        options = ["--nproc", "1", "--nodes", "2", "--node-rank", str(number), "--master", "10.83.0.1:29500"]
        words = [*INTERNLM, "launch", *options, "train", str(path), f"run={folder}"]
        processes.append(start("ip", "netns", "exec", name, *words))
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
    assert losses(folder) == pytest.approx(alone, rel=1e-5)


@pytest.mark.timeout(240)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("whom", "how", "code"),
    [
        ("rank", signal.SIGKILL, 137),
        ("launcher", signal.SIGINT, 130),
        pytest.param("launcher", signal.SIGTERM, 75, marks=pytest.mark.proof),
        pytest.param("launcher", signal.SIGKILL, -9, marks=pytest.mark.proof),
    ],
    ids=["rank-killed", "interrupted", "terminated", "launcher-killed"],
)
def test_when_one_ends_all_end_within_seconds(whom: str, how: signal.Signals, code: int, path: Path) -> None:
    process = Fork(*LAUNCH, "train", str(path), *LONG)
    ranks = ranks_of(process, path)
    try:
        os.kill(ranks[1] if whom == "rank" else process.pid, how)
        found, output = finish(process, timeout_s=30)
    finally:
        process.kill()  # its ranks end with it
    assert gone(ranks), "a rank was left behind"
    assert found == code, output
    assert "Traceback" not in output
    if whom == "rank":
        assert f"rank 1 (process {ranks[1]}) was ended by SIGKILL" in output
    if how == signal.SIGINT:
        assert "the same command goes on from" in output


@pytest.mark.timeout(240)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_second_ctrl_c_leaves_nobody_behind(path: Path) -> None:
    process = Fork(*LAUNCH, "train", str(path), *LONG)
    ranks = ranks_of(process, path)
    try:
        for _ in range(2):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.1)
        code, output = finish(process, timeout_s=30)
    finally:
        process.kill()
    assert gone(ranks), "a rank was left behind"
    assert code in (130, -signal.SIGINT), output  # the second may meet a process that is about to exit
    assert "Traceback" not in output


@pytest.mark.timeout(240)
@pytest.mark.parametrize("who", ["rank", "launcher"])
def test_who_waits_for_others_that_do_not_come_can_be_interrupted(who: str, path: Path) -> None:
    port = free_port()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = ["--nproc", "1", "--nodes", "2", "--node-rank", "0", "--master", f"127.0.0.1:{port}"]
    if who == "rank":
        process = start(*INTERNLM, "train", str(path), **place)
    else:
        process = start(*INTERNLM, "launch", *options, "train", str(path))
    try:
        wait_for(process, lambda: listened_to(port))
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        code, output = finish(process, timeout_s=30)  # it would wait an hour
    finally:
        process.kill()
    assert code in (-signal.SIGINT, 130), output
    assert "Traceback" not in output


@pytest.mark.timeout(240)
def test_a_port_in_use_is_said_with_what_to_do(path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        master = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--nproc", "1", "--nodes", "2", "--node-rank", "0", "--master", master]
        code, output = finish(Fork("launch", *options, "train", str(path)))
    assert code == 1, output
    assert "the nodes did not find each other" in output
    assert "a port that is free on machine 0" in output
    assert "Traceback" not in output


@pytest.mark.timeout(240)
def test_ranks_with_different_recipes_are_refused_on_every_rank(path: Path) -> None:
    master = f"127.0.0.1:{free_port()}"
    processes = []
    for number, rate in enumerate(("1e-3", "2e-3")):
        options = ["--nproc", "1", "--nodes", "2", "--node-rank", str(number), "--master", master]
        processes.append(Fork("launch", *options, "train", str(path), f"optim.lr={rate}"))
    for process in processes:
        code, output = finish(process)
        assert code == 1, output
        assert "the ranks differ" in output
        assert "optim.lr: 0.001 on rank 0; 0.002 on rank 1" in output
        assert "Traceback" not in output
    assert not (path.parent / "run").exists()


@pytest.mark.timeout(240)
def test_sizes_that_do_not_fit_say_the_numbers(path: Path) -> None:
    code, output = finish(Fork(*LAUNCH, "train", str(path), "parallel.tensor=3"))
    assert code == 1, output
    assert "tensor 3 needs a multiple of 3 ranks, and this run has 2 ranks" in output
    assert "ended with exit code 1" in output
    assert "Traceback" not in output
    assert not (path.parent / "run").exists()
