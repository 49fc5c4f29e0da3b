"""Attention forward, one block of queries per program (FlashAttention-2, Algorithm 1).

    o = softmax(scale * q k^T, masked, biased, capped) v        lse = logsumexp of the scores
    norm = m, log2 l: the largest score, and the denominator relative to it, for the backward

Grid:    batch * head * ceil(T / BLOCK_M), flat; heads in sections, longest causal rows first
Memory:  q, acc [BLOCK_M, D_v], m, l in registers; k and v tiles in shared memory, num_stages deep
Loops:   tiles that a window's left side cuts; tiles that every row attends, without any masking by
         position; tiles that the diagonal, the window's right side or the end of the keys cut
Limits:  D, D_v to 512, padded to a power of two in registers only
Rows:    a row's result depends on its own sequence and on BLOCK_N alone
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnfast.call import Inputs, Options
from attnfast.ops import empty_in_order

from . import configs
from .arguments import Call, Tile, block, row_strides
from .blocks import block_tile, entries_of, tiles_in
from .dropout import kept_by_dropout
from .head import (
    attended_range,
    distances,
    key_range,
    scheduled,
    sequence_of,
    sides_of,
    tiles_of,
)
from .launch import Launch, launch
from .rows import (
    at_head,
    holds_nan,
    load_rows,
    offset,
    rely_on,
    row_at,
    start_of,
    store_rows,
    without_dead_rows,
)
from .scores import (
    LARGEST,
    LN2,
    attended_keys,
    edit_scores,
    in_log2,
    in_units,
    line_of,
    natural,
    rounded_product,
    slope_of,
)


class ForwardResults(NamedTuple):
    """What the forward writes."""

    out: Tensor  # (B, H, T, D_v)
    lse: Tensor  # (B, H, T) fp32
    norm: Tensor  # (2, B, H, T) fp32: m in the units of the scores, log2 l
    stats: Tensor | None  # (4, B, H, T) fp32
    out_b: int
    out_h: int
    out_t: int
    plane: int  # elements of lse


@triton.jit
def attention_fwd_kernel(x, to, p, f, tile):
    """One block of queries of one head."""
    # Setup
    rely_on(p.k_t, f)
    rely_on(p.v_t, f)
    block, head = scheduled(p.B * p.H, tl.cdiv(p.T, tile.BLOCK_M), p.section, f.HAS_RIGHT)
    b, h = head // p.H, head % p.H
    T, S, q_row, k_row, shift = sequence_of(x, p, f, b)
    t0 = block * tile.BLOCK_M
    if t0 >= T:
        return
    h_kv = h // p.group
    row = tl.arange(0, tile.BLOCK_M)
    key = tl.arange(0, tile.BLOCK_N)
    t = t0 + row
    mask = at_head(x.mask, b, p.mask_b, h, p.mask_h)
    bias = at_head(x.bias, b, p.bias_b, h, p.bias_h)
    slope = slope_of(x, p, f, b, h)

    # Load q
    q_base = x.q + offset(b, p.q_b, h, p.q_h, q_row + t0, p.q_t)
    q = load_rows(q_base, row, p.q_t, t < T, f.D, tile.BLOCK_D, f, True)
    m = tl.full([tile.BLOCK_M], -LARGEST if f.FUSED else -float("inf"), tl.float32)
    l = tl.zeros([tile.BLOCK_M], tl.float32)
    acc = tl.zeros([tile.BLOCK_M, tile.BLOCK_DV], tl.float32)
    depth_sum = tl.zeros([tile.BLOCK_M], tl.float32)  # of e^(s - m) (s - m), in units of log2
    distance_sum = tl.zeros([tile.BLOCK_M], tl.float32)  # of e^(s - m) |j - t'|

    t_last = tl.minimum(t0 + tile.BLOCK_M, T) - 1
    sides = sides_of(x, p, h)
    begin, end, inner_begin, inner_end = key_range(t0, t_last, S, shift, sides, f)
    begin, end, inner_begin, inner_end = attended_range(x, b, begin, end, inner_begin, inner_end)
    if f.BLOCKS:
        line = t0 // f.BLOCKS
        entries = entries_of(x, p, f, b, h, line, begin, end, inner_begin, inner_end, False)
    for careful in tl.static_range(1 if f.HOLED and f.DROPOUT else 0, 2 if f.HOLED else 1):
        if careful and not f.DROPOUT:
            # 0 * NaN may have let out a v that no query attends: then zeros in its place
            again = holds_nan(acc)
            m = tl.where(again, -LARGEST if f.FUSED else -float("inf"), m)
            l = tl.where(again, 0.0, l)
            acc = tl.where(again, 0.0, acc)
            depth_sum = tl.where(again, 0.0, depth_sum)
            distance_sum = tl.where(again, 0.0, distance_sum)
        for part in tl.static_range(1 if f.BLOCKS or not (f.HAS_LEFT or f.KEY_MASK) else 0, 3):
            if f.BLOCKS:
                first, last = t0 * 0, tiles_in(part, entries, f, tile.BLOCK_N)
            else:
                first, last = tiles_of(part, begin, end, inner_begin, inner_end, tile.BLOCK_N)
            if careful and not f.DROPOUT:
                last = tl.where(again, last, first)
            if first < last:  # without it ptxas waits for each product of Hopper's by itself
                if f.BLOCKS:
                    ahead, slot_ahead = block_tile(
                        part, first, entries, x, p, f, tile.BLOCK_N, False
                    )
                for i in tl.range(first, last, 1 if f.BLOCKS else tile.BLOCK_N):
                    # Scores
                    if f.BLOCKS:
                        j0, slot = ahead, slot_ahead
                        ahead, slot_ahead = block_tile(
                            part, tl.minimum(i + 1, last - 1), entries, x, p, f, tile.BLOCK_N, False
                        )
                        start = j0.to(tl.uint32)
                    else:
                        j0, slot = i, None
                        start = start_of(j0, last)
                    j = j0 + key
                    live = (j >= begin) & (j < end)
                    if f.KEY_MASK and part != 1:  # what no query attends is not even read
                        live = live & attended_keys(mask, start, key, S, p)
                    tile_row = k_row + start
                    k_tile = x.k + offset(b, p.k_b, h_kv, p.k_h, tile_row, p.k_t)
                    k = load_rows(k_tile, key, p.k_t, live, f.D, tile.BLOCK_D, f, part != 1)
                    s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
                    s, _tanh_x = edit_scores(
                        s,
                        t0,
                        row[:, None],
                        start if f.TILED else j0,
                        key[None, :],
                        T,
                        S,
                        shift,
                        sides,
                        mask,
                        bias,
                        slope,
                        x,
                        p,
                        f,
                        part != 1,
                        careful == 1,
                        slot,
                    )
                    # Softmax
                    m_new = tl.maximum(m, tl.max(s, 1))
                    if f.FUSED:
                        base = m_new
                        factor, level = line_of(base, p)
                        depth = tl.fma(s, factor[:, None], -level[:, None])
                        drop = (m - base) * factor
                    else:
                        base = tl.where(m_new == -float("inf"), 0.0, m_new)
                        depth = in_log2(s - base[:, None], p, f)
                        drop = in_log2(m - base, p, f)
                    probs = tl.exp2(depth)
                    rescale = tl.exp2(drop)
                    if to.stats is not None:
                        moved = tl.where(rescale > 0.0, rescale * (depth_sum + l * drop), 0.0)
                        depth_sum = moved + tl.sum(tl.where(probs > 0.0, probs * depth, 0.0), 1)
                        far = rounded_product(probs, distances(t[:, None], j[None, :], shift))
                        distance_sum = rescale * distance_sum + tl.sum(far, 1)
                    l = l * rescale + tl.sum(probs, 1)
                    m = m_new
                    if f.DROPOUT:
                        kept = kept_by_dropout(x, p, f, b, h, t0, j0, tile.BLOCK_M, tile.BLOCK_N)
                        probs = tl.where(kept, probs, 0.0)
                    # Output
                    v_tile = x.v + offset(b, p.v_b, h_kv, p.v_h, tile_row, p.v_t)
                    v = load_rows(v_tile, key, p.v_t, live, f.D_V, tile.BLOCK_DV, f, part != 1)
                    if careful and (part != 1 or f.TILED):
                        v = without_dead_rows(
                            v, tl.max((depth != -float("inf")).to(tl.int32), 0) == 0
                        )
                    acc = acc * rescale[:, None]
                    acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=f.PRECISION)

    if f.FUSED:  # from the level to m, from which it differs by what it was rounded
        factor, level = line_of(m, p)
        drop = -tl.fma(m, factor, -level)
        m = tl.where((l > 0.0) | (m > -LARGEST), m, -float("inf"))
        rescale = tl.exp2(drop)
        depth_sum = rescale * (depth_sum + l * drop)
        distance_sum = rescale * distance_sum
        l = rescale * l
        acc = rescale[:, None] * acc

    # Sinks: one more key without a value
    without_keys = l == 0.0
    top, highest, rescale = m, natural(m, p, f), tl.full([tile.BLOCK_M], 1.0, tl.float32)
    if x.sinks is not None:
        sink = tl.load(x.sinks + h).to(tl.float32)
        sink_units = in_units(sink, f)
        top = tl.maximum(m, sink_units)
        base = tl.where(top == -float("inf"), 0.0, top)
        drop = tl.where(without_keys, 0.0, in_log2(m - base, p, f))
        rescale = tl.exp2(drop)
        depth = in_log2(sink_units - base, p, f)
        l_sink = tl.exp2(depth)
        moved = tl.where(rescale > 0.0, (depth_sum + l * drop) * rescale, 0.0)
        depth_sum = moved + tl.where(l_sink > 0.0, l_sink * depth, 0.0)
        l = l * rescale + l_sink
        highest_of_all = tl.where(sink_units >= m, sink, highest)
    else:
        highest_of_all = highest

    # Statistics
    empty = l == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / l)
    at = row_at(x, p, b, h, q_row) + t0 + row
    lse = tl.where(empty, -float("inf"), highest_of_all + tl.log(l))
    tl.store(to.lse + at, lse, mask=t < T)
    tl.store(to.norm + at, tl.where(top == -float("inf"), 0.0, top), mask=t < T)
    log2_l = tl.where(without_keys, float("inf"), tl.log2(l))
    tl.store(to.norm + to.plane + at, log2_l, mask=t < T)
    # Store
    out_base = to.out + offset(b, to.out_b, h, to.out_h, q_row + t0, to.out_t)
    acc = acc * (inverse * rescale * p.keep_scale)[:, None]
    acc = tl.where(without_keys[:, None], 0.0, acc)
    store_rows(out_base, row, to.out_t, t < T, f.D_V, tile.BLOCK_DV, f, acc)
    # Statistics that are asked for
    if to.stats is not None:
        at = to.stats + at
        tl.store(at, highest, mask=t < T)
        entropy = tl.where(empty, 0.0, tl.log(l) - depth_sum * inverse * LN2)
        at = at + to.plane
        tl.store(at, entropy, mask=t < T)
        at = at + to.plane
        tl.store(at, distance_sum * rescale * inverse, mask=t < T)
        tl.store(at + to.plane, tl.where(without_keys, 0.0, rescale * inverse), mask=t < T)


def attention_fwd(inputs: Inputs, options: Options, call: Call, arch: str) -> ForwardResults:
    """Run the forward.

    Args:
        inputs: The call's tensors.
        options: Its options.
        call: Both, as `gather` made them.
        arch: The architecture whose tiles to use, see `configs`.

    Returns:
        out, lse, norm and, with ``options.stats``, the statistics, as in ``Outputs``.
    """
    to = results(inputs, options)
    launch(forward_launch(call, to, arch))
    return to


def results(inputs: Inputs, options: Options) -> ForwardResults:
    """Memory for the results. Varlen rows past the last sequence belong to no program."""
    q, varlen = inputs.q, inputs.cu_seqlens_q is not None
    out = empty_in_order(q, inputs.v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    norm = q.new_empty((2, *q.shape[:3]), dtype=torch.float32)
    stats = q.new_empty((4, *q.shape[:3]), dtype=torch.float32) if options.stats else None
    if varlen:
        out.zero_()
        lse.fill_(-torch.inf)
        norm[0].zero_()
        norm[1].fill_(torch.inf)
        if stats is not None:
            stats[0].fill_(-torch.inf)
            stats[1:].zero_()
    return ForwardResults(out, lse, norm, stats, *row_strides(out, varlen), lse.numel())


def forward_launch(call: Call, to: ForwardResults, arch: str) -> Launch:
    """The forward's kernel, grid and tiles."""
    x, p, f = call
    alone = not (f.DROPOUT or f.SOFTCAP or x.alibi_slopes is not None or to.stats is not None)
    config = configs.choose(arch, "fwd", x.q.element_size(), f.D, f.D_V, f.TILED, f.BLOCKS, alone)
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    grid = p.B * p.H * -(-p.T // config.BLOCK_M)
    return Launch(attention_fwd_kernel, grid, (x, to), p, f, tile, config, "BLOCK_N")
