"""The only training loop: steps, with logs, validation, checkpoints, and an orderly end around them.

Every rank runs it. What a step does is `step`'s.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internlm import plot, runtime
from internlm.checkpoint import listing, store
from internlm.checkpoint.listing import CheckpointConfig
from internlm.checkpoint.place import Place
from internlm.checkpoint.saver import Beside, Saved, Saver
from internlm.checkpoint.store import Checkpoint
from internlm.errors import StorageError, TrainingError, first_line
from internlm.log import duration, size
from internlm.model.transformer import Transformer
from internlm.parallel.apply import Parallel
from internlm.train.evaluate import Evaluator
from internlm.train.metrics import Metrics, MetricsFile, read_metrics, step_line
from internlm.train.profile.windows import ProfileConfig, Trace, Windows
from internlm.train.step import Progress, Stepper
from internlm.train.stop import Stop, Stopped
from internlm.train.watch.alerts import Alerts
from internlm.train.watch.goodput import Goodput
from internlm.train.watch.monitor import noted
from internlm.train.watch.stragglers import Stragglers
from internlm.train.watch.trackers import Tracker
from internlm.train.watch.watchdog import WatchConfig, Watchdog

logger = logging.getLogger(__name__)


SAVE_PATIENCE_S = 60
"""How long a run that fails or is interrupted waits for the checkpoint that is being written."""
SAVE_AGAIN_AFTER_S = (1.0, 5.0, 15.0)
"""Waits before the save that ends a run is tried again: of the others, the next one is the second try."""


@dataclass
class Trainer:
    """Takes the steps of a run. Every part is built before, so that each can be used alone."""

    run: Path
    stepper: Stepper
    evaluator: Evaluator
    checkpoints: CheckpointConfig
    watching: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    alerts: Alerts = field(default_factory=Alerts)
    facts: dict[str, Any] = field(default_factory=dict)
    """Goes into every checkpoint: resolved recipe, versions."""
    trackers: list[Tracker] = field(default_factory=list, init=False)
    metrics: Metrics = field(default_factory=dict, init=False)
    """What was measured last, by name: saved with every checkpoint."""
    measured_at: dict[str, int] = field(default_factory=dict, init=False)
    """The step of each: a checkpoint is the best by what was measured of its own weights."""

    def __post_init__(self) -> None:
        stepper, parallel = self.stepper, self.parallel
        self.config, self.meter = stepper.config, stepper.meter
        self.stragglers = Stragglers(parallel.layout)
        self.windows = Windows(self.profile, self.run / "profile", stepper, self.config.trace_every_steps)
        self.alerts.step = lambda: self.progress.step
        self.stop = stepper.stop = Stop(self.run if parallel.rank == 0 else None)
        self.watch = Watchdog(self.run, self.watching, parallel.rank, parallel.layout.world_size, told=self._stalled)
        stepper.alerts, stepper.before_update, stepper.way_back = self.alerts, self._before_update, self._way_back

    @property
    def parallel(self) -> Parallel:
        """The model, as it is spread over ranks."""
        return self.stepper.parallel

    @property
    def model(self) -> Transformer:
        """This rank's model, or its first pipeline stage."""
        return self.parallel.parts[0]

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self.stepper.progress

    @property
    def goodput(self) -> Goodput:
        """What became of the run's time."""
        return self.stepper.goodput

    @functools.cached_property
    def saver(self) -> Saver:
        """What writes checkpoints."""
        return Saver(self.checkpoints.of(self.run), background=self.checkpoints.background, after=self._saved)

    def fit(self) -> Metrics:
        """Train to the end of the budget, with logs, validations and checkpoints; return the last validation.

        Raises:
            Stopped: somebody asked for an end before; there is a checkpoint of this step.
            TrainingError: too many steps in a row were not finite, or the device's memory is full.
            StorageError: a checkpoint could not be written; earlier ones are untouched.
        """
        with self.stop:  # first: one rank that a signal ends before it listens would be a failure of all
            return self._fit()

    def _fit(self) -> Metrics:
        path = self.run / "metrics.jsonl"
        saver = self.saver  # the ranks make it together: not when one has failed
        file = MetricsFile(path, self.progress.step) if self.parallel.rank == 0 else None
        try:
            with (
                noted(self.run if file is not None else None),
                self.watch,
                self.goodput.kept(),
                self.alerts.around(self.config.total_steps),
                self.windows,
            ):
                final = self._steps(file)
        except RuntimeError as error:
            saver.join(SAVE_PATIENCE_S / 12)  # of torch: another rank may be gone, and with it its part
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise TrainingError(
                f"the memory of {self.parallel.device} is full: {first_line(error)}",
                where=f"step {self.progress.step}",
                do="Lower train.micro_batch_rows, evaluate.rows or data.seq_len.",
            ) from error
        finally:
            saver.join(SAVE_PATIENCE_S)  # a checkpoint that is nearly there is not given up
            if file is not None:
                file.close()
            for tracker in self.trackers:
                tracker.close()
        if file is not None:
            plot.loss_curve(read_metrics(path), self.run / "loss.png", str(self.run))
        return final

    def _steps(self, file: MetricsFile | None) -> Metrics:
        total = self.config.total_steps
        self.meter.clear()
        paces: list[float] = []
        final: Metrics = {}
        while self.progress.step < total:
            with self.windows.step(self.progress.step + 1) as is_traced:
                metrics = self._step_and_trace() if is_traced else self.stepper.step()
            self.meter.started += self.windows.spent_s
            if self.stepper.back is not None:
                self._roll_back(self.stepper.back, metrics["train/step_loss"])
                if file is not None:
                    file.cut(self.progress.step)
                self.meter.clear()
                continue
            step, last, ending = self.progress.step, self.progress.step == total, self.stepper.ending
            self.watch.advance(step)
            if step % self.config.log_every_steps == 0 or step == 1 or last or "perf/comm_s" in metrics:
                metrics |= self.meter.read() | self.goodput.shares()
                paces = [*paces[-9:], metrics["perf/step_s"]]
                eta = (total - step) * statistics.median(paces)
                memory = runtime.peak_memory_bytes(self.parallel.device)[1]
                logger.info(step_line(step, total, metrics, memory, eta))
                self._record(file, metrics)
                self.meter.clear()
            self.goodput.write()
            if last or self._due(self.evaluator.config.every_steps):
                with self.watch.phase("evaluate"), self.goodput.within("evaluate"):
                    final = self.evaluator.evaluate(self.parallel, final=last)
                if final:
                    self._record(file, final | {"progress/tokens": self.progress.tokens})
                self.meter.clear()
            if last or ending is not None or self._due(self.checkpoints.every_steps):
                with self.watch.phase("save"), self.goodput.within("checkpoint"):
                    self.save(wait=last or ending is not None)
                self.meter.clear()
            if ending is not None and not last:
                raise Stopped(ending)
        return final

    def _step_and_trace(self) -> Metrics:
        """Take a step and return, besides, what communication cost in it, and which rank is slow."""
        with Trace(self.parallel.device) as trace:
            waited, started = self.goodput.seconds["data"], time.perf_counter()
            metrics = self.stepper.step()
            waiting = self.goodput.seconds["data"]
            own = time.perf_counter() - started - (waiting - waited)
        row = self.stragglers.row([trace.communication_s, trace.waiting_s, own], waiting, self.progress.step)
        found, warning = self.stragglers.look(self.parallel.total(row.to(self.parallel.device)))
        if warning:
            logger.warning("warning: step %d: %s", self.progress.step, warning)
            self.alerts.tell("straggler", warning)
        return metrics | found

    def save(self, *, wait: bool = True) -> Place:
        """Write a checkpoint of the present state, then drop those that need not be kept; return its folder.

        With `wait` when it is there, after more than one try; else the run goes on, and a failure is a warning.

        Raises:
            StorageError: it was waited for, and no try succeeded.
        """
        path = self.saver.folder / listing.name_of(self.progress.step)
        meta = {
            **self.facts,
            **self.stepper.meta(),
            "useful_s": self.goodput.seconds["useful"],
            "metrics": self.metrics,
            "measured_at": self.measured_at,
            "template": self.stepper.loader.template,
        }
        beside = Beside(self.parallel.shape, self.stepper.loader.tokenizer, meta)
        waited = self.saver.save(path.name, self.stepper.state(), beside)
        self.goodput.write(at_once=True)
        if waited > 1:
            logger.warning("warning: the run waited %s for the checkpoint before", duration(waited))
        pauses = list(SAVE_AGAIN_AFTER_S)
        while wait and (saved := self.saver.finish()) is not None and saved.problem is not None:
            if not pauses:
                raise StorageError(saved.problem)
            logger.warning("trying again in %s", duration(pauses[0]))
            time.sleep(pauses.pop(0))
            self.saver.save(path.name, self.stepper.state(), beside)
        return path

    def _saved(self, saved: Saved) -> None:
        """Say how a save went, on rank 0, and drop what need not be kept; called in the thread that wrote."""
        if saved.problem is not None:
            logger.warning("warning: %s could not be written, earlier ones stay: %s", saved.path.name, saved.problem)
            self.alerts.tell("checkpoint", f"{saved.path.name} could not be written: {saved.problem}")
            return
        self.retain()
        logger.info("checkpoint %s | %s | took %s", saved.path, size(saved.bytes), duration(saved.seconds))

    def retain(self) -> None:
        """Drop checkpoints that need not be kept; a failure is a warning."""
        if self.parallel.rank == 0:
            try:
                listing.retain(self.checkpoints.of(self.run), self.checkpoints)
            except (OSError, StorageError) as error:
                logger.warning("warning: old checkpoints could not be removed: %s", error)

    def _before_update(self) -> None:
        """Wait until a checkpoint that is being made has its copy of the weights."""
        if "saver" in vars(self):
            self.saver.copied()

    def _stalled(self, report: str | None) -> None:
        """Keep the time of a run that stands still, and send what is known; the process ends afterwards."""
        self.goodput.stall()
        if report is not None:
            self.alerts.tell("stall", report)
            self.alerts.close()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, exactly where it stopped. Raises as `Stepper.restore`."""
        self.stepper.restore(checkpoint)
        self.goodput.go_back(checkpoint.meta.get("useful_s"))

    def _way_back(self) -> Checkpoint | str:
        """Return the newest checkpoint, if the run may go back to it; else why not."""
        if (times := len(self.progress.passed_over)) >= self.stepper.spikes.config.most_rollbacks:
            return f"{times} times is enough"
        with self.watch.phase("load"):
            self.saver.finish()
            return store.open_newest(self.saver.folder) or "there is no checkpoint yet"

    def _roll_back(self, checkpoint: Checkpoint, loss: float) -> None:
        """Go back to a checkpoint, and on with the data that comes next."""
        stepper, progress = self.stepper, self.progress
        data, losses = stepper.loader.state_dict(), list(stepper.spikes.losses)[:-1]
        with self.watch.phase("load"):
            self.resume(checkpoint)
        passed = {
            "spike": progress.step,
            "loss": loss,
            "from": stepper.loader.state_dict()["taken"],
            "to": data["taken"],
        }
        stepper.loader.load_state_dict(data)
        stepper.spikes.losses.extend(losses[len(stepper.spikes.losses) :])
        self.progress.spikes = progress.spikes
        self.progress.passed_over = [*progress.passed_over, passed]
        logger.warning("back at step %d; rows passed over: %s → %s", self.progress.step, passed["from"], passed["to"])

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _record(self, file: MetricsFile | None, metrics: Metrics) -> None:
        self.metrics |= metrics
        self.measured_at |= dict.fromkeys(metrics, self.progress.step)
        if file is None:
            return
        file.write(self.progress.step, metrics)
        for tracker in self.trackers:
            tracker.write(self.progress.step, metrics)
