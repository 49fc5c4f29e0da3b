"""Attention backward: a number per row, dq by blocks of queries, dk and dv by blocks of keys.

    p = exp(s - m) / l    dP = Z (do v^T + dw)    ds = p (dP + row_term - dentropy (s - m))
    dq = scale * ds k     dk = scale * ds^T q     dv = (p Z)^T do

with ``row_term = -delta + dlse + dentropy * (log l - entropy)``; delta is rowsum(do * o), and where
the weights have a gradient rowsum(p Z dw) more (docs/math.md, section 4). m and l come apart from
the forward: beside a huge m their lse would have lost log l. FlashAttention-2, Algorithm 2, with dq
in a kernel of its own: scores are computed twice, and nothing is added by atomics.

Grid:    row terms and dq: as the forward; dk and dv: batch * key head * ceil(S / BLOCK_N)
Memory:  dq: q, do [BLOCK_M, D] and dq in registers, k and v tiles pass by; dk, dv: k, v
         [BLOCK_N, D] and dk, dv stay, q and do tiles of all heads of the group pass by, scores
         transposed
Loops:   as in the forward: before, inside and after what needs no masking by position; dk and dv
         walk through the tiles of all heads of the group in one loop
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnfast.call import Inputs, Upstream
from attnfast.checks import contiguous
from attnfast.ops import empty_in_order

from . import configs
from .arguments import Call, Tile, block, row_strides, strides
from .blocks import block_tile, entries_of, tiles_in
from .dropout import kept_by_dropout
from .gradients import before_cap, entropy_gradient, score_gradients, weight_gradient
from .head import (
    attended_range,
    key_range,
    query_range,
    scheduled,
    sequence_of,
    sides_of,
    tiles_of,
    widest_sides,
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
    LN2,
    attended_keys,
    edit_scores,
    fused_probabilities,
    line_of_norm,
    norm_of,
    probabilities,
    rounded_product,
    slope_of,
)


class Given(NamedTuple):
    """What the forward left and what comes back to it, and one number per row."""

    grad_out: Tensor  # (B, H, T, D_v)
    grad_lse: Tensor | None  # (B, H, T) fp32
    grad_entropy: Tensor | None  # (B, H, T) fp32
    grad_weights: Tensor | None  # (B, H, T, S), or for the mean (B, T, S)
    out: Tensor  # (B, H, T, D_v)
    norm: Tensor  # (2, B, H, T) fp32
    entropy: Tensor | None  # (B, H, T) fp32
    row_term: Tensor  # (B, H, T) fp32
    do_b: int
    do_h: int
    do_t: int
    out_b: int
    out_h: int
    out_t: int
    dw_b: int
    dw_h: int
    dw_t: int
    dw_s: int
    dw_factor: float  # 1, or 1 / H for the mean over the heads
    plane: int  # elements of row_term


class BackwardResults(NamedTuple):
    """What the backward writes."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_b: int
    dq_h: int
    dq_t: int
    dk_b: int
    dk_h: int
    dk_t: int
    dv_b: int
    dv_h: int
    dv_t: int


