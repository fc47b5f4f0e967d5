"""How a process learns of its ranks, and what the launcher makes of its options; no process is started."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from internlm import ranks, runtime
from internlm.cli import main
from internlm.errors import ConfigError
from internlm.train import launcher

RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart" / "pretrain.yaml")
STEP = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_NTASKS": "32",
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {n: v for n, v in os.environ.items() if not n.startswith((*NAMES, "SLURM_"))})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node7,login", "node7"),
        ("node[003-005,9]", "node003"),
        ("node[9,003-005],a1", "node9"),
        ("rack[2-3]-gpu[01-16].cluster,x", "rack2-gpu01.cluster"),
        ("a[1-2]b", "a1b"),
    ],
)
def test_the_first_host_of_a_node_list(hosts: str, first: str) -> None:
    assert ranks.first_host(hosts) == first


def test_a_task_of_slurm_gets_the_variables_of_torchrun() -> None:
    os.environ.update(STEP)
    ranks.adopt_slurm()
    found = {name: os.environ.get(name) for name in NAMES}
    assert found == {
        "RANK": "9", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": None,
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "13456",
    }  # fmt: skip


def test_torchrun_inside_a_slurm_step_stays_as_it_is() -> None:
    os.environ.update(STEP | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here"})
    ranks.adopt_slurm()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("3", "4", "here")


def test_a_batch_script_and_a_step_of_one_task_are_alone() -> None:
    os.environ.update({name: value for name, value in STEP.items() if "STEP" not in name})
    ranks.adopt_slurm()
    os.environ.update(STEP | {"SLURM_NTASKS": "1"})
    ranks.adopt_slurm()
    assert "RANK" not in os.environ
    with ranks.joined():
        assert (ranks.rank(), ranks.world_size()) == (0, 1)


def test_the_shell_of_an_interactive_step_is_one_task_of_a_job_of_many() -> None:
    os.environ.update(STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    ranks.adopt_slurm()
    assert "RANK" not in os.environ


def test_the_size_of_the_step_counts_and_not_that_of_the_job() -> None:
    os.environ.update(STEP | {"SLURM_STEP_NUM_TASKS": "16"})
    ranks.adopt_slurm()
    assert os.environ["WORLD_SIZE"] == "16"


@pytest.mark.parametrize(
    ("changes", "shared"),
    [({}, False), ({"TORCHELASTIC_RUN_ID": "none"}, True)],
    ids=["srun-shows-each-task-its-own", "launched-inside-a-task"],
)
def test_one_visible_gpu_belongs_to_a_task_and_not_to_several_ranks(
    changes: dict[str, str], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    os.environ.update(STEP | {"LOCAL_RANK": "1"} | changes)
    if shared:
        with pytest.raises(ConfigError, match="no GPU for local rank 1: this machine shows 1"):
            runtime.resolve_device(runtime.RuntimeConfig())
    else:
        assert runtime.resolve_device(runtime.RuntimeConfig()) == torch.device("cuda", 0)
        assert chosen == [0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "2"), ("RANK", "first"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("MASTER_PORT", "70000")],
)
def test_an_impossible_number_is_refused_by_name(name: str, value: str) -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    os.environ[name] = value
    with pytest.raises(ConfigError, match=rf"environment: {name}: is no such number \(got '{value}'\)"), ranks.joined():
        pass


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_anyone() -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    os.environ.update({ranks.PARENT: "1", "TORCHELASTIC_RUN_ID": "x"})
    program = "from internlm import ranks\nwith ranks.joined(): pass"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "process 1: the launcher ended before this rank had started" in done.stderr


def failures(*codes: int) -> dict[int, SimpleNamespace]:
    made = [SimpleNamespace(exitcode=code, pid=100 + n, timestamp=n) for n, code in enumerate(codes)]
    return dict(enumerate(made))


def test_failures_are_told_apart_and_the_first_cause_is_the_exit_code(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("ERROR", logger="internlm.train.launcher")
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    for codes, expected in (
        ((3, 1), 3),
        ((1, -9), 137),  # the one that was killed is why the other failed
        ((-15, 7), 7),  # the launcher stopped the first
        ((-15, -15), 143),  # somebody else did
        ((-40,), 168),
    ):
        assert launcher.report(failures(*codes)) == expected
    assert "rank 1 (process 101) was ended by SIGKILL" in caplog.text
    assert "rank 0 (process 100) was ended by signal 40" in caplog.text


def test_ranks_that_ended_on_purpose_are_no_failures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", logger="internlm.train.launcher")
    term, usr1, ctrl_c = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
    for codes, asked, expected in (
        ((75, 75), None, 75),  # a rank was asked, not the launcher
        ((130, 130), ctrl_c, 130),
        ((75, -15), term, 75),
        ((-10, -10), usr1, 75),  # before the first step: nothing is lost
        ((-10, -10), None, 138),
        ((1, 75), term, 1),
        ((-3, -3), signal.SIGQUIT, 131),
    ):
        caplog.clear()
        assert launcher.report(failures(*codes), asked) == expected, codes
        assert bool(caplog.text) == (expected not in (75, 130))
    assert launcher.report(failures(-9, 124), None, killed={100}) == 124  # the launcher killed the first itself
    assert launcher.report(failures(1, 130), ctrl_c, hurried=0.5) == 130  # the first lost the other
    assert launcher.report(failures(1, 130), ctrl_c, hurried=1.5) == 1  # it had failed before


def test_half_an_environment_is_refused() -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT not set"), ranks.joined():
        pass


def test_one_rank_is_a_process_alone() -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
    with ranks.joined():
        assert ranks.world_size() == 1


def test_ranks_that_differ_are_named_with_key_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    everyone = [{"optim.lr": 1e-3, "versions.torch": "2.13.0"} for _ in range(6)]
    everyone[4] = {"optim.lr": 1e-3, "versions.torch": "2.12.1"}
    everyone[5] = {"optim.lr": 2e-3, "versions.torch": "2.13.0", "seed": 7}

    def gather(own: str) -> list[str]:
        return ["a", "b"] if not own.startswith("{") else [json.dumps(one) for one in everyone]

    monkeypatch.setattr(ranks, "gather", gather)
    with pytest.raises(ConfigError) as error:
        ranks.agree({"optim": {"lr": 1e-3}, "versions": {"torch": "2.13.0"}})
    assert str(error.value).splitlines()[1:] == [
        "  optim.lr: 0.001 on ranks 0-4; 0.002 on rank 5",
        "  seed: nothing on ranks 0-4; 7 on rank 5",
        '  versions.torch: "2.13.0" on ranks 0-3, 5; "2.12.1" on rank 4',
    ]


def test_the_error_of_one_rank_is_an_error_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConfigError("its own")

    monkeypatch.setattr(ranks, "gather", lambda own: [own, "gone.yaml: no such recipe"])
    with pytest.raises(ConfigError, match=r"on rank 1: gone\.yaml: no such recipe"):
        ranks.together(lambda: 1)
    with pytest.raises(ConfigError, match="its own"):
        ranks.together(fail)
    monkeypatch.setattr(ranks, "gather", lambda own: [own, None])
    assert ranks.together(lambda: 1) == 1


def test_loopback_leads_to_no_other_machine() -> None:
    assert ranks.interface_towards("127.0.0.1") is None
    assert ranks.interface_towards("no such host") is None


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["launch", *words[:-1], "--dry-run", "train", RECIPE, words[-1]]) == 0
    return shlex.split(capsys.readouterr().out)


def test_dry_run_prints_command_and_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "available_cpus", lambda: 13)
    os.environ.pop("OMP_NUM_THREADS", None)
    words = shown(capsys, "--nproc", "4", "optim.lr=1e-3")
    assert words[0] == "OMP_NUM_THREADS=3"
    at = words.index("python")
    assert words[at : at + 5] == ["python", "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    assert words[-5:] == ["-m", "internlm", "train", RECIPE, "optim.lr=1e-3"]
    os.environ["OMP_NUM_THREADS"] = "5"  # what the user set stays
    assert not any(word.startswith("OMP_NUM_THREADS") for word in shown(capsys, "--nproc", "4", "optim.lr=1e-3"))


def test_the_allocator_is_set_for_all_ranks_unless_the_recipe_says_no(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.pop("INTERNLM_ALLOCATOR", None)
    setting = f"GLIBC_TUNABLES={runtime.ALLOCATOR_SETTINGS}"
    import platform

    expected = platform.libc_ver()[0] == "glibc"
    assert (setting in shown(capsys, "--nproc", "2", "optim.lr=1e-3")) == expected
    assert setting not in shown(capsys, "--nproc", "2", "runtime.allocator=false")


def test_several_machines_get_the_place_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    words = shown(
        capsys, "--nproc", "8", "--nodes", "2", "--node-rank", "1", "--master", "node0:29500", "optim.lr=1e-3"
    )
    for option, value in (
        ("--nnodes", "2"),
        ("--node-rank", "1"),
        ("--master-addr", "node0"),
        ("--master-port", "29500"),
    ):
        assert words[words.index(option) + 1] == value


@pytest.mark.parametrize(("nodes", "restarts"), [("2", "1"), ("1:2", "0")])
def test_machines_that_may_come_and_go_meet_in_another_way(
    nodes: str, restarts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nproc", "8", "--nodes", nodes, "--max-restarts", restarts, "--master", "127.0.0.1:29500"]
    words = [shown(capsys, *options, "--node-rank", number, "optim.lr=1e-3") for number in ("0", "1")]
    for number, one in enumerate(words):
        assert ("--max-restarts" in one) == (restarts != "0")
        assert "--node-rank" not in one  # torch warns: it numbers the machines itself
        for option, value in (
            ("--nnodes", nodes),
            ("--rdzv-backend", "c10d"),
            ("--rdzv-endpoint", "127.0.0.1:29500"),
            ("--rdzv-conf", f"is_host={1 - number},join_timeout=3600,last_call_timeout=30"),
            ("--local-addr", "127.0.0.1"),
        ):
            assert one[one.index(option) + 1] == value
    assert ranks.address_towards("no such host") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc", "0", "train", RECIPE], "--nproc: must be at least 1"),
        (["--nproc", "2", "--nodes", "0", "train", RECIPE], "--nodes: must be at least 1"),
        (["--nproc", "2", "--nodes=--1", "train", RECIPE], "--nodes: is a number of machines, or MIN:MAX"),
        (["--nproc", "2", "--nodes", "3:2", "train", RECIPE], "--nodes: is a number of machines, or MIN:MAX"),
        (["--nproc", "2", "--nodes", "1:2:3", "train", RECIPE], "--nodes: is a number of machines, or MIN:MAX"),
        (["--nproc", "2", "--nodes", "1:2", "train", RECIPE], "--node-rank: is the number of this machine, 0 to 1"),
        (["--nproc", "2", "--max-restarts", "-1", "train", RECIPE], "--max-restarts: must be at least 0"),
        (["--nproc", "2", "--patience", "0", "train", RECIPE], "--patience: must be above 0"),
        (["--nproc", "2", "--nodes", "2", "train", RECIPE], "--node-rank: is the number of this machine, 0 to 1"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "2", "train", RECIPE], "0 to 1 (got 2)"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0", "train", RECIPE], "--master: is HOST:PORT"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0", "--master", "a:b", "train", RECIPE], "--master"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0", "--master", "a:²", "train", RECIPE], "--master"),
        (["--nproc", "2", "--node-rank", "1", "train", RECIPE], "--node-rank: is for several machines"),
        (["--nproc", "2", "train", RECIPE, "--dry-run"], "train --dry-run needs no ranks"),
        (["--nproc", "2"], "only train runs on several ranks"),
        (["--nproc", "2", "chat", "x"], "only train runs on several ranks"),
    ],
)
def test_wrong_usage_is_said_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err
