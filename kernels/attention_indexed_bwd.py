"""Attention backward over chosen keys, without atomics.

    p = exp(s - m) / l                  ds = p (do v[list]^T + row_term - dentropy (s - m))
    dq = scale * ds k[list]             dk[list] += scale * ds^T q        dv[list] += p^T do

A row of dk or dv is a sum over the queries that list its key. For some queries at a time, as many
as `PARTS_BYTES` has room for, every place in their lists gives its terms of it, a row each; then
each key adds the terms of its places to its sum, in the order of the queries.

Grid:    dq: as the forward; terms: batch * key head * query * ceil(K / BLOCK_N); sums: batch * key
         head * S
Memory:  dq: q, do [BLOCK_M, D] and dq in registers, rows are heads; terms: gathered k and v
         [BLOCK_N, D] and their terms stay, the heads of the group pass by
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnfast.call import Inputs, Options

from . import configs
from .arguments import Call, Tile, block
from .attention_bwd import BackwardResults, Given, results, row_terms_launch
from .gradients import before_cap, entropy_gradient, score_gradients
from .head import sequence_of
from .indexed_lists import (
    Listing,
    Lists,
    gather_rows,
    list_at,
    listing,
    query_of,
    sorted_lists,
    with_heads_in_rows,
)
from .launch import Launch, launch
from .rows import load_rows, offset, store_rows
from .scores import edit_scores, norm_of, probabilities

PARTS_BYTES = 256 << 20  # of the terms that are held at a time
PLACES = 8  # that a sum adds at once


class Terms(NamedTuple):
    """What the places of some queries' lists add to dk and dv."""

    dk: Tensor  # (B, H_kv, rows, K, D) fp32
    dv: Tensor  # (B, H_kv, rows, K, D_v) fp32
    first: int  # query
    rows: int


class Sums(NamedTuple):
    """dk and dv, of the queries so far."""

    dk: Tensor  # (B, H_kv, S, D) fp32, dense
    dv: Tensor  # (B, H_kv, S, D_v) fp32, dense


@triton.jit
def indexed_dq_kernel(x, lists, g, to, p, f, tile):
    """Of some heads of one query."""
    # Setup
    b, h_kv, t, first = query_of(p, tile.BLOCK_M)
    _T, _S, _q_row, _k_row, shift = sequence_of(x, p, f, b)
    row = tl.arange(0, tile.BLOCK_M)
    slot = tl.arange(0, tile.BLOCK_N)
    live_row = first + row < p.group
    h = h_kv * p.group + first
    listed, count = list_at(lists, b, h_kv, t, p)

    # Load
    q_base = x.q + offset(b, p.q_b, h, p.q_h, t, p.q_t)
    q = load_rows(q_base, row, p.q_h, live_row, f.D, tile.BLOCK_D, f, True)
    at = (b.to(tl.int64) * p.H + h + row) * p.T + t
    m, log2_l = norm_of(g.norm, g.plane, at, live_row)
    do_base = g.grad_out + offset(b, g.do_b, h, g.do_h, t, g.do_t)
    has_keys = log2_l < float("inf")  # and is not NaN
    do = load_rows(do_base, row, g.do_h, has_keys, f.D_V, tile.BLOCK_DV, f, True)
    row_term = tl.load(g.row_term + at, mask=live_row, other=0.0)
    dentropy = entropy_gradient(g, at, live_row)
    dq = tl.zeros([tile.BLOCK_M, tile.BLOCK_D], tl.float32)
    k_base = x.k + offset(b, p.k_b, h_kv, p.k_h, t * 0, p.k_t)
    v_base = x.v + offset(b, p.v_b, h_kv, p.v_h, t * 0, p.v_t)

    for j0 in tl.range(0, count, tile.BLOCK_N):
        # Scores
        j = tl.load(listed + j0 + slot, mask=j0 + slot < count, other=p.S)
        live = j < p.S
        k = gather_rows(k_base, j, p.k_t, live, f.D, tile.BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
        s, tanh_x = edit_scores(
            s, t, row[:, None], j0, j[None, :], p.T, p.S, shift, None,
            None, None, 0.0, x, p, f, False,
        )  # fmt: skip
        s = tl.where(live[None, :], s, -float("inf"))
        # Probabilities
        depth, probs = probabilities(s, m[:, None], log2_l[:, None], p, f, True)
        # dP
        v = gather_rows(v_base, j, p.v_t, live, f.D_V, tile.BLOCK_DV)
        dp = tl.dot(do, tl.trans(v), input_precision=f.PRECISION)
        # ds
        ds = score_gradients(
            depth, probs, dp, 0.0, True, row_term[:, None], dentropy[:, None], g, p, f, True
        )
        ds = before_cap(ds, tanh_x, f)
        # dq
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=f.PRECISION)

    # Store
    dq_base = to.dq + offset(b, to.dq_b, h, to.dq_h, t, to.dq_t)
    store_rows(dq_base, row, to.dq_h, live_row, f.D, tile.BLOCK_D, f, dq * p.scale)


