"""A layer's self-attention without gradients in one operator.

Of a small layer's time most is spent on the way: arguments checked, a dozen views made. Where a
`MultiheadAttention` uses none of its extras and nobody watches, it calls one operator instead that
takes the packed projection and gives the merged heads, bit for bit what the long way gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, dispatch, ops, watching
from ..autograd import call_unwatched
from ..backends import cpu
from ..checks import WEIGHTS
from .extras import appended_keys, is_plain
from .inputs import split_masks
from .linear import is_watched, linear


def takes(module: Any, asked: dict[str, Any], weight: Tensor | None, query: Tensor) -> bool:
    """Whether self-attention of a checked query may go the short way."""
    return (
        not watching.now
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and is_plain(asked)
        and type(query) is Tensor
        and query.is_cpu
        and query.dim() == 3
        and query.dtype in backends.FUSED_DTYPES
        and weight is not None
        and weight.shape[0] == 3 * module.embed_dim
        and module.embed_dim % module.num_heads == 0
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

    Returns:
        The output and the weights; None where the long way has to decide what is wrong.
    """
    mask = bias = None
    if attn_mask is not None or key_padding_mask is not None:
        batch, length = query.shape[:2] if module.batch_first else query.shape[1::-1]
        sizes = (batch, module.num_heads, length, length)
        masks = (attn_mask, key_padding_mask)
        mask, bias = (_as_4d(x) for x in split_masks(*masks, sizes, query.device))
        if not (_is_plain_tensor(mask) and _is_plain_tensor(bias)):
            return None
    packed = linear(query, weight, module.in_proj_bias)
    if packed.dtype not in backends.FUSED_DTYPES or not packed.is_contiguous():
        return None
    heads, weights = module.num_heads, WEIGHTS[return_weights]
    args = (packed, heads, module.batch_first, mask, bias, causal, weights)
    out, probabilities = call_unwatched(ops.SELF_ATTENTION, args)
    return module.out_proj(out), probabilities if return_weights else None


def _as_4d(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _is_plain_tensor(x: Tensor | None) -> bool:
    return x is None or (type(x) in (Tensor, nn.Parameter) and x.is_cpu)
