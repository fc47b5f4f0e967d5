"""Sinks of metrics: the same numbers everywhere, the same run after a restart, and no harm to the training."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from internlm import recipe as recipes
from internlm.errors import ConfigError
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from internlm.train.watch import trackers
from internlm.train.watch.trackers import IDS, MlflowConfig, ServerConfig, Sink, TrackConfig, open_trackers

Make = Callable[..., Recipe]


class Fake:
    """Modules with the parts of wandb, swanlab and mlflow that are used, which note how they are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inits: list[dict[str, Any]] = []
        self.points: dict[str, list[tuple[int, dict[str, float]]]] = {"wandb": [], "swanlab": [], "mlflow": []}
        self.calls: list[str] = []
        self.refuses: set[str] = set()
        """Modes in which `init` fails."""
        self.key = "key"
        wandb: Any = ModuleType("wandb")
        wandb.Settings = lambda **named: named
        wandb.login = lambda prompt: not prompt and bool(self.key)
        wandb.init = self._init("wandb")
        swanlab: Any = ModuleType("swanlab")
        swanlab.Settings = lambda **named: named
        swanlab.init = self._init("swanlab")
        swanlab.log = lambda data, step: self._log("swanlab", step, data)
        swanlab.finish = lambda: self.calls.append("swanlab finish")
        mlflow: Any = ModuleType("mlflow")
        tracking: Any = ModuleType("mlflow.tracking")
        tracking.MlflowClient = lambda uri: self._mlflow(uri)
        entities: Any = ModuleType("mlflow.entities")
        entities.Metric = lambda name, value, when, step: (name, value, step)
        for module in (wandb, swanlab, mlflow, tracking, entities):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI", "WANDB_BASE_URL", "SWANLAB_API_HOST"):
            monkeypatch.delenv(name, raising=False)

    def _init(self, name: str) -> Callable[..., Any]:
        def init(**named: Any) -> Any:
            if named["mode"] in self.refuses:
                raise OSError(f"no {named['mode']} today")
            self.inits.append({"sink": name, **named})
            return SimpleNamespace(
                define_metric=lambda pattern, step_metric: self.calls.append(f"{pattern} by {step_metric}"),
                log=lambda data: self._log("wandb", data["step"], {k: v for k, v in data.items() if k != "step"}),
                finish=lambda: self.calls.append("wandb finish"),
            )

        return init

    def _log(self, name: str, step: int, data: dict[str, float]) -> None:
        self.points[name].append((step, data))

    def _mlflow(self, uri: str) -> Any:
        def create_run(experiment: str, run_name: str) -> Any:
            self.inits.append({"sink": "mlflow", "uri": uri, "experiment": experiment, "name": run_name})
            return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{len(self.inits)}"))

        def log_batch(run: str, metrics: list[tuple[str, float, int]]) -> None:
            self.calls.append(f"mlflow {run}")
            self._log("mlflow", metrics[0][2], {name: value for name, value, _ in metrics})

        return SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: f"experiment {name}",
            create_run=create_run,
            log_param=lambda run, name, value: None,
            update_run=lambda run, status: self.calls.append(f"mlflow {run} {status}"),
            log_batch=log_batch,
            set_terminated=lambda run: self.calls.append(f"mlflow {run} ends"),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "internlm")
    return caplog


OFF = {"offline": True}
ALL: dict[str, Any] = {"tensorboard": False, "wandb": {"project": "p", **OFF}, "swanlab": OFF, "mlflow": {}}


def test_all_sinks_get_what_the_metrics_file_holds_and_go_on_under_the_same_ids(
    recipe: Make, tmp_path: Path, fake: Fake
) -> None:
    run = tmp_path / "run"
    hooks = {"webhooks": [{"url": "http://127.0.0.1/secret", "events": []}]}
    recipes.prepare(recipe(track=ALL, alerts=hooks, train__tokens=3 * 256)).fit()
    lines = [dict(line) for line in read_metrics(run / "metrics.jsonl")]
    for name in ("wandb", "swanlab", "mlflow"):
        assert [(line.pop("step"), line) for line in map(dict, lines)] == fake.points[name], name
    ids = json.loads((run / IDS).read_text())
    first, second, third = sorted(fake.inits, key=lambda init: init["sink"] == "mlflow")[:3]
    assert {first["id"], second["id"]} == {ids["wandb"], ids["swanlab"]}
    assert third == {
        "sink": "mlflow", "uri": f"sqlite:///{run / 'mlflow.db'}", "experiment": "experiment internlm", "name": "run"
    }  # fmt: skip
    assert "* by step" in fake.calls
    assert {"wandb finish", "swanlab finish", f"mlflow {ids['mlflow']} ends"} <= set(fake.calls)
    shown = next(init for init in fake.inits if init["sink"] == "wandb")
    assert (shown["project"], shown["name"], shown["mode"], shown["resume"]) == ("p", "run", "offline", "allow")
    assert shown["config"]["recipe.optim.lr"] == 3e-3
    told = shown["config"].items()
    assert not any("alerts" in name or "mlflow" in name or "secret" in str(value) for name, value in told)
    assert shown["dir"] == str(run), "files lie in the run folder"

    recipes.prepare(recipe(track=ALL, train__tokens=5 * 256)).fit()
    assert json.loads((run / IDS).read_text()) == ids
    assert [init["id"] for init in fake.inits if init["sink"] == "wandb"] == [ids["wandb"]] * 2
    assert [init["id"] for init in fake.inits if init["sink"] == "swanlab"] == [ids["swanlab"]] * 2
    assert len([init for init in fake.inits if init["sink"] == "mlflow"]) == 1, "no second run is made"
    assert fake.points["mlflow"][-1][0] == 5
    assert f"mlflow {ids['mlflow']} RUNNING" in fake.calls


