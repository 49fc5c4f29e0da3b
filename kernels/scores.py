"""Device helpers that every kernel shares: where rows lie, positions, scores with every option.

``x, p, f, tile`` are the tuples of ``arguments``. Index blocks are given in the shape in which they
broadcast: t is [M, 1] and j [1, N], or t [1, M] and j [N, 1] where a tile is transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32
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
def clamped_range(ends, b, rows, longest):
    """First row and length of sequence b."""
    begin = tl.minimum(tl.maximum(tl.load(ends + b), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(ends + b + 1), begin), rows)
    return begin, tl.minimum(end - begin, longest)


@triton.jit
def offset(b, b_stride, h, h_stride, row, row_stride):
    """Where row ``row`` of a batch entry and head begins, in 64 bits."""
    return b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride + row.to(tl.int64) * row_stride


@triton.jit
def row_pointers(base, rows, stride, dims, f):
    """[R, BLOCK] pointers to the rows ``rows`` from base on."""
    if f.WIDE:
        rows = rows.to(tl.int64)
    return base + rows[:, None] * stride + dims[None, :]


@triton.jit
def load_rows(base, rows, stride, live, D, BLOCK: tl.constexpr, f, MASKED: tl.constexpr):
    """[R, BLOCK]: rows from base on, zero past D and, if MASKED, where they are not live."""
    dims = tl.arange(0, BLOCK)
    pointers = row_pointers(base, rows, stride, dims, f)
    if D == BLOCK:
        if MASKED:
            return tl.load(pointers, mask=live[:, None], other=0.0)
        else:
            return tl.load(pointers)
    else:
        inside = (dims < D)[None, :]
        if MASKED:
            return tl.load(pointers, mask=live[:, None] & inside, other=0.0)
        else:
            return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, stride, live, D, BLOCK: tl.constexpr, f, values):
    """Store [R, BLOCK] to the live rows from base on, in their dtype."""
    dims = tl.arange(0, BLOCK)
    pointers = row_pointers(base, rows, stride, dims, f)
    inside = live[:, None] & (dims < D)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


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
def key_range(t_first, t_last, S, shift, p, f):
    """Which keys the queries t_first .. t_last may attend by position.

    Returns begin and end of the keys that some of them may, and of those that all of them may.
    """
    begin = t_first * 0
    inner_begin, end, inner_end = begin, begin + S, begin + S
    if f.HAS_LEFT:
        begin = tl.maximum(narrow(t_first + shift - p.left), 0)
        inner_begin = tl.maximum(narrow(t_last + shift - p.left), 0)
    if f.HAS_RIGHT:
        end = tl.maximum(tl.minimum(end, narrow(t_last + shift + p.right + 1)), 0)
        inner_end = tl.maximum(tl.minimum(inner_end, narrow(t_first + shift + p.right + 1)), 0)
    return begin, end, inner_begin, inner_end


@triton.jit
def query_range(j_first, j_last, T, shift, p, f):
    """The same for keys: the queries that may attend some of them, and all of them."""
    begin = j_first * 0
    inner_begin, end, inner_end = begin, begin + T, begin + T
    if f.HAS_RIGHT:
        begin = tl.maximum(narrow(j_first - shift - p.right), 0)
        inner_begin = tl.maximum(narrow(j_last - shift - p.right), 0)
    if f.HAS_LEFT:
        end = tl.maximum(tl.minimum(end, narrow(j_last - shift + p.left + 1)), 0)
        inner_end = tl.maximum(tl.minimum(inner_end, narrow(j_first - shift + p.left + 1)), 0)
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


@triton.jit
def slope_of(x, p, f, b, h):
    """ALiBi's slope in the units of the scores."""
    slope = 0.0
    if x.alibi_slopes is not None:
        slope = in_units(tl.load(x.alibi_slopes + b * p.alibi_b + h * p.alibi_h), f)
    return slope


@triton.jit
def in_units(x, f):
    """A natural number in the units of finished scores; finite, if it is."""
    x = x.to(tl.float32)
    if f.NATURAL:
        return x
    else:
        units = rounded_product(x, LOG2_E)
        overflows = (tl.abs(units) == float("inf")) & (tl.abs(x) < float("inf"))
        return tl.where(overflows, tl.where(x < 0, -LARGEST, LARGEST), units)


