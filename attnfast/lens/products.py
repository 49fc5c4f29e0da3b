"""Products of the attention matrix and its transpose with other matrices.

``P x`` is the forward with x in the place of the values, ``P^T y`` the values' gradient: the
matrix is never stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..call import Inputs, Options
from ..requirements import choice, fail
from .calls import canonical

COLUMNS = 256  # of x or y in one call
HEADS = {"each": 0, "mean": 1}


def apply(q: Tensor, k: Tensor, x: Tensor, *, heads: str = "each", **options: Any) -> Tensor:
    """The attention matrix times x, ``P x``, in linear memory; differentiable.

    Args:
        q: ``(B, H, T, D)``, see `attnfast.attention`; packed ``(total_q, H, D)`` with
            ``cu_seqlens_q`` and its like, see `attnfast.varlen_attention`.
        k: ``(B, H_kv, S, D)``, or ``(total_k, H_kv, D)``.
        x: ``(B, S, C)``, the same for all heads, or ``(B, H_kv, S, C)``; packed ``(total_k, C)`` or
            ``(total_k, H_kv, C)``. Any floating dtype: q, k and x are brought to the wider one.
        heads: "each", or "mean" for the product with the mean of the heads' matrices.
        options: mask, bias, causal, window, align, scale, softcap, alibi_slopes, sinks, backend,
            as `attnfast.attention` has them.

    Returns:
        ``(B, H, T, C)``, or ``(B, T, C)``; packed ``(total_q, H, C)`` or ``(total_q, C)``.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    head = -2 if is_packed(options) else -3
    q, k, x = widest("apply", q, k, x, "x")
    if x.dim() == k.dim() - 1:
        x = x.unsqueeze(head).expand(*k.shape[:-1], x.shape[-1])
    mean = choice("apply", "heads", heads, HEADS)
    inputs, call, backend = canonical("apply", q, k, x, options, NAMES_X)
    parts = [
        functional.run("apply", inputs._replace(v=part), call, backend, NAMES_X).out
        for part in inputs.v.split(COLUMNS, 3)
    ]
    return results(torch.cat(parts, 3), options, mean)


def apply_transposed(
    q: Tensor, k: Tensor, y: Tensor, *, heads: str = "each", **options: Any
) -> Tensor:
    """The transposed attention matrix times y, ``P^T y``, in linear memory; no gradients.

    With ones for y it is what every key receives. The backward's kernels compute it, with the
    gradients of q and k, which are dropped.

    Args:
        q: ``(B, H, T, D)``, or packed, see `apply`.
        k: ``(B, H_kv, S, D)``, or ``(total_k, H_kv, D)``.
        y: ``(B, T, C)``, the same for all heads, or ``(B, H, T, C)``; packed ``(total_q, C)`` or
            ``(total_q, H, C)``. Any floating dtype: q, k and y are brought to the wider one.
        heads: "each", or "mean" for the mean of the heads' products.
        options: see `apply`.

    Returns:
        ``(B, H, S, C)``, or ``(B, S, C)``; packed ``(total_k, H, C)`` or ``(total_k, C)``.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    q, k, y = (x.detach() if isinstance(x, Tensor) else x for x in (q, k, y))
    q, k, y = widest("apply_transposed", q, k, y, "y")
    head = -2 if is_packed(options) else -3
    if y.dim() == q.dim() - 1:
        y = y.unsqueeze(head).expand(*q.shape[:-1], y.shape[-1])
    if y.shape[:-1] != q.shape[:-1]:
        shape = f"of q's shape but the last dimension, {tuple(q.shape[:-1])}, with heads or without"
        fail("apply_transposed", "y", shape, tuple(y.shape))
    mean = choice("apply_transposed", "heads", heads, HEADS)
    H, H_kv = q.shape[head], k.shape[head] if k.dim() == q.dim() else 0
    if not mean and 0 < H_kv < H and H % H_kv == 0:  # values of its own for each head
        k = k.repeat_interleave(H // H_kv, head)
    values = k[..., :1].new_zeros(()).expand(*k.shape[:-1], 1)
    inputs, call, backend = canonical("apply_transposed", q, k, values, options)
    if is_packed(options):
        y = y.transpose(0, 1)[None]
    total = transposed("apply_transposed", inputs, call, backend, y)
    return results(total if not mean else total.sum(1, keepdim=True) / H, options, mean)


def transposed(function: str, inputs: Inputs, options: Options, backend: str, y: Tensor) -> Tensor:
    """``P^T y`` (B, H_kv, S, C) of y (B, H, T, C), added up over the heads that share keys."""
    inputs, parts = detached(inputs), []
    for part in y.split(COLUMNS, 3):
        zeros = part.new_zeros((*inputs.k.shape[:3], part.shape[3]))
        with torch.enable_grad():
            zeros.requires_grad_()
            out = functional.run(function, inputs._replace(v=zeros), options, backend).out
            parts += torch.autograd.grad(out, zeros, part)
    return torch.cat(parts, 3)


NAMES_X = ("q", "k", "x", "mask", "bias")


def widest(function: str, q: Any, k: Any, x: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """All three in the widest of their dtypes."""
    for given, tensor in (("q", q), ("k", k), (name, x)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            fail(function, given, "a floating-point torch.Tensor", got, TypeError)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), x.dtype)
    return q.to(dtype), k.to(dtype), x.to(dtype)


def is_packed(options: dict[str, Any]) -> bool:
    """Whether a call has sequences."""
    return options.get("cu_seqlens_q") is not None


def detached(inputs: Inputs) -> Inputs:
    """The same tensors without a graph."""
    return Inputs(*(None if x is None else x.detach() for x in inputs))  # type: ignore[arg-type]


def results(x: Tensor, options: dict[str, Any], mean: int) -> Tensor:
    """(B, H, rows, C) as the caller has it: averaged, packed."""
    if mean:
        x = x.mean(1)
        return x[0] if is_packed(options) else x
    return x[0].transpose(0, 1) if is_packed(options) else x
