"""The files of deploy/: a batch script that Slurm runs, a manifest with what its operator asks for, an image."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from internlm.cli import launch
from internlm.recipe import load
from internlm.train import launcher
from internlm.train.stop import EXIT_CODES, Reason
from tests.launch.conftest import ROOT, losses
from tests.processes import free_port, until

SBATCH = ROOT / "deploy" / "slurm" / "train.sbatch"
MANIFEST = ROOT / "deploy" / "kubernetes" / "pytorchjob.yaml"
DOCKERFILE = ROOT / "deploy" / "train.Dockerfile"


def directives() -> dict[str, str | None]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SBATCH.read_text(), re.MULTILINE)
    assert len(lines) == SBATCH.read_text().count("\n#SBATCH"), "a directive of another form"
    return {name: value or None for name, value in lines}


def test_the_batch_script_is_bash_with_known_directives() -> None:
    assert subprocess.run(["bash", "-n", SBATCH], capture_output=True).returncode == 0
    found = directives()
    assert found["ntasks-per-node"] == found["gpus-per-node"]  # a rank per GPU
    assert int(found["nodes"] or 0) >= 1
    assert re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", found["time"] or "")
    assert {"requeue", "open-mode", "cpus-per-task"} <= found.keys()
    text = SBATCH.read_text()
    first_command = re.search(r"^[^#\n].*$", text, re.MULTILINE)
    assert first_command is not None
    assert text.rindex("#SBATCH") < first_command.start()  # sbatch reads no directive after it
    assert "--kill-on-bad-exit=1" in text


def test_the_batch_script_without_a_recipe_says_so() -> None:
    done = subprocess.run(["bash", SBATCH], capture_output=True, text=True)
    assert done.returncode != 0
    assert "RECIPE" in done.stderr


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (138, True), (143, False)])
def test_the_batch_script_goes_back_into_the_queue_after_a_preemption_only(
    code: int, requeued: bool, tmp_path: Path
) -> None:
    """75 is how a training ends that was asked to by a signal and has saved."""
    assert re.fullmatch(r"USR1@\d{2,}", directives()["signal"] or "")
    assert EXIT_CODES[Reason.PREEMPTED] == 75
    for name, body in (("srun", f'echo "$@"; exit {code}'), ("scontrol", f'echo "$@" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    done = subprocess.run(["bash", SBATCH, "r.yaml", "run=x y"], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.endswith("internlm train r.yaml run=x y\n")
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 42\n"


def said(words: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the environment of a Slurm of this machine alone, which ends with the test."""
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None or os.geteuid() != 0:
        pytest.skip("needs Slurm's daemons (apt install slurm-wlm) and root")
    ports = [free_port() for _ in range(2)]
    host, conf = socket.gethostname().partition(".")[0], tmp_path / "slurm.conf"
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    conf.write_text(f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
""")
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    daemons = [
        subprocess.Popen([name, "-D", "-f", str(conf)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        if not until(lambda: "idle" in said(["sinfo", "-h"], environment), 20):
            pytest.skip("Slurm does not come up here")
        yield environment
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.mark.timeout(150)
def test_slurm_runs_the_batch_script(slurm: dict[str, str], path: Path, alone: list[float]) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    sizes = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
    folder, log = path.parent / "slurm", path.parent / "job.log"
    words = ["sbatch", "--parsable", *sizes, "--output", str(log), str(SBATCH), str(path), f"run={folder}"]
    job = subprocess.run(words, env=slurm, cwd=path.parent, capture_output=True, text=True, check=True).stdout.strip()

    def state() -> str:
        return said(["scontrol", "show", "job", job], slurm).partition("JobState=")[2].split()[0]

    # `sbatch --wait` looks every few seconds only.
    assert until(lambda: state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 120)
    assert state() == "COMPLETED", log.read_text() if log.exists() else "it said nothing"
    assert "2 ranks: shard 2" in log.read_text()
    assert losses(folder) == pytest.approx(alone, rel=1e-5)


# What the operator and Kubernetes ask of a PyTorchJob, as far as this manifest uses it. A dict: these keys and, but
# for the optional ones (?), all of them; a list of one: any number of such; a string: a pattern; a type: of that type.
NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
QUANTITY = r"\d+(m|Ki|Mi|Gi|Ti)?"
RESOURCES = {"cpu?": QUANTITY, "memory?": QUANTITY, "nvidia.com/gpu?": int}
CONTAINER = {
    "name": "pytorch",
    "image": r"\S+:\S+",
    "command": [str],
    "workingDir?": r"/.*",
    "args": [str],
    "env?": [{"name": r"[A-Z][A-Z0-9_]*", "value": str}],
    "ports": [{"name": "pytorchjob-port", "containerPort": int}],
    "resources": {"requests?": RESOURCES, "limits": RESOURCES},
    "volumeMounts?": [{"name": NAME, "mountPath": r"/.*"}],
}
VOLUME = {
    "name": NAME,
    "persistentVolumeClaim?": {"claimName": NAME},
    "emptyDir?": {"medium": "Memory", "sizeLimit": QUANTITY},
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": "Always|OnFailure|Never|ExitCode",
    "template": {"spec": {"terminationGracePeriodSeconds": int, "containers": [CONTAINER], "volumes?": [VOLUME]}},
}
JOB = {
    "apiVersion": r"kubeflow\.org/v1",
    "kind": "PyTorchJob",
    "metadata": {"name": NAME, "namespace?": NAME},
    "spec": {
        "runPolicy?": {"cleanPodPolicy?": "All|Running|None", "backoffLimit?": int},
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker?": REPLICAS},
    },
}


def misfits(value: Any, schema: Any, place: str = "job") -> list[str]:
    """Return where a value does not fit a schema."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        known = {key.removesuffix("?"): inner for key, inner in schema.items()}
        found = [f"{place}.{key} is unknown" for key in value if key not in known]
        found += [f"{place}.{key} is missing" for key in schema if not key.endswith("?") and key not in value]
        pairs = [(key, known[key]) for key in value if key in known]
        return found + [text for key, inner in pairs for text in misfits(value[key], inner, f"{place}.{key}")]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{place} is no list with something in it"]
        return [text for i, item in enumerate(value) for text in misfits(item, schema[0], f"{place}[{i}]")]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{place} is {value!r}, not of type {schema.__name__}"]
    return [] if isinstance(value, str) and re.fullmatch(schema, value) else [f"{place} is {value!r}, not {schema}"]


def manifest() -> dict[str, Any]:
    return yaml.safe_load(MANIFEST.read_text())


def test_the_manifest_has_what_the_operator_asks_for() -> None:
    job = manifest()
    assert misfits(job, JOB) == []
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for one in replicas.values():
        spec = one["template"]["spec"]
        assert len(spec["containers"]) == 1
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}


