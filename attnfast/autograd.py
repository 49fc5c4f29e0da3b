"""Gradients of the fused backends: what is saved, first and second derivatives, what must raise.

A fused forward saves its inputs, ``out`` and ``lse`` (and the statistics, where they are returned):
memory linear in T and S. The backward is a Function of its own, whose derivative is taken through
the reference (second_order.py). Whatever else autograd could ask for raises.

Both Functions exist in two forms: with ctx in forward, which is cheap, and with setup_context,
which functorch's transforms need and which costs three times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import dispatch
from .checks import rows
from .options import Inputs, Options, Outputs
from .second_order import (
    PRIMALS,
    RESULTS,
    present,
    second_derivative_names,
    second_derivatives,
)


def fused_attention(backend: str, inputs: Inputs, options: Options, requires_grad: bool) -> Outputs:
    """Run a fused backend so that gradients, where any are wanted, are recorded.

    ``out``, ``lse``, ``weights`` and the entropy, ``stats[1]``, are differentiable; of the other
    statistics the gradient is ignored. What was not asked for is an empty tensor.
    """
    if transforms_active():
        return Outputs(*TransformedAttention.apply(backend, options, *inputs))
    if torch.compiler.is_compiling():
        inputs = distinct(inputs)
    if requires_grad:
        return Outputs(*AttentionFunction.apply(backend, options, *inputs))
    return Outputs(*call(dispatch.OPS[backend].fwd, *inputs, *options))


def distinct(inputs: Inputs) -> Inputs:
    """Inputs with a view in place of any tensor that came before, which Dynamo would reject."""
    tensors: list[Tensor | None] = []
    for x in inputs:
        seen = x is not None and any(x is other for other in tensors)
        tensors.append(x.view(x.shape) if x is not None and seen else x)
    return Inputs._make(tensors)


def transforms_active() -> bool:
    """Whether a functorch transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(op: Any, *args: Any) -> Any:
    """Call a raw operator, in eager mode past its Autograd kernel, which only guards gradients."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def no_jvp(ctx: Any, *tangents: Any) -> Any:
    """Refuse forward-mode derivatives."""
    raise NotImplementedError(
        "attention: forward-mode derivatives (jvp) are not implemented for the fused backends: use"
        " backend='reference'"
    )


def no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    """Refuse vmap, whose fallback would be a loop."""
    raise NotImplementedError(
        "attention: vmap is not implemented for the fused backends: make the mapped dimension part"
        " of B or H, or use backend='reference'"
    )


def attention_forward(backend: str, options: Options, *inputs: Tensor | None) -> Any:
    """(backend, options, *Inputs) -> Outputs, or out and lse if nothing else was asked for."""
    outputs = call(dispatch.OPS[backend].fwd, *inputs, *options)
    return outputs if options.stats or options.weights else outputs[:2]


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the backward of ``attention_forward`` needs."""
    backend, options, *tensors = inputs
    out, lse, *rest = output
    ctx.set_materialize_grads(False)
    if rest:
        stats, received, weights = rest
        constants = [received]
        if not options.stats:
            constants.append(stats)
        if not options.weights:
            constants.append(weights)
        ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(out, lse, stats if options.stats else None, *tensors)
    ctx.backend, ctx.options = backend, options


