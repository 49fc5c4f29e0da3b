"""The gradients of a bias and of the sinks: sums of ds over whatever they are broadcast over.

    dbias = sum of ds    dsink = sum over rows of p_sink * (row_term - dentropy * (sink - m))

Grid:    dbias: one program per block of dbias and chunk of what is summed into it; where a bias is
         small there are several chunks, each with a partial sum, added in their order afterwards:
         no atomics, and how the sum is cut depends on the shapes alone. dsinks: one per head
Memory:  a tile of ds and one of its sum in registers; partial sums in fp32, at most _PROGRAMS tiles
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .arguments import Call, block, strides
from .attention_bwd import Given
from .blocks import EMPTY, slot_at
from .dropout import kept_by_dropout
from .gradients import entropy_gradient, score_gradients, weight_gradient
from .head import key_range, sequence_of, sides_of
from .launch import Launch, launch
from .rows import at_head, load_rows, offset, row_at
from .scores import edit_scores, in_units, norm_of, probabilities, slope_of

_PROGRAMS = 1024  # enough to fill a GPU
_ROWS = 1024  # of dsinks, at once


class BiasSums(NamedTuple):
    """Where dbias, or its partial sums, go, and how the work is cut."""

    sums: Tensor  # (chunks, *bias.shape)
    chunk: int  # strides
    b: int
    h: int
    t: int
    s: int
    owned_b: int  # blocks of dbias
    owned_h: int
    owned_t: int
    owned_s: int
    summed_b: int  # what is summed into each
    summed_h: int
    summed_t: int
    summed: int
    per_chunk: int


class BiasTile(NamedTuple):
    """A tile, and which dimensions dbias keeps."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    PER_T: bool
    PER_S: bool


class SinkSums(NamedTuple):
    """Where dsinks go."""

    dsinks: Tensor  # (H,)


class SinkTile(NamedTuple):
    """Rows at once."""

    ROWS: int


