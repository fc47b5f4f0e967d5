"""Where metrics go besides `metrics.jsonl`: sinks of the same dict, chosen by the recipe, on rank 0.

A sink has a bounded queue and a thread: the training never waits for it, and whatever goes wrong in it (library,
network, server) is one warning. Only the import is waited for, before the first step. A run that is started again goes
on under the ids that RUN/track.json holds; docs/operations.md says what becomes of steps that are taken again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from internlm import disk
from internlm.config import leaves, section
from internlm.errors import StorageError, first_line
from internlm.train.metrics import Metrics

logger = logging.getLogger(__name__)
T = TypeVar("T")

PRIVATE = ("alerts.", "track.mlflow.")
"""Beginnings of keys of a recipe with addresses, which may hold a key or a password: nobody is shown their values."""

IDS = "track.json"
CLOSE_S = 30.0
_LOOK_EVERY_S = 0.1
_HELD = 1000
"""Dicts that wait for a sink; more are dropped."""


@section
class ServerConfig:
    """A project on a server of Weights & Biases or SwanLab. Who you are is said by their own `login`, or variables."""

    project: str = "internlm"
    """Name of the project."""
    name: str | None = None
    """Name of the run; None: that of its folder."""
    offline: bool | None = None
    """Whether only files are written, to be sent later by `wandb sync` or `swanlab sync`. None: as WANDB_MODE or
    SWANLAB_MODE says, or else where the server cannot be reached or does not know you."""


@section
class MlflowConfig:
    """An experiment of MLflow."""

    experiment: str = "internlm"
    """Name of the experiment."""
    name: str | None = None
    """Name of the run; None: that of its folder."""
    uri: str | None = None
    """Tracking server or store; None: MLFLOW_TRACKING_URI, or else RUN/mlflow.db."""


@section
class TrackConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool | None = None
    """Event files in RUN/tensorboard. None: where it is installed."""
    wandb: ServerConfig | None = None
    """Weights & Biases; None: not used."""
    swanlab: ServerConfig | None = None
    """SwanLab; None: not used."""
    mlflow: MlflowConfig | None = None
    """MLflow; None: not used."""


class Tracker(Protocol):
    """A sink of metrics."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Finish."""


class Sink:
    """A tracker behind a queue and a thread, in which it is opened. Nothing raises; only `close` waits, for a while."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self.name, self._open = name, open_tracker
        self.peers: list[Sink] = [self]
        """Sinks that end together: they share the time that is waited."""
        self._queue: queue.Queue[tuple[int, Metrics]] = queue.Queue(_HELD)
        self._until = math.inf
        """When it is given up, by the monotonic clock; finite as soon as nothing more comes."""
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step; they are dropped if too many wait already."""
        try:
            self._queue.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._warn(f"metrics are dropped from step {step} on: it does not keep up")

    def close(self) -> None:
        """Wait until all is written, but not for long."""
        now = time.monotonic()
        for sink in self.peers:
            sink._until = min(sink._until, now + CLOSE_S)
        self._thread.join(max(0.0, self._until - now))
        if self._thread.is_alive():
            self._warn(f"not finished after {CLOSE_S:.0f} s: given up")

    def _work(self) -> None:
        tracker = self._try(self._open)
        while True:
            try:
                item = self._queue.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                if self._until < math.inf:
                    break
                continue
            if tracker is not None:
                self._try(functools.partial(tracker.write, *item))
        if tracker is not None:
            self._try(tracker.close)

    def _try(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except BaseException as error:  # one library ends what it cannot do by SystemExit
            self._warn(_what(error))
            return None

    def _warn(self, what: str) -> None:
        if self._problem is None:
            self._problem = what
            logger.warning("warning: %s: %s; the run goes on without it", self.name, what)


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)[:300]}"


class TensorBoard:
    """Event files under RUN/tensorboard; points of steps after `resumed_step`, which come again, are taken back."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write one point per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, under an id that is ours."""

    def __init__(self, run: Path, config: ServerConfig, facts: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        known = _known(run, "wandb", config, facts)

        def start(mode: str) -> Any:
            if mode == "online" and not _has_key(wandb):  # it would ask at the terminal
                raise RuntimeError("there is no login; `wandb login` makes one")
            return wandb.init(**known, dir=str(run), mode=mode, settings=wandb.Settings(console="off"))

        server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        self.run = _start("wandb", config, start, server)
        # their own step only grows, and ours goes back when a run does
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Metrics) -> None:
        """Log a dict."""
        self.run.log({"step": step, **metrics})

    def close(self) -> None:
        """Send the rest."""
        self.run.finish()


class SwanLab:
    """A run of SwanLab, under an id that is ours."""

    def __init__(self, run: Path, config: ServerConfig, facts: dict[str, Any]) -> None:
        swanlab: Any = importlib.import_module("swanlab")
        self.module = swanlab
        known = _known(run, "swanlab", config, facts)

        def start(mode: str) -> Any:
            settings = swanlab.Settings(interactive=False)  # else it asks at the terminal
            return swanlab.init(**known, log_dir=str(run / "swanlab"), mode=mode, settings=settings)

        server = os.environ.get("SWANLAB_API_HOST", "https://api.swanlab.cn")
        _start("swanlab", config, start, server)

    def write(self, step: int, metrics: Metrics) -> None:
        """Log a dict."""
        self.module.log(_finite(metrics), step=step)

    def close(self) -> None:
        """Send the rest."""
        self.module.finish()