@triton.jit
def rounded_product(x, y):
    """A product that the compiler cannot fuse with a subtraction that follows.

    A score so fused would not be rounded as the maximum is that is taken from it, and where both
    are huge exp2 of the difference would overflow.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def at_head(pointer, b, b_stride, h, h_stride):
    """A mask or bias at its (b, h, 0, 0); None stays None."""
    if pointer is not None:
        return pointer + b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride
    else:
        return  # noqa: RET502 - Triton 3.6 cannot return None by name


@triton.jit
def soft_cap(s, p):
    """The capped score softcap * tanh(inner * s) of s = q k^T, and the tanh.

    To about fp32's rounding: a series near 0, where 1 - exp(-2 |x|) cancels. There the score is
    factor s times the series, which no softcap makes too small.
    """
    x = s * p.inner
    y = x * x
    series = 62.0 / 2835 - y * (1382.0 / 155925)
    series = 1 - y * (1.0 / 3 - y * (2.0 / 15 - y * (17.0 / 315 - y * series)))
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    near = tl.abs(x) < 0.35
    score = tl.where(near, s * p.factor * series, far * p.softcap)
    return score, tl.where(near, x * series, far)


@triton.jit
def edit_scores(s, t, j, T, S, shift, mask, bias, slope, x, p, f, BY_POSITION: tl.constexpr):
    """Scores from q k^T: factor, softcap, ALiBi, bias, and -inf where t may not attend j.

    Returns the scores, still q k^T where the features are LAZY, and what tanh gave, for the slope
    of the cap. ``mask`` and ``bias`` are at their (b, h, 0, 0).
    """
    capped = s
    if f.LAZY:
        if f.NEGATED:
            s = -s
    else:
        if f.SOFTCAP:
            s, capped = soft_cap(s, p)
        else:
            s = rounded_product(s, p.factor)
        if x.alibi_slopes is not None:
            s -= slope * distances(t, j, shift)
    if bias is not None:
        at = bias + t.to(tl.int64) * p.bias_t + j.to(tl.int64) * p.bias_s
        added = tl.load(at, mask=(t < T) & (j < S), other=-float("inf")).to(tl.float32)
        s = tl.where(added == -float("inf"), added, s + added)
    if mask is not None:
        at = mask + j.to(tl.int64) * p.mask_s
        if f.KEY_MASK:
            attend = tl.load(at, mask=j < S, other=False)
        else:
            attend = tl.load(at + t.to(tl.int64) * p.mask_t, mask=(t < T) & (j < S), other=False)
        s = tl.where(attend, s, -float("inf"))
    if BY_POSITION:
        attend = j < S
        ahead = j - t
        if f.HAS_LEFT:
            attend = attend & (ahead >= narrow(shift - p.left))
        if f.HAS_RIGHT:
            attend = attend & (ahead <= narrow(shift + p.right))
        s = tl.where(attend, s, -float("inf"))
    return s, capped


@triton.jit
def in_log2(difference, p, f):
    """A difference of scores in units of log2."""
    if f.LAZY:
        difference = difference * p.factor
    if f.NATURAL:
        difference = difference * LOG2_E
    return difference


@triton.jit
def natural(s, p, f):
    """Scores in natural units."""
    if f.LAZY:
        return s * tl.abs(p.scale)
    elif f.NATURAL:
        return s
    else:
        return s * LN2


@triton.jit
def norm_of(norm, plane, at, live):
    """Of rows, m and log2 l. Those that are not live have no keys: log2 l is inf, and p 0."""
    m = tl.load(norm + at, mask=live, other=0.0)
    return m, tl.load(norm + plane + at, mask=live, other=float("inf"))


@triton.jit
def probabilities(s, m, log2_l, p, f, EDITED: tl.constexpr):
    """How far scores lie above m, in units of log2, and p = exp2 of that less log2 l.

    Where scores may be -inf (EDITED) p is 0 there, also in a row of NaN.
    """
    height = in_log2(s - m, p, f)
    probs = tl.exp2(height - log2_l)
    if EDITED:
        probs = tl.where(height == -float("inf"), 0.0, probs)
    return height, probs


@triton.jit
def without_dead_rows(rows, dead):
    """[R, D] with zeros where a row is dead: 0 * NaN would let out what it holds."""
    return tl.where(dead[:, None], 0.0, rows).to(rows.dtype)


@triton.jit
def dropout_keeps(x, p, b, h, t0, j0, M: tl.constexpr, N: tl.constexpr):
    """[M, N] bool: which probabilities of queries t0 .. and keys j0 .. stay; j0 and N in eights.

    Philox-4x32-10 of (s // 8, t, b * H + h, offset); its words, low half first, are eight lanes.
    """
    seed = tl.load(x.dropout_seed)
    times = tl.load(x.dropout_seed + 1).to(tl.uint32)
    t = (t0 + tl.arange(0, M)).to(tl.uint32)[:, None]
    eights = (j0 // 8 + tl.arange(0, N // 8)).to(tl.uint32)[None, :]
    stream = (b * p.H + h).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, eights, t, stream, times)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 8, 2, 2]: word // 2 after word % 2
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes.to(tl.int32) >= p.threshold, [M, N])


@triton.jit
def score_gradients(height, probs, dp, dw, kept, row, dentropy, g, p, f, EDITED: tl.constexpr):
    """The gradient ds = p * (keep * (do v^T + dw) + row - dentropy * (s - m)) before the cap.

    ``dp`` is do v^T, ``height`` s - m in units of log2, as ``dentropy`` is. Where scores may be
    -inf (EDITED) a probability of zero gives zero, whatever v holds there.
    """
    if g.grad_weights is not None:
        dp += dw
    if f.DROPOUT:
        dp = tl.where(kept, dp * p.kept, 0.0)
    d = dp + row
    if g.grad_entropy is not None:
        d -= dentropy * height
    d = probs * d
    if EDITED or g.grad_entropy is not None:
        d = tl.where(probs == 0.0, 0.0, d)
    return d


@triton.jit
def weights_gradients(g, b, h, t, j, T, S):
    """The gradient of the returned weights at [M, N], or 0 where there is none."""
    if g.grad_weights is not None:
        at = g.grad_weights + b.to(tl.int64) * g.dw_b + h.to(tl.int64) * g.dw_h
        at = at + t.to(tl.int64) * g.dw_t + j.to(tl.int64) * g.dw_s
        return tl.load(at, mask=(t < T) & (j < S), other=0.0).to(tl.float32) * g.dw_factor
    else:
        return 0.0
