"""Attention forward over chosen keys: each query attends those that its list names.

    o = softmax(scale * q k[list]^T) v[list]        lse = logsumexp of the scores

Grid:    batch * key head * T * ceil(group / BLOCK_M): a query, and heads that share its list
Memory:  q, acc [BLOCK_M, D_v], m, l in registers, rows are heads; gathered rows of k and v pass by
Rows:    a row's result depends on the set of its keys and on BLOCK_N alone
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnfast.call import Inputs, Options

from . import configs
from .arguments import Call, Tile, block
from .attention_fwd import ForwardResults, results
from .head import distances, sequence_of
from .indexed_lists import (
    Lists,
    gather_rows,
    list_at,
    query_of,
    sorted_lists,
    with_heads_in_rows,
)
from .launch import Launch, launch
from .rows import load_rows, offset, store_rows
from .scores import LN2, edit_scores, in_log2, in_units, natural, rounded_product


@triton.jit
def indexed_fwd_kernel(x, lists, to, p, f, tile):
    """Some heads of one query."""
    # Setup
    b, h_kv, t, first = query_of(p, tile.BLOCK_M)
    _T, _S, _q_row, _k_row, shift = sequence_of(x, p, f, b)
    row = tl.arange(0, tile.BLOCK_M)
    slot = tl.arange(0, tile.BLOCK_N)
    live_row = first + row < p.group
    h = h_kv * p.group + first
    listed, count = list_at(lists, b, h_kv, t, p)

    # Load q
    q_base = x.q + offset(b, p.q_b, h, p.q_h, t, p.q_t)
    q = load_rows(q_base, row, p.q_h, live_row, f.D, tile.BLOCK_D, f, True)
    m = tl.full([tile.BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([tile.BLOCK_M], tl.float32)
    acc = tl.zeros([tile.BLOCK_M, tile.BLOCK_DV], tl.float32)
    depth_sum = tl.zeros([tile.BLOCK_M], tl.float32)  # of e^(s - m) (s - m), in units of log2
    distance_sum = tl.zeros([tile.BLOCK_M], tl.float32)  # of e^(s - m) |j - t'|
    k_base = x.k + offset(b, p.k_b, h_kv, p.k_h, t * 0, p.k_t)
    v_base = x.v + offset(b, p.v_b, h_kv, p.v_h, t * 0, p.v_t)

    for j0 in tl.range(0, count, tile.BLOCK_N):
        # Scores
        j = tl.load(listed + j0 + slot, mask=j0 + slot < count, other=p.S)
        live = j < p.S
        k = gather_rows(k_base, j, p.k_t, live, f.D, tile.BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
        s, _tanh_x = edit_scores(
            s, t, row[:, None], j0, j[None, :], p.T, p.S, shift, None,
            None, None, 0.0, x, p, f, False,
        )  # fmt: skip
        s = tl.where(live[None, :], s, -float("inf"))
        # Softmax
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        depth = in_log2(s - base[:, None], p, f)
        drop = in_log2(m - base, p, f)
        probs = tl.exp2(depth)
        rescale = tl.exp2(drop)
        if to.stats is not None:
            moved = tl.where(rescale > 0.0, rescale * (depth_sum + l * drop), 0.0)
            depth_sum = moved + tl.sum(tl.where(probs > 0.0, probs * depth, 0.0), 1)
            far = rounded_product(probs, distances(t, j[None, :], shift))
            distance_sum = rescale * distance_sum + tl.sum(far, 1)
        l = l * rescale + tl.sum(probs, 1)
        m = m_new
        # Output
        v = gather_rows(v_base, j, p.v_t, live, f.D_V, tile.BLOCK_DV)
        acc = acc * rescale[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=f.PRECISION)

    # Sinks: one more key without a value
    without_keys = l == 0.0
    top, highest, rescale = m, natural(m, p, f), tl.full([tile.BLOCK_M], 1.0, tl.float32)
    if x.sinks is not None:
        sink = tl.load(x.sinks + h + row, mask=live_row, other=0.0).to(tl.float32)
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

    # Store
    empty = l == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / l)
    at = (b.to(tl.int64) * p.H + h + row) * p.T + t
    lse = tl.where(empty, -float("inf"), highest_of_all + tl.log(l))
    tl.store(to.lse + at, lse, mask=live_row)
    tl.store(to.norm + at, tl.where(top == -float("inf"), 0.0, top), mask=live_row)
    log2_l = tl.where(without_keys, float("inf"), tl.log2(l))
    tl.store(to.norm + to.plane + at, log2_l, mask=live_row)
    out_base = to.out + offset(b, to.out_b, h, to.out_h, t, to.out_t)
    acc = acc * (inverse * rescale)[:, None]
    acc = tl.where(without_keys[:, None], 0.0, acc)
    store_rows(out_base, row, to.out_h, live_row, f.D_V, tile.BLOCK_DV, f, acc)
    # Statistics that are asked for
    if to.stats is not None:
        at = to.stats + at
        tl.store(at, highest, mask=live_row)
        entropy = tl.where(empty, 0.0, tl.log(l) - depth_sum * inverse * LN2)
        at = at + to.plane
        tl.store(at, entropy, mask=live_row)
        at = at + to.plane
        tl.store(at, distance_sum * rescale * inverse, mask=live_row)
        tl.store(at + to.plane, tl.where(without_keys, 0.0, rescale * inverse), mask=live_row)


def indexed_fwd(inputs: Inputs, options: Options, call: Call, arch: str) -> ForwardResults:
    """Run the forward over chosen keys; arguments and results as those of ``attention_fwd``."""
    to = results(inputs, options)
    launch(indexed_fwd_launch(call, sorted_lists(inputs, options), to, arch))
    return to


def indexed_fwd_launch(call: Call, lists: Lists, to: ForwardResults, arch: str) -> Launch:
    """The kernel, grid and tiles."""
    x, p, f = with_heads_in_rows(call, to.out)
    config = configs.of_group(arch, "indexed_fwd", x.q.element_size(), f.D, f.D_V, p.group)
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    grid = p.B * (p.H // p.group) * p.T * -(-p.group // config.BLOCK_M)
    return Launch(indexed_fwd_kernel, grid, (x, lists, to), p, f, tile, config, "BLOCK_N")
