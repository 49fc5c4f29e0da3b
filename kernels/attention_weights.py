"""Attention probabilities and their column sums: second passes over the scores.

    p = exp(s - m) / l
    weights   p Z, per head or the mean over the heads
    received  sum over the queries of p

Grid:    weights: batch * head (unless averaged) * blocks of queries * blocks of keys; received:
         batch * head * blocks of keys
Memory:  one tile of probabilities in registers; every program owns its part of the result and adds
         heads and queries in their order
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attnfast.call import Inputs, Options

from . import configs
from .arguments import Call, Tile, block
from .blocks import EMPTY, block_tile, entries_of, slot_at, tiles_in
from .dropout import kept_by_dropout
from .head import query_range, sequence_of, sides_of
from .launch import Launch, launch
from .rows import at_head, load_rows, offset, row_at
from .scores import edit_scores, norm_of, probabilities, slope_of


class Weights(NamedTuple):
    """Where the weights go. The heads of one program are averaged."""

    weights: Tensor  # (B, H, T, S) or (B, T, S)
    norm: Tensor  # (2, B, H, T) fp32
    plane: int  # elements of half of it
    b: int
    h: int
    t: int
    outputs: int  # per batch entry
    heads: int  # per output
    factor: float  # 1 / heads


class Received(NamedTuple):
    """Where the column sums go."""

    received: Tensor  # (B, H, S) fp32
    norm: Tensor
    plane: int


@triton.jit
def probability_tile(x, to, p, f, tile, b, h, t0, j0, T, S, q_row, k_row, shift, slot):
    """[M, N] of p before dropout. A row whose l is NaN is NaN at all keys, as softmax has it."""
    # Load
    h_kv = h // p.group
    row = tl.arange(0, tile.BLOCK_M)
    key = tl.arange(0, tile.BLOCK_N)
    t, j = t0 + row, j0 + key
    q_base = x.q + offset(b, p.q_b, h, p.q_h, q_row + t0, p.q_t)
    q = load_rows(q_base, row, p.q_t, t < T, f.D, tile.BLOCK_D, f, True)
    k_base = x.k + offset(b, p.k_b, h_kv, p.k_h, k_row + j0, p.k_t)
    k = load_rows(k_base, key, p.k_t, j < S, f.D, tile.BLOCK_D, f, True)
    mask = at_head(x.mask, b, p.mask_b, h, p.mask_h)
    bias = at_head(x.bias, b, p.bias_b, h, p.bias_h)
    slope = slope_of(x, p, f, b, h)
    sides = sides_of(x, p, h)
    m, log2_l = norm_of(to.norm, to.plane, row_at(x, p, b, h, q_row) + t, t < T)
    # Scores
    s = tl.dot(q, tl.trans(k), input_precision=f.PRECISION)
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
    _depth, probs = probabilities(s, m[:, None], log2_l[:, None], p, f, False)
    return probs


@triton.jit
def weights_kernel(x, to, p, f, tile):
    """One tile of the weights."""
    # Setup
    blocks_t, blocks_s = tl.cdiv(p.T, tile.BLOCK_M), tl.cdiv(p.S, tile.BLOCK_N)
    pid = tl.program_id(0)
    j0 = pid % blocks_s * tile.BLOCK_N
    t0 = pid // blocks_s % blocks_t * tile.BLOCK_M
    output = pid // blocks_s // blocks_t
    b, h0 = output // to.outputs, output % to.outputs
    T, S, q_row, k_row, shift = sequence_of(x, p, f, b)
    total = tl.zeros([tile.BLOCK_M, tile.BLOCK_N], tl.float32)
    if (t0 < T) & (j0 < S):
        for member in range(to.heads):
            h = h0 + member
            slot, end = None, S
            if f.BLOCKS:
                slot = slot_at(x, p, f, b, h, t0, j0)
                end = tl.where(slot == EMPTY, 0, S)  # no key is read
            probs = probability_tile(
                x, to, p, f, tile, b, h, t0, j0, T, end, q_row, k_row, shift, slot
            )
            if f.DROPOUT:
                kept = kept_by_dropout(x, p, f, b, h, t0, j0, tile.BLOCK_M, tile.BLOCK_N)
                probs = tl.where(kept, probs * p.keep_scale, 0.0)
            total += probs

    # Store
    t = t0 + tl.arange(0, tile.BLOCK_M)
    j = j0 + tl.arange(0, tile.BLOCK_N)
    at = to.weights + offset(b, to.b, h0, to.h, t0, to.t)
    at = at + (t - t0).to(tl.int64)[:, None] * to.t + j[None, :]
    inside = (t < p.T)[:, None] & (j < p.S)[None, :]
    tl.store(at, (total * to.factor).to(to.weights.dtype.element_ty), mask=inside)


@triton.jit
def received_kernel(x, to, p, f, tile):
    """The column sums of one block of keys of one head, query by query in their order."""
    # Setup
    blocks = tl.cdiv(p.S, tile.BLOCK_N)
    pid = tl.program_id(0)
    j0 = pid % blocks * tile.BLOCK_N
    head = pid // blocks
    b, h = head // p.H, head % p.H
    T, S, q_row, k_row, shift = sequence_of(x, p, f, b)
    if j0 >= S:
        return
    total = tl.zeros([tile.BLOCK_N], tl.float32)
    j_last = tl.minimum(j0 + tile.BLOCK_N, S) - 1
    begin, end, _, _ = query_range(j0, j_last, T, shift, sides_of(x, p, h), f)
    first, last = begin // tile.BLOCK_M * tile.BLOCK_M, end
    if f.BLOCKS:
        line = j0 // f.BLOCKS
        entries = entries_of(x, p, f, b, h, line, begin, end, begin, end, True, False)
        first, last = j0 * 0, tiles_in(2, entries, f, tile.BLOCK_M)
    for i in range(first, last, 1 if f.BLOCKS else tile.BLOCK_M):
        if f.BLOCKS:
            t0, slot = block_tile(2, i, entries, x, p, f, tile.BLOCK_M, True)
        else:
            t0, slot = j0 * 0 + i, None
        probs = probability_tile(x, to, p, f, tile, b, h, t0, j0, T, S, q_row, k_row, shift, slot)
        live = t0 + tl.arange(0, tile.BLOCK_M) < T
        total += tl.sum(tl.where(live[:, None], probs, 0.0), 0)

    # Store
    j = j0 + tl.arange(0, tile.BLOCK_N)
    batch = b * 0 if x.cu_seqlens_k is not None else b
    at = to.received + (batch.to(tl.int64) * p.H + h) * p.rows_k + k_row + j
    tl.store(at, total, mask=j < S)


def weights_fwd(options: Options, call: Call, norm: Tensor, arch: str) -> Tensor:
    """The weights after dropout, (B, H, T, S), or their mean over the heads, (B, T, S)."""
    x, p, _ = call
    sizes = p.T, p.S
    if x.cu_seqlens_q is not None:
        sizes = options.max_seqlen_q, options.max_seqlen_k
    mean = options.weights == 1
    weights: Tensor = x.q.new_empty((p.B, *sizes) if mean else (p.B, p.H, *sizes))
    if sizes != (p.T, p.S):
        weights.zero_()
    launch(weights_launch(call, weights, norm, mean, arch))
    return weights


def weights_launch(call: Call, weights: Tensor, norm: Tensor, mean: bool, arch: str) -> Launch:
    """The kernel of the weights."""
    x, p, f = call
    config = configs.choose(arch, "weights", x.q.element_size(), f.D, f.D_V, True, f.BLOCKS)
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    outputs = 1 if mean else p.H
    b, t = weights.stride(0), weights.stride(-2)
    h = 0 if mean else weights.stride(1)
    heads = p.H if mean else 1
    plane = norm.numel() // 2
    to = Weights(weights, norm, plane, b, h, t, outputs, heads, 1 / max(heads, 1))
    grid = p.B * outputs * -(-p.T // config.BLOCK_M) * -(-p.S // config.BLOCK_N)
    return Launch(weights_kernel, grid, (x, to), p, f, tile, config)


def received_fwd(inputs: Inputs, options: Options, call: Call, norm: Tensor, arch: str) -> Tensor:
    """The column sums of p, (B, H, S) fp32."""
    q, S = inputs.q, inputs.k.shape[2]
    received = norm.new_empty((q.shape[0], q.shape[1], S))
    if inputs.cu_seqlens_k is not None:
        received.zero_()
    launch(received_launch(call, received, norm, arch))
    return received


def received_launch(call: Call, received: Tensor, norm: Tensor, arch: str) -> Launch:
    """The kernel of the column sums."""
    x, p, f = call
    config = configs.choose(arch, "received", x.q.element_size(), f.D, f.D_V, True, f.BLOCKS)
    tile = Tile(config.BLOCK_M, config.BLOCK_N, block(f.D), block(f.D_V))
    grid = p.B * p.H * -(-p.S // config.BLOCK_N)
    to = Received(received, norm, norm.numel() // 2)
    return Launch(received_kernel, grid, (x, to), p, f, tile, config, "BLOCK_M")
