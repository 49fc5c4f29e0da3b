"""The public functions: the documented contract, and the way from arguments to a backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import autograd, backends, checks, dispatch, sharding, watching
from .backends import reference
from .block_mask import BlockMask
from .call import DecodeInputs, DecodeOptions, Inputs, Options, Outputs, Sequences
from .reference import reference_attention, reference_decode
from .requirements import nothing_else, truth
from .stats import AttentionStats
from .subclasses import overridden


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | Tensor | None = None,
    align: str | int | Tensor = "top_left",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool | str = False,
    return_weights: bool | str = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    **other: Any,
) -> Any:
    r"""Exact softmax attention, ``softmax(scale * q k^T + bias) v``, in memory linear in T and S.

    Query t stands at t' among the keys, and attends key s if all of ``causal``, ``window`` and
    ``mask`` allow it, and the bias is not -inf. With ``causal=True``, T = 2 and S = 4::

        align="top_left"     t' = t          align="bottom_right"   t' = t + S - T
            1 0 0 0                              1 1 1 0
            1 1 0 0                              1 1 1 1

    and with T = 4 and S = 2::

            1 0                                  0 0
            1 1                                  0 0
            1 1                                  1 0
            1 1                                  1 1

    A query without keys gives zeros, ``lse = -inf`` (the sink, where there is one) and zero
    gradients, never NaN. NaN or Inf in keys that no query of their batch entry and head may attend
    has no effect.

    Args:
        q: ``(B, H, T, D)``, float32, bfloat16 or float16; float64, and devices without a kernel,
            are served by the reference. Any strides; only a last stride other than 1 costs a copy.
        k: ``(B, H_kv, S, D)``, q's dtype; H_kv divides H (grouped queries: arXiv:2305.13245), and
            query head h reads key head ``h // (H / H_kv)``.
        v: ``(B, H_kv, S, D_v)``, q's dtype.
        mask: bool, True = attend, broadcastable to ``(B, H, T, S)``; never expanded. Or a
            `BlockMask` of ``(B|1, H|1, T, S)``, of which empty blocks cost nothing; torch's own
            (``torch.nn.attention.flex_attention``) is converted once.
        bias: any supported dtype, broadcastable to ``(B, H, T, S)``, added to the scaled scores.
            Differentiable; -inf masks. A ``torch.nn.attention.bias.CausalBias``, here or as
            ``mask``, is taken as ``causal`` with its alignment.
        causal: attend keys s <= t'.
        window: ``(left, right)``, attend t' - left <= s <= t' + right; None is unbounded. Or int32
            ``(H, 2)`` on q's device: left and right of each query head, -1 is unbounded; int64 is
            converted. Not with ``indices``.
        align: "top_left" t' = t (as torch), "bottom_right" t' = t + S - T (as flash-attn), an int n
            or an int tensor ``(B,)``: t' = t + n (chunked prefill), up to 2**29 either way.
        scale: factor of ``q k^T``; default ``D ** -0.5``.
        softcap: c > 0: scaled scores x become ``c * tanh(x / c)``, before all that is added to them
            (arXiv:2408.00118).
        alibi_slopes: float32 ``(H,)`` or ``(B, H)``: adds ``-slope * abs(s - t')``
            (arXiv:2108.12409).
        sinks: ``(H,)``, any supported dtype, differentiable: one more logit per head in the
            denominator, without a value (arXiv:2309.17453).
        indices: int32 ``(B, T, K)``, or ``(B, H_kv, T, K)`` with one list per key head: query t
            attends the keys ``indices[..., t, :]`` and no others, in time and memory linear in K
            (DeepSeek sparse attention, arXiv:2512.02556). -1 is no key, a key that stands there
            twice counts once; their order does not matter. int64 is converted. ``causal``,
            ``window`` and ``sinks`` apply as well; mask, bias, alibi_slopes, dropout, weights and
            "received" statistics are refused.
        dropout_p: probability in [0, 1] with which a probability is dropped; the rest is divided by
            ``1 - dropout_p``.
        dropout_seed: int64 ``(seed, offset)`` on q's device, of which the offset counts modulo
            2**32; default: drawn from torch's generator of that device.
        return_lse: also return the natural log of the softmax's denominator, sink included.
        return_stats: True: also return `AttentionStats`; "received" fills its column sums as well.
        return_weights: True: also return the probabilities after dropout; "mean": averaged over
            heads.
        deterministic: True: bitwise the same every run, and every row independent of what else is
            in the batch. Default: ``torch.are_deterministic_algorithms_enabled()``.
        backend: "auto", "cpu", "triton", "gluon" (experimental: a forward for Hopper), "cuda" or
            "reference". "auto" is ``ATTNFAST_BACKEND`` where that is set, else the first backend
            that accepts; see `explain`.
        other: none; names that torch or flash-attn use are refused with the ones to use here.

    Returns:
        ``out`` ``(B, H, T, D_v)`` in q's dtype and stride order; or a tuple in the order out, lse,
        stats, weights of what was asked for. lse is float32 ``(B, H, T)`` (float64 for float64
        inputs), weights are in q's dtype, ``(B, H, T, S)`` or, "mean", ``(B, T, S)``. All but the
        statistics other than entropy are differentiable. Second derivatives are taken through the
        reference, block by block. Under autocast q, k and v are cast to its dtype first.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the named backend cannot
            run the call; or none but the reference can and ``ATTNFAST_FALLBACK=error``.
        NotImplementedError: Forward-mode or third derivatives of a fused backend.

    Papers: FlashAttention-2 (arXiv:2307.08691); online softmax (arXiv:1805.02867).
    """
    if has_torch_function_variadic(
        q, k, v, mask, bias, window, align, alibi_slopes, sinks, indices, dropout_seed
    ):
        result = overridden(attention, locals())
        if result is not NotImplemented:
            return result
    if other:
        nothing_else("attention", other)
    if type(return_lse) is not bool:
        return_lse = truth("attention", "return_lse", return_lse)
    inputs, options = checks.attention_call(
        "attention",
        q,
        k,
        v,
        mask,
        bias,
        causal,
        window,
        align,
        (scale, softcap),
        alibi_slopes,
        sinks,
        dropout_p,
        dropout_seed,
        return_stats,
        return_weights,
        deterministic,
        indices=indices,
    )
    outputs = run("attention", inputs, options, backend)
    if not (return_lse or return_stats or return_weights):
        return outputs.out
    return results_of(outputs, return_lse, options)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | Tensor | None = None,
    align: str | int | Tensor = "top_left",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool | str = False,
    return_weights: bool | str = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    **other: Any,
) -> Any:
    """`attention` within each of many sequences that lie one after another, without padding.

    Sequence i has queries ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]`` and keys
    ``cu_seqlens_k[i]`` to ``cu_seqlens_k[i + 1]``. Positions t and s count from the sequence's
    first row, T and S are its own lengths, and ``align`` applies to each. Rows past the last
    sequence are queries without keys, and keys that nothing attends.

    Args:
        q: ``(total_q, H, D)``; dtypes as for `attention`.
        k: ``(total_k, H_kv, D)``.
        v: ``(total_k, H_kv, D_v)``.
        cu_seqlens_q: int32 ``(sequences + 1,)`` on q's device: 0, then the sequences' ends; int64
            is converted.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: at least the longest sequence's number of queries; an int, or an int tensor
            of one element, which is read (and on a GPU waited for).
        max_seqlen_k: at least the longest sequence's number of keys.
        mask: bool, broadcastable to ``(1, H, max_seqlen_q, max_seqlen_k)``: the same for every
            sequence, by positions within it. A `BlockMask` may have one for each sequence:
            ``(sequences|1, H|1, max_seqlen_q, max_seqlen_k)``.
        bias: the same, added; differentiable.
        causal: see `attention`, as for all that follow.
        window: see `attention`.
        align: a tensor has one entry per sequence.
        scale: default ``D ** -0.5``.
        softcap: see `attention`.
        alibi_slopes: ``(H,)`` or ``(sequences, H)``.
        sinks: see `attention`.
        dropout_p: see `attention`.
        dropout_seed: see `attention`.
        return_lse: see `attention`.
        return_stats: see `attention`.
        return_weights: see `attention`.
        deterministic: see `attention`.
        backend: see `attention`.
        other: none, see `attention`.

    Returns:
        As `attention`, with out ``(total_q, H, D_v)``, lse and statistics ``(H, total_q)``,
        received ``(H, total_k)`` and weights ``(sequences, H, max_seqlen_q, max_seqlen_k)`` or,
        "mean", ``(sequences, max_seqlen_q, max_seqlen_k)``, zero outside a sequence.

    Raises:
        TypeError: As `attention`.
        ValueError: As `attention`; also if cu_seqlens does not start at 0, decreases, or ends past
            the last row, or a sequence is longer than max_seqlen. GPU kernels do not read these
            values but never leave their tensors.
        NotImplementedError: As `attention`.
    """
    if has_torch_function_variadic(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        mask,
        bias,
        window,
        align,
        alibi_slopes,
        sinks,
        dropout_seed,
    ):
        result = overridden(varlen_attention, locals())
        if result is not NotImplemented:
            return result
    if other:
        nothing_else("varlen_attention", other)
    if type(return_lse) is not bool:
        return_lse = truth("varlen_attention", "return_lse", return_lse)
    inputs, options = checks.attention_call(
        "varlen_attention",
        q,
        k,
        v,
        mask,
        bias,
        causal,
        window,
        align,
        (scale, softcap),
        alibi_slopes,
        sinks,
        dropout_p,
        dropout_seed,
        return_stats,
        return_weights,
        deterministic,
        Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
    )
    outputs = packed(run("varlen_attention", inputs, options, backend), options)
    if not (return_lse or return_stats or return_weights):
        return outputs.out
    return results_of(outputs, return_lse, options)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | BlockMask | None = None,
    return_lse: bool = False,
    return_received: bool = False,
    backend: str = "auto",
    **other: Any,
) -> Any:
    """Attention of the newest T queries of every sequence over a cache of keys and values.

    Query t of entry b stands at t' = ``cache_seqlens[b] - T + t`` and attends the keys s <= t'. The
    caller has written the T new keys and values; the cache is never written here. The work is split
    over the keys.

    Args:
        q: ``(B, H, T, D)`` with a small T; dtypes as for `attention`.
        k_cache: ``(B, H_kv, S, D)``; or, with ``page_table``, pages ``(P, page, H_kv, D)``.
        v_cache: ``(B, H_kv, S, D_v)``; or pages ``(P, page, H_kv, D_v)``.
        cache_seqlens: int32 ``(B,)`` on q's device, the keys in the cache, the new ones included;
            at most S. What lies past them, NaN included, has no effect. int64 is converted.
        page_table: int32 ``(B, n)``: keys ``i * page`` and following of entry b lie in page
            ``page_table[b, i]``, so that S = n * page. Entries past ``cache_seqlens`` are not read.
        scale: default ``D ** -0.5``.
        window: see `attention`.
        softcap: see `attention`.
        alibi_slopes: see `attention`.
        sinks: see `attention`.
        bias: broadcastable to ``(B, H, T, S)``, see `attention`.
        mask: bool, broadcastable to ``(B, H, T, T)``, or a `BlockMask` of that shape: which of the
            last T keys each query attends, in place of s <= t' (drafted trees, arXiv:2305.09781:
            `BlockMask.from_tree`). All keys before them are attended as without it.
        return_lse: also return lse, float32 ``(B, H, T)``.
        return_received: also return received, float32 ``(B, H, S)``: per key the sum over the T
            queries of its probabilities, which may add up to less than T where there are sinks; 0
            past ``cache_seqlens``. What cache eviction by heavy hitters adds up (arXiv:2306.14048).
        backend: see `attention`.
        other: none, see `attention`.

    Returns:
        out ``(B, H, T, D_v)``, or a tuple in the order out, lse, received of what was asked for.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or requires a gradient, which
            decoding does not have; a length is outside [0, S], or a page outside [0, P); or the
            backend cannot run the call.

    Paper: PagedAttention (arXiv:2309.06180).
    """
    if has_torch_function_variadic(
        q, k_cache, v_cache, cache_seqlens, page_table, window, alibi_slopes, sinks, bias, mask
    ):
        result = overridden(decode_attention, locals())
        if result is not NotImplemented:
            return result
    if other:
        nothing_else("decode_attention", other)
    if type(return_lse) is not bool:
        return_lse = truth("decode_attention", "return_lse", return_lse)
    function = "decode_attention"
    inputs, options = checks.decode_call(
        function,
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        page_table,
        window,
        (scale, softcap),
        alibi_slopes,
        sinks,
        bias,
        mask,
        return_received,
    )
    row = dispatch.select(decode_problem(inputs, options), backend, function=function)
    if _in_onnx_export():
        row = reference.ROW
    if row.ops is None:
        sharding.needs_operator(function, inputs.q)
        checks.memory(function, inputs)
    if dispatch.wants_checks(row):
        checks.cache_values(function, inputs)
        checks.window_values(function, inputs.windows)
    if row.ops is None:
        out, lse, received = reference_decode(inputs, options)
    else:
        try:
            out, lse, received = autograd.call(row.ops.decode, *inputs, *options)
        except RuntimeError as error:
            if (refused := checks.complaint(function, error)) is None:
                raise
            raise refused from None
    if not (return_lse or options.received):
        return out
    return (out, *(lse,) * return_lse, *(received,) * options.received)


def run(
    function: str,
    inputs: Inputs,
    options: Options,
    backend: str,
    names: tuple[str, ...] = checks.NAMES,
) -> Outputs:
    """Choose a backend and run a checked call of ``attention`` or ``varlen_attention``.

    ``function`` and ``names`` are for messages, as those of ``checks.attention_call``.
    """
    if not watching.now:
        return _run(function, inputs, options, backend, names)
    compute: Callable[..., Outputs] = functools.partial(_run, function)
    for watcher in watching.now:
        compute = functools.partial(watcher.run, compute)
    return compute(inputs, options, backend, names)


def _run(
    function: str, inputs: Inputs, options: Options, backend: str, names: tuple[str, ...]
) -> Outputs:
    problem = attention_problem(inputs, options)
    row = dispatch.select(problem, backend, function=function)
    if _in_onnx_export():  # ONNX has no operator of ours: the reference's are known
        row = reference.ROW
    if options.dropout_p > 0 and inputs.dropout_seed is None:
        sharding.needs_seed(function, inputs.q)
        drawn = torch.randint(1 << 32, (2,), dtype=torch.int64, device=inputs.q.device)
        inputs = inputs._replace(dropout_seed=drawn)
    if row.ops is None:
        sharding.needs_operator(function, inputs.q)
        checks.memory(function, inputs, names)
    if inputs.cu_seqlens_q is not None and dispatch.wants_checks(row):
        checks.sequence_values(function, inputs, options)
    if inputs.indices is not None and dispatch.wants_checks(row):
        checks.index_values(function, inputs)
    if inputs.windows is not None and dispatch.wants_checks(row):
        checks.window_values(function, inputs.windows)
    if row.ops is None:
        return reference_attention(inputs, options)
    try:
        return autograd.fused_attention(row.ops, inputs, options, problem.requires_grad)
    except RuntimeError as error:
        if (refused := checks.complaint(function, error, names)) is None:
            raise
        raise refused from None


def _in_onnx_export() -> bool:
    """Torch's answer, which costs microseconds, only asked where a program is captured."""
    captured = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return captured and torch.onnx.is_in_onnx_export()


