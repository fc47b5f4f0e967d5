"""How a process learns of its ranks, and what the launcher makes of its options; no process is started."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from internlm import runtime
from internlm.cli import main
from internlm.errors import ConfigError

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
    assert runtime.first_host(hosts) == first


def test_a_task_of_slurm_gets_the_variables_of_torchrun() -> None:
    os.environ.update(STEP)
    runtime.adopt_slurm()
    found = {name: os.environ.get(name) for name in NAMES}
    assert found == {
        "RANK": "9", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": None,
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "13456",
    }  # fmt: skip


def test_torchrun_inside_a_slurm_step_stays_as_it_is() -> None:
    os.environ.update(STEP | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here"})
    runtime.adopt_slurm()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("3", "4", "here")


def test_a_batch_script_and_a_step_of_one_task_are_alone() -> None:
    os.environ.update({name: value for name, value in STEP.items() if "STEP" not in name})
    runtime.adopt_slurm()
    os.environ.update(STEP | {"SLURM_NTASKS": "1"})
    runtime.adopt_slurm()
    assert "RANK" not in os.environ
    with runtime.joined():
        assert (runtime.rank(), runtime.world_size()) == (0, 1)


def test_half_an_environment_is_refused() -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT not set"), runtime.joined():
        pass


def test_one_rank_is_a_process_alone() -> None:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
    with runtime.joined():
        assert runtime.world_size() == 1


def test_ranks_that_differ_are_named_with_key_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    everyone = [{"optim.lr": 1e-3, "versions.torch": "2.13.0"} for _ in range(6)]
    everyone[4] = {"optim.lr": 1e-3, "versions.torch": "2.12.1"}
    everyone[5] = {"optim.lr": 2e-3, "versions.torch": "2.13.0", "seed": 7}

    def gather(own: str) -> list[str]:
        return ["a", "b"] if not own.startswith("{") else [json.dumps(one) for one in everyone]

    monkeypatch.setattr(runtime, "gather", gather)
    with pytest.raises(ConfigError) as error:
        runtime.agree({"optim": {"lr": 1e-3}, "versions": {"torch": "2.13.0"}})
    assert str(error.value).splitlines()[1:] == [
        "  optim.lr: 0.001 on ranks 0-4; 0.002 on rank 5",
        "  seed: nothing on ranks 0-4; 7 on rank 5",
        '  versions.torch: "2.13.0" on ranks 0-3, 5; "2.12.1" on rank 4',
    ]


def test_the_error_of_one_rank_is_an_error_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConfigError("its own")

    monkeypatch.setattr(runtime, "gather", lambda own: [own, "gone.yaml: no such recipe"])
    with pytest.raises(ConfigError, match=r"on rank 1: gone\.yaml: no such recipe"):
        runtime.together(lambda: 1)
    with pytest.raises(ConfigError, match="its own"):
        runtime.together(fail)
    monkeypatch.setattr(runtime, "gather", lambda own: [own, None])
    assert runtime.together(lambda: 1) == 1


def test_loopback_leads_to_no_other_machine() -> None:
    assert runtime.interface_towards("127.0.0.1") is None
    assert runtime.interface_towards("no such host") is None


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc", "0", "train", RECIPE], "--nproc: must be at least 1"),
        (["--nproc", "2", "--nodes", "0", "train", RECIPE], "--nodes: must be at least 1"),
        (["--nproc", "2", "--nodes", "2", "train", RECIPE], "--node-rank: is the number of this machine, 0 to 1"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "2", "train", RECIPE], "0 to 1 (got 2)"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0", "train", RECIPE], "--master: is HOST:PORT"),
        (["--nproc", "2", "--nodes", "2", "--node-rank", "0", "--master", "a:b", "train", RECIPE], "--master"),
        (["--nproc", "2"], "only train runs on several ranks"),
        (["--nproc", "2", "chat", "x"], "only train runs on several ranks"),
    ],
)
def test_wrong_usage_is_said_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err
