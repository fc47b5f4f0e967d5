"""Blocks are conserved, shared where texts begin alike, and laid side by side."""

from __future__ import annotations

import random
import time

import pytest

from internlm.infer.blocks import Blocks
from tests.infer.engines import check_blocks


def fill(blocks: Blocks, tokens: list[int], kind: object = None) -> list[int]:
    """Give a text its blocks, as if all of it were computed."""
    table = blocks.match(tokens, kind)
    more = blocks.take(blocks.needed(len(tokens)) - len(table), table[-1] if table else None)
    assert more is not None
    table += more
    blocks.publish(table, tokens, len(tokens), kind)
    return table


def test_texts_that_begin_alike_share_full_blocks() -> None:
    blocks = Blocks(16, 4)
    first = fill(blocks, list(range(10)))
    second = fill(blocks, [*range(8), 50, 51])
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert blocks.free == 16 - 4
    check_blocks(blocks)


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    blocks = Blocks(16, 4)
    fill(blocks, list(range(8)))
    assert len(blocks.match(list(range(8)))) == 1
    assert len(blocks.match(list(range(9)))) == 2


def test_what_is_released_is_found_again_until_its_room_is_needed() -> None:
    blocks = Blocks(4, 4)
    table = fill(blocks, list(range(12)))
    blocks.release(table)
    assert blocks.free == 4
    assert blocks.match(list(range(12))) == table[:2]
    blocks.release(table[:2])
    other = blocks.take(2)
    assert other is not None
    check_blocks(blocks)
    # The end of the old text went first: its beginning is there still.
    assert blocks.match([*range(12), 99]) == table[:2]


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    blocks = Blocks(4, 2)
    table = blocks.take(3)
    assert table is not None
    blocks.publish(table, range(8), 6)
    blocks.release(table)
    assert blocks.take(2) is not None, "one block that is empty, and one of the text's"
    assert blocks.match(range(8)) == table[:2]


def test_texts_of_different_kinds_share_nothing() -> None:
    blocks = Blocks(16, 4)
    fill(blocks, list(range(10)), kind="a")
    assert blocks.match(list(range(10)), "b") == []
    assert len(blocks.match(list(range(10)), "a")) == 2


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    blocks = Blocks(16, 2)
    fill(blocks, [1, 2, 7, 8, 0])
    assert blocks.match([3, 4, 7, 8, 0]) == []


def test_what_is_not_to_be_trusted_is_not_found() -> None:
    blocks = Blocks(16, 4)
    table = fill(blocks, list(range(10)))
    blocks.disown(table)
    assert blocks.match(list(range(10))) == []
    blocks.release(table)
    check_blocks(blocks)
    assert blocks.free == 16


def test_texts_lie_in_one_stretch_while_there_is_room() -> None:
    blocks = Blocks(32, 4)
    tables = [blocks.take(2, hint=8) for _ in range(4)]
    for _ in range(6):
        for table in tables:
            assert table is not None
            more = blocks.take(1, table[-1])
            assert more is not None
            table += more
    for table in tables:
        assert table is not None
        assert len(blocks.runs(table, 32)) == 1, "every text may grow to its hint in place"


def test_runs_end_with_the_text() -> None:
    blocks = Blocks(8, 4)
    assert blocks.runs([2, 3, 6], 9) == [(8, 16), (24, 25)]
    assert blocks.runs([2, 3, 6], 8) == [(8, 16)]
    assert blocks.runs([2, 3], 5) == [(8, 13)]


def test_more_than_there_is_cannot_be_taken() -> None:
    blocks = Blocks(4, 4)
    assert blocks.take(5) is None
    assert blocks.free == 4


def test_where_a_kernel_reads_blocks_anywhere_a_text_lies_together_as_it_comes_and_costs_nothing() -> None:
    """Of as many blocks as a large GPU has: looking for a place to grow in took 20 ms a text."""
    blocks = Blocks(2**18, 32, grow=False)
    begun = time.perf_counter()
    tables = [blocks.take(8, hint=1024) for _ in range(256)]
    for table in tables[::2]:
        assert table is not None
        assert len(blocks.runs(table, 8 * 32)) == 1
        blocks.release(table)
    assert time.perf_counter() - begun < 2
    check_blocks(blocks)


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_lost_or_used_twice_whatever_happens(seed: int) -> None:
    dice = random.Random(seed)
    size = dice.choice([1, 3, 4])
    blocks = Blocks(dice.randrange(4, 24), size, share=dice.random() < 0.8, grow=seed % 2 == 0)
    texts: dict[int, tuple[list[int], list[int]]] = {}
    content: dict[int, tuple[int, ...]] = {}
    for number in range(300):
        action = dice.random()
        if action < 0.4:
            tokens = [dice.randrange(2) for _ in range(dice.randrange(1, 5 * size))]
            table = blocks.match(tokens)
            for index, block in enumerate(table):
                assert content[block] == tuple(tokens[: (index + 1) * size]), "what is found is the text's beginning"
            more = blocks.take(blocks.needed(len(tokens)) - len(table), table[-1] if table else None)
            if more is None:
                blocks.release(table)
                continue
            for index, block in enumerate([*table, *more]):
                content[block] = tuple(tokens[: (index + 1) * size])
            table += more
            assert all(block not in other for block in more for _, other in texts.values()), "a new block is nobody's"
            blocks.publish(table, tokens, dice.randrange(len(tokens) + 1))
            texts[number] = tokens, table
        elif texts:
            tokens, table = texts.pop(dice.choice(list(texts)))
            if action < 0.5:
                blocks.disown(table)
            blocks.release(table)
        check_blocks(blocks)
    for _, table in texts.values():
        blocks.release(table)
    check_blocks(blocks)
    assert blocks.free == blocks.count