def attention_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of ``attention_forward``'s arguments from those of its results."""
    grad_out, grad_lse, grad_stats, _, grad_weights = (*grads, None, None, None)[:5]
    out, lse, stats, *tensors = ctx.saved_tensors
    inputs, options = Inputs(*tensors), ctx.options
    if grad_out is None and grad_lse is None and grad_stats is None and grad_weights is None:
        return (None,) * (2 + len(inputs))
    if not options.stats:  # torch.compile passes zeros of the empty tensor's shape
        grad_stats = None
    if not options.weights:
        grad_weights = None
    need_dbias, need_dsinks = ctx.needs_input_grad[6], ctx.needs_input_grad[8]
    args = (
        torch.zeros_like(out) if grad_out is None else rows(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        None if grad_stats is None else grad_stats[1].contiguous(),
        None if grad_weights is None else rows(grad_weights),
        out,
        lse,
        None if grad_stats is None else stats[1],
        need_dbias,
        need_dsinks,
        *inputs,
    )
    if torch.compiler.is_compiling():
        gradients = dispatch.OPS[ctx.backend].bwd(*args, *options)
    elif transforms_active():
        gradients = TransformedBackward.apply(ctx.backend, options, *args)
    elif torch.is_grad_enabled():
        gradients = AttentionBackward.apply(ctx.backend, options, *args)
    else:
        gradients = call(dispatch.OPS[ctx.backend].bwd, *args, *options)
    dq, dk, dv, dbias, dsinks = gradients
    return (
        *(None, None),
        *(dq, dk, dv, None, dbias if need_dbias else None, None, dsinks if need_dsinks else None),
        *(None, None, None, None),
    )


def backward_forward(backend: str, options: Options, *args: Any) -> Any:
    """(backend, options, arguments of the backward operator up to Inputs) -> Gradients."""
    return call(dispatch.OPS[backend].bwd, *args, *options)


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what second derivatives need: what backward was given, but no results of forward."""
    _, options, *tensors = inputs
    need_dbias, need_dsinks = tensors[7:9]
    ctx.set_materialize_grads(False)
    constants = []
    if not need_dbias:
        constants.append(output[3])
    if not need_dsinks:
        constants.append(output[4])
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(*tensors[:4], *tensors[9:])
    ctx.options = options


def second_backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of ``backward_forward``'s arguments from those of its results."""
    results: dict[str, Tensor] = {}
    if any(direction is not None for direction in directions):
        tensors = (*directions, *ctx.saved_tensors)
        names = second_derivative_names(*second_order_call(tensors)[:2])
        values = SecondDerivatives.apply(ctx.options, *tensors)
        results = dict(zip(names, values, strict=True))
    get = results.get
    return (
        *(None, None),
        *(get("grad_out"), get("grad_lse"), get("grad_entropy"), get("grad_weights")),
        *(None, None, None, None, None),
        *(get("q"), get("k"), get("v"), None, get("bias"), None, get("sinks")),
        *(None, None, None, None),
    )


def second_order_call(
    tensors: tuple[Tensor | None, ...],
) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """Directions, gradients and Inputs, in a row, as ``second_derivatives`` takes them."""
    inputs = Inputs(*tensors[9:])  # type: ignore[arg-type]
    return inputs, present(RESULTS, tensors[5:9]), present(PRIMALS, tensors[:5])


def second_forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """(options, directions, gradients, Inputs) -> the second derivatives that there are."""
    inputs, grads, toward = second_order_call(tensors)
    return tuple(second_derivatives(inputs, options, grads, toward).values())


def no_third(ctx: Any, *grads: Tensor) -> Any:
    """Refuse third derivatives."""
    raise NotImplementedError(
        "attention: third derivatives are not implemented for the fused backends: use"
        " backend='reference'"
    )


def with_saving(function: Any, save: Any) -> Any:
    """A forward with ctx, for eager mode, of a function and what saves its call."""

    def forward(ctx: Any, *args: Any) -> Any:
        results = function(*args)
        save(ctx, args, results)
        return results

    return staticmethod(forward)


class AttentionFunction(Function):
    """Attention in eager mode and under torch.compile."""

    forward = with_saving(attention_forward, save_attention)
    backward = staticmethod(attention_backward)


class TransformedAttention(Function):
    """Attention under functorch's transforms."""

    forward = staticmethod(attention_forward)
    setup_context = staticmethod(save_attention)
    backward = staticmethod(attention_backward)
    jvp = staticmethod(no_jvp)
    vmap = staticmethod(no_vmap)


class AttentionBackward(Function):
    """Attention's backward, where it is to be differentiated again."""

    forward = with_saving(backward_forward, save_backward)
    backward = staticmethod(second_backward)


class TransformedBackward(Function):
    """Attention's backward under functorch's transforms."""

    forward = staticmethod(backward_forward)
    setup_context = staticmethod(save_backward)
    backward = staticmethod(second_backward)
    jvp = staticmethod(no_jvp)
    vmap = staticmethod(no_vmap)


class SecondDerivatives(Function):
    """Second derivatives, with third ones that raise instead of being zero."""

    forward = staticmethod(second_forward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(no_third)
    jvp = staticmethod(no_jvp)
    vmap = staticmethod(no_vmap)
