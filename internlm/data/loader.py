"""The per-rank iterator over packed rows. Its state is how many rows each source has given.

Row i of the run is a pure function of the recipe: the mixture names its source, the source's packing of that epoch
holds the row. Rank r of D takes rows r, r + D, r + 2D … of each step: any number of ranks sees the same rows, in order.

The source of row i is the one that is furthest behind its share, weight · (i + 1) − rows taken, so that after any
number of rows every source is near it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any

import numpy as np
import torch

from internlm.config import section
from internlm.data.batch import Batch
from internlm.data.pack import PackedRow, Packing, PackKind, shuffled
from internlm.data.shards import Shards
from internlm.errors import ConfigError, DataError
from internlm.log import warn_once
from internlm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@section
class SourceConfig:
    """One source of training or validation data."""

    path: str
    """Folder of shards, from `internlm data tokenize`."""
    weight: float | None = None
    """Share of the rows, relative to the other sources' weights. None for all: in proportion to their tokens."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ConfigError("must be a positive number", where=f"weight of {self.path}", got=self.weight)


@section
class DataConfig:
    """What is trained on and validated with."""

    train: dict[str, SourceConfig]
    """Training sources by name."""
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    """Validation sources by name; each is scored by itself."""
    seq_len: int
    """Tokens per row."""
    pack: PackKind = "split"
    """split: documents cut at row ends, nothing lost (pre-training). whole: documents kept whole (tuning)."""
    seed: int = 1
    """Decides the order of the documents."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("needs at least one source", where="data.train")
        if self.seq_len < 2:
            raise ConfigError("must be at least 2", where="data.seq_len", got=self.seq_len)
        if self.seed < 0:
            raise ConfigError("must be 0 or more", where="data.seed", got=self.seed)
        if len({source.weight is None for source in self.train.values()}) > 1:
            raise ConfigError("give every source a weight, or none", where="data.train")


class Source:
    """A source that starts again in a new order when it is used up."""

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.data = name, data
        self.shards = Shards.open(config.path)
        self.rewind()
        _tell_truncated(name, self.packing)

    def row(self, number: int) -> PackedRow:
        """Return a row by its number in the run, which must not fall below an epoch."""
        while number >= self.first_row + self.packing.num_rows:
            self.first_row += self.packing.num_rows
            self._pack(self.epoch + 1)
        return self.packing.row(int(self.order[number - self.first_row]))

    def rewind(self) -> None:
        """Go back to the first epoch."""
        self.first_row = 0
        self._pack(0)

    def _pack(self, epoch: int) -> None:
        """Pack the documents of an epoch, in its order, and draw the order of its rows.

        Without, a step's gradient might be that of one long document (the quickstart's loss after 180 steps was 6.5,
        with it 4.7).
        """
        self.epoch = epoch
        documents = shuffled(self.shards.num_documents, self.data.seed, self.name, epoch)
        self.packing = Packing(self.shards, self.data.seq_len, self.data.pack, documents)
        self.order = shuffled(self.packing.num_rows, self.data.seed, f"{self.name}/rows", epoch)


class Mixture:
    """Draws source after source."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Start before the first row."""
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self.taken = [0] * len(weights)

    def draw(self) -> tuple[int, int]:
        """Return (source, its rows so far) for the next row."""
        rows = sum(self.taken) + 1
        behind = [share * rows - taken for share, taken in zip(self.shares, self.taken, strict=True)]
        source = behind.index(max(behind))
        self.taken[source] += 1
        return source, self.taken[source] - 1