def _known(run: Path, name: str, config: ServerConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what both servers' `init` is told of a run."""
    number = _id(run, name, lambda: uuid.uuid4().hex[:21])
    return {
        "project": config.project, "name": config.name or run.name, "id": number, "resume": "allow", "config": facts,
    }  # fmt: skip


def _has_key(wandb: Any) -> bool:
    """Return whether a library of Weights & Biases knows who you are, without asking."""
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # before it knew that option
        return bool(wandb.api.api_key)


def _start(name: str, config: ServerConfig, start: Callable[[str], Any], server: str) -> Any:
    """Return what `start` makes of the mode that is wanted; else of online, or of offline where that fails."""
    wanted = os.environ.get(f"{name.upper()}_MODE")
    if config.offline is not None:
        wanted = "offline" if config.offline else "online"
    if wanted:
        return start(wanted)
    problem = _silence(server)
    if problem is None:
        try:
            return start("online")
        except Exception as error:
            problem = _what(error)
    logger.warning("warning: track.%s: offline: %s; `%s sync` sends what is kept in files", name, problem, name)
    return start("offline")


class Mlflow:
    """A run of MLflow."""

    def __init__(self, run: Path, config: MlflowConfig, facts: dict[str, Any]) -> None:
        self.entities: Any = importlib.import_module("mlflow.entities")
        tracking: Any = importlib.import_module("mlflow.tracking")
        local = f"sqlite:///{(run / 'mlflow.db').resolve()}"
        self.client = tracking.MlflowClient(config.uri or os.environ.get("MLFLOW_TRACKING_URI") or local)

        def create() -> str:
            known = self.client.get_experiment_by_name(config.experiment)
            experiment = known.experiment_id if known else self.client.create_experiment(config.experiment)
            created = self.client.create_run(experiment, run_name=config.name or run.name).info.run_id
            for name, value in facts.items():
                self.client.log_param(created, name, str(value)[:500])
            return created

        self.id = _id(run, "mlflow", create)
        self.client.update_run(self.id, status="RUNNING")

    def write(self, step: int, metrics: Metrics) -> None:
        """Log a dict in one request."""
        now = int(time.time() * 1000)
        points = [self.entities.Metric(name, value, now, step) for name, value in _finite(metrics).items()]
        self.client.log_batch(self.id, metrics=points)

    def close(self) -> None:
        """Mark the run as ended; one that goes on is marked as running again."""
        self.client.set_terminated(self.id)


def open_trackers(run: Path, resumed_step: int, config: TrackConfig, facts: dict[str, Any] | None = None) -> list[Sink]:
    """Return the sinks that a recipe asks for. A library that is missing, or breaks, is a warning.

    The run goes on from `resumed_step`; `facts`, recipe and versions, are shown beside the metrics.
    """
    hidden = tuple(f"recipe.{name}" for name in PRIVATE)
    shown = {name: value for name, value in leaves(facts or {}) if name and not name.startswith(hidden)}
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    wanted: list[tuple[str, str, Callable[[], Tracker]]] = []
    if config.tensorboard or (config.tensorboard is None and has_tensorboard):
        wanted.append(("tensorboard", "torch.utils.tensorboard", lambda: TensorBoard(run, resumed_step)))
    if (wandb := config.wandb) is not None:
        wanted.append(("wandb", "wandb", lambda: Wandb(run, wandb, shown)))
    if (swanlab := config.swanlab) is not None:
        wanted.append(("swanlab", "swanlab", lambda: SwanLab(run, swanlab, shown)))
    if (mlflow := config.mlflow) is not None:
        wanted.append(("mlflow", "mlflow.tracking", lambda: Mlflow(run, mlflow, shown)))
    sinks: list[Sink] = []
    for name, module, make in wanted:
        try:
            importlib.import_module(module)  # here: two threads that import at a time may see half of a module
        except BaseException as error:
            advice = f" (pip install {name})" if isinstance(error, ImportError) else ""
            logger.warning("warning: track.%s: %s%s; the run goes on without it", name, _what(error), advice)
            if isinstance(error, KeyboardInterrupt):
                raise
            continue
        sinks.append(Sink(f"track.{name}", make))
    for sink in sinks:
        sink.peers = sinks
    return sinks


def _silence(server: str) -> str | None:
    """Return why a server cannot be reached, through a proxy where the environment names one; None where it can."""
    try:
        urllib.request.urlopen(server, timeout=5).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"{server} cannot be reached ({_what(error)})"
    return None


def _id(run: Path, name: str, create: Callable[[], str]) -> str:
    """Return the id under which a sink knows this run, made and kept at the first call."""
    with _ids:
        try:
            known = disk.read_json(run / IDS)
        except StorageError:
            known = {}
        if isinstance(known.get(name), str):
            return known[name]
        made = create()
        try:
            disk.write_json(run / IDS, {**known, name: made})
        except StorageError as error:
            logger.warning("warning: track.%s: the run's id is not kept: %s", name, error)
        return made


_ids = threading.Lock()


def _finite(metrics: Metrics) -> Metrics:
    """Return what a server takes: some refuse a whole dict for one NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
