"""From dP to the gradients of scores (docs/math.md, section 4).

    dP = do v^T + dw, times Z    ds = p * (dP + row_term - dentropy * (s - m))
    row_term = -delta + dlse + dentropy * (log l - entropy), one number per row

``g`` is the ``Given`` of ``attention_bwd``, ``p, f`` are the tuples of ``arguments``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LN2


@triton.jit
def weight_gradient(g, b, h, t, j, T, S):
    """The gradient of the returned weights at [M, N], or 0 where there is none."""
    if g.grad_weights is not None:
        at = g.grad_weights + b.to(tl.int64) * g.dw_b + h.to(tl.int64) * g.dw_h
        at = at + t.to(tl.int64) * g.dw_t + j.to(tl.int64) * g.dw_s
        return tl.load(at, mask=(t < T) & (j < S), other=0.0).to(tl.float32) * g.dw_factor
    else:
        return 0.0


@triton.jit
def entropy_gradient(g, at, live):
    """The gradient of rows' entropy, times log 2: it multiplies what is in units of log2."""
    if g.grad_entropy is not None:
        return tl.load(g.grad_entropy + at, mask=live, other=0.0) * LN2
    else:
        return tl.zeros(at.shape, tl.float32)


@triton.jit
def score_gradients(depth, probs, dp, dw, kept, row_term, dentropy, g, p, f, HOLES: tl.constexpr):
    """The gradients ds of the scores.

    ``dp`` is do v^T, ``depth`` s - m in units of log2, as ``dentropy`` is. Where scores may be
    -inf (HOLES) a probability of zero gives zero, whatever v holds there.
    """
    if g.grad_weights is not None:
        dp += dw
    if f.DROPOUT:
        dp = tl.where(kept, dp * p.keep_scale, 0.0)
    ds = dp + row_term
    if g.grad_entropy is not None:
        ds -= dentropy * depth
    ds = probs * ds
    if HOLES or g.grad_entropy is not None:
        ds = tl.where(probs == 0.0, 0.0, ds)
    return ds


@triton.jit
def before_cap(ds, tanh_x, f):
    """The gradients of what the softcap was taken of: ds * dcapped, and 0 where ds is."""
    if f.SOFTCAP:
        ds = tl.where(ds == 0.0, 0.0, ds * (1.0 - tanh_x * tanh_x))
    return ds
