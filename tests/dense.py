"""Attention and its gradients as dense fp64 formulas, each with the size of its rounding errors.

Written from the formulas of docs/math.md and independent of ``attnfast.reference``, which gets
its gradients from autograd: the two check each other. Beside every value stands its `unit`, the
size of its rounding errors. The accuracy rule (`accuracy.check`) allows four of the largest.

Scores, softmax and sums are in fp32, with ``es = 2**-23``. Only p, out and ds, as they enter a sum,
and the results may be rounded to the input's dtype, with ``e = finfo(dtype).eps``. Every term of
such a sum is rounded for itself, by at most e / 2 of it either way: a variance of e^2 / 12 times
its square, and these add up. The errors of fp32 may all go one way: they count as es times the sum
of the absolute terms. A unit is

    unit = sqrt(var) + lin,   r^2 = e^2 / 12

    A      = |scale| sum |q| |k|, through the softcap, + |bias - bias*| + slope |s - t'|
    Abar   = sum_s p A, the sink as one more key with A = |sink - m|
    E      = A + Abar + |lse - m|
    rho    = e + es E

m is a row's largest score and bias* the bias there: a constant that all scores of a row share is no
part of the softmax, and of no error. A is the sum of a score's other absolute terms, so es A is its
error. p = exp(score - m - log l) is moved, relative to its size, by that and by the error of log l,
es (Abar + |lse - m|): together es E. rho is p's relative error where it is a result. The units,
|x|' the absolute terms of x summed, var before the bar and lin after it:

    out        r^2 sum_s (p Z v)^2  |  es sum_s (1 + E) p Z |v|
    weights    rho p Z
    lse        es (1 + Abar + |lse|)               focus      es p (1 + E) of the likeliest key
    max_logit  es A of the largest score, or of any within its own error of it, with all its bias
    entropy    es (1 + |log l| + sum_s p (|s - m| + sum p |s - m|) E)
    reach      es sum_s p |s - t'| (1 + E)          received   es sum_t p (1 + E)

    dP         |dP|' = Z (|do| |v|^T + |dW|)
    delta      r^2 (sum_d (do o)^2 + sum_s (p dP)^2)  |  es sum_s p |dP|' (1 + E)
    ds         r^2 ds^2 + p^2 var(delta)
                 |  es (1 + E) |ds|' + p (lin(delta) + |dH| (es E + unit(H))),
               |ds|' = p (|dP|' + sum_s p |dP|' + |dlse| + |dH| (|log p| + H))
    dx         ds (1 - u^2), likewise
                 |  lin(ds) (1 - u^2) + es |ds|' (u^2 + 2 |u| (1 - u^2) A_x / c),  u = tanh(x / c)
    dq         scale^2 (r^2 sum_s (dx k)^2 + var(delta) (sum_s p (1 - u^2) k)^2)
                 |  |scale| sum_s lin(dx) |k|
    dk         scale^2 sum_t var(dx) q^2  |  |scale| sum_t lin(dx) |q|
    dv         r^2 sum_t (p Z do)^2  |  es sum_t (1 + E) p Z |do|
    dbias      r^2 sum ds^2 + sum_t var(delta) (sum_s p)^2, over what the bias spans  |  sum lin(ds)
    dsinks     sum var(ds)  |  sum lin(ds), of the sink

One error of delta moves a whole row of ds: in sums over keys it counts once, times the sum of p.
So huge scores are judged by what fp32 can know of them, cancelling sums by their terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnfast.block_index import with_dense_mask
from attnfast.call import Inputs, Options
from attnfast.reference import dropout_mask


class Cotangents(NamedTuple):
    """The gradients of a scalar loss by each differentiable output; None where it has none."""

    out: Tensor | None = None  # (B, H, T, D_v)
    lse: Tensor | None = None  # (B, H, T)
    entropy: Tensor | None = None  # (B, H, T)
    weights: Tensor | None = None  # the shape of the returned weights


class Trial(NamedTuple):
    """One call to judge: what goes in, and which gradients come back."""

    inputs: Inputs
    options: Options
    cotangents: Cotangents


class Sum(NamedTuple):
    """A value in fp64 and the size of its rounding errors, both of the result's shape."""

    value: Tensor
    unit: Tensor


def _sum(value: Tensor, var: Tensor, lin: Tensor) -> Sum:
    """A sum whose terms' own roundings have the squares `var`, and whose other errors are `lin`."""
    return Sum(value, var.sqrt() + lin)


