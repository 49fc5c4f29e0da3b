"""Linear projections: ``torch.nn.functional.linear``, but not where torch's is slow on a CPU.

MKL, the BLAS of torch's x86 builds, does not use AVX-512 on AMD processors; oneDNN, which the same
builds hold for other purposes, does: on a Zen 5, 2 threads, 2048 rows from 384 to 1152 features in
fp32 take 4.0 ms instead of 8.2. Where a processor has no instructions for bf16 or fp16 that oneDNN
knows, torch multiplies these in plain loops; fp32 products of converted operands, rounded once at
the end, are exact to more digits and many times faster. Without gradients bf16 goes to oneDNN with
its bias, and its activation, in one operator. Everything else goes to torch's own function: other
dtypes, devices and processors, small products, autocast, torch.compile, functorch's
transforms, tracing, dispatch modes and tensor subclasses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..backends import HALF

# Multiply-adds from which oneDNN saves more than its preparations cost; with gradients, also those
# of a Function in Python.
WORTH_IT = 1 << 22
WORTH_IT_WITH_GRADIENTS = 1 << 23
WORTH_CONVERTING = 1 << 16  # the same for products of bf16 and fp16
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``x @ weight.T + bias``: what ``torch.nn.functional.linear`` gives, up to rounding.

    Args:
        x: ``(..., K)``, or a jagged nested ``(B, *, K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``, or None.
        activation: "relu" or "gelu" of the result, or "none".

    Returns:
        ``(..., N)``, with derivatives of every order.
    """
    activate = ACTIVATIONS[activation]
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return activate(F.linear(x, weight, bias))
    if type(x) is NestedTensor and x._ragged_idx == 1 and x.lengths() is None:
        return _jagged(x, weight, bias, activation)
    with_gradients = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if x.dtype in HALF:
        least = WORTH_CONVERTING
    else:
        least = WORTH_IT_WITH_GRADIENTS if with_gradients else WORTH_IT
    worth_it = x.numel() * weight.shape[0] >= least
    if not (worth_it and _torch_is_slow(x.dtype, with_gradients) and _takes(x, weight, bias)):
        return activate(F.linear(x, weight, bias))
    if with_gradients:
        return activate(_Linear.apply(x, weight, bias))
    return _product(x, weight, bias, activation)


def _jagged(x: Any, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`linear` of the rows of all sequences."""
    return torch.nested.nested_tensor_from_jagged(
        linear(x.values(), weight, bias, activation),
        x.offsets(),
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )


class ProjectionLinear(NonDynamicallyQuantizableLinear):
    """The class of ``out_proj`` in our MultiheadAttention: torch's, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Project ``(..., in_features)`` to ``(..., out_features)``."""
        return linear(input, self.weight, self.bias)


def use_projection_linear(module: Any) -> None:
    """Make a layer of exactly torch's class for ``out_proj`` a `ProjectionLinear`."""
    if type(module) is NonDynamicallyQuantizableLinear and "forward" not in vars(module):
        module.__class__ = ProjectionLinear


def use_torch_linear(module: Any) -> None:
    """Undo `use_projection_linear`."""
    kind: type = type(module)
    if kind is ProjectionLinear:
        module.__class__ = NonDynamicallyQuantizableLinear


class _Linear(Function):
    """`_product` with gradients, themselves products of `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, (need_x, need_weight, need_bias) = grads[0], ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (M, N)
        return (
            linear(grad, weight.t(), None) if need_x else None,
            linear(rows.t(), x.flatten(0, -2).t(), None) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """The product where `_torch_is_slow`."""
    if x.dtype in HALF and _half_is_slow(x.dtype):
        return ACTIVATIONS[activation](_in_fp32(x, weight, bias))
    return _onednn(x, weight, bias, activation)


def _in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    exact = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), exact).to(x.dtype)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    gelu = "none" if activation == "gelu" else ""  # not the one by tanh
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], gelu)
    return y


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product is a plain one, and nobody watches for torch's own function."""
    return (
        _is_plain(x)
        and _is_plain(weight)
        and (bias is None or _is_plain(bias))
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == x.dtype)
        and x.dim() > 1
        and x.numel() > 0
        and weight.numel() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and bool(torch.backends.mkldnn.enabled)
        and not torch._C._is_any_autocast_enabled()
        and not is_watched()
    )


def is_watched() -> bool:
    """Whether functorch, a dispatch mode, forward-mode derivatives, the compiler or a tracer look.

    They are to see the operators that they know.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
    )


def _is_plain(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.layout is torch.strided
    )


def _torch_is_slow(dtype: torch.dtype, with_gradients: bool) -> bool:
    """Whether torch's own products of a dtype leave the processor's best unused."""
    if dtype is torch.float32:
        return _mkl_is_slow()
    if dtype is torch.bfloat16 and not with_gradients and _has_onednn():
        return True
    return dtype in HALF and _half_is_slow(dtype)


@functools.cache
def _half_is_slow(dtype: torch.dtype) -> bool:
    """Whether oneDNN has no instructions here for bf16 or fp16, so that torch loops by itself."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False  # another BLAS: not measured
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: True)
    return not supported()


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch's fp32 products leave AVX-512 unused that oneDNN would use."""
    if not _has_onednn():
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_f")) and "AMD" in str(capabilities.get("cpu_name"))


@functools.cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's products beside MKL's: of other builds nothing was measured."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and hasattr(torch.ops.mkldnn, "_linear_pointwise")
