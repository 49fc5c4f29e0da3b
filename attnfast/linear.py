"""Linear projections: ``torch.nn.functional.linear``, by oneDNN where torch's BLAS is slow.

MKL, the BLAS of torch's x86 builds, does not use AVX-512 on AMD processors; oneDNN, which the same
builds hold for other purposes, does: on a Zen 5, 2 threads, 2048 rows from 384 to 1152 features in
fp32 take 4.0 ms instead of 8.2. Everything else goes to torch's own function: other dtypes, devices
and processors, small products, autocast, torch.compile, functorch's transforms, tracing, dispatch
modes and tensor subclasses.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# Multiply-adds from which oneDNN saves more than its preparations cost; with gradients, also those
# of a Function in Python.
WORTH_IT = 1 << 22
WORTH_IT_WITH_GRADIENTS = 1 << 23


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: what ``torch.nn.functional.linear`` gives, up to rounding.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``, or None.

    Returns:
        ``(..., N)``, with derivatives of every order.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return F.linear(x, weight, bias)
    with_gradients = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    work = x.numel() * weight.shape[0]
    worth_it = work >= (WORTH_IT_WITH_GRADIENTS if with_gradients else WORTH_IT)
    if not (worth_it and _mkl_is_slow() and _onednn_takes(x, weight, bias)):
        return F.linear(x, weight, bias)
    if with_gradients:
        y: Tensor = _Linear.apply(x, weight, bias)
        return y
    return _onednn(x, weight, bias)


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
    """oneDNN's product with gradients, themselves products of `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

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


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def _onednn_takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN may compute a product, and nobody watches for torch's own function."""
    return (
        _is_plain(x)
        and _is_plain(weight)
        and (bias is None or _is_plain(bias))
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
        type(x) in (Tensor, nn.Parameter)
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.layout is torch.strided
    )


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch's fp32 products leave AVX-512 unused that oneDNN would use."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_f")) and "AMD" in str(capabilities.get("cpu_name"))
