"""Length and cut of a run: how many steps, of how many tokens, in which micro-batches."""

from __future__ import annotations

from internlm.config import require_positive, section
from internlm.errors import ConfigError


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
        if self.batch_tokens > self.tokens:
            raise ConfigError(
                f"one step is more than the whole budget, train.tokens {self.tokens}",
                where="train.batch_tokens",
                got=self.batch_tokens,
            )
        if not self.max_grad_norm >= 0:
            raise ConfigError("must not be negative", where="train.max_grad_norm", got=self.max_grad_norm)

    def micro_rows(self, seq_len: int, data_ranks: int) -> int:
        """Return the rows of a micro-batch on each of `data_ranks` ranks that see different rows of `seq_len` tokens.

        Raises:
            ConfigError: the rows of a step cannot be cut so.
        """
        rows = self.batch_tokens // seq_len
        if self.batch_tokens % seq_len:
            raise ConfigError(
                f"is not a multiple of data.seq_len {seq_len}", where="train.batch_tokens", got=self.batch_tokens
            )
        if rows % data_ranks:
            raise ConfigError(
                f"{self.batch_tokens} tokens are {rows} rows, which do not divide over {data_ranks} ranks",
                where="train.batch_tokens",
            )
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
