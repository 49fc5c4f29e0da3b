"""Which block of which head a program has, its sequence, and what its rows may attend by position.

``x, p, f, tile`` are the tuples of ``arguments``.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNBOUNDED = tl.constexpr(2**31 - 1)  # a window's side
FARTHEST = tl.constexpr((1 << 30) - 1)  # T, S and the distance between a query and a key are less


@triton.jit
def scheduled(heads, blocks, section, LAST_FIRST: tl.constexpr):
    """Block and head of this program.

    All blocks of ``section`` heads come before those of the next, so that their keys stay in the
    second-level cache, and among them the last block of every head comes first: under causal the
    longest, which leaves the short ones to fill the end.
    """
    pid = tl.program_id(0)
    begin = pid // (section * blocks) * section
    here = tl.minimum(heads - begin, section)
    within = pid - begin * blocks
    block = within // here
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, begin + within % here


@triton.jit
def sequence_of(x, p, f, b):
    """Of batch entry b: T, S, its first row of q and of k, and shift, where t' = t + shift.

    Ends that lead out of a tensor are clamped to it. The shift has 64 bits: with a window's side
    added it may leave 32.
    """
    T, S, q_row, k_row = p.T, p.S, b * 0, b * 0
    if x.cu_seqlens_q is not None:
        q_row, T = clamped_range(x.cu_seqlens_q, b, p.rows_q, p.T)
        k_row, S = clamped_range(x.cu_seqlens_k, b, p.rows_k, p.S)
    shift = (b * 0).to(tl.int64) + p.shift
    if x.align is not None:
        shift += tl.load(x.align + b)
    if f.BOTTOM_RIGHT:
        shift += S - T
    return T, S, q_row, k_row, shift


@triton.jit
def attended_range(x, b, begin, end, inner_begin, inner_end):
    """A `key_range`, cut to the keys that a mask of keys lets pass, the inner one to their run."""
    if x.key_ends is not None:
        first, run_end, last = x.key_ends + 3 * b, x.key_ends + 3 * b + 1, x.key_ends + 3 * b + 2
        begin = tl.maximum(begin, tl.load(first))
        inner_begin = tl.maximum(inner_begin, tl.load(first))
        inner_end = tl.minimum(inner_end, tl.load(run_end))
        end = tl.minimum(end, tl.load(last))
    return begin, end, inner_begin, inner_end


@triton.jit
def clamped_range(ends, b, rows, longest):
    """First row and length of sequence b."""
    begin = tl.minimum(tl.maximum(tl.load(ends + b), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(ends + b + 1), begin), rows)
    return begin, tl.minimum(end - begin, longest)


@triton.jit
def narrow(position):
    """A position or distance in 32 bits; one that is out of reach stays so."""
    return tl.minimum(tl.maximum(position, -FARTHEST), FARTHEST).to(tl.int32)


@triton.jit
def distances(t, j, shift):
    """|j - t'| in fp32."""
    near = narrow(shift)
    return tl.abs((j - (t + near)).to(tl.float32) - (shift - near).to(tl.float32))


@triton.jit
def sides_of(x, p, h):
    """How far before and after t' a head's window reaches; the right side 0 if causal."""
    left, right = p.left, p.right
    if x.windows is not None:
        left = reach(tl.load(x.windows + 2 * h))
        right = tl.minimum(reach(tl.load(x.windows + 2 * h + 1)), p.right)
    return left, right


@triton.jit
def widest_sides(x, p, h_kv):
    """The same of all heads together that share a key head."""
    left, right = p.left, p.right
    if x.windows is not None:
        left, right = h_kv * 0, h_kv * 0
        for member in range(p.group):
            left_of_head, right_of_head = sides_of(x, p, h_kv * p.group + member)
            left, right = tl.maximum(left, left_of_head), tl.maximum(right, right_of_head)
    return left, right


@triton.jit
def reach(side):
    """A side of a window; one that is unbounded is as far as any."""
    return tl.where(side < 0, UNBOUNDED, side)


@triton.jit
def key_range(t_first, t_last, S, shift, sides, f):
    """Which keys the queries t_first .. t_last may attend by position.

    Returns begin and end of the keys that some of them may, and of those that all of them may.
    """
    left, right = sides
    begin = t_first * 0
    inner_begin, end, inner_end = begin, begin + S, begin + S
    if f.HAS_LEFT:
        begin = tl.maximum(narrow(t_first + shift - left), 0)
        inner_begin = tl.maximum(narrow(t_last + shift - left), 0)
    if f.HAS_RIGHT:
        end = tl.maximum(tl.minimum(end, narrow(t_last + shift + right + 1)), 0)
        inner_end = tl.maximum(tl.minimum(inner_end, narrow(t_first + shift + right + 1)), 0)
    return begin, end, inner_begin, inner_end


@triton.jit
def query_range(j_first, j_last, T, shift, sides, f):
    """The same for keys: the queries that may attend some of them, and all of them."""
    left, right = sides
    begin = j_first * 0
    inner_begin, end, inner_end = begin, begin + T, begin + T
    if f.HAS_RIGHT:
        begin = tl.maximum(narrow(j_first - shift - right), 0)
        inner_begin = tl.maximum(narrow(j_last - shift - right), 0)
    if f.HAS_LEFT:
        end = tl.maximum(tl.minimum(end, narrow(j_last - shift + left + 1)), 0)
        inner_end = tl.maximum(tl.minimum(inner_end, narrow(j_first - shift + left + 1)), 0)
    return begin, end, inner_begin, inner_end


@triton.jit
def tiles_of(part: tl.constexpr, begin, end, inner_begin, inner_end, BLOCK: tl.constexpr):
    """The tiles before those that need no masking by position (part 0), these (1), those after (2).

    Tiles begin at multiples of BLOCK.
    """
    first = begin // BLOCK * BLOCK
    inner = tl.minimum(tl.maximum(tl.cdiv(inner_begin, BLOCK) * BLOCK, first), end)
    after = tl.maximum(inner_end // BLOCK * BLOCK, inner)
    if part == 0:
        return first, inner
    elif part == 1:
        return inner, after
    else:
        return after, end