def dense(problem: Trial) -> dict[str, Sum]:
    """Every output and gradient of a call, from inputs of any dtype.

    Returns:
        ``out lse max_logit entropy reach focus received weights dq dk dv dbias dsinks``, without
        those that the call lacks, in the layout of `Outputs` and `Gradients`.
    """
    inputs, options, _ = problem
    if inputs.block_starts is not None:
        sizes = (inputs.q.shape[2], inputs.k.shape[2])
        if inputs.cu_seqlens_q is not None:
            sizes = (options.max_seqlen_q, options.max_seqlen_k)
        problem = problem._replace(inputs=with_dense_mask(inputs, *sizes))
    return _batch(*problem) if problem.inputs.cu_seqlens_q is None else _varlen(*problem)


def _batch(
    inputs: Inputs, options: Options, cotangents: Cotangents, batch_start: int = 0
) -> dict[str, Sum]:
    """`dense` without cu_seqlens. The dropout mask counts batch_start entries before these."""
    B, H, T, _ = inputs.q.shape
    H_kv, S, D_v = inputs.v.shape[1:]
    group = H // H_kv
    e, es = rounding(inputs.q.dtype)
    variance = e**2 / 12  # of a rounding error, over the square of what is rounded

    standing = torch.arange(T).view(1, 1, T, 1) + options.align_offset
    if options.align_bottom_right:
        standing = standing + S - T
    if inputs.align is not None:
        standing = standing + inputs.align.view(B, 1, 1, 1)
    ahead = torch.arange(S) - standing  # s - t', (B|1, 1, T, S)
    allowed = torch.ones(B, H, T, S, dtype=torch.bool)
    if options.causal:
        allowed &= ahead <= 0
    if options.window_left >= 0:
        allowed &= ahead >= -options.window_left
    if options.window_right >= 0:
        allowed &= ahead <= options.window_right
    for h, (left, right) in enumerate([] if inputs.windows is None else inputs.windows.tolist()):
        near = (left < 0) | (ahead >= -left)
        allowed[:, h] &= (near & ((right < 0) | (ahead <= right)))[:, 0]
    if inputs.mask is not None:
        allowed &= inputs.mask
    if inputs.bias is not None:
        allowed &= inputs.bias != -torch.inf
    if inputs.indices is not None:
        lists = inputs.indices.repeat_interleave(H // inputs.indices.shape[1], 1).unsqueeze(4)
        allowed &= (lists == torch.arange(S)).any(3)

    # Keys that nobody attends count as zero, whatever they hold.
    seen = allowed.any(2).view(B, H_kv, group, S).any(2).unsqueeze(-1)  # (B, H_kv, S, 1)
    q = inputs.q.double()
    k = inputs.k.double().where(seen, 0).repeat_interleave(group, 1)
    v = inputs.v.double().where(seen, 0).repeat_interleave(group, 1)

    x = options.scale * q @ k.mT
    A = abs(options.scale) * q.abs() @ k.abs().mT
    s, slope, slope_unit = x, torch.ones(()).double(), torch.zeros(()).double()
    if options.softcap > 0:
        u = torch.tanh(x / options.softcap)
        s, slope = options.softcap * u, 1 - u * u
        slope_unit = es * (u * u + 2 * u.abs() * slope * A / options.softcap)
        A = A * slope + s.abs()
    if inputs.alibi_slopes is not None:
        distance = inputs.alibi_slopes.double().view(-1, H, 1, 1) * ahead.abs()
        s, A = s - distance, A + distance.abs()
    shared = torch.zeros(()).double()
    if inputs.bias is not None:
        bias = inputs.bias.double().expand(B, H, T, S).where(allowed, 0)
        s = s + bias
        if S:
            likeliest = s.where(allowed, -torch.inf).argmax(3, keepdim=True)
            shared = bias.gather(3, likeliest)
        A = A + (bias - shared).abs()
    s, A = s.where(allowed, -torch.inf), A.where(allowed, 0)

    # The sink is one more key, the last, whose value is zero.
    sink = torch.full((H,), -torch.inf).double() if inputs.sinks is None else inputs.sinks.double()
    sink = sink.view(1, H, 1, 1).expand(B, H, T, 1)
    s_all = torch.cat([s, sink], 3)
    lse = s_all.logsumexp(3, keepdim=True)  # (B, H, T, 1)
    empty = lse == -torch.inf
    m = s_all.amax(3, keepdim=True).where(~empty, 0)
    A_all = torch.cat([A, (sink - m).abs().where(sink > -torch.inf, 0)], 3)
    log_l = (s_all - m).logsumexp(3, keepdim=True).where(~empty, 0)
    below = (s_all - m - log_l).where(s_all > -torch.inf, 0)  # log p, 0 where p is 0
    p_all = below.exp().where(s_all > -torch.inf, 0)
    lse0 = lse.where(~empty, 0)
    A_bar = (p_all * A_all).sum(3, keepdim=True)
    E_all = A_all + A_bar + log_l.abs()
    rho_all = e + es * E_all
    p, E, rho = p_all[..., :S], E_all[..., :S], rho_all[..., :S]

    Z = torch.ones(B, H, T, S).double()
    if options.dropout_p > 0:
        assert inputs.dropout_seed is not None
        Z = dropout_mask(
            inputs.dropout_seed, B, H, T, S, options.dropout_p, batch_start=batch_start
        ).double() / (1 - options.dropout_p if options.dropout_p < 1 else 1)

    spread = (p_all * below).sum(3, keepdim=True).neg()  # sum p (lse - s): the entropy
    depth = (s_all - m).abs().where(s_all > -torch.inf, 0)
    mean_depth = (p_all * depth).sum(3, keepdim=True)
    entropy_unit = es * (
        1 + log_l.abs() + (p_all * (depth + mean_depth) * E_all).sum(3, keepdim=True)
    )
    result = {
        "out": _sum((p * Z) @ v, variance * (p * Z) ** 2 @ v**2, es * ((1 + E) * p * Z) @ v.abs()),
        "lse": Sum(lse.squeeze(3), es * (1 + A_bar + lse0.abs()).squeeze(3)),
    }
    if options.stats:
        largest = s.amax(3, keepdim=True) if S else lse.new_full((B, H, T, 1), -torch.inf)
        near = (A + shared.abs()).where(s + 4 * es * (A + shared.abs()) >= largest, 0)
        result["max_logit"] = Sum(
            largest.squeeze(3), es * (near.amax(3) if S else near.new_zeros(B, H, T))
        )
        result["entropy"] = Sum(spread.squeeze(3), entropy_unit.squeeze(3))
        result["reach"] = Sum((p * ahead.abs()).sum(3), es * (p * ahead.abs() * (1 + E)).sum(3))
        one_more = torch.zeros(B, H, T, 1).double()  # there may be no keys
        result["focus"] = Sum(
            torch.cat([p, one_more], 3).amax(3), es * torch.cat([p * (1 + E), one_more], 3).amax(3)
        )
    if options.stats == 2:
        result["received"] = Sum(p.sum(2), es * (p * (1 + E)).sum(2))
    if options.weights:
        W = Sum(p * Z, rho * p * Z)
        result["weights"] = W if options.weights == 2 else Sum(W.value.mean(1), W.unit.mean(1))

    do = _or_zeros(cotangents.out, (B, H, T, D_v))
    dlse = _or_zeros(cotangents.lse, (B, H, T)).unsqueeze(3).where(~empty, 0)
    dH = _or_zeros(cotangents.entropy, (B, H, T)).unsqueeze(3).where(~empty, 0)
    dW = torch.zeros(()).double()
    if cotangents.weights is not None:
        dW = cotangents.weights.double()
        dW = dW if options.weights == 2 else (dW / H).unsqueeze(1)
    dP, dP_abs = Z * (do @ v.mT + dW), Z * (do.abs() @ v.abs().mT + dW.abs())
    delta = (p * dP).sum(3, keepdim=True)
    delta_abs = (p * dP_abs).sum(3, keepdim=True)
    delta_lin = es * ((1 + E) * p * dP_abs).sum(3, keepdim=True)
    products = (do * result["out"].value) ** 2
    delta_var = variance * (products.sum(3, keepdim=True) + ((p * dP) ** 2).sum(3, keepdim=True))

    nothing = torch.zeros(B, H, T, 1).double()  # the sink has no value: its dP is zero
    ds_all = p_all * (torch.cat([dP, nothing], 3) - delta + dlse - dH * (below + spread))
    ds_abs = p_all * (
        torch.cat([dP_abs, nothing], 3) + delta_abs + dlse.abs() + dH.abs() * (below.abs() + spread)
    )
    lin_all = es * (1 + E_all) * ds_abs
    lin_all += p_all * (delta_lin + dH.abs() * (es * E_all + entropy_unit))
    ds, ds_lin = ds_all[..., :S], lin_all[..., :S]
    dx, dx_lin = ds * slope, ds_lin * slope + ds_abs[..., :S] * slope_unit
    p_slope = p * slope

    def per_kv_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (H_kv, group)).sum(2)

    scale = options.scale
    result["dq"] = _sum(
        scale * dx @ k,
        scale**2 * (variance * dx**2 @ k**2 + delta_var * (p_slope @ k) ** 2),
        abs(scale) * dx_lin @ k.abs(),
    )
    dx_var = variance * dx**2 + delta_var * p_slope**2
    result["dk"] = _sum(
        per_kv_head(scale * dx.mT @ q),
        per_kv_head(scale**2 * dx_var.mT @ q**2),
        per_kv_head(abs(scale) * dx_lin.mT @ q.abs()),
    )
    result["dv"] = _sum(
        per_kv_head((p * Z).mT @ do),
        per_kv_head(variance * ((p * Z) ** 2).mT @ do**2),
        per_kv_head(es * ((1 + E) * p * Z).mT @ do.abs()),
    )
    if inputs.bias is not None:
        shape = inputs.bias.shape
        weight = p.sum(3, keepdim=True) if shape[3] == 1 else p
        spans = (*shape[:3], weight.shape[3])
        result["dbias"] = _sum(
            ds.sum_to_size(shape),
            variance * (ds**2).sum_to_size(shape) + (delta_var * weight**2).sum_to_size(spans),
            ds_lin.sum_to_size(shape),
        )
    if inputs.sinks is not None:
        last, p_sink = ds_all[..., S], p_all[..., S]
        result["dsinks"] = _sum(
            last.sum((0, 2)),
            (variance * last**2 + delta_var.squeeze(3) * p_sink**2).sum((0, 2)),
            lin_all[..., S].sum((0, 2)),
        )
    return result


