"""The blocks that a block mask leaves to attend: which tiles are walked, and what their bits say.

A line, which is a row of blocks or a column, has a list of full blocks and one of partial ones,
both ascending. Where positions may cut full blocks, only those inside of what all of a program's
rows attend are walked without masking (part 1); the others and the partial ones follow (part 2).

``x, p, f`` are the tuples of ``arguments``.
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL = tl.constexpr(-1)  # the slot of a block that has no bits
EMPTY = tl.constexpr(-2)


@triton.jit
def lists_of(x, p, b, h, line, COLUMN: tl.constexpr):
    """Where a line's full entries begin, its partial ones, and where these end."""
    at = x.block_starts + b.to(tl.int64) * p.blocks_b + h.to(tl.int64) * p.blocks_h + 2 * line
    if COLUMN:
        at += p.block_columns
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def blocks_from(x, p, COLUMN: tl.constexpr):
    """The blocks of the entries of rows or columns; their slots are p.block_entries further."""
    if COLUMN:
        return x.block_index + 2 * p.block_entries
    else:
        return x.block_index


@triton.jit
def search(blocks, begin, end, block):
    """The first of the ascending entries begin .. end that is not before a block; end if none."""
    while begin < end:
        middle = (begin + end) // 2
        before = tl.load(blocks + middle) < block
        begin = tl.where(before, middle + 1, begin)
        end = tl.where(before, end, middle)
    return begin


@triton.jit
def entries_of(
    x,
    p,
    f,
    b,
    h,
    line,
    begin,
    end,
    inner_begin,
    inner_end,
    COLUMN: tl.constexpr,
    INSIDE: tl.constexpr = True,
):
    """A line's entries that reach into begin .. end, which are queries where it is a COLUMN.

    Four ends of full ones, of which the middle stretch is part 1 (empty unless INSIDE), and the two
    ends of partial ones.
    """
    first, end_full, last = lists_of(x, p, b, h, line, COLUMN)
    inner, after, partial = first, end_full, end_full
    if f.CUT:
        blocks = blocks_from(x, p, COLUMN)
        if f.HAS_RIGHT if COLUMN else f.HAS_LEFT or f.KEY_MASK:
            first = search(blocks, first, end_full, begin // f.BLOCKS)
            inner = search(blocks, first, end_full, tl.cdiv(inner_begin, f.BLOCKS))
            partial = search(blocks, partial, last, begin // f.BLOCKS)
        end_full = search(blocks, first, end_full, tl.cdiv(end, f.BLOCKS))
        last = search(blocks, partial, last, tl.cdiv(end, f.BLOCKS))
        inner = tl.minimum(inner, end_full)
        after = search(blocks, inner, end_full, inner_end // f.BLOCKS)
    if not INSIDE:
        inner, after = end_full, end_full
    return first, inner, after, end_full, partial, last


@triton.jit
def tiles_in(part: tl.constexpr, entries, f, BLOCK: tl.constexpr):
    """How many tiles a part has."""
    first, inner, after, end_full, partial, last = entries
    if part == 1:
        return (after - inner) * (f.BLOCKS // BLOCK)
    else:
        return (inner - first + end_full - after + last - partial) * (f.BLOCKS // BLOCK)


@triton.jit
def block_tile(part: tl.constexpr, i, entries, x, p, f, BLOCK: tl.constexpr, COLUMN: tl.constexpr):
    """Where tile i of a part begins, and its block's slot: its place among the bits, or FULL."""
    TILES: tl.constexpr = f.BLOCKS // BLOCK
    first, inner, after, end_full, partial, _last = entries
    i = first * 0 + i  # not a number of Python's, as in the interpreter
    entry = i // TILES
    if part == 1:
        entry = inner + entry
    else:
        full = inner - first + end_full - after
        gap = tl.where(entry < inner - first, 0, after - inner)
        entry = tl.where(entry < full, first + entry + gap, partial + entry - full)
    blocks = blocks_from(x, p, COLUMN)
    begin = tl.load(blocks + entry) * f.BLOCKS + i % TILES * BLOCK
    return begin, tl.load(blocks + p.block_entries + entry)


@triton.jit
def slot_at(x, p, f, b, h, t0, j0):
    """The slot of the block that a tile lies in: FULL, EMPTY or its place among the bits."""
    full, partial, last = lists_of(x, p, b, h, t0 // f.BLOCKS, False)
    column = j0 // f.BLOCKS
    entry = search(x.block_index, full, partial, column)
    is_full = tl.load(x.block_index + entry, mask=entry < partial, other=-1) == column
    entry = search(x.block_index, partial, last, column)
    is_partial = tl.load(x.block_index + entry, mask=entry < last, other=-1) == column
    slot = tl.load(x.block_index + p.block_entries + entry, mask=is_partial, other=EMPTY)
    return tl.where(is_full, FULL, slot)


@triton.jit
def attended_scores(x, f, slot, t0, row, j0, key):
    """Which of a tile's scores its block's bits let pass: a word for 32 keys of a row is read."""
    WORDS: tl.constexpr = f.BLOCKS // 32
    M: tl.constexpr = row.shape[0] * row.shape[1]
    N: tl.constexpr = key.shape[0] * key.shape[1]
    word = tl.arange(0, max(N // 32, 1))
    word = word[None, :] if row.shape[1] == 1 else word[:, None]
    at = ((t0 % f.BLOCKS).to(tl.int32) + row) * WORDS + (j0 % f.BLOCKS).to(tl.int32) // 32 + word
    of_block = x.block_bits + slot.to(tl.int64) * (f.BLOCKS * WORDS)
    slot = at * 0 + slot  # a mask of one number is none in the interpreter
    words = tl.load(of_block + at, mask=slot >= 0, other=tl.where(slot == FULL, -1, 0))
    bit = key
    if N < 32:
        bit += (j0 % 32).to(tl.int32)
    elif row.shape[1] == 1:
        words = tl.reshape(tl.broadcast_to(words[:, :, None], [M, N // 32, 32]), [M, N])
    else:
        words = tl.reshape(tl.broadcast_to(words[:, None, :], [N // 32, 32, M]), [N, M])
    return (words >> bit % 8 >> bit // 8 % 4 * 8 & 1) != 0
