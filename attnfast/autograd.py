"""Gradients of the raw operators: what is saved, first and second derivatives, what must raise.

A fused forward saves its inputs, ``out`` and ``norm`` (and the statistics, where they are
returned): memory linear in T and S. The backward is an operator of its own, whose derivative is
taken through the reference (second_order.py). Whatever else autograd could ask for raises.

Each is a Function below the operator, in its Autograd kernel. So the operators that torch.compile
and torch.export find are differentiable by themselves, at every level of functorch's transforms. In
eager mode `fused_attention` goes to the Functions at once, which is cheaper.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import Function

from .call import (
    Gradients,
    Inputs,
    Options,
    Outputs,
    Upstream,
    backward_call,
    cut,
    forward_call,
)
from .checks import contiguous, dense_rows
from .second_order import (
    PRIMALS,
    ResultGradients,
    present,
    second_derivative_names,
    second_derivatives,
)
from .vmap import one_by_one


def fused_attention(ops: Any, inputs: Inputs, options: Options, requires_grad: bool) -> Outputs:
    """Run a backend's operators so that gradients, where any are wanted, are recorded.

    ``out``, ``lse``, ``weights`` and the entropy, ``stats[1]``, are differentiable; of the other
    statistics the gradient is ignored. What was not asked for is an empty tensor.
    """
    if requires_grad and not (torch.compiler.is_compiling() or transforms_active()):
        return Outputs(*AttentionFunction.apply(ops, options, *inputs))
    return Outputs(*call(ops.fwd, *inputs, *options))


def transforms_active() -> bool:
    """Whether a functorch transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(op: Any, *args: Any) -> Any:
    """Call a raw operator without gradients: past its Autograd kernel, unless others look on."""
    if torch.compiler.is_compiling() or transforms_active():
        return op(*args)
    return call_unwatched(op, args)


def call_unwatched(op: Any, args: tuple[Any, ...]) -> Any:
    """Call a raw operator below autograd, where no transform is under way."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except RuntimeError as error:
        if (known := operator_error(error)) is None:
            raise
        raise known from error


def call_below(op: Any, *args: Any) -> Any:
    """Call a raw operator from a Function: below autograd, at this level of a transform."""
    if not torch._C._are_functorch_transforms_active():
        return call_unwatched(op, args)
    below = torch._C._AutoDispatchBelowAutograd()  # other levels want what the Function disabled
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), below:
        return op(*args)


def operator_error(error: RuntimeError) -> RuntimeError | None:
    """What a native operator's error is to become; None if it is to stay as it is.

    A lack of a GPU's memory becomes torch's own error; what is said after a place in the source is
    said without the place.

    Where a signal's handler has interrupted the operator, Python raises what the handler raised as
    soon as it enters a function, which is this one.
    """
    if type(error) is RuntimeError and re.match(r"attnfast: no tensor.*out of memory", str(error)):
        return torch.OutOfMemoryError(str(error))
    said = re.search(r"csrc/\S+, ((?:decode_)?attention: .*)", str(error))
    return None if said is None or type(error) is not RuntimeError else RuntimeError(said[1])


def no_jvp(ctx: Any, *tangents: Any) -> Any:
    """Refuse forward-mode derivatives."""
    raise NotImplementedError(
        "attention: forward-mode derivatives (jvp) are not implemented for the fused backends: use"
        " backend='reference'"
    )


def attention_forward(ops: Any, options: Options, *inputs: Tensor | None) -> Any:
    """(operators, options, *Inputs) -> Outputs."""
    return call_below(ops.fwd, *inputs, *options)


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the backward of ``attention_forward`` needs."""
    ops, options, *tensors = inputs
    outputs = Outputs(*output)
    ctx.set_materialize_grads(False)
    constants = [outputs.norm, outputs.received]
    if not options.stats:
        constants.append(outputs.stats)
    if not options.weights:
        constants.append(outputs.weights)
    ctx.mark_non_differentiable(*constants)
    stats = outputs.stats if options.stats else None
    ctx.save_for_backward(outputs.out, outputs.norm, stats, *tensors)
    ctx.ops, ctx.options = ops, options


def attention_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of ``attention_forward``'s arguments from those of its results.

    Records are made by position: names would cost a microsecond each.
    """
    by_input: Any = Inputs
    to_out, to_lse, _, to_stats, _, to_weights = grads  # as in Outputs
    out, norm, stats, *tensors = ctx.saved_tensors
    if to_out is None and to_lse is None and to_stats is None and to_weights is None:
        return (None,) * len(ctx.needs_input_grad)
    _, _, *needed = ctx.needs_input_grad
    needs = by_input(*needed)
    upstream = Upstream(
        torch.zeros_like(out) if to_out is None else dense_rows(to_out),
        contiguous(to_lse),
        None if to_stats is None else to_stats[1].contiguous(),
        None if to_weights is None else dense_rows(to_weights),
        out,
        norm,
        None if to_stats is None else stats[1],
        needs.bias,
        needs.sinks,
    )
    args = (*upstream, *tensors, *ctx.options)
    gradients = ctx.ops.bwd(*args) if torch.is_grad_enabled() else call(ctx.ops.bwd, *args)
    dq, dk, dv, dbias, dsinks = gradients
    bias, sinks = dbias if needs.bias else None, dsinks if needs.sinks else None
    return None, None, *by_input(dq, dk, dv, None, bias, None, sinks)


def backward_forward(ops: Any, options: Options, *args: Any) -> Any:
    """(operators, options, *Upstream, *Inputs) -> Gradients."""
    return call_below(ops.bwd, *args, *options)


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what second derivatives need: what backward was given, but no results of forward."""
    _, options, *args = inputs
    upstream, tensors = cut(args, Upstream, Inputs)
    gradients = Gradients(*output)
    ctx.set_materialize_grads(False)
    constants = []
    if not upstream.need_dbias:
        constants.append(gradients.dbias)
    if not upstream.need_dsinks:
        constants.append(gradients.dsinks)
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(*given_gradients(upstream), *tensors)
    ctx.options = options