@triton.jit
def row_terms_kernel(x, g, p, f, tile):
    """What of ds depends on the row alone, for one block of queries."""
    # Setup
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
    live_row = t < T
    at = row_at(x, p, b, h, q_row) + t
    m, log2_l = norm_of(g.norm, g.plane, at, live_row)
    has_keys = log2_l != float("inf")

    # Load
    out_base = g.out + offset(b, g.out_b, h, g.out_h, q_row + t0, g.out_t)
    out = load_rows(out_base, row, g.out_t, live_row, f.D_V, tile.BLOCK_DV, f, True)
    do_base = g.grad_out + offset(b, g.do_b, h, g.do_h, q_row + t0, g.do_t)
    do = load_rows(do_base, row, g.do_t, live_row & has_keys, f.D_V, tile.BLOCK_DV, f, True)
    delta = tl.sum(rounded_product(out.to(tl.float32), do.to(tl.float32)), 1)

    if g.grad_weights is not None:
        mask = at_head(x.mask, b, p.mask_b, h, p.mask_h)
        bias = at_head(x.bias, b, p.bias_b, h, p.bias_h)
        slope = slope_of(x, p, f, b, h)
        q_base = x.q + offset(b, p.q_b, h, p.q_h, q_row + t0, p.q_t)
        q = load_rows(q_base, row, p.q_t, live_row, f.D, tile.BLOCK_D, f, True)
        t_last = tl.minimum(t0 + tile.BLOCK_M, T) - 1
        sides = sides_of(x, p, h)
        begin, end, _inner_begin, _inner_end = key_range(t0, t_last, S, shift, sides, f)
        first, last = begin // tile.BLOCK_N * tile.BLOCK_N, end
        if f.BLOCKS:
            line = t0 // f.BLOCKS
            entries = entries_of(x, p, f, b, h, line, begin, end, begin, end, False, False)
            first, last = t0 * 0, tiles_in(2, entries, f, tile.BLOCK_N)
        for i in tl.range(first, last, 1 if f.BLOCKS else tile.BLOCK_N):
            # Scores
            if f.BLOCKS:
                j0, slot = block_tile(2, i, entries, x, p, f, tile.BLOCK_N, False)
            else:
                j0, slot = i, None
            j = j0 + key
            k_tile = x.k + offset(b, p.k_b, h_kv, p.k_h, k_row + j0, p.k_t)
            live = (j >= begin) & (j < end)
            k = load_rows(k_tile, key, p.k_t, live, f.D, tile.BLOCK_D, f, True)
            s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
            s, _tanh_x = edit_scores(
                s,
                t0,
                row[:, None],
                j0,
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
                True,
                True,
                slot,
            )
            # Probabilities
            _depth, probs = probabilities(s, m[:, None], log2_l[:, None], p, f, True)
            # dP: what dw adds to delta
            dw = weight_gradient(g, b, h, t[:, None], j[None, :], T, S)
            w_dw = tl.where(probs == 0.0, 0.0, probs * dw)
            if f.DROPOUT:
                kept = kept_by_dropout(x, p, f, b, h, t0, j0, tile.BLOCK_M, tile.BLOCK_N)
                w_dw = tl.where(kept, w_dw * p.keep_scale, 0.0)
            delta += tl.sum(w_dw, 1)

    # Store
    row_term = -delta
    if g.grad_entropy is not None:
        dentropy = tl.load(g.grad_entropy + at, mask=live_row, other=0.0)
        row_term += dentropy * (log2_l * LN2 - tl.load(g.entropy + at, mask=live_row, other=0.0))
    row_term = tl.where(has_keys, row_term, 0.0)
    if g.grad_lse is not None:
        row_term += tl.load(g.grad_lse + at, mask=live_row, other=0.0)
    tl.store(g.row_term + at, row_term, mask=live_row)


@triton.jit
def dq_kernel(x, g, to, p, f, tile):
    """One block of queries' dq."""
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
    live_row = t < T
    mask = at_head(x.mask, b, p.mask_b, h, p.mask_h)
    bias = at_head(x.bias, b, p.bias_b, h, p.bias_h)
    slope = slope_of(x, p, f, b, h)

    # Load
    q_base = x.q + offset(b, p.q_b, h, p.q_h, q_row + t0, p.q_t)
    q = load_rows(q_base, row, p.q_t, live_row, f.D, tile.BLOCK_D, f, True)
    at = row_at(x, p, b, h, q_row) + t
    m, log2_l = norm_of(g.norm, g.plane, at, live_row)
    has_keys = log2_l < float("inf")  # and is not NaN
    do_base = g.grad_out + offset(b, g.do_b, h, g.do_h, q_row + t0, g.do_t)
    do = load_rows(do_base, row, g.do_t, has_keys, f.D_V, tile.BLOCK_DV, f, True)
    row_term = tl.load(g.row_term + at, mask=live_row, other=0.0)
    dentropy = entropy_gradient(g, at, live_row)
    FUSED: tl.constexpr = f.FUSED and x.q.dtype.element_ty != tl.float16  # rest leaves its range
    if FUSED:
        factor, level, held, rest = line_of_norm(m, log2_l, p)
    dq = tl.zeros([tile.BLOCK_M, tile.BLOCK_D], tl.float32)

    t_last = tl.minimum(t0 + tile.BLOCK_M, T) - 1
    sides = sides_of(x, p, h)
    begin, end, inner_begin, inner_end = key_range(t0, t_last, S, shift, sides, f)
    begin, end, inner_begin, inner_end = attended_range(x, b, begin, end, inner_begin, inner_end)
    if f.BLOCKS:
        line = t0 // f.BLOCKS
        entries = entries_of(x, p, f, b, h, line, begin, end, inner_begin, inner_end, False)
    for careful in tl.static_range(1 if f.HOLED and f.DROPOUT else 0, 2 if f.HOLED else 1):
        if careful and not f.DROPOUT:
            # 0 * NaN may have let out a k that no query attends: then zeros in its place
            again = holds_nan(dq)
            dq = tl.where(again, 0.0, dq)
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
                    # Load
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
                    v_tile = x.v + offset(b, p.v_b, h_kv, p.v_h, tile_row, p.v_t)
                    v = load_rows(v_tile, key, p.v_t, live, f.D_V, tile.BLOCK_DV, f, part != 1)
                    # Scores
                    s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
                    s, tanh_x = edit_scores(
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
                    # Probabilities
                    if FUSED:
                        depth, probs = fused_probabilities(
                            s, factor[:, None], level[:, None], held[:, None]
                        )
                    else:
                        depth, probs = probabilities(s, m[:, None], log2_l[:, None], p, f, False)
                    # dP
                    dp = tl.dot(do, tl.trans(v), input_precision=f.PRECISION)
                    dw = weight_gradient(g, b, h, t[:, None], j[None, :], T, S)
                    kept = True
                    if f.DROPOUT:
                        kept = kept_by_dropout(x, p, f, b, h, t0, j0, tile.BLOCK_M, tile.BLOCK_N)
                    # ds
                    holes = part != 1 or (careful == 1 and f.TILED)
                    ds = score_gradients(
                        depth,
                        probs,
                        dp,
                        dw,
                        kept,
                        row_term[:, None],
                        dentropy[:, None],
                        g,
                        p,
                        f,
                        holes,
                    )
                    ds = before_cap(ds, tanh_x, f)
                    # dq
                    if careful and (part != 1 or f.TILED):
                        k = without_dead_rows(k, tl.max((s != -float("inf")).to(tl.int32), 0) == 0)
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=f.PRECISION)

    # Store
    dq = dq * p.scale
    if FUSED:
        dq = dq * rest[:, None]
    dq_base = to.dq + offset(b, to.dq_b, h, to.dq_h, q_row + t0, to.dq_t)
    store_rows(dq_base, row, to.dq_t, live_row, f.D, tile.BLOCK_D, f, dq)


