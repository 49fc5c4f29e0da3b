"""Attention probabilities pooled into cells, or by distance: second passes over the scores.

    p = exp(s - m) / l
    cells      the mean or the largest p of each cell of queries and keys
    distances  sums of p over a cell's queries, by the power of two that t' - j lies under

Grid:    cells: batch * head * groups of cells; distances: batch * head * groups of rows of cells
Memory:  a program's sums in registers, place by place of its tiles, because cells end anywhere.
         Where several cells share a program, all of its rows (or keys) fit into one tile, a place
         each; where a cell is larger than a tile, all places are its own
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attnfast.call import BY_DISTANCE, LARGEST, Pooling

from . import configs
from .arguments import Call, block
from .attention_weights import probability_tile
from .blocks import EMPTY, slot_at
from .head import attended_range, key_range, sequence_of, sides_of
from .launch import Launch, launch
from .rows import row_at

BINS = tl.constexpr(64)  # of distances; two columns follow
NEAR = tl.constexpr((1 << 31) - 1 - (1 << 29))  # with T and S added, a distance has 32 bits


class Pooled(NamedTuple):
    """Where cells go."""

    pooled: Tensor  # (B, H, rows, columns) fp32
    norm: Tensor  # (2, B, H, T) fp32
    plane: int  # elements of half of it
    rows: int
    columns: int
    row_cells: int  # of a program
    column_cells: int
    tokens_q: Tensor | None  # (B, T) int32
    tokens_k: Tensor | None  # (B, S) int32


class CellTile(NamedTuple):
    """A tile, and what is kept of a cell."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    LARGEST: bool


