"""A call over whole sequences, cut into calls of some queries and some keys."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Inputs, Options
from .layout import Chunk, Layout

EMPTY, CUT, FULL = range(3)  # scores that a call's positions let pass: none, some, all


class Piece(NamedTuple):
    """Queries and keys that follow one another in the sequences and in their shards."""

    q: Chunk
    k: Chunk
    full: bool  # by position every query attends every key


class Sequence(NamedTuple):
    """Rows of a varlen call that attend each other."""

    q: tuple[int, int]  # from, to
    k: tuple[int, int]
    offset: int | None  # t' = t + offset, counted in the sequence


class Sight(NamedTuple):
    """What of a call says which queries attend which keys by position, and what else counts."""

    left: int  # -1: unbounded
    right: int  # causal is 0
    offset: int | None  # t' = t + offset; None: known on the device alone
    by_position: bool  # scores or statistics of full pieces depend on positions
    sequences: tuple[Sequence, ...] | None = None  # of a varlen call

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> Sight:
        """That of a call; the boundaries of a varlen call are read, on a GPU waited for."""
        right = 0 if options.causal else options.window_right
        offset = options.align_offset if inputs.align is None else None
        tensors = (inputs.mask, inputs.bias, inputs.alibi_slopes, inputs.dropout_seed)
        by_position = options.stats > 0 or any(x is not None for x in tensors)
        sequences = None
        if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
            rows = (
                itertools.pairwise(x.tolist()) for x in (inputs.cu_seqlens_q, inputs.cu_seqlens_k)
            )
            of_bottom = options.align_bottom_right
            sequences = tuple(
                Sequence(q, k, k[1] - k[0] - (q[1] - q[0]) if of_bottom else offset)
                for q, k in zip(*rows, strict=True)
            )
        return cls(options.window_left, right, offset, by_position, sequences)

    def scores(self, q: Chunk, k: Chunk) -> int:
        """How many scores it lets pass: EMPTY, CUT or FULL."""
        if self.sequences is None:
            return self._scores(q, k, self.offset)
        for of_q, of_k, offset in self._with_rows(q, k):
            parts = q.within(*of_q), k.within(*of_k)
            if min(x.length for x in parts) > 0 and self._scores(*parts, offset) != EMPTY:
                return CUT
        return EMPTY

    def _with_rows(self, q: Chunk, k: Chunk) -> tuple[Sequence, ...]:
        """The sequences, which lie one after another, that have rows in both chunks."""
        assert self.sequences is not None
        given, first, after = self.sequences, 0, len(self.sequences)
        for chunk, name in ((q, "q"), (k, "k")):
            begin, end = (functools.partial(_end, name=name, end=i) for i in (0, 1))
            first = max(first, bisect.bisect_right(given, chunk.start, key=end))
            after = min(after, bisect.bisect_left(given, chunk.start + chunk.length, key=begin))
        return given[first:after]

    def _scores(self, q: Chunk, k: Chunk, offset: int | None) -> int:
        left, right = self.left, self.right
        if left < 0 and right < 0:
            return FULL
        if offset is None:
            return CUT
        first = q.start + offset
        last, k_last = first + q.length - 1, k.start + k.length - 1
        if (right >= 0 and k.start > last + right) or (left >= 0 and k_last < first - left):
            return EMPTY
        within_right = right < 0 or k_last <= first + right
        return FULL if within_right and (left < 0 or k.start >= last - left) else CUT


def _end(sequence: Sequence, name: str, end: int) -> int:
    rows: tuple[int, int] = getattr(sequence, name)
    return rows[end]


def pieces(queries: Iterable[Chunk], keys: Iterable[Chunk], sight: Sight) -> list[Piece]:
    """What attention to some keys consists of; what no query attends by position is left out.

    Queries of different chunks that attend a chunk of keys wholly are one piece, where nothing
    else depends on positions, and chunks of keys too.
    """
    found: list[Piece] = []
    apart = sight.by_position or sight.sequences is not None
    for k in keys:
        for q in queries:
            passed = sight.scores(q, k)
            if passed != EMPTY:
                _join(found, Piece(q, k, passed == FULL), apart)
    return found


@functools.lru_cache(maxsize=1 << 12)
def last_step(queries: Layout, keys: Layout, sight: Sight, owner: int) -> int:
    """Of a ring, the last step at which a rank attends a block, which lies s ranks on at step s."""
    for step in range(keys.ranks - 1, 0, -1):
        met = queries.chunks((owner + step) % keys.ranks)
        if any(sight.scores(q, k) != EMPTY for k in keys.chunks(owner) for q in met):
            return step
    return 0


def _join(found: list[Piece], piece: Piece, apart: bool) -> None:
    if found and piece.full and found[-1].full and not apart:
        q, k, _ = found[-1]
        if k == piece.k and q.row + q.length == piece.q.row:
            found[-1] = Piece(Chunk(q.start, q.length + piece.q.length, q.row), k, True)
            _join_keys(found)
            return
    found.append(piece)
    if not apart:
        _join_keys(found)


def _join_keys(found: list[Piece]) -> None:
    """Make one of the last two pieces, if they are of the same queries and of adjacent keys."""
    if len(found) < 2:
        return
    (q, k, full), (other_q, other_k, other_full) = found[-2:]
    if q == other_q and full and other_full and k.row + k.length == other_k.row:
        found[-2:] = [Piece(q, Chunk(k.start, k.length + other_k.length, k.row), True)]


def call_of(piece: Piece, inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """The call of a piece, of a rank's queries, all of some rank's keys, and masks of all keys."""
    q, k, full = piece
    if full:
        options = options._replace(causal=False, window_left=-1, window_right=-1)
    inputs = inputs._replace(
        q=inputs.q.narrow(2, q.row, q.length),
        k=inputs.k.narrow(2, k.row, k.length),
        v=inputs.v.narrow(2, k.row, k.length),
    )
    if inputs.cu_seqlens_q is not None:
        return _call_of_sequences(piece, inputs, options)
    apart, seed = q.start - k.start, inputs.dropout_seed
    if seed is not None:
        seed = seed + seed.new_tensor([0, 0, 0, 0, q.start, k.start])
    return inputs._replace(
        mask=scores_of(inputs.mask, q, k),
        bias=scores_of(inputs.bias, q, k),
        dropout_seed=seed,
        indices=None if inputs.indices is None else inputs.indices.narrow(2, q.row, q.length),
    ), options._replace(align_offset=options.align_offset + apart)


def _call_of_sequences(piece: Piece, inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """The same of a varlen call: all its sequences, most of them empty there."""
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    parts, before, lengths = [], [], []
    for chunk, ends in ((piece.q, inputs.cu_seqlens_q), (piece.k, inputs.cu_seqlens_k)):
        parts.append(ends.clamp(chunk.start, chunk.start + chunk.length) - chunk.start)
        before.append((chunk.start - ends[:-1]).clamp(min=0))  # rows of earlier chunks
        lengths.append(ends.diff())
    align = before[0] - before[1]
    if inputs.align is not None:
        align = align + inputs.align
    elif options.align_bottom_right:
        align = align + lengths[1] - lengths[0]
    else:
        align = align + options.align_offset
    return inputs._replace(
        cu_seqlens_q=parts[0], cu_seqlens_k=parts[1], align=align.to(torch.int32)
    ), options._replace(
        align_offset=0,
        align_bottom_right=False,
        max_seqlen_q=min(options.max_seqlen_q, piece.q.length),
        max_seqlen_k=min(options.max_seqlen_k, piece.k.length),
    )


def scores_of(x: Tensor | None, q: Chunk, k: Chunk) -> Tensor | None:
    """A piece's part of a mask or bias, of a rank's queries and the keys of the sequence."""
    if x is None:
        return None
    x = x if x.shape[2] == 1 else x.narrow(2, q.row, q.length)
    return x if x.shape[3] == 1 else x.narrow(3, k.start, k.length)
