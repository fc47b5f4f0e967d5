"""The only training loop.

A step pulls its micro-batches, knows the count they are divided by before anything is computed, runs them one by one,
clips by one global norm, updates, and measures:

    loss of a step = Σ over all micro-batches of objective.loss / Σ of objective.count

so neither loss nor gradient depends on how the step was cut, into micro-batches or over ranks. Every rank runs this
loop; what they sum is the count before the step, and the squared norm and the loss after it.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm import plot, ranks, runtime
from internlm.checkpoint import store
from internlm.checkpoint.saver import Beside, Saved, Saver
from internlm.checkpoint.store import Checkpoint, CheckpointConfig
from internlm.data.batch import Batch
from internlm.data.loader import Loader
from internlm.errors import ConfigError, StorageError, TrainingError
from internlm.log import duration, size
from internlm.model.transformer import Transformer
from internlm.optim.optimizer import Optimizer, scale_to_norm, squared_norm
from internlm.optim.schedule import ScheduleConfig, rate
from internlm.parallel.apply import Parallel
from internlm.train.budget import TrainConfig
from internlm.train.evaluate import EvaluateConfig, Evaluator
from internlm.train.loss_scale import LossScale
from internlm.train.metrics import Meter, Metrics, MetricsFile, is_finite, read_metrics, step_line
from internlm.train.objective import Objective
from internlm.train.profile.windows import Parts, ProfileConfig, Trace, Windows
from internlm.train.stop import Reason, Stop, Stopped
from internlm.train.watch.alerts import Alerts
from internlm.train.watch.goodput import Goodput
from internlm.train.watch.monitor import noted
from internlm.train.watch.spikes import Spikes
from internlm.train.watch.stragglers import Stragglers
from internlm.train.watch.trackers import Tracker
from internlm.train.watch.watchdog import WatchConfig, Watchdog

logger = logging.getLogger(__name__)


SAVE_PATIENCE_S = 60
"""How long a run that fails or is interrupted waits for the checkpoint that is being written."""
SAVE_AGAIN_AFTER_S = (1.0, 5.0, 15.0)
"""Waits before the save that ends a run is tried again: of the others, the next one is the second try."""


@dataclass
class Progress:
    """How far a run is: saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    passed_over: list[dict[str, Any]] = field(default_factory=list)
    """Data that rollbacks left out: the step and loss of the spike, and rows of each source, from and to."""