def test_numbers_that_are_not_finite_are_kept_from_servers_that_refuse_them(fake: Fake, tmp_path: Path) -> None:
    for sink in open_trackers(tmp_path, 0, TrackConfig(tensorboard=False, mlflow=MlflowConfig())):
        sink.write(1, {"train/loss": math.nan, "optim/lr": 1.0})
        sink.close()
    assert fake.points["mlflow"] == [(1, {"optim/lr": 1.0})]


class Broken(ModuleType):
    """A module whose every use fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("two of its libraries do not fit\neach other")


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
@pytest.mark.parametrize("how", ["missing", "broken"])
def test_a_library_that_is_missing_or_broken_is_one_warning(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    for module in (name, f"{name}.tracking", f"{name}.entities"):
        monkeypatch.setitem(sys.modules, module, Broken(module) if how == "broken" else None)  # type: ignore[arg-type]
    trainer = recipes.prepare(
        recipe(track={"tensorboard": False, name: {} if name == "mlflow" else OFF}, train__tokens=2 * 256)
    )
    trainer.fit()
    (record,) = [record for record in heard.records if name in record.getMessage()]
    assert f"track.{name}" in record.getMessage()
    assert ("pip install" if how == "missing" else "do not fit") in record.getMessage()
    assert trainer.progress.step == 2


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_sink_that_fails_is_one_warning_and_the_training_goes_on(
    recipe: Make, fake: Fake, heard: pytest.LogCaptureFixture, where: str
) -> None:
    swanlab: Any = sys.modules["swanlab"]

    def broken(*arguments: Any, **named: Any) -> Any:
        raise SystemExit("no space left on their server")

    setattr(swanlab, where, broken)
    trainer = recipes.prepare(recipe(track={"tensorboard": False, "swanlab": OFF}, train__tokens=4 * 256))
    trainer.fit()
    (record,) = heard.records
    assert "track.swanlab: SystemExit: no space left on their server" in record.getMessage()
    assert trainer.progress.step == 4


def test_a_sink_that_hangs_is_not_waited_for(heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    over = threading.Event()
    sink = Sink("slow", lambda: over.wait(60) and None)  # type: ignore[arg-type,return-value]
    begun = time.monotonic()
    for step in range(3000):  # more than the queue holds
        sink.write(step, {"a": 1.0})
    assert time.monotonic() - begun < 1
    sink.close()
    assert time.monotonic() - begun < 2
    over.set()
    (record,) = heard.records
    assert "dropped from step 1000 on" in record.getMessage()


def test_sinks_that_hang_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.5)
    over = threading.Event()
    sinks = [Sink(f"slow {number}", lambda: over.wait(60) and None) for number in range(4)]  # type: ignore[arg-type,return-value]
    for sink in sinks:
        sink.peers = sinks
    begun = time.monotonic()
    for sink in sinks:
        sink.close()
    assert time.monotonic() - begun < 1.5
    over.set()


def test_what_is_queued_is_written_before_the_end() -> None:
    taken: list[int] = []

    def write(step: int, metrics: dict[str, float]) -> None:
        time.sleep(0.02)
        taken.append(step)

    tracker: Any = SimpleNamespace(write=write, close=lambda: taken.append(-1))
    sink = Sink("slow", lambda: tracker)
    for step in range(5):
        sink.write(step, {})
    sink.close()
    assert taken == [0, 1, 2, 3, 4, -1]


@pytest.fixture
def server() -> Iterator[str]:
    """Return the address of a server that answers, with 404."""
    with HTTPServer(("127.0.0.1", 0), type("Quiet", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None})) as it:
        threading.Thread(target=it.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}"
        it.shutdown()


def opened(fake: Fake, run: Path, config: ServerConfig) -> list[tuple[str, str]]:
    for sink in open_trackers(run, 0, TrackConfig(tensorboard=False, wandb=config, swanlab=config)):
        sink.close()
    return sorted((init["sink"], init["mode"]) for init in fake.inits)


def test_without_network_metrics_go_to_files_and_with_it_to_the_server(
    fake: Fake, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    for variable in ("WANDB_BASE_URL", "SWANLAB_API_HOST"):
        monkeypatch.setenv(variable, server)
    assert opened(fake, tmp_path, ServerConfig()) == [("swanlab", "online"), ("wandb", "online")]
    assert not heard.records
    fake.inits.clear()
    for variable in ("WANDB_BASE_URL", "SWANLAB_API_HOST"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody
    assert opened(fake, tmp_path, ServerConfig()) == [("swanlab", "offline"), ("wandb", "offline")]
    assert "cannot be reached" in heard.text
    assert "`wandb sync` sends what is kept in files" in heard.text


def test_where_online_fails_or_nobody_is_logged_in_metrics_go_to_files(
    fake: Fake, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    for variable in ("WANDB_BASE_URL", "SWANLAB_API_HOST"):
        monkeypatch.setenv(variable, server)
    fake.refuses, fake.key = {"online"}, ""
    assert opened(fake, tmp_path, ServerConfig()) == [("swanlab", "offline"), ("wandb", "offline")]
    assert "no login" in heard.text
    assert "no online today" in heard.text


def test_recipe_and_environment_decide_about_the_mode(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_silence", lambda server: pytest.fail("nobody asked"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "local")
    assert opened(fake, tmp_path, ServerConfig()) == [("swanlab", "local"), ("wandb", "offline")]
    fake.inits.clear()
    assert opened(fake, tmp_path, ServerConfig(offline=False)) == [("swanlab", "online"), ("wandb", "online")]


def test_tensorboard_is_used_where_it_is_installed_unless_the_recipe_says_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (sink,) = open_trackers(tmp_path / "a", 0, TrackConfig())
    sink.write(1, {"train/loss": 2.0})
    sink.close()
    assert any("tfevents" in path.name for path in (tmp_path / "a" / "tensorboard").iterdir())
    assert open_trackers(tmp_path / "b", 0, TrackConfig(tensorboard=False)) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_trackers(tmp_path / "c", 0, TrackConfig()) == []
    assert not heard.records
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_trackers(tmp_path / "d", 0, TrackConfig(tensorboard=True)) == []
    assert "track.tensorboard" in heard.text


def test_an_unknown_sink_is_an_error(recipe: Make) -> None:
    with pytest.raises(ConfigError, match="wandb"):
        recipe(track={"wanbd": {}})


def test_ids_that_cannot_be_read_are_made_anew(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / IDS).write_text("[1")
    opened(fake, tmp_path, ServerConfig(offline=True))
    assert len(json.loads((tmp_path / IDS).read_text())) == 2


def logged(run: Path, config: TrackConfig, heard: pytest.LogCaptureFixture) -> None:
    """Log steps 1 to 4, and after a restart 3 to 6."""
    for first in (1, 3):
        (sink,) = open_trackers(run, first - 1, config, {"recipe": {"a": 1}})
        for step in range(first, first + 4):
            sink.write(step, {"train/loss": 1 / step})
        sink.close()
    assert not heard.records


def test_the_real_mlflow_takes_it(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    logged(tmp_path, TrackConfig(tensorboard=False, mlflow=MlflowConfig()), heard)
    client = tracking.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    number = json.loads((tmp_path / IDS).read_text())["mlflow"]
    history = client.get_metric_history(number, "train/loss")
    assert {point.step: point.value for point in history} == {step: 1 / step for step in range(1, 7)}
    assert client.get_run(number).info.status == "FINISHED"
    assert client.get_run(number).data.params == {"recipe.a": "1"}


def test_the_real_wandb_takes_it_offline(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    logged(tmp_path, TrackConfig(tensorboard=False, wandb=ServerConfig(offline=True)), heard)
    number = json.loads((tmp_path / IDS).read_text())["wandb"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2
    assert all(b"train/loss" in file.read_bytes() for file in files)


def test_the_real_swanlab_takes_it_offline(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("swanlab")
    logged(tmp_path, TrackConfig(tensorboard=False, swanlab=ServerConfig(offline=True)), heard)
    number = json.loads((tmp_path / IDS).read_text())["swanlab"]
    files = list((tmp_path / "swanlab").glob(f"run-*-{number}/run-{number}.swanlab"))
    assert len(files) == 2
    assert all(b"train/loss" in file.read_bytes() for file in files)
