"""Documents → rows of T tokens, isolated from each other. Pure functions of (lengths, T, seed, source, epoch).

`split`, for pre-training: the documents, in a new order every epoch, are laid end to end and cut every T tokens. The
label of a row's last token is the token after the cut, if the document goes on: every token but the first of each
document is a label once per epoch. What follows a cut starts again at position 0 and does not see what stood before.

`whole`, for tuning: each document goes into the fullest row that has room for all of it (best fit). One of n tokens
needs n − 1 places, its last token being only a label. Longer ones are cut to T + 1 tokens, and counted.
"""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

import numpy as np

from internlm.data.shards import Shards

PackKind = Literal["split", "whole"]


class PackedRow(NamedTuple):
    """One row, each [T]; see Batch."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    weights: np.ndarray


class Packing:
    """The rows of one epoch of one source."""

    def __init__(self, shards: Shards, seq_len: int, kind: PackKind, order: np.ndarray) -> None:
        """Plan the rows of T = `seq_len` tokens, of the documents in this order [S]."""
        self.shards, self.seq_len, self.order = shards, seq_len, order
        lengths = shards.lengths[order]
        self.truncated_tokens = 0
        self.starts: np.ndarray | None = None
        self.rows: list[list[int]] = []
        if kind == "split":
            self.starts = np.concatenate([[0], np.cumsum(lengths)])
            # The last token of the stream is only ever a label: a row for it alone would train nothing.
            self.num_rows = max(1, -(-(int(self.starts[-1]) - 1) // seq_len))
        else:
            self.truncated_tokens = int(np.maximum(lengths - seq_len - 1, 0).sum())
            self.rows = best_fit(np.clip(lengths - 1, 1, seq_len), seq_len)
            self.num_rows = len(self.rows)

    def row(self, index: int) -> PackedRow:
        """Return one row."""
        tokens, labels, positions, documents = np.zeros((4, self.seq_len), np.int64)
        row = PackedRow(tokens, labels, positions, documents, np.zeros(self.seq_len, np.float32))
        documents.fill(-1)
        at = 0
        for number, (document, start, stop) in enumerate(self._pieces(index)):
            ids, mask = self.shards.document(document)
            size = stop - start
            labels = ids[start + 1 : stop + 1]  # one shorter than the piece where the document ends
            place, label_place = slice(at, at + size), slice(at, at + len(labels))
            row.tokens[place] = ids[start:stop]
            row.labels[label_place] = labels
            row.positions[place] = np.arange(size)
            row.documents[place] = number
            row.weights[label_place] = 1.0 if mask is None else mask[start + 1 : stop + 1]
            at += size
        return row

    def _pieces(self, index: int) -> list[tuple[int, int, int]]:
        """Return the (document, first token, last token + 1) that make a row."""
        if self.starts is None:
            # The last token of a document is a label only; a document of one token still needs its place.
            sizes = [(int(self.order[i]), int(self.shards.lengths[self.order[i]])) for i in self.rows[index]]
            return [(document, 0, min(length, max(1, length - 1), self.seq_len)) for document, length in sizes]
        begin, end = index * self.seq_len, min((index + 1) * self.seq_len, int(self.starts[-1]))
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        last = int(np.searchsorted(self.starts, end, side="left"))
        pieces = []
        for i in range(first, last):
            start, stop = int(self.starts[i]), int(self.starts[i + 1])
            if max(begin, start) < min(end, stop):
                pieces.append((int(self.order[i]), max(begin, start) - start, min(end, stop) - start))
        return pieces


def shuffled(count: int, seed: int, source: str, epoch: int) -> np.ndarray:
    """Return a permutation of `count` things, of (seed, source, epoch) alone."""
    key = np.random.SeedSequence([seed, zlib.crc32(source.encode()), epoch])
    return np.random.Generator(np.random.Philox(key)).permutation(count)


def best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Return rows of indices whose sizes add up to at most `capacity`, each put where least room is left over.

    Every size lies between 1 and `capacity`. O(N · capacity / 64): a bit set says which amounts of room are open.
    """
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left → rows
    rooms = 0  # bit r is set when some row has room r
    rows: list[list[int]] = []
    for item, size in enumerate(sizes.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if room > size:
            if not open_rows[room - size]:
                rooms |= 1 << (room - size)
            open_rows[room - size].append(row)
    return rows