@triton.jit
def dbias_kernel(x, g, to, p, f, tile):
    """One chunk of the sum for one block of dbias."""
    # Setup
    pid = tl.program_id(0)
    chunk = pid % tl.cdiv(to.summed, to.per_chunk)
    owned = pid // tl.cdiv(to.summed, to.per_chunk)
    own_s = owned % to.owned_s
    own_t = owned // to.owned_s % to.owned_t
    own_h = owned // to.owned_s // to.owned_t % to.owned_h
    own_b = owned // to.owned_s // to.owned_t // to.owned_h
    row = tl.arange(0, tile.BLOCK_M)
    key = tl.arange(0, tile.BLOCK_N)
    total = tl.zeros([tile.BLOCK_M, tile.BLOCK_N], tl.float32)

    last = tl.minimum((chunk + 1) * to.per_chunk, to.summed)
    for i in range(chunk * to.per_chunk, last):
        index = chunk * 0 + i
        b = own_b + index % to.summed_b
        h = own_h + index // to.summed_b % to.summed_h
        t0 = (own_t + index // to.summed_b // to.summed_h % to.summed_t) * tile.BLOCK_M
        j0 = (own_s + index // to.summed_b // to.summed_h // to.summed_t) * tile.BLOCK_N
        T, S, q_row, k_row, shift = sequence_of(x, p, f, b)
        t_last = tl.minimum(t0 + tile.BLOCK_M, T) - 1
        sides = sides_of(x, p, h)
        begin, end, _, _ = key_range(t0, t_last, S, shift, sides, f)
        visited, slot = (t0 < T) & (j0 < end) & (j0 + tile.BLOCK_N > begin), None
        if f.BLOCKS:
            slot = slot_at(x, p, f, b, h, t0, j0)
            visited &= slot != EMPTY
        if visited:
            total += score_gradient_tile(
                x, g, p, f, tile, b, h, t0, j0, T, S, q_row, k_row, shift, sides, begin, end, slot
            )

    # Store
    at = to.sums + chunk.to(tl.int64) * to.chunk + own_b.to(tl.int64) * to.b
    at += own_h.to(tl.int64) * to.h
    out_type = to.sums.dtype.element_ty
    t, j = own_t * tile.BLOCK_M + row, own_s * tile.BLOCK_N + key
    if tile.PER_T:
        if tile.PER_S:
            at = at + t.to(tl.int64)[:, None] * to.t + j[None, :]
            tl.store(at, total.to(out_type), mask=(t < p.T)[:, None] & (j < p.S)[None, :])
        else:
            tl.store(at + t.to(tl.int64) * to.t, tl.sum(total, 1).to(out_type), mask=t < p.T)
    else:
        if tile.PER_S:
            tl.store(at + j, tl.sum(total, 0).to(out_type), mask=j < p.S)
        else:
            tl.store(at, tl.sum(tl.sum(total, 1), 0).to(out_type))


@triton.jit
def score_gradient_tile(
    x, g, p, f, tile, b, h, t0, j0, T, S, q_row, k_row, shift, sides, begin, end, slot
):
    """[M, N] of ds."""
    # Setup
    h_kv = h // p.group
    row = tl.arange(0, tile.BLOCK_M)
    key = tl.arange(0, tile.BLOCK_N)
    t, j = t0 + row, j0 + key
    live_row, live = t < T, (j >= begin) & (j < end)
    mask = at_head(x.mask, b, p.mask_b, h, p.mask_h)
    bias = at_head(x.bias, b, p.bias_b, h, p.bias_h)

    # Load
    q_base = x.q + offset(b, p.q_b, h, p.q_h, q_row + t0, p.q_t)
    q = load_rows(q_base, row, p.q_t, live_row, f.D, tile.BLOCK_D, f, True)
    do_base = g.grad_out + offset(b, g.do_b, h, g.do_h, q_row + t0, g.do_t)
    do = load_rows(do_base, row, g.do_t, live_row, f.D_V, tile.BLOCK_DV, f, True)
    k_base = x.k + offset(b, p.k_b, h_kv, p.k_h, k_row + j0, p.k_t)
    k = load_rows(k_base, key, p.k_t, live, f.D, tile.BLOCK_D, f, True)
    v_base = x.v + offset(b, p.v_b, h_kv, p.v_h, k_row + j0, p.v_t)
    v = load_rows(v_base, key, p.v_t, live, f.D_V, tile.BLOCK_DV, f, True)
    at = row_at(x, p, b, h, q_row) + t
    m, log2_l = norm_of(g.norm, g.plane, at, live_row)
    row_term = tl.load(g.row_term + at, mask=live_row, other=0.0)
    dentropy = entropy_gradient(g, at, live_row)

    # Scores
    s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
    slope = slope_of(x, p, f, b, h)
    s, _ = edit_scores(
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
    depth, probs = probabilities(s, m[:, None], log2_l[:, None], p, f, True)
    # dP
    dp = tl.dot(do, tl.trans(v), input_precision=f.PRECISION)
    dw = weight_gradient(g, b, h, t[:, None], j[None, :], T, S)
    kept = True
    if f.DROPOUT:
        kept = kept_by_dropout(x, p, f, b, h, t0, j0, tile.BLOCK_M, tile.BLOCK_N)
    # ds
    return score_gradients(
        depth, probs, dp, dw, kept, row_term[:, None], dentropy[:, None], g, p, f, True
    )


@triton.jit
def dsinks_kernel(x, g, to, p, f, tile):
    """The sink gradient of one head, its rows in their order."""
    h = tl.program_id(0)
    lane = tl.arange(0, tile.ROWS)
    sink = in_units(tl.load(x.sinks + h), f)
    total = tl.zeros([tile.ROWS], tl.float32)
    batches = 1 if x.cu_seqlens_q is not None else p.B
    for b in range(batches):
        at = ((h * 0 + b).to(tl.int64) * p.H + h) * p.rows_q
        for t0 in range(0, p.rows_q, tile.ROWS):
            live = t0 + lane < p.rows_q
            m, log2_l = norm_of(g.norm, g.plane, at + t0 + lane, live)
            sink_alone = tl.where(sink == -float("inf"), 0.0, log2_l) == float("inf")
            m, log2_l = tl.where(sink_alone, sink, m), tl.where(sink_alone, 0.0, log2_l)
            depth, p_sink = probabilities(sink, m, log2_l, p, f, False)
            row_term = tl.load(g.row_term + at + t0 + lane, mask=live, other=0.0)
            if g.grad_entropy is not None:
                row_term -= entropy_gradient(g, at + t0 + lane, live) * depth
            total += tl.where(live & (p_sink != 0.0), row_term * p_sink, 0.0)
    tl.store(to.dsinks + h, tl.sum(total, 0).to(to.dsinks.dtype.element_ty))


def bias_gradient(call: Call, given: Given, arch: str) -> Tensor:
    """dbias, in the bias's shape and dtype. ``given.row_term`` must have been filled."""
    bias: Tensor = call.x.bias
    job = bias_launch(call, given, arch)
    if job.grid == 0:
        return bias.new_zeros(bias.shape)
    launch(job)
    sums: Tensor = job.tensors[2].sums
    return sums[0] if len(sums) == 1 else sums.sum(0).to(bias.dtype)


def bias_launch(call: Call, given: Given, arch: str) -> Launch:
    """The kernel of dbias, and memory for its sums."""
    x, p, f = call
    config = configs.choose(arch, "dbias", x.q.element_size(), f.D, f.D_V, True, f.BLOCKS)
    kept = tuple(n > 1 for n in x.bias.shape)
    blocks = (p.B, p.H, -(-p.T // config.BLOCK_M), -(-p.S // config.BLOCK_N))
    owned = [n if keep else 1 for n, keep in zip(blocks, kept, strict=True)]
    summed = [1 if keep else n for n, keep in zip(blocks, kept, strict=True)]
    programs, number = math.prod(owned), math.prod(summed)
    chunks = min(max(_PROGRAMS // max(programs, 1), 1), max(number, 1))
    per_chunk = -(-number // chunks)
    chunks = -(-number // max(per_chunk, 1))
    dtype = x.bias.dtype if chunks <= 1 else given.norm.dtype
    sums = x.bias.new_empty((max(chunks, 1), *x.bias.shape), dtype=dtype)
    if (kept[2] and x.bias.shape[2] > p.T) or (kept[3] and x.bias.shape[3] > p.S):
        sums.zero_()  # varlen: a maximum that no sequence can reach
    whole = number, max(per_chunk, 1)
    where = sums, sums.stride(0), *strides(sums[0])
    to = BiasSums._make((*where, *owned, *summed[:3], *whole))
    tile = BiasTile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V), kept[2], kept[3])
    return Launch(dbias_kernel, programs * chunks, (x, given, to), p, f, tile, config)


def sink_gradient(call: Call, given: Given, arch: str) -> Tensor:
    """The sinks' gradient, (H,) in the sinks' dtype. ``given.row_term`` must have been filled."""
    dsinks: Tensor = call.x.sinks.new_zeros(call.x.sinks.shape)
    if given.norm.numel():
        launch(sink_launch(call, given, dsinks, arch))
    return dsinks


def sink_launch(call: Call, given: Given, dsinks: Tensor, arch: str) -> Launch:
    """The kernel of dsinks."""
    x, p, f = call
    config = configs.Config(1, 1, 4, 1)
    return Launch(dsinks_kernel, p.H, (x, given, SinkSums(dsinks)), p, f, SinkTile(_ROWS), config)