@triton.jit
def cell_begin(cell, rows, cells):
    """The first of so many rows that a cell holds."""
    return (cell.to(tl.int64) * rows // cells).to(tl.int32)


@triton.jit
def group_of(first, of_group, rows, cells):
    """The rows of a group of cells, begin to end."""
    last = tl.minimum(first + of_group, cells)
    return cell_begin(first, rows, cells), cell_begin(last, rows, cells)


@triton.jit
def first_tile(begin, f, BLOCK: tl.constexpr):
    """Where tiles begin: with the group, but that each lies in one block of a block mask."""
    if f.BLOCKS:
        return begin // BLOCK * BLOCK
    else:
        return begin


@triton.jit
def row_of(place, first, begin, BLOCK: tl.constexpr):
    """Which row from begin on has this place in its tile, of tiles from first on."""
    return begin + (place + (first - begin + BLOCK)) % BLOCK


@triton.jit
def reached_keys(x, to, p, f, b, h, at, own, t_first, t_last, S, shift):
    """The keys that some of these queries may attend by position; and whether any row is NaN.

    Such a row is NaN at all keys, so then these are all. Returns also the queries that count: those
    whose log2 l is not inf, whatever else they hold.
    """
    log2_l = tl.load(to.norm + to.plane + at, mask=own, other=0.0)
    has_nan = tl.max((log2_l != log2_l).to(tl.int32), 0) > 0
    begin, end, _, _ = key_range(t_first, t_last, S, shift, sides_of(x, p, h), f)
    begin, end, _, _ = attended_range(x, b, begin, end, begin, end)
    counts = own & (log2_l != float("inf"))
    return tl.where(has_nan, 0, begin), tl.where(has_nan, S, end), has_nan, counts


@triton.jit
def cells_kernel(x, to, p, f, tile):
    """A group of cells."""
    # Setup
    row_groups, column_groups = tl.cdiv(to.rows, to.row_cells), tl.cdiv(to.columns, to.column_cells)
    pid = tl.program_id(0)
    c0 = pid % column_groups * to.column_cells
    r0 = pid // column_groups % row_groups * to.row_cells
    head = pid // column_groups // row_groups
    b, h = head // p.H, head % p.H
    T, S, q_row, k_row, shift = sequence_of(x, p, f, b)
    t_begin, t_end = group_of(r0, to.row_cells, T, to.rows)
    j_begin, j_end = group_of(c0, to.column_cells, S, to.columns)
    t_first = first_tile(t_begin, f, tile.BLOCK_M)
    j_first = first_tile(j_begin, f, tile.BLOCK_N)
    row, key = tl.arange(0, tile.BLOCK_M), tl.arange(0, tile.BLOCK_N)
    norm_at = row_at(x, p, b, h, q_row)

    # Probabilities: place by place
    total = tl.zeros([tile.BLOCK_M, tile.BLOCK_N], tl.float32)
    for t0 in range(t_first, t_end, tile.BLOCK_M):
        t = t0 + row
        own = (t >= t_begin) & (t < t_end)
        low, high = tl.maximum(t0, t_begin), tl.minimum(t0 + tile.BLOCK_M, t_end) - 1
        begin, end, has_nan, own = reached_keys(
            x, to, p, f, b, h, norm_at + t, own, low, high, S, shift
        )
        begin = tl.maximum(begin, j_begin) - j_first
        begin = j_first + begin // tile.BLOCK_N * tile.BLOCK_N
        for j0 in range(begin, tl.minimum(end, j_end), tile.BLOCK_N):
            slot, some = None, True
            if f.BLOCKS:
                slot = slot_at(x, p, f, b, h, t0, j0)
                some = (slot != EMPTY) | has_nan
            if some:
                probs = probability_tile(
                    x, to, p, f, tile, b, h, t0, j0, T, S, q_row, k_row, shift, slot
                )
                j = j0 + key
                own_keys = (j >= j_begin) & (j < j_end)
                probs = tl.where(own[:, None] & own_keys[None, :], probs, 0.0)
                if tile.LARGEST:
                    probs = tl.where(probs == probs, probs, float("inf"))
                    total = tl.maximum(total, probs)
                else:
                    total += probs

    # Store: row of cells by row of cells
    t = row_of(row, t_first, t_begin, tile.BLOCK_M)
    j = row_of(key, j_first, j_begin, tile.BLOCK_N)
    c = c0 + key
    begin, end = cell_begin(c, S, to.columns), cell_begin(c + 1, S, to.columns)
    in_column = (j[:, None] >= begin[None, :]) & (j[:, None] < end[None, :])
    written = (key < to.column_cells) & (c < to.columns)
    for r in range(r0, tl.minimum(r0 + to.row_cells, to.rows)):
        t_low, t_high = group_of(r0 * 0 + r, 1, T, to.rows)
        in_row = (t >= t_low) & (t < t_high)
        of_row = tl.where(in_row[:, None], total, 0.0)
        if tile.LARGEST:
            value = tl.max(tl.where(in_column, tl.max(of_row, 0)[:, None], 0.0), 0)
            value = tl.where(value == float("inf"), float("nan"), value)
        else:
            value = tl.sum(tl.where(in_column, tl.sum(of_row, 0)[:, None], 0.0), 0)
            size = (end - begin).to(tl.int64) * (t_high - t_low)
            value = value / tl.maximum(size, 1).to(tl.float32)
        at = to.pooled + (head.to(tl.int64) * to.rows + r) * to.columns + c
        tl.store(at, value, mask=written)


@triton.jit
def bin_of(d):
    """The bin of a distance: 32 and, away from it, one more for each of its bits."""
    far = tl.abs(d)
    far = far & ~(far >> 1)  # so that no rounding makes it a bit longer
    bits = (far.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    bits = tl.maximum(bits, 0)
    return 32 + tl.where(d < 0, -bits, bits)


@triton.jit
def distances_kernel(x, to, p, f, tile):
    """A group of rows of cells; under causal, the longest first."""
    # Setup
    groups = tl.cdiv(to.rows, to.row_cells)
    pid = tl.program_id(0)
    r0 = (groups - 1 - pid % groups) * to.row_cells
    head = pid // groups
    b, h = head // p.H, head % p.H
    T, S, q_row, k_row, shift = sequence_of(x, p, f, b)
    near = tl.minimum(tl.maximum(shift, -NEAR), NEAR).to(tl.int32)
    t_begin, t_end = group_of(r0, to.row_cells, T, to.rows)
    t_first = first_tile(t_begin, f, tile.BLOCK_M)
    row, key, column = tl.arange(0, tile.BLOCK_M), tl.arange(0, tile.BLOCK_N), tl.arange(0, BINS)
    norm_at = row_at(x, p, b, h, q_row)
    batch = b * 0 if x.cu_seqlens_q is not None else b

    # Probabilities: bin by bin of those that a tile crosses
    sums = tl.zeros([tile.BLOCK_M, BINS], tl.float32)
    first = tl.zeros([tile.BLOCK_M], tl.float32)
    same = tl.zeros([tile.BLOCK_M], tl.float32)
    for t0 in range(t_first, t_end, tile.BLOCK_M):
        t = t0 + row
        own = (t >= t_begin) & (t < t_end)
        low, high = tl.maximum(t0, t_begin), tl.minimum(t0 + tile.BLOCK_M, t_end) - 1
        begin, end, has_nan, own = reached_keys(
            x, to, p, f, b, h, norm_at + t, own, low, high, S, shift
        )
        if to.tokens_q is not None:
            at = to.tokens_q + batch.to(tl.int64) * p.rows_q + q_row
            token = tl.load(at + t, mask=own, other=0)
        for j0 in range(begin // tile.BLOCK_N * tile.BLOCK_N, end, tile.BLOCK_N):
            slot, some = None, True
            if f.BLOCKS:
                slot = slot_at(x, p, f, b, h, t0, j0)
                some = (slot != EMPTY) | has_nan
            if some:
                probs = probability_tile(
                    x, to, p, f, tile, b, h, t0, j0, T, S, q_row, k_row, shift, slot
                )
                j = j0 + key
                probs = tl.where(own[:, None] & (j < S)[None, :], probs, 0.0)
                d = (t + near)[:, None] - j[None, :]
                bins = bin_of(d)
                least = bin_of(low + near - (j0 + tile.BLOCK_N - 1))
                for at_bin in range(least, bin_of(high + near - j0) + 1):
                    of_bin = tl.sum(tl.where(bins == at_bin, probs, 0.0), 1)
                    sums += tl.where((column == at_bin)[None, :], of_bin[:, None], 0.0)
                if j0 == 0:
                    first += tl.sum(tl.where((key == 0)[None, :], probs, 0.0), 1)
                if to.tokens_q is not None:
                    at = to.tokens_k + batch.to(tl.int64) * p.rows_k + k_row
                    others = tl.load(at + j, mask=j < S, other=0)
                    alike = (token[:, None] == others[None, :]) & (d != 0)
                    same += tl.sum(tl.where(alike, probs, 0.0), 1)

    # Store: row of cells by row of cells
    t = row_of(row, t_first, t_begin, tile.BLOCK_M)
    for r in range(r0, tl.minimum(r0 + to.row_cells, to.rows)):
        t_low, t_high = group_of(r0 * 0 + r, 1, T, to.rows)
        in_row = (t >= t_low) & (t < t_high)
        at = to.pooled + (head.to(tl.int64) * to.rows + r) * to.columns
        tl.store(at + column, tl.sum(tl.where(in_row[:, None], sums, 0.0), 0))
        tl.store(at + BINS, tl.sum(tl.where(in_row, first, 0.0), 0))
        tl.store(at + BINS + 1, tl.sum(tl.where(in_row, same, 0.0), 0))


def pooled_fwd(pooling: Pooling, call: Call, arch: str) -> Tensor:
    """The cells, (B, H, rows, columns) fp32."""
    cells = pooling.norm.new_empty((call.p.B, call.p.H, pooling.rows, pooling.columns))
    launch(pooled_launch(call, pooling, cells, arch))
    return cells


def pooled_launch(call: Call, pooling: Pooling, cells: Tensor, arch: str) -> Launch:
    """The kernel of cells of this kind."""
    x, p, f = call
    by_distance = pooling.kind == BY_DISTANCE
    name = "distances" if by_distance else "cells"
    config = configs.choose(arch, name, x.q.element_size(), f.D, f.D_V, True, f.BLOCKS)
    M, N = config.BLOCK_M, config.BLOCK_N
    tile = CellTile(M, N, block(f.D), block(f.D_V), pooling.kind == LARGEST)
    norm, rows, columns = pooling.norm, pooling.rows, pooling.columns
    of_rows, of_columns = cells_in_tile(p.T, rows, M), cells_in_tile(p.S, columns, N)
    tokens = (None if y is None else y.contiguous() for y in (pooling.tokens_q, pooling.tokens_k))
    to = Pooled(cells, norm, norm.numel() // 2, rows, columns, of_rows, of_columns, *tokens)
    grid = p.B * p.H * -(-rows // of_rows)
    if by_distance:
        return Launch(distances_kernel, grid, (x, to), p, f, tile, config, "BLOCK_N")
    grid *= -(-columns // of_columns)
    return Launch(cells_kernel, grid, (x, to), p, f, tile, config)


def cells_in_tile(n: int, cells: int, side: int) -> int:
    """How many neighbouring cells of n rows a tile surely holds, or 1."""
    largest = -(-n // max(cells, 1))
    return max(1, side // max(largest, 1))
