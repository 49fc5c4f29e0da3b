"""What every kernel takes: tensors, numbers, and compile-time features, made from one call.

Kernels read them by name (``x.q``, ``p.scale``, ``f.SOFTCAP``). Tensors that a call lacks are None,
which Triton knows at compile time, as it does the features.

Scores are in units of log2, so that p = exp2(s - m). Where there is a bias, or a scale or softcap
beyond `HUGE`, they are in natural units, since log2 e times a huge number would overflow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfast.call import Inputs, Options

from .launch import INTERPRETED

LOG2_E = math.log2(math.e)
MAX_ROWS = 1 << 28  # of positions no sum then leaves 32 bits
FARTHEST = 2**31 - 1  # positions and windows beyond are taken for this
LARGEST = torch.finfo(torch.float32).max
HUGE = 2.0**100
STEEP = 2.0**28  # units of log2: two fp32 numbers beyond differ by 16 or more


class Tensors(NamedTuple):
    """The tensors of a call, ``Inputs`` with what is 1-D dense."""

    q: Any
    k: Any
    v: Any
    mask: Any
    bias: Any
    alibi_slopes: Any
    sinks: Any
    align: Any
    dropout_seed: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    block_starts: Any
    block_index: Any
    block_bits: Any
    windows: Any  # (H, 2) int32: left and right of each head, -1 is unbounded
    key_ends: Any = None  # (B, 3) int32: see key_ends.py


class Values(NamedTuple):
    """The numbers of a call. Strides count elements; 0 broadcasts."""

    B: int  # varlen: the number of sequences
    H: int
    group: int  # query heads per key head
    T: int  # varlen: the longest sequence
    S: int
    rows_q: int  # rows of q in memory
    rows_k: int
    q_b: int
    q_h: int
    q_t: int
    k_b: int
    k_h: int
    k_t: int
    v_b: int
    v_h: int
    v_t: int
    mask_b: int
    mask_h: int
    mask_t: int
    mask_s: int
    bias_b: int
    bias_h: int
    bias_t: int
    bias_s: int
    alibi_b: int
    alibi_h: int
    scale: float
    factor: float  # makes q k^T a score; where that is done last (LAZY) positive
    steep: float  # q k^T from which on a score is beyond STEEP
    power: float  # the power of two that is factor or next above
    inner: float  # with a softcap, makes q k^T what tanh is taken of
    softcap: float  # in the units of the scores
    left: int  # t' - left <= s; the farthest, where heads have windows of their own
    right: int  # s <= t' + right; 0 if causal
    shift: int  # t' = t + shift, plus align[b], plus S - T with BOTTOM_RIGHT
    threshold: int  # dropout keeps what draws at least this, of 65536
    keep_scale: float  # 1 / (1 - dropout_p)
    section: int  # query heads whose keys share the second-level cache
    blocks_b: int  # strides of a block mask's starts
    blocks_h: int
    block_columns: int  # where in a head's starts the columns' begin
    block_entries: int


class Features(NamedTuple):
    """What a kernel is compiled for."""

    D: int
    D_V: int
    HAS_LEFT: bool
    HAS_RIGHT: bool
    BOTTOM_RIGHT: bool
    SOFTCAP: bool
    NATURAL: bool  # scores in natural units instead of log2
    LAZY: bool  # scores stay q k^T until m is taken off: nothing else is done to them
    FUSED: bool  # the forward takes m off a LAZY score in one multiply-add
    NEGATED: bool  # or -q k^T, where a LAZY scale is negative
    KEY_MASK: bool  # the mask is the same for all queries and heads
    TILED: bool  # any other mask, or a bias: a tile of it is loaded
    BLOCKS: int  # the side of a block mask's blocks, or 0
    CUT: bool  # its full blocks may be cut, by position, a sequence's end or a mask of keys
    HOLED: bool  # keys that no query attends are seen in scores or bits only
    DROPOUT: bool
    PLACED: bool  # the call is a part of another, in which dropout counts
    WIDE: bool  # offsets within a tile need 64 bits
    PRECISION: str  # of fp32 products: "ieee" or "tf32"


class Tile(NamedTuple):
    """Sizes of a program's tiles, powers of two from 16 on; rows of fp32 from 8 on."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    BLOCK_D: int  # at least D
    BLOCK_DV: int


class Call(NamedTuple):
    """One call as all of its kernels take it."""

    x: Tensors
    p: Values
    f: Features


def strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Four strides, 0 where a dimension broadcasts."""
    if x is None:
        return 0, 0, 0, 0
    size, stride = x.shape, x.stride()
    return tuple(0 if n == 1 else s for n, s in zip(size, stride, strict=True))  # type: ignore[return-value]


def row_strides(x: Tensor, varlen: bool) -> tuple[int, int, int]:
    """Strides of batch, head and row; sequences of a varlen call lie in one batch entry."""
    b, h, t, _ = strides(x)
    return 0 if varlen else b, h, t


def dense(x: Tensor | None) -> Tensor | None:
    """A small 1-D tensor with stride 1."""
    return x if x is None or x.numel() < 2 or x.stride(0) == 1 else x.contiguous()


def needs_wide_offsets(*tensors: Tensor | None) -> bool:
    """Whether a tile of 512 rows and columns of a tensor may span 2**31 elements."""
    return any(x is not None and max(map(abs, x.stride()[2:])) >= 1 << 22 for x in tensors)


def gather(inputs: Inputs, options: Options, l2_bytes: int, *others: Tensor | None) -> Call:
    """Everything about a call that does not depend on tiles.

    Args:
        inputs: The call's tensors.
        options: Its options.
        l2_bytes: How much of keys and values the second-level cache is trusted to hold.
        others: More tensors whose rows are walked: gradients and outputs.
    """
    q, k, v, mask, bias, slopes, sinks, align, seed, cu_q, cu_k, *_ = inputs
    slopes = None if slopes is None else slopes.contiguous()  # one per batch entry and head
    varlen = cu_q is not None
    rows_q, rows_k = q.shape[2], k.shape[2]
    B, T, S = q.shape[0], rows_q, rows_k
    if cu_q is not None:
        B = cu_q.shape[0] - 1
        T, S = min(options.max_seqlen_q, rows_q), min(options.max_seqlen_k, rows_k)
    group = q.shape[1] // max(k.shape[1], 1)
    softcap, p_drop = options.softcap, options.dropout_p
    scale = options.scale
    natural = bias is not None or max(abs(scale), softcap) > HUGE
    unit = 1.0 if natural else LOG2_E
    lazy = scale != 0 and softcap == 0 and bias is None and slopes is None and sinks is None
    factor = (abs(scale) if lazy else scale) * unit
    inner = scale / softcap if softcap > 0 else 0.0
    windows = None if inputs.windows is None else inputs.windows.contiguous()
    left, right = (
        (options.window_left, options.window_right) if windows is None else (FARTHEST,) * 2
    )
    if options.causal:
        right = 0 if right < 0 else min(right, 0)
    key_bytes = max(rows_k * (q.shape[3] + v.shape[3]) * q.element_size(), 1)
    # kernels multiply it by a head's blocks, of T or of S, in 32 bits
    most = (1 << 30) // max(group * max(T, S), 1)
    section = max(min(l2_bytes // key_bytes, most), 1) * group
    mask_strides = strides(mask)
    key_mask = mask is not None and mask_strides[1:3] == (0, 0)
    tiled = bias is not None or (mask is not None and not key_mask)
    size = 0 if inputs.block_bits is None else inputs.block_bits.shape[1]
    values = Values(
        B,
        q.shape[1],
        group,
        T,
        S,
        rows_q,
        rows_k,
        *row_strides(q, varlen),
        *row_strides(k, varlen),
        *row_strides(v, varlen),
        *mask_strides,
        *strides(bias),
        0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0),
        0 if slopes is None else slopes.stride(1),
        scale,
        factor,
        min(STEEP / max(factor, 1 / LARGEST), LARGEST),
        2.0 ** math.ceil(math.log2(max(factor, 1 / HUGE))),
        max(min(inner, LARGEST), -LARGEST),
        softcap * unit,
        min(left, FARTHEST),
        min(right, FARTHEST),
        max(min(options.align_offset, FARTHEST), -FARTHEST),
        round(p_drop * 65536),
        0.0 if p_drop >= 1 else 1 / (1 - p_drop),
        section,
        *block_numbers(inputs, options),
    )
    features = Features(
        q.shape[3],
        v.shape[3],
        left >= 0,
        right >= 0,
        options.align_bottom_right,
        softcap > 0,
        natural,
        lazy,
        lazy and factor <= 0.5,
        lazy and scale < 0,
        key_mask,
        tiled,
        size,
        size > 0 and (left >= 0 or right >= 0 or varlen or key_mask),
        tiled or size > 0,
        p_drop > 0,
        seed is not None and seed.numel() > 2,
        needs_wide_offsets(q, k, v, mask, bias, *others),
        precision(q),
    )
    dense_ones = (dense(y) for y in (sinks, align, seed, cu_q, cu_k))
    blocks = inputs.block_starts, inputs.block_index, inputs.block_bits
    tensors = Tensors._make((q, k, v, mask, bias, slopes, *dense_ones, *blocks, windows, None))
    return Call(tensors, values, features)


def block_numbers(inputs: Inputs, options: Options) -> tuple[int, int, int, int]:
    """Two strides of a block mask's starts, where the columns' begin, and its entries."""
    starts, index, bits = inputs.block_starts, inputs.block_index, inputs.block_bits
    if starts is None or index is None or bits is None:
        return 0, 0, 0, 0
    T = inputs.q.shape[2] if inputs.cu_seqlens_q is None else options.max_seqlen_q
    b, h = (0 if starts.shape[d] == 1 else starts.stride(d) for d in (0, 1))
    return b, h, 2 * -(-T // bits.shape[1]) + 1, index.shape[1]


def precision(q: Tensor) -> str:
    """How fp32 products are taken: as torch's own would be on this device."""
    if q.dtype is not torch.float32 or INTERPRETED or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def block(n: int) -> int:
    """The smallest power of two that holds n and that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())