@triton.jit
def indexed_terms_kernel(x, lists, g, terms, p, f, tile):
    """What some places of one query's list add to dk and dv, all heads of the group."""
    # Setup
    blocks = tl.cdiv(lists.K, tile.BLOCK_N)
    pid = tl.program_id(0)
    block, query = pid % blocks, pid // blocks
    local, head = query % terms.rows, query // terms.rows
    H_kv = p.H // p.group
    b, h_kv, t = head // H_kv, head % H_kv, terms.first + local
    listed, count = list_at(lists, b, h_kv, t, p)
    j0 = block * tile.BLOCK_N
    if j0 >= count:
        return
    _T, _S, _q_row, _k_row, shift = sequence_of(x, p, f, b)
    row = tl.arange(0, tile.BLOCK_M)
    slot = j0 + tl.arange(0, tile.BLOCK_N)
    j = tl.load(listed + slot, mask=slot < count, other=p.S)
    live = j < p.S

    # Load
    k_base = x.k + offset(b, p.k_b, h_kv, p.k_h, t * 0, p.k_t)
    k = gather_rows(k_base, j, p.k_t, live, f.D, tile.BLOCK_D)
    v_base = x.v + offset(b, p.v_b, h_kv, p.v_h, t * 0, p.v_t)
    v = gather_rows(v_base, j, p.v_t, live, f.D_V, tile.BLOCK_DV)
    dk = tl.zeros([tile.BLOCK_N, tile.BLOCK_D], tl.float32)
    dv = tl.zeros([tile.BLOCK_N, tile.BLOCK_DV], tl.float32)

    for first in tl.range(0, p.group, tile.BLOCK_M):
        # Load
        h = h_kv * p.group + first
        at = (b.to(tl.int64) * p.H + h + row) * p.T + t
        live_row = first + row < p.group
        m, log2_l = norm_of(g.norm, g.plane, at, live_row)
        row_term = tl.load(g.row_term + at, mask=live_row, other=0.0)
        dentropy = entropy_gradient(g, at, live_row)
        known = log2_l < float("inf")  # of a row of NaN p is known, and 0 * NaN would get out
        q_base = x.q + offset(b, p.q_b, h, p.q_h, t, p.q_t)
        q = load_rows(q_base, row, p.q_h, known, f.D, tile.BLOCK_D, f, True)
        do_base = g.grad_out + offset(b, g.do_b, h, g.do_h, t, g.do_t)
        do = load_rows(do_base, row, g.do_h, known, f.D_V, tile.BLOCK_DV, f, True)
        # Scores, transposed
        s = tl.dot(k, tl.trans(q), input_precision=f.PRECISION)
        s, tanh_x = edit_scores(
            s, t, row[None, :], j0, j[:, None], p.T, p.S, shift, None,
            None, None, 0.0, x, p, f, False,
        )  # fmt: skip
        # Probabilities
        depth, probs = probabilities(s, m[None, :], log2_l[None, :], p, f, True)
        # dv
        dv = tl.dot(probs.to(do.dtype), do, dv, input_precision=f.PRECISION)
        # dP
        dp = tl.dot(v, tl.trans(do), input_precision=f.PRECISION)
        # ds
        ds = score_gradients(
            depth, probs, dp, 0.0, True, row_term[None, :], dentropy[None, :], g, p, f, True
        )
        ds = before_cap(ds, tanh_x, f)
        # dk
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=f.PRECISION)

    # Store
    place = (head.to(tl.int64) * terms.rows + local) * lists.K + j0
    at_slot = tl.arange(0, tile.BLOCK_N).to(tl.int64)
    store_rows(terms.dk + place * f.D, at_slot, f.D, live, f.D, tile.BLOCK_D, f, dk * p.scale)
    store_rows(terms.dv + place * f.D_V, at_slot, f.D_V, live, f.D_V, tile.BLOCK_DV, f, dv)


