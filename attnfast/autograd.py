"""Gradients of the fused backends: what is saved, first and second derivatives, what must raise.

A fused forward saves its inputs, ``out`` and ``lse`` (and the entropy, where statistics are returned):
memory linear in T and S. The backward is a Function of its own whose derivative is taken through the
reference, block of rows by block of rows. Everything else that autograd could ask for raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import dispatch
from .options import Inputs, Options, Outputs
from .second_order import present, second_derivatives


def fused_attention(backend: str, inputs: Inputs, options: Options, requires_grad: bool) -> Outputs:
    """Run a fused backend so that gradients, where any are wanted, are recorded.

    ``lse``, the entropy in ``stats``, and ``weights`` are differentiable; ``received`` and the other
    statistics are not. What was not asked for is an empty tensor.
    """
    if torch._C._are_functorch_transforms_active():
        return Outputs(*TransformedAttention.apply(backend, options, *inputs))
    if requires_grad or forward_ad._current_level >= 0:
        return Outputs(*AttentionFunction.apply(backend, options, *inputs))
    return Outputs(*call(dispatch.OPS[backend].fwd, *inputs, *options))


def call(op: Any, *args: Any) -> Any:
    """Call a raw operator, in eager mode past its Autograd kernel, which only guards gradients."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class AttentionFunction(Function):
    """apply(backend, options, *Inputs) -> Outputs."""

    @staticmethod
    def forward(ctx: Any, backend: str, options: Options, *inputs: Tensor | None) -> Any:
        outputs = call(dispatch.OPS[backend].fwd, *inputs, *options)
        save_attention(ctx, (backend, options, *inputs), outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return attention_backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("attention: forward-mode derivatives (jvp) are not implemented")


class TransformedAttention(Function):
    """The same in the form that functorch needs, and that costs three times as much per call."""

    @staticmethod
    def forward(backend: str, options: Options, *inputs: Tensor | None) -> Any:
        return call(dispatch.OPS[backend].fwd, *inputs, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save_attention(ctx, inputs, output)

    backward = AttentionFunction.backward
    jvp = AttentionFunction.jvp

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "attention: vmap is not implemented for the fused backends: put the mapped dimension into B"
            " or H, or use backend='reference'"
        )


def save_attention(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keep for backward what it needs of a forward call."""
    backend, options, *inputs = args
    out, lse, stats, received, weights = outputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(
        received,
        *(() if options.stats else (stats,)),
        *(() if options.weights else (weights,)),
    )
    ctx.save_for_backward(out, lse, stats if options.stats else None, *inputs)
    ctx.backend, ctx.options = backend, options


def attention_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of (backend, options, *Inputs) from those of ``Outputs``."""
    grad_out, grad_lse, grad_stats, _, grad_weights = grads
    out, lse, stats, *tensors = ctx.saved_tensors
    nothing = (None,) * (2 + len(tensors))
    if grad_out is None and grad_lse is None and grad_stats is None and grad_weights is None:
        return nothing
    inputs = Inputs(*tensors)
    needs = ctx.needs_input_grad[2:]
    args = (
        torch.zeros_like(out) if grad_out is None else dense_rows(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        None if grad_stats is None else grad_stats[1].contiguous(),
        None if grad_weights is None else dense_rows(grad_weights),
        out.detach(),
        lse.detach(),
        None if grad_stats is None else stats.detach()[1],
        inputs.bias is not None and needs[4],
        inputs.sinks is not None and needs[6],
        *inputs,
    )
    if torch.compiler.is_compiling():
        gradients = dispatch.OPS[ctx.backend].bwd(*args, *ctx.options)
    elif torch._C._are_functorch_transforms_active():
        gradients = TransformedBackward.apply(ctx.backend, ctx.options, *args)
    elif torch.is_grad_enabled():
        gradients = AttentionBackward.apply(ctx.backend, ctx.options, *args)
    else:
        gradients = call(dispatch.OPS[ctx.backend].bwd, *args, *ctx.options)
    dq, dk, dv, dbias, dsinks = gradients
    return (
        None,
        None,
        dq,
        dk,
        dv,
        None,
        dbias if inputs.bias is not None and needs[4] else None,
        None,
        dsinks if inputs.sinks is not None and needs[6] else None,
        None,
        None,
        None,
        None,
    )


def dense_rows(x: Tensor) -> Tensor:
    """x with stride 1 in its last dimension, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


class AttentionBackward(Function):
    """apply(backend, options, *args of the backward operator up to Inputs) -> Gradients."""

    @staticmethod
    def forward(ctx: Any, backend: str, options: Options, *args: Any) -> Any:
        gradients = call(dispatch.OPS[backend].bwd, *args, *options)
        save_backward(ctx, (backend, options, *args), gradients)
        return gradients

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        return second_backward(ctx, *directions)

    jvp = AttentionFunction.jvp


class TransformedBackward(Function):
    """The same in the form that functorch needs."""

    @staticmethod
    def forward(backend: str, options: Options, *args: Any) -> Any:
        return call(dispatch.OPS[backend].bwd, *args, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save_backward(ctx, inputs, output)

    backward = AttentionBackward.backward
    jvp = AttentionFunction.jvp
    vmap = TransformedAttention.vmap


def save_backward(ctx: Any, args: tuple[Any, ...], gradients: tuple[Tensor, ...]) -> None:
    """Keep what second derivatives need of a backward call: its inputs, not the results of forward."""
    _, options, *tensors = args
    need_dbias, need_dsinks = tensors[7:9]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(
        *(() if need_dbias else (gradients[3],)), *(() if need_dsinks else (gradients[4],))
    )
    ctx.save_for_backward(*tensors[:4], *tensors[9:])
    ctx.options = options


def second_backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of (backend, options, *args) of ``AttentionBackward`` from those of ``Gradients``."""
    tensors = ctx.saved_tensors
    inputs = Inputs(*tensors[4:])
    grads = present(("out", "lse", "entropy", "weights"), tensors[:4])
    toward = present(("q", "k", "v", "bias", "sinks"), directions)
    results = second_derivatives(inputs, ctx.options, grads, toward)
    if torch.is_grad_enabled() and results:
        sources = [x for x in (*tensors, *directions) if x is not None]
        values = SecondDerivatives.apply(len(results), *results.values(), *sources)
        results = dict(zip(results, values, strict=True))
    get = results.get
    return (
        *(None, None),
        *(get("grad_out"), get("grad_lse"), get("grad_entropy"), get("grad_weights")),
        *(None, None, None, None, None),
        *(get("q"), get("k"), get("v"), None, get("bias"), None, get("sinks")),
        *(None, None, None, None),
    )


class SecondDerivatives(Function):
    """apply(n, *results, *sources): the n results, whose derivatives by the sources must raise."""

    @staticmethod
    def forward(n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "attention: third derivatives are not implemented for the fused backends: use"
            " backend='reference'"
        )

    jvp = AttentionFunction.jvp
    vmap = TransformedAttention.vmap
