"""The rows of parameters that make the queries and the keys of a layer's heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

LINEARS = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("q_lin", "k_lin"))
NORMS = (
    *("q_norm", "k_norm", "qk_norm", "q_layernorm", "k_layernorm", "query_layernorm"),
    *("key_layernorm", "query_norm", "key_norm", "norm_q", "norm_k", "q_ln", "k_ln"),
)


def query_key_rows(module: nn.Module) -> tuple[list[Tensor], list[Tensor]] | None:
    """What makes the queries and what makes the keys: views whose rows are those of the heads.

    None where it is not known how the module makes them.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _of_torchs_layer(module)
    pair = _linears(module)
    if pair is None:
        return None
    q, k = ([x.weight.detach()] for x in pair)
    for rows, linear in zip((q, k), pair, strict=True):
        rows += [] if linear.bias is None else [linear.bias.detach()]
    return q, k


def unscalable(module: nn.Module) -> str | None:
    """Why a layer's logits do not grow and shrink with these rows; None where they do."""
    pair = _linears(module)
    if pair is None and not isinstance(module, nn.MultiheadAttention):
        return None
    for name in NORMS:
        if not isinstance(getattr(module, name, None), (type(None), nn.Identity)):
            return f"its {name} undoes any scaling of the projections, and bounds logits by itself"
    if getattr(module, "similarity", "dot") == "cosine":
        return (
            "its cosine similarity undoes any scaling of the projections, and bounds logits by"
            " itself, at 100"
        )
    if getattr(module, "parallel", None) is not None:
        return "its heads are cut over ranks"
    for made in (module, *(pair or ())):
        if parametrize.is_parametrized(made):
            return "its projections are parametrized: their values are not kept, but computed"
    for linear in pair or ():
        if not isinstance(linear, nn.Linear):
            told = f"{type(linear).__module__.partition('.')[0]}'s {type(linear).__name__}"
            return f"its projection is {told} and no nn.Linear: merge adapters first"
    for x in module.parameters():
        if type(x) not in (Tensor, nn.Parameter):  # DTensor, quantised ones
            return f"its parameters are of the type {type(x).__name__}"
    return None


def _linears(module: nn.Module) -> tuple[Any, Any] | None:
    for names in LINEARS:
        q, k = (getattr(module, name, None) for name in names)
        if isinstance(q, nn.Module) and isinstance(k, nn.Module):
            return q, k
    return None


def _of_torchs_layer(module: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor]]:
    packed, bias, E = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    if packed is None:
        q, k = [module.q_proj_weight.detach()], [module.k_proj_weight.detach()]
    else:
        keys = (len(packed) - E) // 2
        q, k = [packed.detach()[:E]], [packed.detach()[E : E + keys]]
    if bias is not None:
        q.append(bias.detach()[:E])
        k.append(bias.detach()[E : E + len(k[0])])
    if module.bias_k is not None:
        k.append(module.bias_k.detach().view(-1))
    return q, k