@triton.jit
def indexed_sums_kernel(x, found, terms, to, p, f, tile):
    """One key's dk and dv: what its places add to them, in the order of the queries."""
    pid = tl.program_id(0)
    j, head = pid % p.S, pid // p.S
    H_kv = p.H // p.group
    list_head = head // H_kv * found.heads + tl.where(found.heads > 1, head % H_kv, 0)
    starts = found.starts + list_head.to(tl.int64) * (p.S + 1) + j
    begin, end = tl.load(starts), tl.load(starts + 1)
    if begin == end:
        return
    lane = tl.arange(0, tile.BLOCK_N)
    d, d_v = tl.arange(0, tile.BLOCK_D), tl.arange(0, tile.BLOCK_DV)
    dk = tl.zeros([tile.BLOCK_D], tl.float32)
    dv = tl.zeros([tile.BLOCK_DV], tl.float32)
    order = found.order + list_head.to(tl.int64) * found.places
    base = head.to(tl.int64) * found.places
    for i in tl.range(begin, end, tile.BLOCK_N):
        live = i + lane < end
        place = base + tl.load(order + i + lane, mask=live, other=0)
        dk += tl.sum(gather_rows(terms.dk, place, f.D, live, f.D, tile.BLOCK_D), 0)
        dv += tl.sum(gather_rows(terms.dv, place, f.D_V, live, f.D_V, tile.BLOCK_DV), 0)
    dk_at = to.dk + pid.to(tl.int64) * f.D + d
    tl.store(dk_at, tl.load(dk_at, mask=d < f.D) + dk, mask=d < f.D)
    dv_at = to.dv + pid.to(tl.int64) * f.D_V + d_v
    tl.store(dv_at, tl.load(dv_at, mask=d_v < f.D_V) + dv, mask=d_v < f.D_V)


def indexed_bwd(
    inputs: Inputs, options: Options, call: Call, given: Given, arch: str
) -> BackwardResults:
    """Run the backward over chosen keys; arguments and results as those of ``attention_bwd``."""
    to = results(inputs)
    lists = sorted_lists(inputs, options)
    launch(row_terms_launch(call, given, arch))
    launch(dq_launch(call, lists, given, to, arch))
    sums = new_sums(to)
    T, rows = call.p.T, rows_at_once(call, lists.K)
    for first in range(0, T, rows):
        part = slice(first, min(first + rows, T))
        terms = new_terms(call, lists.K, part)
        launch(terms_launch(call, lists, given, terms, arch))
        launch(sums_launch(call, listing(lists, part, call.p.S), terms, sums))
    to.dk.copy_(sums.dk)
    to.dv.copy_(sums.dv)
    return to


def rows_at_once(call: Call, K: int) -> int:
    """The queries whose terms are held at a time: any number of them makes the same sums' terms."""
    p, f = call.p, call.f
    of_a_row = 4 * p.B * (p.H // p.group) * K * (f.D + f.D_V)
    return max(1, min(p.T, PARTS_BYTES // max(of_a_row, 1)))


def new_terms(call: Call, K: int, rows: slice) -> Terms:
    """Memory for the terms of some queries."""
    p, f = call.p, call.f
    places = (p.B, p.H // p.group, rows.stop - rows.start, K)
    dk, dv = (call.x.q.new_empty((*places, n), dtype=torch.float32) for n in (f.D, f.D_V))
    return Terms(dk, dv, rows.start, rows.stop - rows.start)


def new_sums(to: BackwardResults) -> Sums:
    """Sums of nothing yet."""
    return Sums(*(x.new_zeros(x.shape, dtype=torch.float32) for x in (to.dk, to.dv)))


def dq_launch(call: Call, lists: Lists, given: Given, to: BackwardResults, arch: str) -> Launch:
    """The kernel of dq."""
    x, p, f = with_heads_in_rows(call, given.grad_out, to.dq)
    config = configs.of_group(arch, "indexed_dq", x.q.element_size(), f.D, f.D_V, p.group)
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    grid = p.B * (p.H // p.group) * p.T * -(-p.group // config.BLOCK_M)
    return Launch(indexed_dq_kernel, grid, (x, lists, given, to), p, f, tile, config, "BLOCK_N")


def terms_launch(call: Call, lists: Lists, given: Given, terms: Terms, arch: str) -> Launch:
    """The kernel of the terms."""
    x, p, f = with_heads_in_rows(call, given.grad_out)
    config = configs.of_group(arch, "indexed_terms", x.q.element_size(), f.D, f.D_V, p.group)
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    grid = p.B * (p.H // p.group) * terms.rows * -(-lists.K // config.BLOCK_N)
    return Launch(
        indexed_terms_kernel, grid, (x, lists, given, terms), p, f, tile, config, "BLOCK_M"
    )


def sums_launch(call: Call, found: Listing, terms: Terms, to: Sums) -> Launch:
    """The kernel of the sums."""
    x, p, f = call
    config = configs.Config(1, PLACES, 4, 1)
    tile = Tile(1, PLACES, block(f.D), block(f.D_V))
    grid = p.B * (p.H // p.group) * p.S
    return Launch(indexed_sums_kernel, grid, (x, found, terms, to), p, f, tile, config)
