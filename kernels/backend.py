"""The Triton backend's operators: the schemas of ``attnfast.ops``, from tensors to launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnfast import checks
from attnfast.call import (
    DecodeInputs,
    DecodeOutputs,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Upstream,
    backward_call,
    decode_call,
    forward_call,
    pooled_call,
)
from attnfast.ops import empty_in_order, wants_gradient
from attnfast.requirements import checks_values

from . import (
    attention_bias,
    attention_bwd,
    attention_fwd,
    attention_indexed_bwd,
    attention_pooled,
    attention_weights,
    configs,
    launch,
)
from .arguments import MAX_ROWS, Call, gather
from .attention_decode import attention_decode, decode_jobs
from .attention_indexed_fwd import indexed_fwd
from .indexed_lists import listing, sorted_lists
from .key_ends import key_ends_launches, with_key_ends

if launch.INTERPRETED:
    from . import interpreter

    interpreter.mend()


def fwd(*args: Any) -> Outputs:
    """``triton_fwd``."""
    inputs, options = forward_call(args)
    check_memory(inputs)
    check_rows(q=inputs.q, k=inputs.k, v=inputs.v)
    if checks_values():
        checks.window_values("attention", inputs.windows)
        if inputs.cu_seqlens_q is not None:
            checks.sequence_values("varlen_attention", inputs, options)
    arch = configs.architecture(inputs.q.device)
    call = with_key_ends(gather(inputs, options, configs.l2_bytes(arch)))
    if inputs.indices is not None:
        if checks_values():
            checks.index_values("attention", inputs)
        out, lse, norm, stats, *_ = indexed_fwd(inputs, options, call, arch)
        nothing = (lse.new_empty(0), lse.new_empty(0), inputs.q.new_empty(0))
        return Outputs(out, lse, norm, nothing[0] if stats is None else stats, *nothing[1:])
    for job in key_ends_launches(call):
        launch.launch(job)
    out, lse, norm, stats, *_ = attention_fwd.attention_fwd(inputs, options, call, arch)
    if stats is None:
        stats = lse.new_empty(0)
    received = lse.new_empty(0)  # no result may be another's memory, not even of nothing
    if options.stats == 2:
        received = attention_weights.received_fwd(inputs, options, call, norm, arch)
    probabilities = inputs.q.new_empty(0)
    if options.weights:
        probabilities = attention_weights.weights_fwd(options, call, norm, arch)
    return Outputs(out, lse, norm, stats, received, probabilities)


def gluon_fwd(*args: Any) -> Outputs:
    """``gluon_fwd``: out, lse and norm by the forward for Hopper."""
    from . import attention_fwd_gluon

    inputs, options = forward_call(args)
    check_memory(inputs)
    check_rows(q=inputs.q, k=inputs.k, v=inputs.v)
    call = gather(inputs, options, configs.l2_bytes("sm_90"))
    reason = attention_fwd_gluon.unsupported(call)
    if reason is not None:
        raise ValueError(f"attention: the gluon backend {reason}")
    to = attention_fwd.results(inputs, options)
    attention_fwd_gluon.give_scratch(inputs.q.device)
    launch.launch(attention_fwd_gluon.hopper_launch(call, to))
    stats, received = to.lse.new_empty(0), to.lse.new_empty(0)
    return Outputs(to.out, to.lse, to.norm, stats, received, inputs.q.new_empty(0))


def bwd(*args: Any) -> Gradients:
    """``triton_bwd``."""
    upstream, inputs, options = backward_call(args)
    check_memory(inputs)
    check_memory(upstream)
    check_rows(q=inputs.q, k=inputs.k, v=inputs.v, out=upstream.out)
    arch = configs.architecture(inputs.q.device)
    given = attention_bwd.given(upstream, inputs.cu_seqlens_q is not None)
    call = gather(inputs, options, configs.l2_bytes(arch), given.grad_out, given.out)
    call = with_key_ends(call)
    for job in key_ends_launches(call):
        launch.launch(job)
    if inputs.indices is not None:
        to = attention_indexed_bwd.indexed_bwd(inputs, options, call, given, arch)
    else:
        to = attention_bwd.attention_bwd(inputs, call, given, arch)
    dbias, dsinks = inputs.q.new_empty(0), inputs.q.new_empty(0)
    if upstream.need_dbias:
        dbias = attention_bias.bias_gradient(call, given, arch)
    if upstream.need_dsinks:
        dsinks = attention_bias.sink_gradient(call, given, arch)
    return Gradients(to.dq, to.dk, to.dv, dbias, dsinks)


def decode(*args: Any) -> DecodeOutputs:
    """``triton_decode``."""
    inputs, options = decode_call(args)
    check_memory(inputs)
    check_rows(q=inputs.q, k_cache=inputs.k_cache, v_cache=inputs.v_cache)
    if checks_values():
        checks.cache_values("decode_attention", inputs)
        checks.window_values("decode_attention", inputs.windows)
    return attention_decode(inputs, options, arch=configs.architecture(inputs.q.device))


def pooled(*args: Any) -> Tensor:
    """``triton_pooled``."""
    inputs, options, pooling = pooled_call(args)
    check_memory(inputs)
    check_memory(pooling)
    check_rows(q=inputs.q, k=inputs.k, v=inputs.v)
    arch = configs.architecture(inputs.q.device)
    call = with_key_ends(gather(inputs, options, configs.l2_bytes(arch)))
    for job in key_ends_launches(call):
        launch.launch(job)
    return attention_pooled.pooled_fwd(pooling, call, arch)


def workspace(inputs: Any, options: Any) -> tuple[int, int]:
    """Bytes of scratch of a call, forward and backward: what its launches take, without memory."""
    arch = configs.architecture(inputs.q.device)
    need_dbias = wants_gradient(inputs.bias)
    inputs = inputs._make(None if x is None else x.detach().to("meta") for x in inputs)
    if isinstance(inputs, DecodeInputs):
        cache = decode_jobs(inputs, options, arch)[0].tensors[1]
        sums = (cache.scores, cache.base, cache.total)
        return nbytes(cache.acc, cache.m, cache.l, *(x for x in sums if x is not None)), 0
    rows = inputs.q.new_empty((2, *inputs.q.shape[:3]), dtype=torch.float32)
    out = empty_in_order(inputs.q, inputs.v.shape[3])
    given = attention_bwd.given(Upstream.plain(out, out, rows), inputs.cu_seqlens_q is not None)
    call = with_key_ends(gather(inputs, options, configs.l2_bytes(arch)))
    if inputs.indices is not None:
        return indexed_workspace(inputs, options, call, given)
    ends = 0 if call.x.key_ends is None else nbytes(call.x.key_ends)
    dbias = 0
    if need_dbias:
        sums = attention_bias.bias_launch(call, given, arch).tensors[2].sums
        if len(sums) > 1:
            in_fp32 = sums[:1] if sums.dtype != inputs.bias.dtype else ()  # the sum of sums
            dbias = nbytes(sums, *in_fp32)
    return ends, ends + nbytes(given.row_term) + dbias


def indexed_workspace(
    inputs: Inputs, options: Options, call: Call, given: attention_bwd.Given
) -> tuple[int, int]:
    """The same over chosen keys: lists, and terms and sums of dk and dv."""
    lists = sorted_lists(inputs, options)
    rows = slice(0, attention_indexed_bwd.rows_at_once(call, lists.K))
    terms = attention_indexed_bwd.new_terms(call, lists.K, rows)
    sums = attention_indexed_bwd.new_sums(attention_bwd.results(inputs))
    found = listing(lists, rows, call.p.S)
    of_lists = nbytes(lists.keys, lists.counts)
    held = (terms.dk, terms.dv, sums.dk, sums.dv, found.order, found.starts, given.row_term)
    return of_lists, of_lists + nbytes(*held)


def nbytes(*tensors: Tensor) -> int:
    """The bytes of dense tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def check_memory(record: Any) -> None:
    """A tensor's storage may have been given back, which Triton would not see."""
    for name, x in record._asdict().items():
        if isinstance(x, Tensor) and not x.untyped_storage().nbytes() and x.numel():
            raise RuntimeError(f"attention: {name} must have its memory, got a storage of 0 bytes")


def check_rows(**tensors: Tensor) -> None:
    """Rows are walked by pointer: their last stride must be 1; and counted in 32 bits."""
    for name, x in tensors.items():
        if x.dim() != 4 or (x.shape[3] > 1 and x.stride(3) != 1):
            raise RuntimeError(
                f"attention: {name} must be 4-D with last stride 1, got strides {x.stride()}"
            )
        if x.shape[2] > MAX_ROWS:
            raise RuntimeError(
                f"attention: {name} must have at most {MAX_ROWS} rows, got {x.shape[2]}"
            )