def test_the_check_of_the_manifest_finds_faults() -> None:
    job = manifest()
    job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["name"] = "trainer"
    job["spec"]["replicas"] = 2
    del job["metadata"]["name"]
    assert sorted(text.split(" is ")[0] for text in misfits(job, JOB)) == [
        "job.metadata.name",
        "job.spec.pytorchReplicaSpecs.Master.template.spec.containers[0].name",
        "job.spec.pytorchReplicaSpecs.Worker.template.spec.containers[0].name",  # an alias in the file
        "job.spec.replicas",
    ]


def test_the_manifest_starts_as_many_ranks_as_it_has_gpus() -> None:
    replicas = manifest()["spec"]["pytorchReplicaSpecs"]
    container = replicas["Master"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["internlm", "launch"]
    values = {"RANK": "1", "MASTER_ADDR": "internlm-master-0", "MASTER_PORT": "23456"}
    words = [re.sub(r"\$\((\w+)\)", lambda match: values[match.group(1)], word) for word in container["args"]]
    import argparse

    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    arguments = parser.parse_args(words)
    assert arguments.nproc == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(arguments.nodes) == sum(one["replicas"] for one in replicas.values())
    assert "--master-addr" in launch.options(arguments, arguments.nproc)
    assert arguments.command[0] == "train"
    copied = Path(arguments.command[1]).relative_to("/opt/internlm")  # where the image has the recipes
    assert load(ROOT / copied).value.run
    for one in replicas.values():  # else Kubernetes kills the ranks that the launcher still lets save
        patience = arguments.patience + launcher.CRASH_PATIENCE_S
        assert one["template"]["spec"]["terminationGracePeriodSeconds"] >= patience


def test_the_image_is_built_from_files_that_exist() -> None:
    text = DOCKERFILE.read_text()
    base = re.search(r"^FROM python:3\.(\d+)-slim$", text, re.MULTILINE)
    assert base is not None
    assert int(base.group(1)) >= 11
    assert "WORKDIR /opt/internlm" in text
    copies = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    assert copies
    for source in " ".join(copies).split():
        assert (ROOT / source).exists(), source
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    assert extras is not None
    for extra in extras.group(1).split(","):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
