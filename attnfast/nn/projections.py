"""The projections of `MultiheadAttention`, and its heads as views of them.

Sizes are what ``num_heads``, ``embed_dim`` and the weights say at every call, so that heads can be
pruned in place; ``head_dim``, which torch's layer stores as well, is not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import requirements as require
from .inputs import NAME
from .linear import linear


def project(
    module: Any,
    weight: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
) -> Any:
    """Project to q (B, H, T, D), k and v (B, H_kv, S, D), with as few linears as possible.

    ``weight`` is the layer's ``in_proj_weight``; k and v are None where key and value are.
    """
    D, bias = head_dim(module), module.in_proj_bias
    if weight is None or key is not value or query is not key:
        projected = _project_apart(module, weight, bias, query, key, value)
    else:
        packed = linear(query, weight, bias)
        if weight.shape[0] == 3 * module.embed_dim:
            packed = packed.view(*query.shape[:-1], 3, module.num_heads, D)
            if packed.dim() == 5 and not torch.is_grad_enabled():  # its backward would copy
                order = (2, 0, 3, 1, 4) if module.batch_first else (2, 1, 3, 0, 4)
                return packed.permute(order).unbind(0)
            return tuple(_heads_first(module, x) for x in packed.unbind(-3))
        projected = packed.split(_sizes(module, weight), -1)
    return tuple(
        None if x is None else _heads_first(module, x.unflatten(-1, (-1, D))) for x in projected
    )


def _project_apart(
    module: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """q, k and v (..., H * D) of inputs that are not one tensor: up to three linears."""
    if module.parallel is not None and weight is None:
        weights, biases = module.parallel.projections(module)
        return tuple(
            None if x is None else linear(x, w, b)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
    sizes = _sizes(module, weight)
    if weight is not None and key is not None and key is value:
        weight_q, weight_kv = weight.split((sizes[0], 2 * sizes[1]))
        bias_q, bias_kv = (None, None) if bias is None else bias.split((sizes[0], 2 * sizes[1]))
        return linear(query, weight_q, bias_q), *linear(key, weight_kv, bias_kv).chunk(2, -1)
    if weight is not None:
        weights = weight.split(sizes)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.split(sizes)
    return tuple(
        None if x is None else linear(x, w, b)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )


def _sizes(module: Any, weight: Tensor | None) -> tuple[int, int, int]:
    """The features of q, k and v."""
    E = module.embed_dim
    if weight is None:
        keys = module.k_proj_weight.shape[0]
    else:
        keys = (weight.shape[0] - E) // 2
        if keys < 1 or weight.shape[0] != E + 2 * keys or keys % head_dim(module):
            required = f"((H + 2 H_kv) D, E) for embed_dim {E} and {module.num_heads} heads"
            require.fail(NAME, "in_proj_weight", required, tuple(weight.shape))
    return E, keys, keys


def _heads_first(module: Any, x: Tensor) -> Tensor:
    """View (..., heads, D) as (B, heads, length, D)."""
    if x.dim() == 3:
        return x.transpose(0, 1).unsqueeze(0)
    return x.transpose(1, 2) if module.batch_first else x.permute(1, 2, 0, 3)


def merge_heads(module: Any, out: Tensor, query: Tensor) -> Tensor:
    """The inverse of `project`'s view of q, heads merged: (B, H, T, D) to query's shape."""
    if query.dim() == 2:
        return out[0].transpose(0, 1).flatten(-2)
    return (out.transpose(1, 2) if module.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)


def head_dim(module: nn.MultiheadAttention) -> int:
    """D, by torch's rule: all heads together are as wide as the embedding."""
    E, H = int(module.embed_dim), int(module.num_heads)
    if E % H:
        require.fail(NAME, "embed_dim", f"a multiple of num_heads, {H}", E)
    return E // H
