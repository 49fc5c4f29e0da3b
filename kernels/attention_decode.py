"""Attention of a few new queries over a cache, split over the keys.

(Flash-Decoding, Dao et al., 2023)

    o = softmax(scale * q k^T, causal, windowed, biased, capped) v    lse = logsumexp of the scores
    received = sum over the queries of the softmax

Query t stands at cache_seqlens[b] - T + t and attends the keys up to there, or
those of the last T that a mask lets pass, and all before them.

Grid:    batch * key head * blocks of the T * H / H_kv query rows that share its keys * pieces of
         the keys; then one program per query row, to combine the pieces in their order; for column
         sums, batch * head * blocks of keys
Memory:  q, acc, m, l in registers; k and v tiles in shared memory, from a contiguous cache or from
         pages, key by key; per row and piece m, l and acc in fp32; for column sums all scores
Rows:    how keys are cut depends on the sequence's own length alone, and so do the results
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnfast.call import DecodeInputs, DecodeOptions, DecodeOutputs
from attnfast.ops import empty_in_order

from . import configs
from .arguments import Call, Tile, block, dense, gather, row_strides, strides
from .head import narrow, reach
from .launch import Launch, launch
from .rows import store_rows, without_dead_rows
from .scores import edit_scores, in_log2, in_units, natural, rounded_product

MIN_PIECE = tl.constexpr(256)  # keys
MAX_PIECES = tl.constexpr(128)  # that a sequence's keys are cut into
AT_ONCE = tl.constexpr(16)  # pieces that are combined together
SUMMED_KEYS = 256  # of one program


class Cache(NamedTuple):
    """The cache, the pieces and the results."""

    lengths: Any  # (B,) int32
    page_table: Any  # (B, n) int32
    acc: Any  # (B, H_kv, pieces, rows, D_v) fp32
    m: Any  # (B, H_kv, pieces, rows) fp32
    l: Any  # (B, H_kv, pieces, rows) fp32
    out: Any  # (B, H, T, D_v)
    lse: Any  # (B, H, T) fp32
    table_b: int
    page_size: int
    num_pages: int
    pieces: int  # that the longest sequence could have
    out_b: int
    out_h: int
    out_t: int
    mask: Any = None  # (B|1, H|1, T|1, T|1) bool, of the last T keys
    mask_b: int = 0
    mask_h: int = 0
    mask_t: int = 0
    mask_s: int = 0
    # For column sums
    scores: Any = None  # (B, H, T, S) fp32, -inf where no query looks
    base: Any = None  # (B, H, T) fp32: their largest
    total: Any = None  # (B, H, T) fp32: the softmax's denominator
    received: Any = None  # (B, H, S) fp32


@triton.jit
def pieces_of(length, p, f, BLOCK_N: tl.constexpr):
    """The first key that any query may attend, the first key of a piece, its keys, the pieces."""
    begin = length * 0
    if f.HAS_LEFT:
        begin = tl.maximum(narrow(length.to(tl.int64) - p.T - p.left), 0)
    first = begin // BLOCK_N * BLOCK_N
    keys = length - first
    piece = tl.cdiv(tl.cdiv(keys, MAX_PIECES), BLOCK_N) * BLOCK_N
    piece = tl.maximum(piece, MIN_PIECE)
    return begin, first, piece, tl.cdiv(keys, piece)


@triton.jit
def key_rows(base, b, b_stride, h, h_stride, j, stride, live, c):
    """[N] pointers to the rows of keys j, through the page table if there is one."""
    if c.page_table is not None:
        page = tl.load(
            c.page_table + b.to(tl.int64) * c.table_b + j // c.page_size, mask=live, other=0
        )
        b = tl.minimum(tl.maximum(page, 0), c.num_pages - 1)
        j = j % c.page_size
    return base + b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride + j.to(tl.int64) * stride


@triton.jit
def load_pointed(pointers, live, D, BLOCK: tl.constexpr):
    """[N, BLOCK]: the rows that [N] pointers lead to, zero past D and where not live."""
    dims = tl.arange(0, BLOCK)
    inside = live[:, None] & (dims < D)[None, :]
    return tl.load(pointers[:, None] + dims[None, :], mask=inside, other=0.0)


@triton.jit
def decode_kernel(x, c, p, f, tile):
    """One piece of the keys for one block of query rows."""
    # Setup
    H_kv, group_rows = p.H // p.group, p.group * p.T
    blocks = tl.cdiv(group_rows, tile.BLOCK_M)
    pid = tl.program_id(0)
    row0 = pid % blocks * tile.BLOCK_M
    piece_index = pid // blocks % c.pieces
    head = pid // blocks // c.pieces
    b, h_kv = head // H_kv, head % H_kv
    length = tl.minimum(tl.maximum(tl.load(c.lengths + b), 0), p.S)
    begin, first, piece, pieces = pieces_of(length, p, f, tile.BLOCK_N)
    if piece_index >= pieces:
        return

    row = row0 + tl.arange(0, tile.BLOCK_M)
    key = tl.arange(0, tile.BLOCK_N)
    live_row = row < group_rows
    h, t = tl.minimum(h_kv * p.group + row // p.T, p.H - 1), row % p.T
    shift = length.to(tl.int64) - p.T
    start = first + piece_index * piece
    end = tl.minimum(start + piece, length)
    sides = p.left, p.right
    if x.windows is not None:
        left = reach(tl.load(x.windows + 2 * h))
        nearest = tl.min(narrow(shift + t - left), 0)  # key that any of these rows attends
        begin = tl.maximum(nearest, 0)
        start = tl.maximum(begin // tile.BLOCK_N * tile.BLOCK_N, start)
        sides = left[:, None], p.right
    slope = 0.0
    if x.alibi_slopes is not None:
        slope = in_units(tl.load(x.alibi_slopes + b * p.alibi_b + h * p.alibi_h), f)[:, None]
    bias = None
    if x.bias is not None:
        bias = (x.bias + b.to(tl.int64) * p.bias_b + h.to(tl.int64) * p.bias_h)[:, None]

    mask = None
    if c.mask is not None:
        mask = c.mask + b.to(tl.int64) * c.mask_b + h.to(tl.int64) * c.mask_h
        mask = (mask + t.to(tl.int64) * c.mask_t)[:, None]

    # Load q
    q_rows = x.q + b.to(tl.int64) * p.q_b + h.to(tl.int64) * p.q_h + t.to(tl.int64) * p.q_t
    q = load_pointed(q_rows, live_row, f.D, tile.BLOCK_D)
    m = tl.full([tile.BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([tile.BLOCK_M], tl.float32)
    acc = tl.zeros([tile.BLOCK_M, tile.BLOCK_DV], tl.float32)
    for j0 in tl.range(start, end, tile.BLOCK_N):
        # Scores
        j = j0 + key
        live = (j >= begin) & (j < end)
        k_rows = key_rows(x.k, b, p.k_b, h_kv, p.k_h, j, p.k_t, live, c)
        k = load_pointed(k_rows, live, f.D, tile.BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
        s, _tanh_x = edit_scores(
            s,
            b * 0,
            t.to(tl.int64)[:, None],
            j0,
            key[None, :],
            p.T,
            end,
            shift,
            sides,
            None,
            bias,
            slope,
            x,
            p,
            f,
            True,
        )
        if c.mask is not None:  # in place of the causal order
            last = (j - (length - p.T))[None, :]
            passes = tl.load(mask + last * c.mask_s, mask=(last >= 0) & live[None, :], other=True)
            s = tl.where(passes, s, -float("inf"))
        if c.scores is not None:
            rows = ((b * p.H + h).to(tl.int64) * p.T + t) * p.S
            inside = live_row[:, None] & live[None, :]
            tl.store(c.scores + rows[:, None] + j[None, :], s, mask=inside)
        # Softmax
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        probs = tl.exp2(in_log2(s - base[:, None], p, f))
        rescale = tl.exp2(in_log2(m - base, p, f))
        l = l * rescale + tl.sum(probs, 1)
        m = m_new
        # Output
        v_rows = key_rows(x.v, b, p.v_b, h_kv, p.v_h, j, p.v_t, live, c)
        v = load_pointed(v_rows, live, f.D_V, tile.BLOCK_DV)
        if bias is not None or c.mask is not None:
            v = without_dead_rows(v, tl.max((s != -float("inf")).to(tl.int32), 0) == 0)
        acc = acc * rescale[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=f.PRECISION)

    # Store
    at = (head.to(tl.int64) * c.pieces + piece_index) * group_rows + row0
    own = tl.arange(0, tile.BLOCK_M)
    store_rows(c.acc + at * f.D_V, own, f.D_V, live_row, f.D_V, tile.BLOCK_DV, f, acc)
    tl.store(c.m + at + own, m, mask=live_row)
    tl.store(c.l + at + own, l, mask=live_row)


@triton.jit
def combine_kernel(x, c, p, f, tile):
    """One query row from its pieces."""
    # Setup
    pid = tl.program_id(0)
    t, head = pid % p.T, pid // p.T
    b, h = head // p.H, head % p.H
    H_kv, group_rows = p.H // p.group, p.group * p.T
    length = tl.minimum(tl.maximum(tl.load(c.lengths + b), 0), p.S)
    _, _, _, pieces = pieces_of(length, p, f, tile.BLOCK_N)
    at = (b.to(tl.int64) * H_kv + h // p.group) * c.pieces * group_rows + h % p.group * p.T + t
    piece = tl.arange(0, MAX_PIECES)
    m = tl.load(c.m + at + piece * group_rows, mask=piece < pieces, other=-float("inf"))
    l = tl.load(c.l + at + piece * group_rows, mask=piece < pieces, other=0.0)

    # Sinks
    top = tl.max(m, 0)
    highest = natural(top, p, f)
    sink_units = -float("inf")
    if x.sinks is not None:
        sink = tl.load(x.sinks + h).to(tl.float32)
        sink_units = in_units(sink, f)
        highest = tl.where(sink_units >= top, sink, highest)
        top = tl.maximum(top, sink_units)
    base = tl.where(top == -float("inf"), 0.0, top)
    without_keys = tl.sum(l, 0) == 0.0
    total = tl.sum(rounded_product(l, tl.exp2(in_log2(m - base, p, f))), 0)
    if x.sinks is not None:
        l_sink = tl.exp2(in_log2(sink_units - base, p, f))
        total += l_sink
    # Statistics
    lse = tl.where(total == 0.0, -float("inf"), highest + tl.log(total))
    tl.store(c.lse + pid, lse)
    if c.scores is not None:
        tl.store(c.base + pid, base)
        tl.store(c.total + pid, tl.where(total == 0.0, float("inf"), total))

    # Output
    dims = tl.arange(0, tile.BLOCK_DV)
    acc = tl.zeros([tile.BLOCK_DV], tl.float32)
    for i in range(0, pieces, AT_ONCE):
        part = i + tl.arange(0, AT_ONCE)
        live = part < pieces
        m_part = tl.load(c.m + at + part * group_rows, mask=live, other=-float("inf"))
        rescale = tl.exp2(in_log2(m_part - base, p, f))
        rows = (at + part * group_rows) * f.D_V
        inside = live[:, None] & (dims < f.D_V)[None, :]
        acc_part = tl.load(c.acc + rows[:, None] + dims[None, :], mask=inside, other=0.0)
        acc += tl.sum(rounded_product(acc_part, rescale[:, None]), 0)
    # Store
    acc = tl.where(without_keys, 0.0, acc / total)
    out = c.out + b.to(tl.int64) * c.out_b + h.to(tl.int64) * c.out_h + t.to(tl.int64) * c.out_t
    tl.store(out + dims, acc.to(c.out.dtype.element_ty), mask=dims < f.D_V)


@triton.jit
def received_kernel(x, c, p, f, tile):
    """Column sums of a block of keys of one head, query by query in their order."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(p.S, tile.BLOCK_N)
    head = pid // blocks
    j = pid % blocks * tile.BLOCK_N + tl.arange(0, tile.BLOCK_N)
    length = tl.minimum(tl.maximum(tl.load(c.lengths + head // p.H), 0), p.S)
    total = tl.zeros([tile.BLOCK_N], tl.float32)
    for t in range(p.T):
        row = head.to(tl.int64) * p.T + t
        s = tl.load(c.scores + row * p.S + j, mask=j < length, other=-float("inf"))
        probs = tl.exp2(in_log2(s - tl.load(c.base + row), p, f))
        total += probs / tl.load(c.total + row)
    total = tl.where(j < length, total, 0.0)  # of a row with NaN too
    tl.store(c.received + head.to(tl.int64) * p.S + j, total, mask=j < p.S)


def attention_decode(inputs: DecodeInputs, options: DecodeOptions, *, arch: str) -> DecodeOutputs:
    """Run decoding, see ``attnfast.decode_attention``; all arguments checked.

    Lengths are clamped to the cache's capacity and pages to those that there are.
    """
    jobs = decode_jobs(inputs, options, arch)
    for job in jobs:
        launch(job)
    cache = jobs[0].tensors[1]
    received = cache.lse.new_empty(0) if cache.received is None else cache.received
    return DecodeOutputs(cache.out, cache.lse, received)


def decode_jobs(inputs: DecodeInputs, options: DecodeOptions, arch: str) -> tuple[Launch, ...]:
    """What a call launches."""
    k, v, table = inputs.k_cache, inputs.v_cache, inputs.page_table
    if table is not None:  # pages (P, page, H_kv, D) as (P, H_kv, page, D)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    of_call = options.as_options(inputs.mask is not None)
    call = gather(inputs.as_inputs(k, v), of_call, configs.l2_bytes(arch))
    capacity = k.shape[2] if table is None else k.shape[2] * table.shape[1]
    S = capacity if k.shape[0] else 0  # without pages, none is the nearest to a wrong one
    call = call._replace(p=call.p._replace(S=S))
    sums: tuple[Tensor, ...] = ()
    if options.received:
        B, H, T, _ = inputs.q.shape
        scores = inputs.q.new_full((B, H, T, S), -float("inf"), dtype=torch.float32)
        received = (scores.new_empty if S else scores.new_zeros)((B, H, capacity))
        sums = (scores, *scores.new_empty((2, B, H, T)), received)
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    return decode_launches(call, dense(inputs.cache_seqlens), table, arch, inputs.mask, sums)


def decode_launches(
    call: Call,
    lengths: Tensor | None,
    page_table: Tensor | None,
    arch: str,
    mask: Tensor | None = None,
    sums: tuple[Tensor, ...] = (),
) -> tuple[Launch, ...]:
    """The kernels, two or with column sums three, and memory for the pieces and the results."""
    x, p, f = call
    q, group_rows = x.q, p.group * p.T
    config = configs.choose(
        arch, "decode", q.element_size(), f.D, f.D_V, x.bias is not None or mask is not None
    )
    config = config._replace(BLOCK_M=min(config.BLOCK_M, block(max(group_rows, 1))))
    pieces = max(min(-(-p.S // MIN_PIECE.value), MAX_PIECES.value), 1)
    H_kv = p.H // max(p.group, 1)
    acc = q.new_empty((p.B, H_kv, pieces, group_rows, f.D_V), dtype=torch.float32)
    m, l = q.new_empty((2, p.B, H_kv, pieces, group_rows), dtype=torch.float32)
    out = empty_in_order(q, f.D_V)
    cache = Cache(
        lengths,
        page_table,
        acc,
        m,
        l,
        out,
        q.new_empty(q.shape[:3], dtype=torch.float32),
        0 if page_table is None else page_table.stride(0),
        x.k.shape[2],
        x.k.shape[0],
        pieces,
        *row_strides(out, False),
        mask,
        *strides(mask),
        *sums,
    )
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    grid = p.B * H_kv * pieces * -(-group_rows // config.BLOCK_M)
    combine = config._replace(num_warps=4, num_stages=1)
    jobs = (
        Launch(decode_kernel, grid, (x, cache), p, f, tile, config),
        Launch(combine_kernel, p.B * p.H * p.T, (x, cache), p, f, tile, combine),
    )
    if not sums:
        return jobs
    tile = tile._replace(BLOCK_N=SUMMED_KEYS)
    blocks = -(-p.S // SUMMED_KEYS)
    return *jobs, Launch(received_kernel, p.B * p.H * blocks, (x, cache), p, f, tile, combine)
