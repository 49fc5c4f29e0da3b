"""A layer's self-attention in one operator, and its backward in another.

Of a small layer's time most is spent on the way: arguments checked, a dozen views made, three
gradients joined. Where a `MultiheadAttention` uses none of its extras and nobody watches, it calls
one operator instead that takes the packed projection and gives the merged heads, bit for bit what
the long way gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from .. import backends, dispatch, ops, watching
from ..autograd import call, call_unwatched
from ..backends import cpu
from ..call import Inputs, Options, Upstream
from ..checks import WEIGHTS, dense_rows
from ..requirements import DTYPES
from .extras import NO_DROPOUT, appended_keys, is_plain
from .inputs import split_masks
from .linear import is_watched, linear


def takes(module: Any, asked: dict[str, Any], weight: Tensor | None, query: Tensor) -> bool:
    """Whether self-attention of a checked query may go the short way."""
    return (
        not watching.now
        and not torch.compiler.is_compiling()
        and is_plain(asked, "dropout_p")
        and type(query) is Tensor
        and query.is_cpu
        and query.dim() == 3
        and query.dtype in backends.FUSED_DTYPES
        and weight is not None
        and weight.shape[0] == 3 * module.embed_dim
        and module.embed_dim % module.num_heads == 0
        and _is_probability(asked["dropout_p"])
        and not appended_keys(module)
        and dispatch.requested(module.backend)[0] in ("auto", "cpu")
        and cpu.MISSING is None
        and not is_watched()
    )


def self_attention(
    module: Any,
    weight: Tensor,
    query: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    causal: bool,
    return_weights: bool | str,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None] | None:
    """What the layer returns for ``query`` as query, key and value, where `takes` says yes.

    Args:
        module: the layer.
        weight: its ``in_proj_weight``.
        query: ``(B, T, E)`` with ``batch_first``, else ``(T, B, E)``.
        key_padding_mask: see `MultiheadAttention.forward`.
        attn_mask: see `MultiheadAttention.forward`.
        causal: query t attends keys up to t.
        return_weights: see `attention`.
        dropout_p: see `attention`.

    Returns:
        The output and the weights; None where the long way has to decide what is wrong, or to
        differentiate a bias.
    """
    mask = bias = seed = None
    if attn_mask is not None or key_padding_mask is not None:
        batch, length = query.shape[:2] if module.batch_first else query.shape[1::-1]
        sizes = (batch, module.num_heads, length, length)
        masks = (attn_mask, key_padding_mask)
        mask, bias = (_as_4d(x) for x in split_masks(*masks, sizes, query.device))
        if not (_is_plain_tensor(mask) and _is_plain_tensor(bias)):
            return None
        if bias is not None and bias.dtype not in DTYPES:
            return None
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
    packed = linear(query, weight, module.in_proj_bias)
    if packed.dtype not in backends.FUSED_DTYPES or not packed.is_contiguous():
        return None
    if dropout_p > 0:
        seed = torch.randint(1 << 32, (2,), dtype=torch.int64)
    heads, weights = module.num_heads, WEIGHTS[return_weights]
    args = (packed, heads, module.batch_first, mask, bias, causal, dropout_p, seed, weights)
    if packed.requires_grad and torch.is_grad_enabled():
        out, probabilities = _SelfAttention.apply(*args)
    else:
        out, _, probabilities = call_unwatched(ops.SELF_ATTENTION, args)
    return module.out_proj(out), probabilities if return_weights else None


class _SelfAttention(Function):
    """The operator's arguments -> merged heads and weights."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        out, norm, weights = call_unwatched(ops.SELF_ATTENTION, args)
        packed, heads, batch_first, mask, bias, causal, dropout_p, seed, mode = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, norm, packed, mask, bias, seed)
        ctx.options = heads, batch_first, causal, dropout_p, mode
        return out, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        to_out, to_weights = grads
        out, norm, packed, mask, bias, seed = ctx.saved_tensors
        heads, batch_first, causal, dropout_p, _ = ctx.options
        if to_out is None and to_weights is None:
            gradient = None
        elif to_out is None or to_weights is not None or torch.is_grad_enabled() or is_watched():
            gradient = _by_views(ctx, to_out, to_weights)
        else:
            layer = (packed, heads, batch_first, mask, bias, causal, dropout_p, seed)
            args = (dense_rows(to_out), out, norm, *layer)
            gradient = call_unwatched(ops.SELF_ATTENTION_BWD, args)
        return gradient, *(None,) * 8


def _by_views(ctx: Any, to_out: Tensor | None, to_weights: Tensor | None) -> Tensor:
    """The gradient of packed, by the operator that has derivatives and that others know."""
    out, norm, packed, mask, bias, seed = ctx.saved_tensors
    heads, batch_first, causal, dropout_p, mode = ctx.options

    def apart(x: Tensor) -> Tensor:  # (B, H, T, D)
        x = x.unflatten(-1, (heads, -1))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def merged(x: Tensor) -> Tensor:
        return (x.transpose(1, 2) if batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    upstream = Upstream.plain(
        apart(torch.zeros_like(out) if to_out is None else dense_rows(to_out)), apart(out), norm[:2]
    )
    if to_weights is not None:
        upstream = upstream._replace(grad_weights=dense_rows(to_weights))
    q, k, v = map(apart, packed.chunk(3, -1))
    inputs = Inputs(q, k, v, mask, bias, dropout_seed=seed)
    options = Options(q.shape[3] ** -0.5, causal=causal, dropout_p=dropout_p, weights=mode)
    args = (*upstream, *inputs, *options)
    gradients = ops.CPU.bwd(*args) if torch.is_grad_enabled() else call(ops.CPU.bwd, *args)
    return torch.cat([merged(x) for x in gradients[:3]], -1)


def _is_probability(p: Any) -> bool:
    return p is NO_DROPOUT or (type(p) is float and 0 <= p <= 1)


def _as_4d(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _is_plain_tensor(x: Tensor | None) -> bool:
    return x is None or (type(x) in (Tensor, nn.Parameter) and x.is_cpu)