@triton.jit
def dkdv_kernel(x, g, to, p, f, tile):
    """One block of keys' dk and dv, summed over the query heads that share it."""
    # Setup
    rely_on(p.q_t, f)
    rely_on(g.do_t, f)
    H_kv = p.H // p.group
    APART: tl.constexpr = f.BLOCKS > 0 or x.windows is not None  # heads have ranges of their own
    block, head = scheduled(p.B * H_kv, tl.cdiv(p.S, tile.BLOCK_N), p.section // p.group, False)
    b, h_kv = head // H_kv, head % H_kv
    T, S, q_row, k_row, shift = sequence_of(x, p, f, b)
    j0 = block * tile.BLOCK_N
    if j0 >= S:
        return
    row = tl.arange(0, tile.BLOCK_M)
    key = tl.arange(0, tile.BLOCK_N)
    j = j0 + key
    live_key = j < S
    # what no query may attend by position is zero: padded queries would meet NaN there
    widest = widest_sides(x, p, h_kv)
    first_key, last_key, _inner_first, _inner_last = key_range(j0 * 0, T - 1, S, shift, widest, f)
    attended = (j >= first_key) & (j < last_key)
    if f.KEY_MASK:  # and dk and dv of what no query attends are zero: no score need be masked
        key_mask = at_head(x.mask, b, p.mask_b, h_kv * 0, p.mask_h)
        attended = attended & attended_keys(key_mask, j0, key, S, p)

    # Load
    k_base = x.k + offset(b, p.k_b, h_kv, p.k_h, k_row + j0, p.k_t)
    k = load_rows(k_base, key, p.k_t, attended, f.D, tile.BLOCK_D, f, True)
    v_base = x.v + offset(b, p.v_b, h_kv, p.v_h, k_row + j0, p.v_t)
    v = load_rows(v_base, key, p.v_t, attended, f.D_V, tile.BLOCK_DV, f, True)
    dk = tl.zeros([tile.BLOCK_N, tile.BLOCK_D], tl.float32)
    dv = tl.zeros([tile.BLOCK_N, tile.BLOCK_DV], tl.float32)

    j_last = tl.minimum(j0 + tile.BLOCK_N, S) - 1
    if f.KEY_MASK:
        first_key, last_key, _inner_first, _inner_last = attended_range(x, b, j0 * 0, S, j0, S)
        T = tl.where((j_last >= first_key) & (j0 < last_key), T, 0)  # no query attends any key
    for member in tl.range(0, p.group if APART else 1):
        sides = sides_of(x, p, h_kv * p.group + member)
        begin, end, inner_begin, inner_end = query_range(j0, j_last, T, shift, sides, f)
        if (
            f.TILED
        ):  # where the keys end within the block, masks and biases are read by position too
            inner_end = tl.where(j0 + tile.BLOCK_N <= S, inner_end, 0)
        if f.BLOCKS:
            h, line = h_kv * p.group + member, j0 // f.BLOCKS
            entries = entries_of(x, p, f, b, h, line, begin, end, inner_begin, inner_end, True)
        for part in tl.static_range(0 if f.HAS_RIGHT and not f.BLOCKS else 1, 3):
            if f.BLOCKS:
                first, last = j0 * 0, tiles_in(part, entries, f, tile.BLOCK_M)
            else:
                first, last = tiles_of(part, begin, end, inner_begin, inner_end, tile.BLOCK_M)
            if first < last:
                h, t0 = h_kv * p.group + member, first
                if f.BLOCKS:
                    count = last
                    ahead, slot_ahead = block_tile(
                        part, first, entries, x, p, f, tile.BLOCK_M, True
                    )
                else:
                    count = (1 if APART else p.group) * tl.cdiv(last - first, tile.BLOCK_M)
                for i in tl.range(0, count):
                    # Load
                    if f.BLOCKS:
                        t0, slot = ahead, slot_ahead
                        ahead, slot_ahead = block_tile(
                            part, tl.minimum(i + 1, last - 1), entries, x, p, f, tile.BLOCK_M, True
                        )
                        past = t0.to(tl.uint32)
                    else:
                        slot = None
                        past = start_of(t0, last)
                    t = t0 + row
                    live = (t >= begin) & (t < end)
                    at = row_at(x, p, b, h, q_row) + past
                    if part == 1:
                        m = tl.load(g.norm + at + row)
                        log2_l = tl.load(g.norm + at + g.plane + row)
                        row_term = tl.load(g.row_term + at + row)
                    else:
                        m, log2_l = norm_of(g.norm, g.plane, at + row, live)
                        row_term = tl.load(g.row_term + at + row, mask=live, other=0.0)
                    dentropy = entropy_gradient(g, at + row, live)
                    if f.KEY_MASK:
                        mask = None
                    else:
                        mask = at_head(x.mask, b, p.mask_b, h, p.mask_h)
                    bias = at_head(x.bias, b, p.bias_b, h, p.bias_h)
                    holes = part != 1 or f.TILED
                    if (
                        holes
                    ):  # a row of NaN, or without keys: p is known, and 0 * NaN would get out
                        live = live & (log2_l < float("inf"))
                    tile_row = q_row + past
                    q_tile = x.q + offset(b, p.q_b, h, p.q_h, tile_row, p.q_t)
                    q = load_rows(
                        q_tile,
                        row,
                        p.q_t,
                        live,
                        f.D,
                        tile.BLOCK_D,
                        f,
                        part != 1 or f.TILED,
                    )
                    do_tile = g.grad_out + offset(b, g.do_b, h, g.do_h, tile_row, g.do_t)
                    do = load_rows(
                        do_tile,
                        row,
                        g.do_t,
                        live,
                        f.D_V,
                        tile.BLOCK_DV,
                        f,
                        part != 1 or f.TILED,
                    )
                    # Scores, transposed
                    slope = slope_of(x, p, f, b, h)
                    s = tl.dot(k, tl.trans(q), input_precision=f.PRECISION)
                    s, tanh_x = edit_scores(
                        s,
                        past,
                        row[None, :],
                        j0,
                        key[:, None],
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
                        True,
                        slot,
                    )
                    # Probabilities
                    depth, probs = probabilities(s, m[None, :], log2_l[None, :], p, f, holes)
                    kept = True
                    w = probs
                    if f.DROPOUT:
                        kept = tl.trans(
                            kept_by_dropout(x, p, f, b, h, t0, j0, tile.BLOCK_M, tile.BLOCK_N)
                        )
                        w = tl.where(kept, probs * p.keep_scale, 0.0)  # p Z
                    # dv, before dP, so that w need not outlive it
                    dv = tl.dot(w.to(do.dtype), do, dv, input_precision=f.PRECISION)
                    # dP
                    dp = tl.dot(v, tl.trans(do), input_precision=f.PRECISION)
                    dw = weight_gradient(g, b, h, t[None, :], j[:, None], T, S)
                    # ds
                    ds = score_gradients(
                        depth,
                        probs,
                        dp,
                        dw,
                        kept,
                        row_term[None, :],
                        dentropy[None, :],
                        g,
                        p,
                        f,
                        holes,
                    )
                    ds = before_cap(ds, tanh_x, f)
                    # dk
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=f.PRECISION)
                    # The next tile, of this head or of the next, without a division
                    if not f.BLOCKS:
                        t0 += tile.BLOCK_M
                        if p.group != 1:
                            h += (t0 >= last).to(tl.int32)
                            t0 = tl.where(t0 >= last, first, t0)

    # Store
    if f.KEY_MASK:
        dk = tl.where(attended[:, None], dk, 0.0)
        dv = tl.where(attended[:, None], dv, 0.0)
    dk_base = to.dk + offset(b, to.dk_b, h_kv, to.dk_h, k_row + j0, to.dk_t)
    store_rows(dk_base, key, to.dk_t, live_key, f.D, tile.BLOCK_D, f, dk * p.scale)
    dv_base = to.dv + offset(b, to.dv_b, h_kv, to.dv_h, k_row + j0, to.dv_t)
    store_rows(dv_base, key, to.dv_t, live_key, f.D_V, tile.BLOCK_DV, f, dv)


