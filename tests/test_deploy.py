"""The files that put the server into service: every source exists, every option is one of `internlm serve`."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from internlm.cli import KEY_VARIABLE, serve
from internlm.errors import UsageError

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "deploy" / "serve.Dockerfile"
DOCKERFILES = sorted((ROOT / "deploy").rglob("*Dockerfile"))
COMPOSE = ROOT / "deploy" / "compose.yaml"
UNIT = ROOT / "deploy" / "internlm.service"
EXAMPLE = ROOT / "deploy" / "serve.env.example"


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield (instruction, rest) of a Dockerfile, with lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, rest = line.split(maxsplit=1)
            yield name, rest.strip()


def server_file() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, rest in instructions(SERVER.read_text(encoding="utf-8")):
        found.setdefault(name, []).append(rest)
    return found


def options(words: list[str]) -> argparse.Namespace:
    """Return the arguments of `internlm serve`; SystemExit where one is not known."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words)


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return parser


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_every_file_that_an_image_copies_is_there(file: Path) -> None:
    copied = [rest.split()[:-1] for name, rest in instructions(file.read_text(encoding="utf-8")) if name == "COPY"]
    assert copied
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_is_sent_what_it_copies_and_nothing_else(file: Path) -> None:
    """BuildKit reads the rules of a Dockerfile from the file beside it with this ending."""
    lines = Path(f"{file}.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [rest for name, rest in instructions(file.read_text(encoding="utf-8")) if name == "COPY"]
    assert kept == {source for rest in copied for source in rest.split()[:-1]}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_has_what_triton_needs_on_a_gpu(file: Path) -> None:
    """A C compiler with its library, which gcc alone does not depend on, and a place that its user can write to."""
    text = file.read_text(encoding="utf-8")
    installed = re.search(r"--no-install-recommends ([^&]+)&&", text)
    assert installed is not None
    packages = set(installed.group(1).split())
    assert "gcc" in packages
    assert packages & {"libc6-dev", "g++"}
    if "\nUSER " in text:
        assert "TRITON_CACHE_DIR=/tmp/" in text
    assert re.search("docker run (--rm )?--gpus all", text)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_installs_what_was_tested(file: Path) -> None:
    runs = [rest for name, rest in instructions(file.read_text(encoding="utf-8")) if name == "RUN"]
    installs = [run for run in runs if "pip install" in run]
    assert installs
    assert all("-c constraints.txt" in run for run in installs)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in ",".join(re.findall(r"\.\[([^]]+)\]", " ".join(installs))).split(","):
        assert extra in project["optional-dependencies"], "pip only warns of an extra that is not there"


def test_the_server_image_runs_a_server_that_others_reach_as_a_user_without_rights() -> None:
    found = server_file()
    assert json.loads(found["ENTRYPOINT"][0]) == ["internlm", "serve"]
    chosen = options(json.loads(found["CMD"][0]))
    assert (chosen.model, chosen.host, str(chosen.port)) == (["/model"], "0.0.0.0", found["EXPOSE"][0])
    number = found["USER"][-1].split(":")[0]
    assert number.isdigit()
    assert int(number) > 0
    assert any(f"--uid {number}" in run for run in found["RUN"])


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_fails_where_the_server_says_that_it_is_not_well(status: int) -> None:
    rest = server_file()["HEALTHCHECK"][0]
    command = json.loads(rest[rest.index("CMD ") + 4 :])

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = [word.replace(":8000", f":{server.server_port}") for word in command]
        assert there != command
        there[0] = sys.executable
        done = subprocess.run(there, capture_output=True)
        server.shutdown()
    assert (done.returncode == 0) == (status == 200)


def test_the_health_check_asks_a_path_that_the_server_has_and_that_needs_no_key() -> None:
    source = (ROOT / "internlm" / "serve" / "api" / "app.py").read_text(encoding="utf-8")
    assert '.get("/health")' in source
    assert re.search(r'open_paths = \{[^}]*"/health"', source)


def test_compose_starts_the_image_with_a_key_and_a_model_that_cannot_be_written() -> None:
    service = compose()["services"]["server"]
    known = {
        "build", "image", "command", "env_file", "volumes", "ports", "read_only", "tmpfs", "cap_drop", "security_opt",
        "stop_grace_period", "restart",
    }  # fmt: skip
    assert set(service) <= known, "keys of the Compose specification that were looked up"
    assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).resolve() in DOCKERFILES
    chosen = options(service["command"])
    assert chosen.host == "0.0.0.0"
    mount = service["volumes"][0]
    assert (mount["target"], mount["read_only"]) == (chosen.model[0], True)
    assert service["ports"][0].endswith(f":{chosen.port}")
    assert service["ports"][0].startswith("${BIND:-127.0.0.1}:")
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert float(service["stop_grace_period"].removesuffix("s")) > chosen.drain_seconds


def test_the_example_of_the_env_file_names_the_variable_that_the_server_reads() -> None:
    assert compose()["services"]["server"]["env_file"] + ".example" == EXAMPLE.name
    names = [line.split("=")[0] for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    assert names == [KEY_VARIABLE]


def test_the_unit_starts_the_server_with_options_that_it_has_and_waits_for_its_end() -> None:
    service = unit()["Service"]
    line = service["ExecStart"].replace("%d", "/run/credentials/internlm.service")
    for setting in service["Environment"].split():
        name, value = setting.split("=")
        line = line.replace("${" + name + "}", value)
    words = shlex.split(line)
    assert "$" not in line
    assert words[1] == "serve"
    chosen = options(words[2:])
    assert (chosen.host, chosen.port) == ("127.0.0.1", 8000)
    assert chosen.api_key_file.name == service["LoadCredential"].split(":")[0]
    assert float(service["TimeoutStopSec"]) > chosen.drain_seconds
    assert int(service["RestartPreventExitStatus"]) == UsageError.exit_code


def test_the_unit_says_how_to_install_what_was_tested() -> None:
    """From a checkout: what PyPI may have under this name is not this."""
    installs = [line for line in UNIT.read_text(encoding="utf-8").splitlines() if "pip install" in line]
    assert len(installs) == 1
    assert installs[0].endswith("pip install -c constraints.txt '.[serve]'")


def test_the_unit_passes_systemd_and_is_shut_in(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True).stdout.split()[1]
    if int(version) < 250:
        pytest.skip("the unit needs systemd 250")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/internlm/bin/internlm", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    # Exposure from 0 to 10 (threshold in tenths): a unit without any of the settings has 9.6.
    judged = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", copy]
    done = subprocess.run(judged, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-400:]