def _varlen(inputs: Inputs, options: Options, cotangents: Cotangents) -> dict[str, Sum]:
    """Every sequence as a batch of one; the rows past the last are rows without keys or sink."""
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    q_ends, k_ends = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    result = _nothing(inputs, options, len(q_ends) - 1)
    for i in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        T, S = rows.stop - rows.start, keys.stop - keys.start

        def corner(x: Tensor | None, T: int = T, S: int = S) -> Tensor | None:
            if x is None:
                return None
            return x[:, :, : T if x.shape[2] > 1 else 1, : S if x.shape[3] > 1 else 1]

        def entry(x: Tensor | None, i: int = i) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[i : i + 1]

        def part(x: Tensor | None, where: slice = rows) -> Tensor | None:
            return None if x is None else x[:, :, where]

        one = Inputs(
            inputs.q[:, :, rows],
            inputs.k[:, :, keys],
            inputs.v[:, :, keys],
            entry(corner(inputs.mask)),
            corner(inputs.bias),
            entry(inputs.alibi_slopes),
            inputs.sinks,
            entry(inputs.align),
            inputs.dropout_seed,
            windows=inputs.windows,
        )
        dW = cotangents.weights
        one_cotangents = Cotangents(
            part(cotangents.out),
            part(cotangents.lse),
            part(cotangents.entropy),
            None if dW is None else dW[i : i + 1, ..., :T, :S],
        )
        for name, term in _batch(one, options, one_cotangents, batch_start=i).items():
            for whole, piece in zip(result[name], term, strict=True):
                if name in ("dk", "dv", "received"):
                    whole[:, :, keys] = piece
                elif name == "weights":
                    whole[i, ..., :T, :S] = piece[0]
                elif name == "dbias":
                    corner_of = corner(whole)
                    assert corner_of is not None
                    corner_of += piece
                elif name == "dsinks":
                    whole += piece
                else:
                    whole[:, :, rows] = piece
    return result


