"""A block mask as kernels read it: where each line's blocks begin, which they are, and their bits.

Entries of lines are referred to by number, so that lines can be repeated or left out (mapped calls,
shards) without touching the entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .call import Inputs

WORD = 32  # bits of an int32
GATHER = sum(1 << 56 - 7 * i for i in range(8))
EMPTY, FULL = -2, -1  # of a block that has no bits


def indexed(
    grid: tuple[int, int, int, int], number: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """``block_starts`` and ``block_index`` of the blocks that are not empty.

    Args:
        grid: Batch entries, heads, rows of blocks and columns of blocks.
        number: int64 ``(entries,)``, ascending: the block's place in the grid.
        slots: int32 ``(entries,)``: its place among those with bits, FULL if it has none.
    """
    B, H, rows, columns = grid
    place = number % max(rows * columns, 1)
    i, j = place // max(columns, 1), place % max(columns, 1)
    head = number // max(rows * columns, 1)
    partial = (slots != FULL).long()
    starts, index = [], []
    for lines, across, line, other in ((rows, columns, i, j), (columns, rows, j, i)):
        place, order = torch.sort(((head * lines + line) * 2 + partial) * across + other)
        starts.append(torch.searchsorted(place, list_edges(B * H, lines, across, number.device)))
        index += [other[order], slots[order]]
    return torch.cat(starts, 1).to(torch.int32).view(B, H, -1), torch.stack(index).to(torch.int32)


def list_edges(heads: int, lines: int, across: int, device: torch.device) -> Tensor:
    """The first place in each line's two lists, and after the last: (heads, 2 * lines + 1)."""
    half = torch.arange(2 * lines + 1, device=device)
    return (torch.arange(heads, device=device)[:, None] * 2 * lines + half) * across


def dense(starts: Tensor, index: Tensor, bits: Tensor, rows: slice, S: int) -> Tensor:
    """The bool mask ``(B|1, H|1, rows, S)`` of some queries of a block mask of S keys."""
    size, begin, end = bits.shape[1], rows.start, rows.stop
    first, last, columns = begin // size, -(-end // size), -(-S // size)
    device = starts.device
    # Both lists of a line, one after the other.
    lines = starts[:, :, 2 * first : 2 * last + 1 : 2].long()
    # Entry m of every line, as far as the line has so many; beyond, in a column that is cut off.
    entry = lines[:, :, :-1, None] + torch.arange(columns, device=device)
    there = entry < lines[:, :, 1:, None]
    wide = torch.nn.functional.pad(index.long(), (0, 1))  # an entry to read where there is none
    entry = torch.where(there, entry, index.shape[1])
    column = torch.where(there, wide[0][entry], columns)
    code = torch.full((*entry.shape[:3], columns + 1), EMPTY, device=device)
    code = code.scatter(3, column, wide[1][entry])[..., :-1]
    plain = torch.tensor([False, True], device=device).view(2, 1, 1).expand(2, size, size)
    blocks = torch.cat((plain, unpacked(bits)))[code - EMPTY]  # [B, H, rows, columns, size, size]
    found = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return found[:, :, begin - first * size : end - first * size, :S]


def with_dense_mask(inputs: Inputs, T: int, S: int) -> Inputs:
    """The same call with its block mask of T queries and S keys as a bool mask."""
    starts, index, bits = inputs.block_starts, inputs.block_index, inputs.block_bits
    assert starts is not None
    assert index is not None
    assert bits is not None
    mask = dense(starts, index, bits, slice(0, T), S)
    return inputs._replace(mask=mask, block_starts=None, block_index=None, block_bits=None)


def packed(blocks: Tensor) -> Tensor:
    """Bits of bool ``(n, size, size)``, as int32 ``(n, size, size / 32)``."""
    eight = blocks.contiguous().view(torch.uint8).view(torch.int64)  # bytes of 0 or 1
    # The product's highest byte has bit i of byte i: 8 i + (56 - 7 i) = 56 + i.
    return (eight * GATHER >> 56).to(torch.uint8).view(torch.int32)


def unpacked(bits: Tensor) -> Tensor:
    """Bool ``(n, size, size)`` of bits."""
    places = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return (bits[..., None] >> places & 1).to(torch.bool).flatten(2)


def as_int32(words: Tensor) -> Tensor:
    """Numbers below 2**32 as the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def blocks_of(grid: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """The numbers of all blocks."""
    return torch.arange(math.prod(grid), device=device)