class Loader:
    """Draws the rows of a run for one rank."""

    def __init__(self, config: DataConfig, rank: int = 0, world_size: int = 1) -> None:
        """Open every source; raise DataError where they are not of one tokenizer."""
        self.config, self.rank, self.world_size = config, rank, world_size
        self._sources = [Source(name, source, config) for name, source in config.train.items()]
        self.sources = tuple(config.train)
        self._validation = {name: Shards.open(source.path) for name, source in config.validation.items()}
        first = self._sources[0]
        self.fingerprint, self.vocab_size = first.shards.fingerprint, first.shards.vocab_size
        """Of the tokenizer."""
        for name, shards in [*((source.name, source.shards) for source in self._sources), *self._validation.items()]:
            if shards.fingerprint != self.fingerprint:
                raise DataError(
                    f"sources {first.name!r} and {name!r} were tokenized with different tokenizers",
                    where="data",
                    do="Tokenize all sources with the same tokenizer.",
                )
        templates = {source.name: source.shards.template for source in self._sources if source.shards.template}
        if len(set(templates.values())) > 1:
            logger.warning("warning: chat templates differ between sources: %s; the first is kept", templates)
        self.template = next(iter(templates.values()), None)
        """Chat template of the first source that has one."""
        self._mixture = self._fresh_mixture()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What the ids mean. Read once: the folder may be gone, or another, when a checkpoint is written."""
        path = self._sources[0].shards.tokenizer_path
        found = Tokenizer.load(path)
        if found.fingerprint != self.fingerprint:
            raise DataError(
                f"is not the tokenizer of the ids beside it ({found.fingerprint[:12]}, not {self.fingerprint[:12]})",
                where=path,
                do="Tokenize the data again.",
            )
        return found

    def next_batch(self, rows: int) -> Batch:
        """Return this rank's part of the next step, which has `rows`, a multiple of `world_size`, over all ranks."""
        assert rows % self.world_size == 0, "the trainer checks that rows divide over ranks"
        drawn = [self._mixture.draw() for _ in range(rows)]
        mine = drawn[self.rank :: self.world_size]
        return stack([(source, self._sources[source].row(number)) for source, number in mine], self.sources)

    def validation_batches(
        self, name: str, rows: int, limit_rows: int | None = None, share: tuple[int, int] | None = None
    ) -> Iterator[Batch]:
        """Yield one rank's part of a validation source: every token is scored once, by one of the ranks.

        Args:
            name: of the source.
            rows: per batch.
            limit_rows: so many rows, spread over the source; None: all.
            share: (rank, ranks): all ranks get equally many batches of `rows` rows, of which those that are too many
                have nothing to score. None: everything; the last batch may have fewer rows.
        """
        rank, ranks = share or (0, 1)
        shards = self._validation[name]
        packing = Packing(shards, self.config.seq_len, self.config.pack, np.arange(shards.num_documents))
        _tell_truncated(name, packing)
        count = min(packing.num_rows, limit_rows or packing.num_rows)
        chosen = [i * packing.num_rows // count for i in range(count)]
        for first in range(0, count, rows * ranks):
            mine = chosen[first : first + rows * ranks][rank::ranks]
            extra = 0 if share is None else rows - len(mine)
            batch = stack([(0, packing.row(i)) for i in (*mine, *[chosen[0]] * extra)], (name,))
            batch.weights[len(mine) :] = 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values that fit any number of ranks."""
        return {
            "taken": dict(zip(self.sources, self._mixture.taken, strict=True)),
            # With other shares the mixture would first make up for all rows drawn before: many of one source alone.
            "shares": dict(zip(self.sources, self._mixture.shares, strict=True)),
            "seed": self.config.seed,
            "seq_len": self.config.seq_len,
            "pack": self.config.pack,
            "sources": {s.name: [s.shards.num_documents, s.shards.num_tokens] for s in self._sources},
            "shards_sha256": {s.name: s.shards.digest for s in self._sources},
            "tokenizer": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where a state says; raise DataError with what differs where it is of other data."""
        own = self.state_dict()
        before = {"shards_sha256": own["shards_sha256"]} | state  # older ones do not say
        differing = [found for key in own if key != "taken" for found in _differences(before.get(key), own[key], key)]
        if differing:
            raise DataError(
                f"the saved position is of other data: {'; '.join(differing)}",
                where="data",
                do="Give the old data back, or start another run; its `init_from` can name this one.",
            )
        for source in self._sources:
            source.rewind()
        self._mixture = self._fresh_mixture()
        self._mixture.taken = [state["taken"][name] for name in self.sources]

    def _fresh_mixture(self) -> Mixture:
        weights = [source.weight for source in self.config.train.values()]
        return Mixture([w or float(s.shards.num_tokens) for w, s in zip(weights, self._sources, strict=True)])


def _differences(before: Any, now: Any, place: str) -> list[str]:
    """Return what differs between two values, in words, by key."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = {**before, **now}
        return [found for key in keys for found in _differences(before.get(key), now.get(key), f"{place}.{key}")]
    return [] if before == now else [f"{place} was {before!r}, is {now!r}"]


def stack(rows: list[tuple[int, PackedRow]], sources: tuple[str, ...]) -> Batch:
    """Return rows, each with the index of its source, as one batch."""
    columns = (torch.from_numpy(np.stack(column)) for column in zip(*(row for _, row in rows), strict=True))
    tokens, labels, positions, documents, weights = columns
    source = torch.tensor([source for source, _ in rows])
    return Batch(tokens, labels, positions, documents, weights, source, sources)


def _tell_truncated(name: str, packing: Packing) -> None:
    if packing.truncated_tokens:
        lost, length = packing.truncated_tokens, packing.seq_len
        warn_once(logger, f"source {name}: {lost} tokens beyond data.seq_len {length} are cut off")


def label_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many UTF-8 bytes each token stands for, int64 [V]; special tokens have none."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], dtype=np.int64)
