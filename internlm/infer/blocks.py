"""Which blocks of the cache belong to whom: plain book-keeping, no tensors.

A block holds the keys and values of `size` neighbouring tokens of a text. A text has a table of blocks; texts that
begin alike share those that are full and equal. A block that nobody uses keeps what it holds, for a text that begins
in the same way later, until it is needed.

    empty ──take──▶ used ──release──▶ idle (content known) or empty
                     ▲                  │
                     └────match─────────┘          idle, unused for the longest time ──take──▶ used

Blocks of a text lie side by side where there is room, so that it can be read as one slice; where a kernel reads them
wherever they are, the next empty ones are taken, at no cost (of 263,000 blocks a place to grow in costs 24 ms a text).
A block is known by its own tokens and the block before it, compared exactly: no hash can collide.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence

Node = tuple[Hashable, tuple[int, ...]]
"""The number of the block before (or the kind of text, for a first block), and the tokens."""


class Blocks:
    """The `count` blocks of one cache, of `size` tokens; `grow`: whether a text is laid where it can grow."""

    def __init__(self, count: int, size: int, *, share: bool = True, grow: bool = True) -> None:
        self.count, self.size, self.share, self.grow = count, size, share, grow
        self._last = -1  # the block that was taken last
        self._users = [0] * count
        self._empty = set(range(count))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one that goes first comes first
        self._known: dict[Node, int] = {}
        self._node_of: dict[int, Node] = {}
        self._number_of: dict[int, int] = {}
        self._numbers = itertools.count()
        # Where a text may grow: a wish, kept while there is other room. The block it began with stands for the text.
        self._wish: dict[int, int] = {}
        self._grows_in: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._empty) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Return how many blocks so many tokens fill."""
        return -(-tokens // self.size)

    def match(self, tokens: Sequence[int], kind: Hashable = None) -> list[int]:
        """Return the blocks that hold the beginning of a text, and use them; the last token is never among it.

        Texts of different kinds share nothing (such as those with other rotations).
        """
        found: list[int] = []
        before: Hashable = ("kind", kind)
        for start in range(0, len(tokens) - self.size if self.share else 0, self.size):
            block = self._known.get((before, tuple(tokens[start : start + self.size])))
            if block is None:
                break
            found.append(block)
            before = self._number_of[block]
        for block in found:
            self._users[block] += 1
            self._idle.pop(block, None)
        return found

    def take(self, wanted: int, after: int | None = None, hint: int = 0) -> list[int] | None:
        """Return `wanted` blocks for use, or None where there are not so many.

        They should follow `after`, the text's last block, and leave it room for `hint` blocks in all.
        """
        if wanted > self.free:
            return None
        while len(self._empty) < wanted:
            self._forget(next(iter(self._idle)))
        if not self.grow:
            return [self._next() for _ in range(wanted)]
        taken: list[int] = []
        place = None if after is None else after + 1
        text = None if after is None else self._grows_in.get(after)
        while len(taken) < wanted:
            if place is None or place not in self._empty or self._wish.get(place, text) != text:
                place = text = self._hole(max(hint, wanted - len(taken)))
                self._wish.update({block: place for block in range(place, place + hint) if block in self._empty})
            self._empty.remove(place)
            self._wish.pop(place, None)
            if text is not None:
                self._grows_in[place] = text
            self._users[place] = 1
            taken.append(place)
            place += 1
        return taken

    def release(self, table: Sequence[int]) -> None:
        """Give back the blocks of a text, its end first: others may share its beginning."""
        for block in reversed(table):
            self._users[block] -= 1
            assert self._users[block] >= 0, "a block is given back once for each use"
            text = self._grows_in.pop(block, None)
            if text == block:  # the first of its stretch: the wish ends with it
                self._wish = {place: other for place, other in self._wish.items() if other != text}
            if not self._users[block]:
                if block in self._node_of:
                    self._idle[block] = None
                else:
                    self._empty.add(block)

    def publish(self, table: Sequence[int], tokens: Sequence[int], done: int, kind: Hashable = None) -> None:
        """Make the full blocks of a text known to others, as far as its tokens are `done`."""
        if not self.share:
            return
        first = full = done // self.size
        while first and table[first - 1] not in self._node_of:  # what is known already is left out
            first -= 1
        before: Hashable = self._number_of[table[first - 1]] if first else ("kind", kind)
        for index in range(first, full):
            node = (before, tuple(tokens[index * self.size : (index + 1) * self.size]))
            known = self._known.setdefault(node, table[index])
            if known not in self._node_of:
                self._node_of[known] = node
                self._number_of[known] = next(self._numbers)
            before = self._number_of[known]

    def runs(self, table: Sequence[int], tokens: int) -> list[tuple[int, int]]:
        """Return where the first tokens of a text lie: (first slot, last slot + 1) of each stretch."""
        runs: list[tuple[int, int]] = []
        for block in table[: self.needed(tokens)]:
            if runs and runs[-1][1] == block * self.size:
                runs[-1] = (runs[-1][0], (block + 1) * self.size)
            else:
                runs.append((block * self.size, (block + 1) * self.size))
        beyond = -tokens % self.size
        if runs:
            runs[-1] = (runs[-1][0], runs[-1][1] - beyond)
        return runs

    def forget(self) -> None:
        """Forget what idle blocks hold."""
        for block in list(self._idle):
            self._forget(block)

    def disown(self, table: Sequence[int]) -> None:
        """Let nobody else find what the blocks of a text hold."""
        for block in table:
            if block in self._node_of:
                self._forget(block)

    def _forget(self, block: int) -> None:
        """Let nobody find what a block holds; an idle one is empty then."""
        del self._known[self._node_of.pop(block)]
        del self._number_of[block]
        if block in self._idle:
            del self._idle[block]
            self._empty.add(block)

    def _next(self) -> int:
        """Take the next empty block, going round."""
        place = (self._last + 1) % self.count
        while place not in self._empty:
            place = (place + 1) % self.count
        self._empty.remove(place)
        self._users[place], self._last = 1, place
        return place

    def _hole(self, wanted: int) -> int:
        """Return where the smallest stretch of empty blocks with room for so many begins, else the largest."""
        best: tuple[bool, int, int] | None = None
        start = last = -2
        # Where nobody wishes to grow, unless there is no other room.
        for block in [*sorted(self._empty - self._wish.keys() or self._empty), -1]:
            if block == last + 1:
                last = block
                continue
            if start >= 0:
                length = last - start + 1
                fits = length >= wanted
                rank = (not fits, length if fits else -length, start)
                best = rank if best is None else min(best, rank)
            start = last = block
        assert best is not None, "there is an empty block"
        return best[2]