def given_gradients(upstream: Upstream) -> ResultGradients:
    """The part of Upstream by which second derivatives are taken."""
    return ResultGradients(*(getattr(upstream, f"grad_{name}") for name in ResultGradients._fields))


def second_backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of ``backward_forward``'s arguments from those of its results."""
    results: dict[str, Tensor] = {}
    if any(direction is not None for direction in directions):
        tensors = (*directions, *ctx.saved_tensors)
        names = second_derivative_names(*second_order_call(tensors)[:2])
        values = SecondDerivatives.apply(ctx.options, *tensors)
        results = dict(zip(names, values, strict=True))
    fields = (*Upstream._fields, *Inputs._fields)
    return None, None, *(results.get(name) for name in fields)


def second_order_call(
    tensors: tuple[Tensor | None, ...],
) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
    """Directions, gradients and Inputs, in a row, as ``second_derivatives`` takes them."""
    toward, grads, inputs = cut(tensors, Gradients, ResultGradients, Inputs)
    return inputs, present(grads._fields, grads), present(PRIMALS, toward)


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
    """The forward of a Function: ``function``, and what saves its call."""

    def forward(ctx: Any, *args: Any) -> Any:
        results = function(*args)
        save(ctx, args, results)
        return results

    return staticmethod(forward)


class AttentionFunction(Function):
    """Attention."""

    forward = with_saving(attention_forward, save_attention)
    backward = staticmethod(attention_backward)
    jvp = staticmethod(no_jvp)


class AttentionBackward(Function):
    """Attention's backward."""

    forward = with_saving(backward_forward, save_backward)
    backward = staticmethod(second_backward)
    jvp = staticmethod(no_jvp)


class SecondDerivatives(Function):
    """Second derivatives, with third ones that raise instead of being zero."""

    forward = staticmethod(second_forward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(no_third)
    jvp = staticmethod(no_jvp)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Mapped calls, one by one."""
        return one_by_one(SecondDerivatives.apply, info, in_dims, *args)


def fwd_kernel(ops: Any) -> Callable[..., Any]:
    """The Autograd kernel of ``NAME_fwd``."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if not is_recorded(args):
            return redispatch(ops.fwd, keyset, args)
        inputs, options = forward_call(args)
        if is_differentiated(inputs.alibi_slopes):
            refuse(ops.fwd, "alibi_slopes has no gradient: detach it (a bias has one)")
        return record(AttentionFunction, ops, options, *inputs)

    return kernel


def bwd_kernel(ops: Any) -> Callable[..., Any]:
    """The Autograd kernel of ``NAME_bwd``.

    Second derivatives are computed from the inputs alone: through ``out`` and ``entropy`` too, as
    long as these are results of the forward operator for the same inputs.
    """

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if not is_recorded(args):
            return redispatch(ops.bwd, keyset, args)
        upstream, inputs, options = backward_call(args)
        if is_differentiated(upstream.norm) or is_differentiated(inputs.alibi_slopes):
            refuse(ops.bwd, "norm and alibi_slopes have no gradient: detach them")
        primals = (inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sinks)
        for x in (upstream.out, upstream.entropy):
            if x is None or not is_differentiated(x):
                continue
            if x.is_leaf or not any(map(is_differentiated, primals)):
                refuse(ops.bwd, "out and entropy have none apart from the inputs': detach them")
        return record(AttentionBackward, ops, options, *upstream, *inputs)

    return kernel


def refusing_kernel(op: Any) -> Callable[..., Any]:
    """The Autograd kernel of an operator without gradients."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if is_recorded(args) and any(map(is_differentiated, args)):
            refuse(op, "the operator has no gradient: detach its inputs, or use torch.no_grad()")
        return redispatch(op, keyset, args)

    return kernel


def redispatch(op: Any, keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
    """Go on from an operator's Autograd kernel to its backend's own."""
    try:
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    except RuntimeError as error:
        if (known := operator_error(error)) is None:
            raise
        raise known from error


def is_recorded(args: tuple[Any, ...]) -> bool:
    """Whether a call of an operator with these arguments is one that a derivative may need."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def is_differentiated(x: Any) -> bool:
    """Whether x is a tensor by which a result is to be differentiated."""
    if not isinstance(x, Tensor):
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def refuse(op: Any, why: str) -> NoReturn:
    """Raise for a derivative that would be lost."""
    raise NotImplementedError(f"{op.name()}: a derivative is wanted, but {why}")


def record(function: Any, *args: Any) -> Any:
    """Apply a Function; inside a functorch transform, at the level whose turn it is."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return super(Function, function).apply(*args)