def attention_bwd(inputs: Inputs, call: Call, given: Given, arch: str) -> BackwardResults:
    """Run the backward but for dbias and dsinks; also fills ``given.row_term``.

    Args:
        inputs: The call's tensors.
        call: The call, as `gather` made it.
        given: The forward's results and their gradients.
        arch: The architecture whose tiles to use, see `configs`.

    Returns:
        dq, dk and dv in their inputs' dtypes and stride orders.
    """
    to = results(inputs)
    for job in backward_launches(call, given, to, arch):
        launch(job)
    return to


def given(upstream: Upstream, varlen: bool) -> Given:
    """The gradients as kernels take them."""
    grad_out, grad_lse, grad_entropy, grad_weights, out, norm, entropy, *_ = upstream
    if grad_out.shape[3] > 1 and grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    per_head, mean = grad_weights, False
    if grad_weights is not None and grad_weights.dim() == 3:
        per_head, mean = grad_weights.unsqueeze(1), True
    dw = strides(per_head)
    norm = norm.contiguous()
    row_term = torch.empty_like(norm[0])
    if varlen:  # rows past the last sequence belong to no program
        row_term.zero_()
    return Given(
        grad_out,
        contiguous(grad_lse),
        contiguous(grad_entropy),
        grad_weights,
        out,
        norm,
        contiguous(entropy),
        row_term,
        *row_strides(grad_out, varlen),
        *row_strides(out, varlen),
        *dw,
        1 / max(out.shape[1], 1) if mean else 1.0,
        row_term.numel(),
    )