def _nothing(inputs: Inputs, options: Options, sequences: int) -> dict[str, Sum]:
    """The results of a varlen call without sequences."""
    q, k, v = inputs.q, inputs.k, inputs.v
    rows = q.shape[:3]
    empty: dict[str, tuple[tuple[int, ...], float]] = {
        "out": ((*rows, v.shape[3]), 0.0),
        "lse": (rows, -torch.inf),
        "dq": (q.shape, 0.0),
        "dk": (k.shape, 0.0),
        "dv": (v.shape, 0.0),
    }
    if options.stats:
        empty |= dict.fromkeys(("entropy", "reach", "focus"), (rows, 0.0))
        empty["max_logit"] = (rows, -torch.inf)
    if options.stats == 2:
        empty["received"] = ((1, q.shape[1], k.shape[2]), 0.0)
    if options.weights:
        heads = (q.shape[1],) if options.weights == 2 else ()
        empty["weights"] = ((sequences, *heads, options.max_seqlen_q, options.max_seqlen_k), 0.0)
    if inputs.bias is not None:
        empty["dbias"] = (inputs.bias.shape, 0.0)
    if inputs.sinks is not None:
        empty["dsinks"] = (inputs.sinks.shape, 0.0)
    return {
        name: Sum(torch.full(shape, value).double(), torch.zeros(shape).double())
        for name, (shape, value) in empty.items()
    }


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """The relative rounding errors of results and of scores for inputs of a dtype: ``(e, es)``."""
    scores = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps, torch.finfo(scores).eps


def _or_zeros(x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape).double() if x is None else x.double()
