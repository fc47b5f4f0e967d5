"""One optimizer step: data, count, forward and backward, clip, update.

    loss of a step = Σ over all micro-batches of objective.loss / Σ of objective.count

so neither loss nor gradient depends on how the step was cut, into micro-batches or over ranks. Every rank takes it;
what they sum is the count before the step, and the squared norm, by which all clip, and the loss after it. What goes
around it, logs, validation and checkpoints, is `trainer`'s.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.store import Checkpoint
from internlm.config import require, require_positive, section
from internlm.data.batch import Batch
from internlm.data.loader import Loader
from internlm.errors import ConfigError, TrainingError
from internlm.optim.optimizer import Optimizer, scale_to_norm, squared_norm
from internlm.optim.schedule import ScheduleConfig, rate
from internlm.parallel.apply import Parallel
from internlm.train.metrics import Meter, Metrics
from internlm.train.objective import Objective
from internlm.train.stop import Reason, Stop
from internlm.train.watch.alerts import Alerts
from internlm.train.watch.goodput import Goodput
from internlm.train.watch.spikes import Spikes

logger = logging.getLogger(__name__)

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
"""Good steps after which a larger scale is tried."""
LEAST_SCALE = 1.0
"""A model whose gradients overflow at this scale is broken: such steps count as skipped."""


@section
class TrainConfig:
    """Length and cut of a run."""

    tokens: int
    """Budget: positions trained on, padding included. Rounded up to whole steps."""
    batch_tokens: int
    """Positions per optimizer step, over all ranks."""
    micro_batch_rows: int | None = None
    """Rows per forward and backward on one device; None: the whole step at once. Changes memory and speed only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: measured only."""
    max_skipped_steps: int = 10
    """Steps with a non-finite loss or gradient are skipped; so many in a row end the run."""
    log_every_steps: int = 10
    """Steps between two logged lines."""
    trace_every_steps: int | None = 1000
    """Steps between two that are traced, on several ranks, to know what communication costs: the second is the first. A
    traced step is slower. None: no step is."""

    def __post_init__(self) -> None:
        require_positive(self, "train", "tokens", "batch_tokens", "micro_batch_rows")
        require_positive(self, "train", "max_skipped_steps", "log_every_steps", "trace_every_steps")
        what = f"one step is more than the whole budget, train.tokens {self.tokens}"
        require(self, "train", ("batch_tokens",), lambda tokens: tokens <= self.tokens, what)
        if not self.max_grad_norm >= 0:
            raise ConfigError("must not be negative", where="train.max_grad_norm", got=self.max_grad_norm)

    def micro_rows(self, seq_len: int, data_ranks: int) -> int:
        """Return the rows of a micro-batch on each of `data_ranks` ranks that see different rows of `seq_len` tokens.

        Raises:
            ConfigError: the rows of a step cannot be cut so.
        """
        rows = self.batch_tokens // seq_len
        if self.batch_tokens % seq_len:
            what = f"is not a multiple of data.seq_len {seq_len}"
            raise ConfigError(what, where="train.batch_tokens", got=self.batch_tokens)
        if rows % data_ranks:
            what = f"{self.batch_tokens} tokens are {rows} rows, which do not divide over {data_ranks} ranks"
            raise ConfigError(what, where="train.batch_tokens")
        own = rows // data_ranks
        micro = self.micro_batch_rows or own
        if own % micro:
            what = f"does not divide the {own} rows of a step on each rank"
            raise ConfigError(what, where="train.micro_batch_rows", got=micro)
        return micro

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.tokens // self.batch_tokens)


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
class LossScale:
    """The factor that keeps float16 gradients from becoming zero, found while training (Micikevicius et al. 2018).

        loss · scale → backward → gradients / scale        not finite: skip the step, halve the scale
                                                           2,000 good steps in a row: double it

    With every other dtype the scale is 1 and stays so. Saved with every checkpoint.
    """

    value: float = 1.0
    """What losses are multiplied by before backward, and gradients divided by after: a power of two."""
    good_steps: int = 0
    """Since the last change."""
    is_dynamic: bool = False
    """Whether steps change it."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """Return the scale a run in this dtype begins with."""
        return cls(FIRST_SCALE, 0, True) if dtype == torch.float16 else cls()

    def update(self, is_finite: bool) -> bool:
        """Learn how a step went; return whether it failed for no other reason than too large a scale.

        `is_finite` is about sums over all ranks: one rank's overflow is everybody's, and scales never part.
        """
        if not self.is_dynamic:
            return False
        if is_finite:
            self.good_steps += 1
            if self.good_steps == GROWTH_STEPS:
                self.value, self.good_steps = self.value * 2, 0
            return False
        was = self.value
        self.value, self.good_steps = max(LEAST_SCALE, was / 2), 0
        return was > LEAST_SCALE


@dataclass
class Stepper:
    """Takes the steps of a run, and holds all that they change."""

    config: TrainConfig
    schedule: ScheduleConfig
    parallel: Parallel
    objective: Objective
    optimizer: Optimizer
    loader: Loader
    meter: Meter
    scale: LossScale = field(default_factory=LossScale)
    spikes: Spikes = field(default_factory=Spikes)
    goodput: Goodput = field(default_factory=Goodput)
    alerts: Alerts = field(default_factory=Alerts)
    """Tell of a spike or a skipped step."""
    stop: Stop = field(default_factory=lambda: Stop(None))
    """Says, on this rank, why the run is to end after this step."""
    before_update: Callable[[], object] = lambda: None
    """Is called when weights are about to change."""
    way_back: Callable[[], Checkpoint | str] = lambda: "there is no checkpoint yet"
    """Says, at a spike, which checkpoint the run can go back to, or why it cannot. Every rank calls it."""
    progress: Progress = field(default_factory=Progress, init=False)
    back: Checkpoint | None = field(default=None, init=False)
    """Where to go back to, if the loss of the last step was a spike and the recipe wants it."""
    ending: Reason | None = field(default=None, init=False)
    """Why the run ends after this step; the same on all ranks."""

    def __post_init__(self) -> None:
        length = self.loader.config.seq_len
        self.rows = self.config.batch_tokens // length
        self.micro_rows = self.config.micro_rows(length, self.parallel.layout.data)
        self.parameters = [p for _, p in self.parallel.owned_parameters() if p.requires_grad]

    def step(self) -> Metrics:
        """Take one optimizer step; return what only this step knows (learning rate, gradient norm).

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        # 1. Pull the data of the whole step.
        started = time.perf_counter()
        with self.goodput.within("data"):
            batch = self.loader.next_batch(self.rows)
        self.meter.data_wait_s += time.perf_counter() - started
        self.goodput.enter("useful")
        self.meter.add_batch(batch)
        micro_batches = [part.to(self.parallel.device) for part in batch.micro_batches(self.micro_rows)]

        # 2. Know the denominator before anything is computed.
        shares = torch.stack([self.objective.count(part) for part in micro_batches]).double().sum()
        tokens = shares.new_tensor(batch.tokens.numel() - batch.num_padding)
        own = torch.stack([shares, tokens]) * self.parallel.leads
        totals = self.parallel.total(torch.cat([own, own.new_tensor([self.stop.wish()])]))
        count, tokens = totals[:2].unbind()

        # 3. Forward and backward, one micro-batch after the other.
        loss = norm = torch.zeros((), device=self.parallel.device)
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
        self.back = None
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

    def state(self) -> dict[str, Tensor]:
        """Return every tensor of the run's state by its logical name."""
        state = {f"model.{name}": p.detach() for name, p in self.parallel.named_parameters()}
        state |= {f"optim.{name}": value for name, value in self.optimizer.named_state().items()}
        state["random.cpu"] = torch.get_rng_state()
        if self.parallel.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.parallel.device)
        return state

    def meta(self) -> dict[str, Any]:
        """Return the rest of the state, as plain values."""
        version, words, gauss = random.getstate()
        return {
            **vars(self.progress),
            "layout": vars(self.parallel.layout),
            "loss_scale": vars(self.scale),
            "losses": list(self.spikes.losses),
            "loader": self.loader.state_dict(),
            "random": {"python": [version, list(words), gauss]},
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint of the same model and data.

        Raises:
            StorageError: tensors are missing, damaged or of another shape. DataError: the data is another.
            ConfigError: steps had another size.
        """
        meta = checkpoint.fact
        step, tokens = meta("step"), meta("tokens")
        if tokens != step * self.config.batch_tokens:
            raise ConfigError(
                f"the run was begun with {tokens // step} tokens a step",
                where="train.batch_tokens",
                got=self.config.batch_tokens,
                do="Choose another `run`, or give the old value back.",
            )
        version, words, gauss = meta("random", "python")
        progress = Progress(**{name: meta(name) for name in vars(self.progress)})
        position, losses, scale = meta("loader"), meta("losses"), meta("loss_scale")
        state = self.state()
        if "random.cuda" not in checkpoint.index:  # it was made on a CPU: the GPU's stream starts at the seed
            state.pop("random.cuda", None)
        checkpoint.load(state)
        self.optimizer.restore({name.removeprefix("optim."): value for name, value in state.items()})
        torch.set_rng_state(state["random.cpu"])
        if "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.parallel.device)
        random.setstate((version, tuple(words), gauss))
        self.loader.load_state_dict(position)
        self.progress, saved = progress, LossScale(**scale)
        self.spikes.losses.clear()
        self.spikes.losses.extend(losses)
        if saved.is_dynamic == self.scale.is_dynamic:  # else it was begun in another dtype
            self.scale = saved

    def _update(self, loss: Tensor, norm: Tensor, count: Tensor, lr_share: float) -> bool:
        """Update the weights, if this step's numbers are fit for it; return whether they were."""
        is_good = bool(count > 0) and bool((norm + loss).isfinite())
        spike = self.spikes.add(float(loss)) if is_good else None
        updates = is_good if spike is None else self._answer(float(loss), spike)
        if updates:
            scale_to_norm(self.parameters, norm, self.config.max_grad_norm, self.scale.value)
            self.before_update()
            self.optimizer.step(lr_share)
            self.parallel.share()
            self.progress.skipped_in_a_row = 0
        if count > 0 and self.scale.update(is_good):
            logger.info("step %d skipped: loss scale lowered to %g", self.progress.step, self.scale.value)
        elif not is_good:
            self._skip(loss, norm, count)
        return updates

    def _loss(self, hidden: Tensor, batch: Batch, count: Tensor) -> Tensor:
        outputs = self.parallel.run.score(hidden, batch.labels, self.objective.coefficients(batch))
        self.meter.add(outputs, batch)
        return self.objective.loss(outputs, batch) * (self.scale.value / count)

    def _sums(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and gradient norm of the whole step, in one collective, and without the loss scale."""
        mine = loss.double() if self.parallel.counts else torch.zeros_like(loss, dtype=torch.float64)
        squares = squared_norm(self.parameters, self.parallel.layout.world_size)
        loss, squares = self.parallel.total(torch.stack([mine, squares.to(mine.device)])).unbind()
        return loss / self.scale.value, squares.sqrt() / self.scale.value

    def _answer(self, loss: float, z: float) -> bool:
        """Do what the recipe wants at a spike, and tell of it; return whether the step's update is made."""
        self.progress.spikes += 1
        policy, done = self.spikes.config.policy, ""
        if policy == "skip_data":
            self.progress.skipped_steps += 1
            done = "; no update is made"
        elif policy == "rollback":
            way = self.way_back()
            self.back = None if isinstance(way, str) else way
            done = f"; not going back: {way}" if isinstance(way, str) else "; going back"
        what = f"loss {loss:.4g} lies {z:.1f} spreads above the last {len(self.spikes.losses) - 1}{done}"
        logger.warning("warning: step %d: %s", self.progress.step, what)
        self.alerts.tell("spike", what)
        return policy == "warn" or (policy == "rollback" and self.back is None)

    def _skip(self, loss: Tensor, norm: Tensor, count: Tensor) -> None:
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        why = f"loss {float(loss):.3g}, gradient norm {float(norm):.3g}" if count > 0 else "nothing to train on in it"
        logger.warning("warning: step %d skipped: %s", self.progress.step, why)
        self.alerts.tell("skipped", f"no update was made: {why}")
        if self.progress.skipped_in_a_row >= self.config.max_skipped_steps:
            do = "Lower optim.lr or lengthen schedule.warmup_ratio" if count > 0 else "Look at the masks of the data"
            raise TrainingError(
                f"{self.progress.skipped_in_a_row} steps in a row were skipped, up to {self.progress.step} ({why})",
                where="train.max_skipped_steps",
                do=f"{do}; checkpoints up to here are untouched.",
            )
