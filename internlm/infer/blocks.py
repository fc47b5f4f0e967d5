"""Which blocks of the cache belong to whom: plain book-keeping, no tensors.

A block holds the keys and values of `size` neighbouring tokens of a text. A text has a table of blocks; texts that
begin alike share the blocks that are full and equal. A block that nobody uses keeps what it holds until it is needed:
a text that begins in the same way later finds it.

    empty ──take──▶ used ──release──▶ idle (content known) or empty
                     ▲                  │
                     └────match─────────┘          idle, unused for the longest time ──take──▶ used

Blocks of a text lie side by side where there is room, so that it can be read as one slice; where a kernel reads them
wherever they are, the next empty ones are taken, at no cost (of 263,000 blocks a place to grow in costs 24 ms a text).
A block is known by its own tokens and the block before it, compared exactly: no hash can collide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

Node = tuple[Hashable, tuple[int, ...]]
"""The number of the block before (or the kind of text, for a first block), and the tokens."""


class Blocks:
    """The blocks of one cache.

    Args:
        count: how many there are.
        size: tokens of a block.
        share: whether texts that begin alike share.
        grow: whether a text is laid where it can grow.
    """

    def __init__(self, count: int, size: int, *, share: bool = True, grow: bool = True) -> None:
        self.count, self.size, self.share, self.grow = count, size, share, grow
        self._last = -1  # the block that was taken last
        self._users = [0] * count
        self._empty = set(range(count))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one that goes first comes first
        self._known: dict[Node, int] = {}
        self._node_of: dict[int, Node] = {}
        self._number_of: dict[int, int] = {}
        self._numbers = 0
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

        Args:
            tokens: the text.
            kind: texts of different kinds share nothing (such as those with other rotations).
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
        """Return blocks for use, or None where there are not so many.

        Args:
            wanted: how many.
            after: the text's last block; theirs should follow it.
            hint: blocks that the text may need in all: it is laid where it can grow.
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
        """Give back the blocks of a text. Its end is forgotten before its beginning, which others may share."""
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
        """Make the full blocks of a text known to others.

        Args:
            table: its blocks.
            tokens: the text; the first len(table) · size tokens at most are looked at.
            done: tokens whose keys and values are there.
            kind: as of `match`.
        """
        if not self.share:
            return
        full = done // self.size
        before: Hashable = ("kind", kind)
        first = full
        while first and table[first - 1] not in self._node_of:  # what is known already is left out
            first -= 1
        if first:
            before = self._number_of[table[first - 1]]
        for index in range(first, full):
            node = (before, tuple(tokens[index * self.size : (index + 1) * self.size]))
            known = self._known.get(node)
            if known is None:
                known = table[index]
                self._known[node] = known
                self._node_of[known] = node
                self._numbers += 1
                self._number_of[known] = self._numbers
            before = self._number_of[known]

    def runs(self, table: Sequence[int], tokens: int) -> list[tuple[int, int]]:
        """Return where the first so many tokens of a text lie: (first slot, last slot + 1) of each stretch."""
        runs: list[tuple[int, int]] = []
        for block in table[: self.needed(tokens)]:
            if runs and runs[-1][1] == block * self.size:
                runs[-1] = (runs[-1][0], (block + 1) * self.size)
            else:
                runs.append((block * self.size, (block + 1) * self.size))
        beyond = self.needed(tokens) * self.size - tokens
        if runs:
            runs[-1] = (runs[-1][0], runs[-1][1] - beyond)
        return runs

    def forget(self) -> None:
        """Forget what idle blocks hold."""
        for block in list(self._idle):
            self._forget(block)

    def disown(self, table: Sequence[int]) -> None:
        """Let nobody else find what the blocks of a text hold: it is not to be trusted."""
        for block in table:
            if block in self._node_of:
                del self._known[self._node_of.pop(block)]
                del self._number_of[block]

    def check(self) -> None:
        """Assert that every block is in one place."""
        used = {block for block, users in enumerate(self._users) if users}
        assert not used & self._empty, "a used block is not empty"
        assert not used & set(self._idle), "a used block is not idle"
        assert not self._empty & set(self._idle), "an idle block is not empty"
        assert len(used) + len(self._empty) + len(self._idle) == self.count, "no block is lost"
        assert set(self._known.values()) == set(self._node_of) == set(self._number_of), (
            "what is known is known both ways"
        )
        assert not self._empty & set(self._node_of), "an empty block holds nothing known"

    def _forget(self, block: int) -> None:
        del self._idle[block]
        del self._known[self._node_of.pop(block)]
        del self._number_of[block]
        self._empty.add(block)

    def _next(self) -> int:
        """Take the next empty block, going round: what is taken at once lies side by side as long as there is room."""
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
