"""Tiles of rows: where they lie in memory, loading and storing them.

``x, p, f`` are the tuples of ``arguments``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset(b, b_stride, h, h_stride, row, row_stride):
    """Where row ``row`` of a batch entry and head begins, in 64 bits."""
    return b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride + row.to(tl.int64) * row_stride


@triton.jit
def row_at(x, p, b, h, q_row):
    """Where the numbers per row of a batch entry and head begin."""
    batch = b * 0 if x.cu_seqlens_q is not None else b
    return (batch.to(tl.int64) * p.H + h) * p.rows_q + q_row


@triton.jit
def rely_on(stride, f):
    """Tell the compiler that offsets within a tile have 31 bits: none takes a register more."""
    if not f.WIDE:
        tl.assume(stride >= 0)
        tl.assume(stride < 1 << 22)


@triton.jit
def start_of(first, end):
    """A tile's first row, which is below end, so that the compiler cannot tell a loop's step.

    It would keep a pointer to each row of a tile in registers and move all of them along.
    """
    return tl.minimum(first, end).to(tl.uint32)


@triton.jit
def row_pointers(base, rows, stride, dims, f):
    """[R, BLOCK] pointers to the rows ``rows`` from base on."""
    if f.WIDE:
        rows = rows.to(tl.int64)
    return base + (rows[:, None] * stride + dims[None, :])


@triton.jit
def load_rows(base, rows, stride, live, D, BLOCK: tl.constexpr, f, MASKED: tl.constexpr):
    """[R, BLOCK]: rows from base on, zero past D and, if MASKED, where they are not live."""
    dims = tl.arange(0, BLOCK)
    pointers = row_pointers(base, rows, stride, dims, f)
    if D == BLOCK:
        if MASKED:
            return tl.load(pointers, mask=live[:, None], other=0.0)
        else:
            return tl.load(pointers)
    else:
        inside = (dims < D)[None, :]
        if MASKED:
            return tl.load(pointers, mask=live[:, None] & inside, other=0.0)
        else:
            return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, stride, live, D, BLOCK: tl.constexpr, f, values):
    """Store [R, BLOCK] to the live rows from base on, in their dtype."""
    dims = tl.arange(0, BLOCK)
    pointers = row_pointers(base, rows, stride, dims, f)
    inside = live[:, None] & (dims < D)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def without_dead_rows(rows, dead):
    """[R, D] with zeros where a row is dead: 0 * NaN would let out what it holds."""
    return tl.where(dead[:, None], 0.0, rows).to(rows.dtype)


@triton.jit
def holds_nan(tile):
    """Whether any number of a tile is NaN."""
    # In one row: Triton 3.6 has no layout for a reduction twice of what lies in tensor memory.
    return tl.max(tl.reshape((tile != tile).to(tl.int32), [tile.shape[0] * tile.shape[1]]), 0) > 0


@triton.jit
def at_head(pointer, b, b_stride, h, h_stride):
    """A mask or bias at its (b, h, 0, 0); None stays None."""
    if pointer is not None:
        return pointer + b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride
    else:
        return  # noqa: RET502 - Triton 3.6 cannot return None by name
