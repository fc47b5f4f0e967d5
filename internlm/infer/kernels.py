"""Triton kernels of the engine; `paged` calls them. Only imported where Triton is there.

They run on NVIDIA GPUs, and, with TRITON_INTERPRET=1 set before Triton is imported, slowly on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_split(
    q, keys, values, key_scales, value_scales, tables, lengths, out, mass,
    scale, q_row, q_head, kv_head, kv_slot, scale_head, table_row,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDED: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Attend the queries of one text that share a key head to one part of its keys: a grid of (B, K, SPLITS).

    Writes the part's output [B, H, SPLITS, E], divided by its denominator, and the logarithm of that [B, H, SPLITS].
    ROWS and COLUMNS are GROUP and WIDTH as powers of two, and 16 at least, which products want. DOT is the dtype of
    their factors. Also one query is multiplied as sixteen rows: the time goes into reading, and for a plain sum of
    products the compiler reads one number at a time.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    length = tl.load(lengths + row)
    part = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    start = split * part
    stop = tl.minimum(start + part, length)
    members, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    wide = columns < WIDTH
    ours = (members < GROUP)[:, None] & wide[None, :]
    first_head = head * GROUP
    queries = tl.load(q + row * q_row + (first_head + members)[:, None] * q_head + columns[None, :], ours, other=0.0)
    queries = queries.to(DOT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(start, stop, TILE):
        places = begin + tl.arange(0, TILE)
        inside = places < stop
        block = tl.load(tables + row * table_row + places // BLOCK, inside, other=0)
        slots = block.to(tl.int64) * BLOCK + places % BLOCK
        at = head.to(tl.int64) * kv_head + slots[:, None] * kv_slot + columns[None, :]
        there = inside[:, None] & wide[None, :]
        k = tl.load(keys + at, there, other=0)  # [TILE, E]
        k = k.to(tl.float32).to(DOT) if ROUNDED else k.to(DOT)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if ROUNDED:
            scores *= tl.load(key_scales + head * scale_head + slots, inside, other=0.0)[None, :]
        scores = tl.where(inside[None, :], scores * scale, float("-inf"))  # [ROWS, TILE]
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p, 1)
        if ROUNDED:
            p *= tl.load(value_scales + head * scale_head + slots, inside, other=0.0)[None, :]
        v = tl.load(values + at, there, other=0)
        v = v.to(tl.float32).to(DOT) if ROUNDED else v.to(DOT)
        sums = sums * shrink[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
        top = higher
    # A part without keys: no share in the whole.
    empty = total == 0
    result = tl.where(empty[:, None], 0.0, sums / tl.where(empty, 1.0, total)[:, None])
    place = (row * heads + first_head + members) * SPLITS + split
    tl.store(out + place[:, None] * WIDTH + columns[None, :], result.to(out.dtype.element_ty), ours)
    tl.store(mass + place, tl.where(empty, float("-inf"), top + tl.log(total)), members < GROUP)


@triton.jit
def merge(parts, mass, out, SPLITS: tl.constexpr, SPREAD: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Weigh the parts [N, SPLITS, E] by their denominators [N, SPLITS] into out [N, E]: a grid of (N,).

    SPREAD is SPLITS, COLUMNS is WIDTH as a power of two. A text without any part gives zeros.
    """
    row = tl.program_id(0)
    splits, columns = tl.arange(0, SPREAD), tl.arange(0, COLUMNS)
    masses = tl.load(mass + row * SPLITS + splits, splits < SPLITS, other=float("-inf"))
    top = tl.max(masses, 0)
    weights = tl.where(masses == float("-inf"), 0.0, tl.exp(masses - top))
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0, 1.0, total)
    there = (splits < SPLITS)[:, None] & (columns < WIDTH)[None, :]
    part = tl.load(parts + (row * SPLITS + splits)[:, None] * WIDTH + columns[None, :], there, other=0.0)
    result = tl.sum(part * weights[:, None], 0)
    tl.store(out + row * WIDTH + columns, result.to(out.dtype.element_ty), columns < WIDTH)
