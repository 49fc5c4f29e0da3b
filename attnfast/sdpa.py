"""``torch.nn.functional.scaled_dot_product_attention``, computed by attnfast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import checks
from . import requirements as require
from .functional import run
from .subclasses import is_causal_bias, overridden

FUNCTION = "scaled_dot_product_attention"
NAMES = ("query", "key", "value", "attn_mask", "attn_mask")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's function with torch's signature; a query that attends nothing gives zeros.

    Args:
        query: ``(..., H, L, E)``, any number of leading dimensions (none of them, or no heads,
            too); dtypes as for `attention`.
        key: ``(..., H | H_kv, S, E)``. Leading dimensions and heads broadcast as in torch.
        value: ``(..., H | H_kv, S, E_v)``.
        attn_mask: bool, True = attend, or float, to be added; broadcastable to ``(..., H, L, S)``;
            or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: dropout probability; applied whether or not anything trains, as in torch.
        is_causal: query t attends keys s <= t; not together with ``attn_mask``.
        scale: default ``E ** -0.5``.
        enable_gqa: allow fewer key and value heads than query heads, whose number they divide.

    Returns:
        ``(..., H, L, E_v)`` in query's dtype.

    Raises:
        TypeError: As `attention`.
        ValueError: As `attention`; also ``attn_mask`` with ``is_causal``, or head counts that need
            ``enable_gqa``.
    """
    if has_torch_function_variadic(query, key, value, attn_mask):
        result: Tensor = overridden(scaled_dot_product_attention, locals())
        if result is not NotImplemented:
            return result
    if is_causal is not False:
        require.flag(FUNCTION, "is_causal", is_causal, (True, False))
    if enable_gqa is not False:
        require.flag(FUNCTION, "enable_gqa", enable_gqa, (True, False))
    q, k, v, leading = canonical(query, key, value, enable_gqa)
    if attn_mask is not None and is_causal:
        raise ValueError(f"{FUNCTION}: attn_mask must be None with is_causal=True, got both")
    mask = bias = None
    if attn_mask is not None:
        if not is_causal_bias(attn_mask):
            attn_mask = flat_mask(attn_mask, q, leading)
        if attn_mask.dtype is torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    H, D_v = q.shape[1], v.shape[3]
    if 0 in (H, q.shape[3], D_v):
        q, k, v, mask, bias = without_empty_dims(q, k, v, mask, bias)
    inputs, options = checks.attention_call(
        FUNCTION,
        q,
        k,
        v,
        mask,
        bias,
        is_causal,
        None,
        "top_left",
        (scale, None),
        None,
        None,
        dropout_p,
        None,
        False,
        False,
        None,
        names=NAMES,
    )
    out: Tensor = run(FUNCTION, inputs, options, "auto", NAMES).out
    if out.shape[1] != H or out.shape[3] != D_v:
        out = out[:, :H, :, :D_v]
    if len(leading) == 1:
        return out
    rank = max(query.dim(), key.dim(), value.dim())
    return out[0, 0] if rank == 2 else out.reshape(*leading, *out.shape[1:])


def canonical(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(B, H, L, E), (B, H_kv, S, E) and (B, H_kv, S, E_v), and the given sizes before H."""
    given = q, k, v = query, key, value
    for name, x in zip(NAMES, given, strict=False):
        require.tensor(FUNCTION, name, x)
        if x.dim() < 2:
            require.fail(FUNCTION, name, "of 2 or more dimensions", tuple(x.shape))
    rank = max(3, q.dim(), k.dim(), v.dim())
    if not q.dim() == k.dim() == v.dim() == 4:
        for name, x in zip(NAMES, given, strict=False):
            require.memory(FUNCTION, name, x)  # torch, which makes views of it, would not name it
    if not q.dim() == k.dim() == v.dim() == rank:
        q, k, v = (x[(None,) * (rank - x.dim())] for x in given)
    q, k, v = same_heads(q, k, v, enable_gqa)
    leading = tuple(q.shape[:-3])
    if not leading == k.shape[:-3] == v.shape[:-3]:
        try:
            leading = tuple(torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v))))
        except RuntimeError:
            shapes = ", ".join(str(tuple(x.shape)) for x in given)
            what = "query, key and value"
            require.fail(FUNCTION, what, "of leading sizes that broadcast", shapes)
        q, k, v = (x.expand(*leading, *x.shape[-3:]) for x in (q, k, v))
    if rank == 3:
        return q[None], k[None], v[None], leading
    if rank > 4:
        q, k, v = (x.flatten(0, rank - 4) for x in (q, k, v))
    return q, k, v, leading


def without_empty_dims(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor | None) -> tuple[Any, ...]:
    """Tensors with one head, and one feature, of zeros where they have none: scores stay zero."""
    head = q.shape[1] == 0
    padded: list[Any] = [F.pad(x, (0, x.shape[3] == 0, 0, 0, 0, head)) for x in (q, k, v)]
    for x in masks:
        if x is not None and x.dim() > 2 and x.shape[-3] == 0:
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        padded.append(x)
    return tuple(padded)


def same_heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with H, H_kv and H_kv heads, repeated only where `attention` cannot share them."""
    H, H_k, H_v = q.shape[-3], k.shape[-3], v.shape[-3]
    if H == H_k == H_v:
        return q, k, v
    if H == 1 and not enable_gqa:
        H = max(H_k, H_v)
        q = q.expand(*q.shape[:-3], H, *q.shape[-2:])
    for name, heads in ((NAMES[1], H_k), (NAMES[2], H_v)):
        if enable_gqa and heads != H and (heads == 0 or H % heads):
            requirement = f"of a number of heads that divides query's, {H}"
            require.fail(FUNCTION, name, requirement, heads)
        if not enable_gqa and heads not in (1, H):
            requirement = f"of query's number of heads, {H} (or a divisor, with enable_gqa=True)"
            require.fail(FUNCTION, name, requirement, heads)
    if H_k != H_v:
        k, v = (x.repeat_interleave(H // max(x.shape[-3], 1), dim=-3) for x in (k, v))
    return q, k, v


def flat_mask(attn_mask: Tensor, q: Tensor, leading: tuple[int, ...]) -> Tensor:
    """attn_mask with its dimensions before H as one, expanded only where several of them differ."""
    require.on_device(FUNCTION, "attn_mask", attn_mask, q, "a Tensor or None")
    if attn_mask.dtype is not torch.bool and not attn_mask.is_floating_point():
        require.fail(FUNCTION, "attn_mask", "bool or float", attn_mask.dtype, TypeError)
    surplus = attn_mask.shape[:-3]
    if not surplus or len(leading) <= 1:
        return attn_mask
    require.memory(FUNCTION, "attn_mask", attn_mask)
    if all(size == 1 for size in surplus):
        return attn_mask.flatten(0, -4)
    try:
        return attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, len(leading) - 1)
    except RuntimeError:
        requirement = f"broadcastable to (..., H, L, S) with leading sizes {leading}"
        require.fail(FUNCTION, "attn_mask", requirement, tuple(attn_mask.shape))