@dataclass
class Trainer:
    """Trains `model` on what `loader` draws. Every part is built before, so that each can be used alone."""

    run: Path
    config: TrainConfig
    schedule: ScheduleConfig
    checkpoints: CheckpointConfig
    evaluation: EvaluateConfig
    parallel: Parallel
    objective: Objective
    optimizer: Optimizer
    loader: Loader
    evaluator: Evaluator
    device: torch.device
    peak_flops: float
    trackers: list[Tracker] = field(default_factory=list)
    alerts: Alerts = field(default_factory=Alerts)
    goodput: Goodput = field(default_factory=Goodput)
    facts: dict[str, Any] = field(default_factory=dict)
    """Goes into every checkpoint: resolved recipe, versions."""
    progress: Progress = field(default_factory=Progress)
    scale: LossScale = field(default_factory=LossScale)
    spikes: Spikes = field(default_factory=Spikes)
    watching: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    metrics: Metrics = field(default_factory=dict)
    """What was measured last, by name: saved with every checkpoint."""

    def __post_init__(self) -> None:
        length = self.loader.config.seq_len
        self.rows = self.config.batch_tokens // length
        self.micro_rows = self.config.micro_rows(length, self.parallel.layout.data)
        self.parameters = [p for _, p in self.parallel.owned_parameters() if p.requires_grad]
        self.meter = Meter(self.parallel, self.loader.sources, self.peak_flops)
        self.stragglers = Stragglers(self.parallel.layout)
        parts = Parts(self.parallel, self.optimizer, self.loader)
        self.windows = Windows(self.profile, self.run / "profile", parts, self.config.trace_every_steps)
        self.alerts.step = lambda: self.progress.step
        self.stop = Stop(self.run if self.parallel.rank == 0 else None)
        rank, world_size = self.parallel.rank, self.parallel.layout.world_size
        self.watch = Watchdog(self.run, self.watching, rank, world_size, told=self._stalled)
        self.spiked = False
        """Whether the loss of the last step was a spike."""
        self.ending: Reason | None = None
        """Why the run ends after this step; the same on all ranks."""

    @property
    def model(self) -> Transformer:
        """This rank's model, or its first pipeline stage."""
        return self.parallel.parts[0]

    def step(self) -> Metrics:
        """Take one optimizer step; return what only this step knows (learning rate, gradient norm)."""
        # 1. Pull the data of the whole step.
        started = time.perf_counter()
        with self.goodput.within("data"):
            batch = self.loader.next_batch(self.rows)
        self.meter.data_wait_s += time.perf_counter() - started
        self.goodput.enter("useful")
        self.meter.add_batch(batch)
        micro_batches = [part.to(self.device) for part in batch.micro_batches(self.micro_rows)]

        # 2. Know the denominator before anything is computed.
        shares = torch.stack([self.objective.count(part) for part in micro_batches]).double().sum()
        tokens = shares.new_tensor(batch.tokens.numel() - batch.num_padding)
        own = torch.stack([shares, tokens]) * self.parallel.leads
        totals = self.parallel.total(torch.cat([own, own.new_tensor([self.stop.wish()])]), counted=True)
        count, tokens = totals[:2].unbind()

        # 3. Forward and backward, one micro-batch after the other.
        loss = norm = torch.zeros((), device=self.device)
        if count > 0:
            share = (self.scale.value / tokens).float()
            loss = self.parallel.run.train(
                micro_batches, lambda hidden, part: self._loss(hidden, part, count.float()), share
            )
            loss, norm = self._sums(loss)

        # 4. Clip by the one global norm; 5. update, unless a number is not finite, or the loss a spike.
        self.meter.steps += 1
        lr_share = rate(self.schedule, self.progress.step, self.config.total_steps)
        self.progress.step += 1
        self.progress.tokens += self.config.batch_tokens
        updated = self._update(loss, norm, count, lr_share)
        self.parallel.zero_grad()

        # 6. Report; all ranks know by the same sum whether to end.
        self.goodput.enter("other", was="useful" if updated else "skipped")
        self.ending = Stop.reason(float(totals[2]))
        return {
            "optim/lr": lr_share * self.optimizer.lr,
            "optim/grad_norm": float(norm),
            "optim/skipped_steps": self.progress.skipped_steps,
            "optim/spikes": self.progress.spikes,
            "optim/rollbacks": len(self.progress.passed_over),
            "optim/loss_scale": self.scale.value,
            "train/step_loss": float(loss),
            "progress/tokens": self.progress.tokens,
        }

    def _update(self, loss: Tensor, norm: Tensor, count: Tensor, lr_share: float) -> bool:
        """Update the weights, if this step's numbers are fit for it; return whether they were."""
        is_good = bool(count > 0) and is_finite(norm + loss)
        spike = self.spikes.add(float(loss)) if is_good else None
        if spike is not None:
            self._warn_of_spike(float(loss), spike)
        updates = is_good and (spike is None or self.spikes.config.policy == "warn")
        if updates:
            scale_to_norm(self.parameters, norm, self.config.max_grad_norm, self.scale.value)
            if "saver" in vars(self):
                self.saver.copied()
            self.optimizer.step(lr_share)
            self.parallel.share()
            self.progress.skipped_in_a_row = 0
        if count > 0 and self.scale.update(is_good):
            logger.info("step %d skipped: loss scale lowered to %g", self.progress.step, self.scale.value)
        elif not is_good:
            self._skip(loss, norm, count)
        self.spiked = spike is not None
        return updates

    def fit(self) -> Metrics:
        """Train to the end of the budget, with logs, validations and checkpoints; return the last validation.

        Raises:
            Stopped: somebody asked for an end before; there is a checkpoint of this step.
            TrainingError: too many steps in a row were not finite, or the device's memory is full.
            StorageError: a checkpoint could not be written; earlier ones are untouched.
        """
        path = self.run / "metrics.jsonl"
        saver = self.saver  # the ranks make it together: not when one has failed
        file = MetricsFile(path, self.progress.step) if self.parallel.rank == 0 else None
        try:
            with (
                noted(self.run if file is not None else None),
                self.stop,
                self.watch,
                self.goodput.kept(),
                self.alerts.around(self.config.total_steps),
                self.windows,
            ):
                final = self._fit(file)
        except RuntimeError as error:
            saver.join(SAVE_PATIENCE_S / 12)  # of torch: another rank may be gone, and with it its part
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise TrainingError(
                f"the memory of {self.device} is full: {str(error).splitlines()[0]}",
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

    def _fit(self, file: MetricsFile | None) -> Metrics:
        total = self.config.total_steps
        self.meter.clear()
        paces: list[float] = []
        final: Metrics = {}
        while self.progress.step < total:
            with self.windows.step(self.progress.step + 1) as is_traced:
                metrics = self._step_and_trace() if is_traced else self.step()
            self.meter.started += self.windows.spent_s
            if self.spiked and self.spikes.config.policy == "rollback" and self._roll_back(metrics["train/step_loss"]):
                if file is not None:
                    file.cut(self.progress.step)
                self.meter.clear()
                continue
            step, last = self.progress.step, self.progress.step == total
            self.watch.advance(step)
            if step % self.config.log_every_steps == 0 or step == 1 or last or "perf/comm_s" in metrics:
                metrics |= self.meter.read() | self.goodput.shares()
                paces = [*paces[-9:], metrics["perf/step_s"]]
                eta = (total - step) * sorted(paces)[len(paces) // 2]
                memory = runtime.peak_memory_bytes(self.device)[1]
                logger.info(step_line(step, total, metrics, memory, eta))
                self._record(file, metrics)
                self.meter.clear()
            self.goodput.write()
            if last or self._due(self.evaluation.every_steps):
                with self.watch.phase("evaluate"), self.goodput.within("evaluate"):
                    final = self.evaluator(self.parallel, final=last)
                if final:
                    self._record(file, final | {"progress/tokens": self.progress.tokens})
                self.meter.clear()
            if last or self.ending is not None or self._due(self.checkpoints.every_steps):
                with self.watch.phase("save"), self.goodput.within("checkpoint"):
                    self.save(wait=last or self.ending is not None)
                self.meter.clear()
            if self.ending is not None and not last:
                raise Stopped(self.ending)
        return final

    def _step_and_trace(self) -> Metrics:
        """Take a step and return, besides, what communication cost in it, and which rank is slow."""
        with Trace(self.device) as trace:
            waited, started = self.goodput.seconds["data"], time.perf_counter()
            metrics = self.step()
            waiting = self.goodput.seconds["data"]
            own = time.perf_counter() - started - (waiting - waited)
        row = self.stragglers.row([trace.communication_s, trace.waiting_s, own], waiting, self.progress.step)
        found, warning = self.stragglers.look(self.parallel.total(row.to(self.device), counted=True))
        if warning:
            logger.warning("warning: step %d: %s", self.progress.step, warning)
            self.alerts.tell("straggler", warning)
        return metrics | found

    def save(self, *, wait: bool = True) -> store.Place:
        """Write a checkpoint of the present state, then drop those that need not be kept; return its folder.

        Args:
            wait: return when it is there, after more than one try; else the run goes on, and a failure is a warning.

        Raises:
            StorageError: it was waited for, and no try succeeded.
        """
        path = self.saver.folder / store.name_of(self.progress.step)
        meta = {
            **self.facts,
            **vars(self.progress),
            "layout": vars(self.parallel.layout),
            "useful_s": self.goodput.seconds["useful"],
            "metrics": self.metrics,
            "loss_scale": vars(self.scale),
            "losses": list(self.spikes.losses),
            "loader": self.loader.state_dict(),
            "template": self.loader.template,
            "random": {"python": _python_random_state()},
        }
        beside = Beside(self.parallel.shape, self.loader.tokenizer_path, meta)
        waited = self.saver.save(path.name, self._state(), beside)
        self.goodput.write(at_once=True)
        if waited > 1:
            logger.warning("warning: the run waited %s for the checkpoint before", duration(waited))
        pauses = list(SAVE_AGAIN_AFTER_S)
        while wait and (saved := self.saver.finish()) is not None and saved.problem is not None:
            if not pauses:
                raise StorageError(saved.problem)
            logger.warning("trying again in %s", duration(pauses[0]))
            time.sleep(pauses.pop(0))
            self.saver.save(path.name, self._state(), beside)
        return path

    @functools.cached_property
    def saver(self) -> Saver:
        """What writes checkpoints."""
        return Saver(self.checkpoints.of(self.run), background=self.checkpoints.background, after=self._saved)

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
                store.retain(self.checkpoints.of(self.run), self.checkpoints)
            except (OSError, StorageError) as error:
                logger.warning("warning: old checkpoints could not be removed: %s", error)

    def _stalled(self, report: str | None) -> None:
        """Keep the time of a run that stands still, and send what is known; the process ends afterwards."""
        self.goodput.stall()
        if report is not None:
            self.alerts.tell_stall(report)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same model and data, exactly where it stopped.

        Raises:
            StorageError: tensors are missing, damaged or of another shape. DataError: the data is another.
            ConfigError: steps had another size.
        """
        step, tokens = checkpoint.meta["step"], checkpoint.meta["tokens"]
        if tokens != step * self.config.batch_tokens:
            raise ConfigError(
                f"the run was begun with {tokens // step} tokens a step",
                where="train.batch_tokens",
                got=self.config.batch_tokens,
                do="Choose another `run`, or give the old value back.",
            )
        state = self._state()
        if not checkpoint.holds("random.cuda"):  # it was made on a CPU: the GPU's stream starts at the seed
            state.pop("random.cuda", None)
        checkpoint.load(state)
        self.optimizer.restore({name.removeprefix("optim."): value for name, value in state.items()})
        torch.set_rng_state(state["random.cpu"])
        if "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.device)
        version, words, gauss = checkpoint.meta["random"]["python"]
        random.setstate((version, tuple(words), gauss))
        self.loader.load_state_dict(checkpoint.meta["loader"])
        self.progress = Progress(**{name: checkpoint.meta[name] for name in vars(self.progress)})
        self.goodput.go_back(checkpoint.meta.get("useful_s"))
        self.spikes.losses.clear()
        self.spikes.losses.extend(checkpoint.meta["losses"])
        saved = LossScale(**checkpoint.meta["loss_scale"])
        self.scale = saved if saved.is_dynamic == self.scale.is_dynamic else self.scale  # begun in another dtype

    def _warn_of_spike(self, loss: float, z: float) -> None:
        self.progress.spikes += 1
        done = {"warn": "", "skip_data": "; no update is made", "rollback": "; going back"}[self.spikes.config.policy]
        what = f"loss {loss:.4g} lies {z:.1f} spreads above the last {len(self.spikes.losses) - 1}{done}"
        logger.warning("warning: step %d: %s", self.progress.step, what)
        self.alerts.tell("spike", what)

    def _roll_back(self, loss: float) -> bool:
        """Go back to the newest checkpoint, and on with the data that comes next; return whether there was one."""
        with self.watch.phase("load"):
            self.saver.finish()
            newest = ranks.gather(store.newest(self.saver.folder) if self.parallel.rank == 0 else None)[0]
        progress = self.progress
        if newest is None or len(progress.passed_over) >= self.spikes.config.most_rollbacks:
            why = "there is no checkpoint yet" if newest is None else f"{len(progress.passed_over)} times is enough"
            logger.warning("warning: step %d: not going back: %s", progress.step, why)
            return False
        data, losses = self.loader.state_dict(), list(self.spikes.losses)[:-1]
        with self.watch.phase("load"):
            self.resume(store.open_checkpoint(newest))
        passed = {"spike": progress.step, "loss": loss, "from": self.loader.state_dict()["taken"], "to": data["taken"]}
        self.loader.load_state_dict(data)
        self.spikes.losses.extend(losses[len(self.spikes.losses) :])
        self.progress.spikes = progress.spikes
        self.progress.passed_over = [*progress.passed_over, passed]
        logger.warning("back at step %d; rows passed over: %s → %s", self.progress.step, passed["from"], passed["to"])
        return True

    def _loss(self, hidden: Tensor, batch: Batch, count: Tensor) -> Tensor:
        outputs = self.parallel.run.score(hidden, batch.labels, self.objective.coefficients(batch))
        self.meter.add(outputs, batch)
        return self.objective.loss(outputs, batch) * (self.scale.value / count)

    def _sums(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and gradient norm of the whole step, in one collective, and without the loss scale."""
        mine = loss.double() if self.parallel.counts else torch.zeros_like(loss, dtype=torch.float64)
        squares = squared_norm(self.parameters, self.parallel.layout.world_size)
        loss, squares = self.parallel.total(torch.stack([mine, squares.to(mine.device)]), counted=True).unbind()
        return loss / self.scale.value, squares.sqrt() / self.scale.value

    def _skip(self, loss: Tensor, norm: Tensor, count: Tensor) -> None:
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        why = f"loss {float(loss):.3g}, gradient norm {float(norm):.3g}" if count > 0 else "nothing to train on in it"
        logger.warning("warning: step %d skipped: %s", self.progress.step, why)
        self.alerts.tell("skipped", f"no update was made: {why}")
        if self.progress.skipped_in_a_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"{self.progress.skipped_in_a_row} steps in a row were skipped, up to {self.progress.step} ({why})",
                where=self.run,
                do="Lower optim.lr or lengthen schedule.warmup_ratio; checkpoints up to here are untouched.",
            )

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _record(self, file: MetricsFile | None, metrics: Metrics) -> None:
        self.metrics |= metrics
        if file is None:
            return
        file.write(self.progress.step, metrics)
        for tracker in self.trackers:
            tracker.write(self.progress.step, metrics)

    def _state(self) -> dict[str, Tensor]:
        """Return every tensor of the run's state by its logical name."""
        state = {f"model.{name}": p.detach() for name, p in self.parallel.named_parameters()}
        state |= {f"optim.{name}": value for name, value in self.optimizer.named_state().items()}
        state["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state


def _python_random_state() -> list[Any]:
    version, words, gauss = random.getstate()
    return [version, list(words), gauss]