def results(inputs: Inputs) -> BackwardResults:
    """Memory for the results. Varlen rows past the last sequence belong to no program."""
    varlen = inputs.cu_seqlens_q is not None
    dq, dk, dv = (empty_in_order(x, x.shape[3]) for x in (inputs.q, inputs.k, inputs.v))
    if varlen:
        for x in (dq, dk, dv):
            x.zero_()
    return BackwardResults(
        dq, dk, dv, *row_strides(dq, varlen), *row_strides(dk, varlen), *row_strides(dv, varlen)
    )


def backward_launches(call: Call, given: Given, to: BackwardResults, arch: str) -> list[Launch]:
    """The kernels in the order in which they run."""
    x = call.x
    return [
        row_terms_launch(call, given, arch),
        _pass("dq", dq_kernel, call, (x, given, to), given, "BLOCK_N", arch),
        _pass("dkdv", dkdv_kernel, call, (x, given, to), given, "BLOCK_M", arch),
    ]


def row_terms_launch(call: Call, given: Given, arch: str) -> Launch:
    """The kernel that fills ``given.row_term``."""
    return _pass("rows", row_terms_kernel, call, (call.x, given), given, "BLOCK_N", arch)


def _pass(
    name: str,
    kernel: Any,
    call: Call,
    tensors: tuple[Any, ...],
    given: Given,
    walked: str,
    arch: str,
) -> Launch:
    x, p, f = call
    extras = f.TILED or given.grad_weights is not None
    config = configs.choose(arch, name, x.q.element_size(), f.D, f.D_V, extras, f.BLOCKS)
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    grid = p.B * p.H * -(-p.T // config.BLOCK_M)
    if name == "dkdv":
        grid = p.B * (p.H // p.group) * -(-p.S // config.BLOCK_N)
    return Launch(kernel, grid, tensors, p, f, tile, config, walked)
