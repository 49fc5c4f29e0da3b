"""The Triton backend's operators: the schemas of ``attnfast.ops``, from tensors to launches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from attnfast import checks
from attnfast.options import Inputs, Options
from attnfast.requirements import checks_values

from . import backward as gradients
from . import bias_gradients, configs, forward, launch, weights
from .arguments import MAX_ROWS, gather
from .decode import attention_decode

RESULTS = ("grad_out", "grad_lse", "grad_entropy", "grad_weights", "out", "lse", "entropy")

if launch.INTERPRETED:
    from . import interpreter

    interpreter.mend()


def fwd(*args: Any) -> tuple[Tensor, ...]:
    """``triton_fwd``: ``Inputs``, then ``Options``; returns ``Outputs``."""
    inputs, options = Inputs(*args[:11]), Options(*args[11:])
    check_memory(Inputs._fields, inputs)
    check_rows(q=inputs.q, k=inputs.k, v=inputs.v)
    if checks_values() and inputs.cu_seqlens_q is not None:
        checks.sequence_values("varlen_attention", inputs, options)
    arch = configs.architecture(inputs.q.device)
    call = gather(inputs, options, configs.l2_bytes(arch))
    out, lse, norm, stats, *_ = forward.attention_fwd(inputs, options, call, arch)
    if stats is None:
        stats = lse.new_empty(0)
    received = lse.new_empty(0)  # no result may be another's memory, not even of nothing
    if options.stats == 2:
        received = weights.received_fwd(inputs, options, call, norm, arch)
    probabilities = inputs.q.new_empty(0)
    if options.weights:
        probabilities = weights.weights_fwd(options, call, norm, arch)
    return out, lse, norm, stats, received, probabilities


def gluon_fwd(*args: Any) -> tuple[Tensor, ...]:
    """``gluon_fwd``: out, lse and norm by the forward for Hopper."""
    from . import gluon_forward

    inputs, options = Inputs(*args[:11]), Options(*args[11:])
    check_memory(Inputs._fields, inputs)
    check_rows(q=inputs.q, k=inputs.k, v=inputs.v)
    call = gather(inputs, options, configs.l2_bytes("sm_90"))
    reason = gluon_forward.unsupported(call)
    if reason is not None:
        raise RuntimeError(f"attention: the gluon backend {reason}")
    to = forward.results(inputs, options)
    gluon_forward.give_scratch()
    launch.launch(gluon_forward.hopper_launch(call, to))
    stats, received = to.lse.new_empty(0), to.lse.new_empty(0)
    return to.out, to.lse, to.norm, stats, received, inputs.q.new_empty(0)


def bwd(*args: Any) -> tuple[Tensor, ...]:
    """``triton_bwd``: gradients and results of the forward, then its arguments; ``Gradients``."""
    grad_out, grad_lse, grad_entropy, grad_weights, out, norm, entropy = args[:7]
    need_dbias, need_dsinks = args[7:9]
    inputs, options = Inputs(*args[9:20]), Options(*args[20:])
    check_memory(Inputs._fields, inputs)
    check_memory(RESULTS, args[:7])
    check_rows(q=inputs.q, k=inputs.k, v=inputs.v, out=out)
    if grad_out.shape[3] > 1 and grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    grad_lse, grad_entropy, entropy, norm = (
        None if x is None else x.contiguous() for x in (grad_lse, grad_entropy, entropy, norm)
    )
    arch = configs.architecture(inputs.q.device)
    call = gather(inputs, options, configs.l2_bytes(arch), grad_out, out)
    given = gradients.given(
        grad_out,
        grad_lse,
        grad_entropy,
        grad_weights,
        out,
        norm,
        entropy,
        inputs.cu_seqlens_q is not None,
    )
    to = gradients.attention_bwd(inputs, call, given, arch)
    dbias, dsinks = inputs.q.new_empty(0), inputs.q.new_empty(0)
    if need_dbias:
        dbias = bias_gradients.bias_gradient(call, given, arch)
    if need_dsinks:
        dsinks = bias_gradients.sink_gradient(call, given, arch)
    return to.dq, to.dk, to.dv, dbias, dsinks


def decode(*args: Any) -> tuple[Tensor, Tensor]:
    """``triton_decode``."""
    q, k_cache, v_cache, *_ = args
    check_memory(checks.DecodeInputs._fields, args[:8])
    check_rows(q=q, k_cache=k_cache, v_cache=v_cache)
    if checks_values():
        checks.cache_values("decode_attention", checks.DecodeInputs(*args[:8]))
    return attention_decode(*args, arch=configs.architecture(q.device))


def check_memory(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """A tensor's storage may have been given back, which Triton would not see."""
    for name, x in zip(names, tensors, strict=True):
        if x is not None and not x.untyped_storage().nbytes() and x.numel():
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
