"""Scores with every option, and probabilities from them.

``x, p, f, tile`` are the tuples of ``arguments``. Index blocks are given in the shape in which they
broadcast: rows are [M, 1] and keys [1, N], or [1, M] and [N, 1] where a tile is transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import attended_scores
from .head import distances, narrow

LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32


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
    """A product that the compiler cannot fuse with a sum that follows.

    A score so fused would not be rounded as the maximum is that is taken from it, and where both
    are huge exp2 of the difference would overflow. In a sum over lanes each lane would add its own
    product unrounded to its neighbour's rounded one, so that the lanes which hold the same row
    would disagree in the last bit.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def soft_cap(s, p):
    """The capped score softcap * tanh(x) of s = q k^T, where x = inner * s, and tanh(x).

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
    capped = tl.where(near, s * p.factor * series, far * p.softcap)
    return capped, tl.where(near, x * series, far)


@triton.jit
def edit_scores(
    s,
    t0,
    row,
    j0,
    key,
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
    BY_POSITION: tl.constexpr,
    CAREFUL: tl.constexpr = True,
    slot=None,
):
    """Scores from q k^T: factor, softcap, ALiBi, bias, and -inf where t may not attend j.

    Of queries t0 + row and keys j0 + key; without BY_POSITION all of these keys exist, and a mask
    of keys lets all of them pass. Unless CAREFUL a score of NaN or inf is NaN where the bias is
    -inf.

    Returns the scores, still q k^T where the features are LAZY, and the softcap's tanh(x), for its
    derivative. ``mask`` and ``bias`` are at their (b, h, 0, 0), ``slot`` is where the bits of a
    block mask's block are.
    """
    t0, j0 = T * 0 + t0, S * 0 + j0  # not numbers of Python's, as in the interpreter
    t, j = (t0 + row).to(tl.int32), (j0 + key).to(tl.int32)
    tanh_x = s
    if f.LAZY:
        if f.NEGATED:
            s = -s
    else:
        if f.SOFTCAP:
            s, tanh_x = soft_cap(s, p)
        else:
            s = rounded_product(s, p.factor)
        if x.alibi_slopes is not None:
            s -= slope * distances(t, j, shift)
    if bias is not None:
        added = load_scores(
            bias, t0, row, p.bias_t, j0, key, p.bias_s, T, S, -float("inf"), f, BY_POSITION
        ).to(tl.float32)
        if CAREFUL:
            s = tl.where(added == -float("inf"), added, s + added)
        else:
            s += added
    if f.KEY_MASK:  # without BY_POSITION all of these keys are attended
        if BY_POSITION and mask is not None:
            s = tl.where(attended_keys(mask, j0, key, S, p), s, -float("inf"))
    elif mask is not None:
        attend = load_scores(
            mask, t0, row, p.mask_t, j0, key, p.mask_s, T, S, False, f, BY_POSITION
        )
        s = tl.where(attend, s, -float("inf"))
    if f.BLOCKS and BY_POSITION:
        attend = attended_scores(x, f, slot, t0, row, j0, key)
        s = tl.where(attend, s, -float("inf"))
    HIDDEN: tl.constexpr = f.KEY_MASK and mask is not None  # what lies behind the end is, already
    if BY_POSITION and (f.CUT or not f.BLOCKS) and (f.HAS_LEFT or f.HAS_RIGHT or not HIDDEN):
        attend = j < S
        ahead = j - t
        left, right = sides
        if f.HAS_LEFT:
            attend = attend & (ahead >= narrow(shift - left))
        if f.HAS_RIGHT:
            attend = attend & (ahead <= narrow(shift + right))
        s = tl.where(attend, s, -float("inf"))
    return s, tanh_x


@triton.jit
def attended_keys(mask, j0, key, S, p):
    """Which of the keys j0 + key a mask that is the same for all queries lets pass."""
    at = mask + j0.to(tl.int64) * p.mask_s + key.to(tl.int64) * p.mask_s
    attend = tl.load(at, mask=(j0 + key).to(tl.int32) < S, other=False)
    # A maximum of one: Triton lays out mma's operands for the narrowest number loaded on their way
    return tl.max(attend.to(tl.int32)[:, None], 1) > 0


@triton.jit
def load_scores(
    base, t0, row, row_stride, j0, key, key_stride, T, S, other, f, MASKED: tl.constexpr
):
    """A tile of a mask or bias; ``other`` past T and S if MASKED, or else more of the last row."""
    at = base + t0.to(tl.int64) * row_stride + j0.to(tl.int64) * key_stride
    if MASKED:
        inside = ((t0 + row).to(tl.int32) < T) & ((j0 + key).to(tl.int32) < S)
    else:
        row = tl.minimum(row, T - 1 - t0.to(tl.int32))
    if f.WIDE:
        row, key = row.to(tl.int64), key.to(tl.int64)
    at = at + row * row_stride + key * key_stride
    if MASKED:
        return tl.load(at, mask=inside, other=other)
    else:
        return tl.load(at)


@triton.jit
def in_log2(difference, p, f):
    """A difference of scores in units of log2."""
    if f.LAZY:
        difference = difference * p.factor
    if f.NATURAL:
        difference = difference * LOG2_E
    return difference


@triton.jit
def line_of(m, p):
    """Factor and level of rows with maximum m: s * factor - level is s - m in units of log2.

    But for what the level is rounded, the same for all of a row. Where that is too much, scores are
    equal or differ by so much that any larger factor serves: a power of two, so the level is exact.
    """
    factor = tl.where(tl.abs(m) < p.steep, p.factor, p.power)
    return factor, rounded_product(m, factor)


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
def probabilities(s, m, log2_l, p, f, HOLES: tl.constexpr):
    """Depth, s - m in units of log2, and p = exp2 of that less log2 l.

    Where scores may be -inf (HOLES) p is 0 there, also in a row of NaN.
    """
    depth = in_log2(s - m, p, f)
    probs = tl.exp2(depth - log2_l)
    if HOLES:
        probs = tl.where(depth == -float("inf"), 0.0, probs)
    return depth, probs


@triton.jit
def line_of_norm(m, log2_l, p):
    """Factor and level of rows whose denominator is known: p = exp2(s * factor - level) * rest.

    Returns also what the level holds of log2 l: the depth is s * factor - level + held.
    """
    factor, top = line_of(m, p)
    level = top + log2_l
    held = level - top
    lost = tl.fma(m, factor, -top) + ((top - (level - held)) + (log2_l - held))
    rest = tl.exp2(tl.where(log2_l < float("inf"), -lost, 0.0))
    return factor, level, held, rest


@triton.jit
def fused_probabilities(s, factor, level, held):
    """The same from a row's `line_of_norm`, but for its rest."""
    depth = tl.fma(s, factor, -level)
    return depth + held, tl.exp2(depth)
