"""`MultiheadAttention` over nested tensors: no padding, no mask.

The rows of all sequences lie one after another, which is what `varlen_attention` takes:

    query (B, *, E) -> values (total_q, E) -> q (total_q, H, D) -> out (total_q, H, D)
      -> (B, *, E) with query's own offsets, so that it can be added to query -> out_proj

Nested tensors of layout ``torch.strided``, which ``nn.TransformerEncoder`` makes of a padded batch
in inference, become jagged ones for it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import requirements as require
from ..functional import varlen_attention
from . import extras
from .cache import KVCache
from .inputs import NAME, apart, check_kind, input_features, projection_weight
from .projections import project


def jagged_forward(
    module: Any,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
    kv_cache: KVCache | None,
    asked: dict[str, Any],
) -> Tensor:
    """The output of `MultiheadAttention.forward` for nested query, key and value, nested as query.

    Raises:
        TypeError: An input that is not nested as query is, or an option that needs padding.
        ValueError: Sizes that do not fit.
    """
    _check_options(module, key_padding_mask, need_weights, attn_mask, is_causal, kv_cache)
    inputs: dict[str, Any] = {"query": query, "key": key, "value": value}
    sizes = input_features(module)
    if query.layout is torch.strided:
        named = zip(inputs.items(), sizes, strict=True)
        made = {id(x): _as_jagged(name, x, size) for (name, x), size in named}
        options: Any = (key_padding_mask, need_weights, attn_mask, is_causal, kv_cache, asked)
        jagged = jagged_forward(module, made[id(query)], made[id(key)], made[id(value)], *options)
        return torch.nested.as_nested_tensor(list(jagged.unbind()))
    for name, size in zip(inputs, sizes, strict=True):
        _check_input(module, name, inputs[name], size, query.shape[0])
    if key is not value and not _same_lengths(inputs["key"], inputs["value"]):
        raise ValueError(f"{NAME}: value must have key's lengths in every sequence")

    values: dict[int, Tensor] = {id(x): x.values() for x in inputs.values()}
    rows = (values[id(query)], values[id(key)], values[id(value)])  # (total, features)
    q, k, v = project(module, module.in_proj_weight, *rows)  # (1, H, total, D)
    if module.similarity == "cosine":
        q, k = extras.normalise(q, k, module.log_temperature)
    result = varlen_attention(
        q[0].transpose(0, 1),
        k[0].transpose(0, 1),
        v[0].transpose(0, 1),
        inputs["query"].offsets(),
        inputs["key"].offsets(),
        _longest(query),
        _longest(inputs["key"]),
        causal=is_causal,
        deterministic=module.deterministic,
        backend=module.backend,
        **asked,
    )
    if asked["return_stats"]:
        result, module.stats = result
    merged = torch.nested.nested_tensor_from_jagged(
        result.flatten(-2),
        inputs["query"].offsets(),
        min_seqlen=inputs["query"]._maybe_min_seqlen,
        max_seqlen=inputs["query"]._maybe_max_seqlen,
    )
    out: Tensor = module.out_proj(merged)
    return out


def _check_options(
    module: Any,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
    kv_cache: KVCache | None,
) -> None:
    if module.parallel is not None:
        require.fail(NAME, "query", "dense over many ranks", "nested", TypeError)
    if not module.batch_first:
        _refuse("batch_first=False", "build the module with batch_first=True")
    if key_padding_mask is not None:
        _refuse("key_padding_mask", "nested tensors have no padding")
    if need_weights:
        _refuse("need_weights=True", "pass need_weights=False, or pad")
    if attn_mask is not None and (not is_causal or apart(attn_mask)[1] is not None):
        _refuse("attn_mask", "pass is_causal=True for a causal mask, or pad")
    if kv_cache is not None:
        _refuse("kv_cache", "pad on the left and give key_padding_mask")
    if extras.appended_keys(module):
        instead = "use sinks=True, or pad (nn.TransformerEncoder: enable_nested_tensor=False)"
        _refuse("add_bias_kv and add_zero_attn", instead)


def _refuse(what: str, instead: str) -> NoReturn:
    raise TypeError(f"{NAME}: nested tensors do not go with {what}: {instead}")


def _as_jagged(name: str, x: Any, size: int) -> Tensor:
    """A strided nested tensor as a jagged one, with its gradient."""
    if not isinstance(x, Tensor) or not x.is_nested or x.layout is not torch.strided:
        _fail_to_nest(name, f"a strided nested tensor (B, *, {size}) as query is", x)
    sequences = list(x.unbind())
    shapes = [tuple(sequence.shape) for sequence in sequences]
    if not shapes or any(len(shape) != 2 or shape[1] != size for shape in shapes):
        raise ValueError(
            f"{NAME}: {name} must be a nested tensor (B, *, {size}), got {len(shapes)} "
            f"sequences{f' of shapes {shapes[:3]}' if shapes else ''}"
        )
    return torch.nested.as_nested_tensor(sequences, layout=torch.jagged)


def _fail_to_nest(name: str, required: str, x: Any) -> NoReturn:
    got = f"layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
    raise TypeError(f"{NAME}: {name} must be {required}, got {got}")


def _check_input(module: Any, name: str, x: Any, features: int, batch: int) -> None:
    required = f"a jagged nested tensor (B, *, {features}) as query is"
    if not isinstance(x, Tensor) or not x.is_nested or x.layout is not torch.jagged:
        _fail_to_nest(name, required, x)
    if x.dim() != 3 or x.shape[-1] != features or x.shape[0] != batch:
        raise ValueError(
            f"{NAME}: {name} must be a jagged nested tensor (B, *, {features}) = "
            f"({batch}, *, {features}), got {tuple(x.shape)}"
        )
    nested: Any = x
    if nested._ragged_idx != 1 or nested.lengths() is not None:
        raise ValueError(f"{NAME}: {name} must be contiguous, ragged in dimension 1")
    check_kind(projection_weight(module), name, x)


def _same_lengths(key: Any, value: Any) -> bool:
    a, b = key.offsets(), value.offsets()
    return a is b or torch.equal(a, b)


def _longest(x: Any) -> int:
    longest: int = x._get_max_seqlen()
    return longest