def attention_problem(inputs: Inputs, options: Options) -> backends.Problem:
    """A call of ``attention`` or ``varlen_attention`` as backends see it."""
    q, k, v, mask, bias, alibi_slopes, sinks, align, _, cu_seqlens_q, _, *others = inputs
    indices, windows, blocks, *_ = others
    B, H, T, D = q.shape
    _, H_kv, S, D_v = v.shape
    return backends.Problem(
        "attention" if cu_seqlens_q is None else "varlen",
        q.device,
        q.dtype,
        B if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        H,
        H_kv,
        T,
        S,
        D,
        D_v,
        options,
        mask is not None,
        None if bias is None else bias.dtype,
        alibi_slopes is not None,
        sinks is not None,
        align is not None,
        0,
        torch.is_grad_enabled()
        and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (bias is not None and bias.requires_grad)
            or (sinks is not None and sinks.requires_grad)
        ),
        indices is not None,
        blocks is not None,
        windows is not None,
    )


def decode_problem(inputs: DecodeInputs, options: DecodeOptions) -> backends.Problem:
    """A call of ``decode_attention`` as backends see it."""
    q, _, v_cache, _, page_table, bias, alibi_slopes, sinks, mask, windows = inputs
    B, H, T, D = q.shape
    _, H_kv, S, D_v = v_cache.shape
    page_size = 0
    if page_table is not None:
        _, page_size, H_kv, D_v = v_cache.shape
        S = page_table.shape[1] * page_size
    return backends.Problem(
        "decode",
        q.device,
        q.dtype,
        B,
        H,
        H_kv,
        T,
        S,
        D,
        D_v,
        options.as_options(),
        mask=mask is not None,
        bias=None if bias is None else bias.dtype,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        page_size=page_size,
        windows=windows is not None,
    )


def packed(outputs: Outputs, options: Options) -> Outputs:
    """The results of a varlen call as its caller has them: without a batch, rows first in out."""
    out, lse, norm, stats, received, weights = outputs
    out = out.squeeze(0).transpose(0, 1)  # the gradient of out[0] would be copied
    stats = None if stats is None or not options.stats else stats[:, 0]
    received = None if received is None or options.stats != 2 else received[0]
    return Outputs(out, lse[0], norm, stats, received, weights)


def results_of(outputs: Outputs, return_lse: bool, options: Options) -> tuple[Any, ...]:
    """What was asked for, in the order out, lse, stats, weights."""
    results: list[Any] = [outputs.out]
    if return_lse:
        results.append(outputs.lse)
    if options.stats and outputs.stats is not None:
        max_logit, _, reach, focus = outputs.stats.detach().unbind(0)
        results.append(
            AttentionStats(
                lse=outputs.lse,
                max_logit=max_logit,
                entropy=outputs.stats[1],
                reach=reach,
                focus=focus,
                received=outputs.received if options.stats == 2 else None,
            )
        )
    if options.weights:
        results.append(outputs.weights)
    return tuple(results)
