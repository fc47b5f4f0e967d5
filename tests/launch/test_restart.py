"""Ranks that fail and start again by themselves, and machines that come and go."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from internlm.checkpoint import store
from internlm.weights.weight import tensors
from tests.launch.conftest import losses, slow, wait_for_step
from tests.processes import INTERNLM, Fork, children, finish, free_port, gone, places, start

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]
STEPS = 12
LONG = [f"train.tokens={STEPS * 256}", "checkpoint.every_steps=2", "train.trace_every_steps=null"]


def launched(path: Path, name: str, *options: str) -> list[str]:
    """Return the command of a run of twelve steps in a folder of its own."""
    return ["launch", *options, "train", str(path), f"run={path.parent / name}", *LONG]


def train_straight(path: Path) -> None:
    """Train without a launcher, and without trouble."""
    ranks = [Fork("train", str(path), f"run={path.parent / 'straight'}", *LONG, **place) for place in places(2)]
    for rank in ranks:
        code, output = finish(rank)
        assert code == 0, output


def assert_same(path: Path, name: str, other: str) -> None:
    """Check that two runs have the same losses and end at the same weights, bitwise."""
    assert losses(path.parent / name) == losses(path.parent / other)
    assert len(losses(path.parent / name)) == STEPS
    wanted = dict(tensors(store.open_checkpoint(path.parent / other).weights("")))
    for key, tensor in tensors(store.open_checkpoint(path.parent / name).weights("")):
        assert torch.equal(tensor, wanted[key]), key


def test_a_killed_rank_starts_again_with_the_others_and_nothing_is_lost(path: Path) -> None:
    train_straight(path)
    words = launched(path, "killed", "--nproc", "2", "--max-restarts", "2")
    process = Fork(*words, **slow(path.parent, 0.2))
    try:
        wait_for_step(path.parent / "killed", 4, process)
        first = children(process.pid)
        os.kill(first[1], signal.SIGKILL)
        code, output = finish(process, 300)
    finally:
        process.kill()
    assert code == 0, output
    assert gone(first)
    assert output.count("all ranks start again (1 of 2 times)") == 1
    assert "was ended by SIGKILL" in output
    assert "Traceback" not in output
    assert output.count("resuming ") == 1
    assert_same(path, "killed", "straight")


@pytest.mark.proof
def test_a_rank_that_fails_each_time_ends_the_run(path: Path) -> None:
    options = ["--nproc", "2", "--max-restarts", "1"]
    code, output = finish(Fork("launch", *options, "train", str(path), "data.train.a.path=nowhere"))
    assert code == 1, output
    assert output.count("nowhere: no such folder") == 4
    assert output.count("start again") == 1


def machines(path: Path, name: str, nodes: str, restarts: int) -> list[list[str]]:
    """Return the commands of two machines, of one rank each."""
    port = free_port()
    options = ["--nproc", "1", "--nodes", nodes, "--master", f"127.0.0.1:{port}", "--max-restarts", str(restarts)]
    return [launched(path, name, *options, "--node-rank", str(number)) for number in range(2)]


@pytest.mark.proof
@pytest.mark.parametrize("nodes", ["2", "1:2"])
def test_two_machines_start_again_together(nodes: str, path: Path) -> None:
    train_straight(path)
    processes = [Fork(*words, **slow(path.parent, 0.5)) for words in machines(path, "two", nodes, 2)]
    try:
        wait_for_step(path.parent / "two", 4, processes[0])
        (victim,) = children(processes[1].pid)
        os.kill(victim, signal.SIGKILL)
        ends = [finish(process, 300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for code, output in ends:
        assert code == 0, "\n-----\n".join(output for _, output in ends)
    assert_same(path, "two", "straight")


@pytest.mark.proof
def test_a_machine_that_is_lost_is_done_without(path: Path) -> None:
    """The layout follows: `parallel.shard` is left at 0, whatever ranks there are.

    The rank of the launcher that is killed hears of it; it must not ask all others to end, as a preemption does.
    """
    train_straight(path)
    commands = machines(path, "fewer", "1:2", 3)
    first, second = [start(*INTERNLM, *words, **slow(path.parent, 0.5)) for words in commands]
    try:
        wait_for_step(path.parent / "fewer", 4, first)
        second.kill()
        code, output = finish(first, 300)
    finally:
        first.kill()
        second.kill()
    assert code == 0, output
    assert "all ranks start again" in output
    assert losses(path.parent / "fewer") == pytest.approx(losses(path.parent / "straight"), rel=1e-5)


@pytest.mark.proof
def test_a_machine_that_comes_later_is_taken_in(path: Path) -> None:
    words = machines(path, "more", "1:2", 1)
    hook = slow(path.parent, 1.5)
    first = Fork(*words[0], **hook)
    second = None
    try:
        wait_for_step(path.parent / "more", 2, first)
        second = Fork(*words[1], **hook)
        ends = [finish(process, 300) for process in (first, second)]
    finally:
        first.kill()
        if second is not None:
            second.kill()
    assert [code for code, _ in ends] == [0, 0], "\n-----\n".join(output for _, output in ends)
    assert "2 ranks: shard 2" in ends[0][1] + ends[1][1]
