"""Attention forward for Hopper in Gluon: FlashAttention-3's shape (Shah et al., 2024, Algorithm 2).

    o = softmax(scale * q k^T, causal) v        lse = logsumexp of the scores

Grid:    batch * head * ceil(T / 128), flat; heads in sections, longest causal rows first
Warps:   a producer, which asks TMA for tiles, and two consumers of one warpgroup and 64 rows each
Memory:  q and STAGES tiles of k and of v in shared memory; acc [64, D], p, m, l in registers (240 a
         thread; the producer has 24)
Order:   each consumer issues q k(j)^T and p(j - 1) v(j - 1) together, and takes the softmax of tile
         j while the second runs; the two take turns at the tensor cores (ping-pong), so that one's
         softmax hides behind the other's products. Tiles go from the last key to the first: those
         that the diagonal or the end of the keys cut come first, the rest needs no masking
Limits:  D = D_v in 64, 128, 256; bf16, fp16; scale in (0, 2**100]; no options but causal and
         grouped heads; rows and pointers aligned to 16 bytes

Gluon has no interpreter: tests execute the PTX that Triton 3.9 emits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .arguments import Call
from .attention_fwd import ForwardResults
from .configs import Config
from .launch import Launch

# Triton 3.9 has new names for them
TMA_LOAD = gl.constexpr(getattr(tma, "async_load", None) or tma.async_copy_global_to_shared)
TMA_STORE = gl.constexpr(getattr(tma, "async_store", None) or tma.async_copy_shared_to_global)
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of a consumer
FARTHEST = gl.constexpr(1 << 30)  # a shift beyond is taken for this: T and S are less

# D -> keys of a tile, stages
TILES = {64: (128, 3), 128: (128, 2), 256: (64, 2)}


class HopperTile(NamedTuple):
    """Keys of a tile, and how many tiles of k and of v are in flight."""

    BLOCK_N: int
    STAGES: int


@gluon.jit
def producer(
    q_rows, k_rows, v_rows, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty, t0, tiles,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for q, then for tile after tile of k and v as their places become free."""
    for i in gl.static_range(2):
        mbarrier.expect(q_full.index(i), ROWS * D * 2)
        TMA_LOAD(q_rows, [t0 + i * ROWS, 0], q_full.index(i), q_s.index(i))
    for i in range(tiles):
        place = i % STAGES
        phase = (i // STAGES) & 1
        j0 = (tiles - 1 - i) * N
        mbarrier.wait(k_empty.index(place), phase ^ 1)
        mbarrier.expect(k_full.index(place), N * D * 2)
        TMA_LOAD(k_rows, [j0, 0], k_full.index(place), k_s.index(place))
        mbarrier.wait(v_empty.index(place), phase ^ 1)
        mbarrier.expect(v_full.index(place), N * D * 2)
        TMA_LOAD(v_rows, [j0, 0], v_full.index(place), v_s.index(place))


@gluon.constexpr_function
def of_warpgroup(columns: int) -> gl.NVMMADistributedLayout:
    """The registers of a warpgroup's product with so many columns."""
    while not isinstance(columns, int):  # constants of tuples come wrapped twice
        columns = columns.value
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def masked(s, t, j, S, shift, CAUSAL: gl.constexpr):
    """[64, N] scores, -inf where a query may not attend a key."""
    attend = (j < S)[None, :]
    if CAUSAL:
        attend = attend & (j[None, :] <= t[:, None] + shift)
    return gl.where(attend, s, -float("inf"))


@gluon.jit
def softmax_step(s, m, l, factor):
    """Fold a tile of raw scores into the running maximum and sum: p, m, l, and rescale."""
    m_new = gl.maximum(m, gl.max(s, 1))
    base = gl.where(m_new == -float("inf"), 0.0, m_new)
    p = gl.exp2((s - base[:, None]) * factor)
    rescale = gl.exp2((m - base) * factor)
    return p, m_new, l * rescale + gl.sum(p, 1), rescale


@gluon.jit
def consumer(
    member: gl.constexpr, out_rows, lse, norm, plane,
    q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
    turn, t0, T, S, shift, tiles, cut, factor,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """64 rows of the block."""
    scores: gl.constexpr = of_warpgroup(N)
    sums: gl.constexpr = of_warpgroup(D)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, scores)
    dtype: gl.constexpr = q_s.dtype
    t = t0 + member * ROWS + gl.arange(0, ROWS, per_row)
    key = gl.arange(0, N, gl.SliceLayout(0, scores))
    nothing = gl.zeros([ROWS, N], gl.float32, scores)
    m = gl.full([ROWS], -float("inf"), gl.float32, per_row)
    l = gl.zeros([ROWS], gl.float32, per_row)
    acc = gl.zeros([ROWS, D], gl.float32, sums)
    q = q_s.index(member)

    # Scores and Softmax of the last tile of keys: always cut
    mbarrier.wait(q_full.index(member), 0)
    mbarrier.wait(k_full.index(0), 0)
    product = warpgroup_mma(q, k_s.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(k_empty.index(0), count=1)
    s = masked(s, t, (tiles - 1) * N + key, S, shift, CAUSAL)
    p, m, l, rescale = softmax_step(s, m, l, factor)
    p = gl.convert_layout(p.to(dtype), operand)

    # Scores, Output of the tile before, Softmax: of those that the diagonal cuts, then of the rest
    for part in gl.static_range(2):
        first, last = 1, cut
        if part == 1:
            first, last = cut, tiles
        for i in range(first, last):
            place, before = i % STAGES, (i - 1) % STAGES
            mbarrier.wait(k_full.index(place), (i // STAGES) & 1)
            mbarrier.wait(turn.index(member), (i - 1) & 1)
            product = warpgroup_mma(
                q, k_s.index(place).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
            gathered = warpgroup_mma(p, v_s.index(before), acc, is_async=True)
            mbarrier.arrive(turn.index(1 - member), count=1)
            s = warpgroup_mma_wait(1, deps=[product])
            mbarrier.arrive(k_empty.index(place), count=1)
            if part == 0:
                s = masked(s, t, (tiles - 1 - i) * N + key, S, shift, CAUSAL)
            p, m, l, rescale = softmax_step(s, m, l, factor)
            acc = warpgroup_mma_wait(0, deps=[gathered])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None]
            p = gl.convert_layout(p.to(dtype), operand)

    # Output of the first tile of keys
    place = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(place), ((tiles - 1) // STAGES) & 1)
    gathered = warpgroup_mma(p, v_s.index(place), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[gathered])

    # Statistics
    empty = l == 0.0
    inverse = gl.where(empty, 0.0, 1.0 / l)
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, sums))[:, None]
    dead = gl.convert_layout(empty, gl.SliceLayout(1, sums))[:, None]
    acc = gl.where(dead, 0.0, acc)
    log2_l = gl.log2(l)
    natural = m * (factor * LN2) + log2_l * LN2
    gl.store(lse + t, gl.where(empty, -float("inf"), natural), mask=t < T)
    gl.store(norm + t, gl.where(m == -float("inf"), 0.0, m), mask=t < T)
    gl.store(norm + plane + t, gl.where(empty, float("inf"), log2_l), mask=t < T)
    # Store
    q.store(acc.to(dtype))
    fence_async_shared()
    TMA_STORE(out_rows, [t0 + member * ROWS, 0], q)
    tma.store_wait(0)


@gluon.jit
def first_consumer(
    out_rows, lse, norm, plane, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
    turn, t0, T, S, shift, tiles, cut, factor,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The consumer of rows 0 .. 63."""
    consumer(
        0,
        out_rows, lse, norm, plane, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
        turn, t0, T, S, shift, tiles, cut, factor, D, N, STAGES, CAUSAL,
    )  # fmt: skip


@gluon.jit
def second_consumer(
    out_rows, lse, norm, plane, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
    turn, t0, T, S, shift, tiles, cut, factor,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The consumer of rows 64 .. 127."""
    consumer(
        1,
        out_rows, lse, norm, plane, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
        turn, t0, T, S, shift, tiles, cut, factor, D, N, STAGES, CAUSAL,
    )  # fmt: skip


@gluon.jit
def attention_fwd_hopper_kernel(x, to, p, f, tile):
    """One block of 128 queries of one head."""
    D: gl.constexpr = f.D
    N: gl.constexpr = tile.BLOCK_N
    STAGES: gl.constexpr = tile.STAGES
    CAUSAL: gl.constexpr = f.HAS_RIGHT
    dtype: gl.constexpr = x.q.dtype.element_ty

    # Setup, in the order of `head.scheduled`
    blocks = gl.cdiv(p.T, 2 * ROWS)
    pid = gl.program_id(0)
    begin = pid // (p.section * blocks) * p.section
    here = gl.minimum(p.B * p.H - begin, p.section)
    within = pid - begin * blocks
    block, head = within // here, begin + within % here
    if CAUSAL:
        block = blocks - 1 - block
    b, h = (head // p.H).to(gl.int64), (head % p.H).to(gl.int64)
    h_kv = h // p.group
    t0 = block * (2 * ROWS)
    shift = gl.minimum(gl.maximum(p.shift, -FARTHEST), FARTHEST)
    if f.BOTTOM_RIGHT:
        shift += p.S - p.T
    end = t0 * 0 + p.S
    inner = end  # keys before it are attended by every row
    if CAUSAL:
        end = gl.minimum(end, gl.minimum(t0 + 2 * ROWS, p.T) + shift)
        inner = gl.minimum(inner, t0 + shift + 1)
    tiles = gl.maximum(gl.cdiv(gl.maximum(end, 0), N), 1)
    cut = gl.maximum(tiles - gl.maximum(inner, 0) // N, 1)

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_rows = tma.make_tensor_descriptor(
        x.q + b * p.q_b + h * p.q_h, [p.T, D], [p.q_t, 1], [ROWS, D], layout
    )
    k_rows = tma.make_tensor_descriptor(
        x.k + b * p.k_b + h_kv * p.k_h, [p.S, D], [p.k_t, 1], [N, D], layout
    )
    v_rows = tma.make_tensor_descriptor(
        x.v + b * p.v_b + h_kv * p.v_h, [p.S, D], [p.v_t, 1], [N, D], layout
    )
    out_rows = tma.make_tensor_descriptor(
        to.out + b * to.out_b + h * to.out_h, [p.T, D], [to.out_t, 1], [ROWS, D], layout
    )
    lse = to.lse + (b * p.H + h) * p.T
    norm, plane = to.norm + (b * p.H + h) * p.T, b * 0 + to.plane

    q_s = gl.allocate_shared_memory(dtype, [2, ROWS, D], layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), 1)
        mbarrier.init(turn.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(k_empty.index(i), 2)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(v_empty.index(i), 2)
    mbarrier.arrive(turn.index(0), count=1)  # the first consumer begins

    gl.warp_specialize(
        [
            (first_consumer, (
                out_rows, lse, norm, plane, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                turn, t0, p.T, p.S, shift, tiles, cut, p.factor, D, N, STAGES, CAUSAL,
            )),
            (second_consumer, (
                out_rows, lse, norm, plane, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                turn, t0, p.T, p.S, shift, tiles, cut, p.factor, D, N, STAGES, CAUSAL,
            )),
            (producer, (
                q_rows, k_rows, v_rows, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                t0, tiles, D, N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
    for i in gl.static_range(2):  # of one tile of keys nobody else knows them: kept until here
        mbarrier.invalidate(turn.index(i))


def give_scratch(device: torch.device) -> None:
    """Let Triton allocate what TMA descriptors are written to, from torch's caching allocator."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


def unsupported(call: Call) -> str | None:
    """Why this kernel does not take a call, or None."""
    x, p, f = call
    options = (x.mask, x.bias, x.alibi_slopes, x.sinks, x.align, x.cu_seqlens_q)
    aligned = all(y.data_ptr() % 16 == 0 for y in (x.q, x.k, x.v))
    strides = (p.q_b, p.q_h, p.q_t, p.k_b, p.k_h, p.k_t, p.v_b, p.v_h, p.v_t)
    reasons: tuple[tuple[Any, str], ...] = (
        (x.q.element_size() != 2, "takes bfloat16 and float16"),
        (f.D != f.D_V or f.D not in TILES, f"takes D = D_v of {tuple(TILES)}"),
        (any(y is not None for y in options), "takes no tensors but q, k and v"),
        (f.SOFTCAP or f.DROPOUT or f.HAS_LEFT, "takes no option but causal"),
        (not f.LAZY or f.NEGATED or f.NATURAL, "takes a scale in (0, 2**100]"),
        (f.HAS_RIGHT and p.right != 0, "takes no window"),
        (p.S == 0, "needs keys"),
        (not aligned or any(n % 8 for n in strides), "needs rows aligned to 16 bytes"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def hopper_launch(call: Call, to: ForwardResults) -> Launch:
    """The forward's kernel, grid and tiles on Hopper."""
    x, p, f = call
    tile = HopperTile(*TILES[f.D])
    grid = p.B * p.H * -(-p.T // (2 * ROWS.value))
    config = Config(2 * ROWS.value, tile.BLOCK_N, 4, tile.STAGES)
    return Launch(attention_fwd_hopper_kernel, grid, (x, to), p, f, tile, config)
