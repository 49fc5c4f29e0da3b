"""What `MultiheadAttention` requires of its inputs, and its masks as `attention` takes them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import requirements as require
from ..checks import block_mask
from ..flex_mask import is_block_mask
from ..subclasses import PLAIN, is_causal_bias, refusal
from .cache import KVCache

NAME = "MultiheadAttention"


def check_inputs(
    module: nn.MultiheadAttention,
    packed: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
) -> None:
    """Raise what the projections would report without naming the argument.

    ``packed`` is the module's ``in_proj_weight``.
    """
    rank = query.dim()
    if rank not in (2, 3):
        batched = layout(module, 3, "B", "T", module.embed_dim)
        unbatched = layout(module, 2, "B", "T", module.embed_dim)
        raise ValueError(
            f"{NAME}: query must be {batched} or {unbatched}, got {tuple(query.shape)}"
        )
    weight = cast(Tensor, module.q_proj_weight) if packed is None else packed
    _check_input(module, weight, "query", query, rank, None, None, module.embed_dim)
    if key is None or value is None or (query is key is value and packed is not None):
        return
    batch = query.shape[0 if module.batch_first else 1] if rank == 3 else None
    _, kdim, vdim = input_features(module)
    _check_input(module, weight, "key", key, rank, batch, None, kdim)
    source = key.shape[1 if module.batch_first and rank == 3 else 0]
    _check_input(module, weight, "value", value, rank, batch, source, vdim)


def check_tensors(*inputs: Any) -> None:
    """Raise unless query, key and value are Tensors of values, or key and value None."""
    for name, x in zip(("query", "key", "value"), inputs, strict=True):
        if x is None and name != "query":
            continue
        reason = refusal(x) if isinstance(x, Tensor) else "a Tensor"
        if reason is not None:
            require.fail(NAME, name, reason, type(x).__name__, TypeError)


def check_flags(
    need_weights: object, average_attn_weights: object, is_causal: object
) -> tuple[bool, bool, bool]:
    """What ``if`` would take these for."""
    return (
        require.truth(NAME, "need_weights", need_weights),
        require.truth(NAME, "average_attn_weights", average_attn_weights),
        require.truth(NAME, "is_causal", is_causal),
    )


def check_cache(kv_cache: Any, key: Tensor | None, value: Tensor | None, parallel: Any) -> None:
    """Raise unless there are keys and values: given, or held by a cache."""
    if parallel is not None and parallel.context is not None:
        requirement = "None where sequences are cut over ranks: see context_parallel_decode"
        require.fail(NAME, "kv_cache", requirement, type(kv_cache).__name__)
    if not isinstance(kv_cache, KVCache | None):
        got = type(kv_cache).__name__
        require.fail(NAME, "kv_cache", "an attnfast.KVCache or None", got, TypeError)
    if (key is None) != (value is None):
        require.fail(NAME, "key and value", "both given or both None", "one of them")
    if key is None and (kv_cache is None or not kv_cache.length):
        state = "no kv_cache" if kv_cache is None else "an empty one"
        require.fail(NAME, "key and value", "given unless kv_cache holds some", f"None, {state}")


def projection_weight(module: nn.MultiheadAttention) -> Tensor:
    """The weight that projects query: ``(..., E)``."""
    packed: Tensor | None = module.in_proj_weight
    return cast(Tensor, module.q_proj_weight) if packed is None else packed


def input_features(module: nn.MultiheadAttention) -> tuple[int, int, int]:
    """The features of query, key and value; ``kdim`` and ``vdim`` say again what weights have."""
    if module.in_proj_weight is not None:
        return module.embed_dim, module.embed_dim, module.embed_dim
    k, v = cast(Tensor, module.k_proj_weight), cast(Tensor, module.v_proj_weight)
    return int(module.embed_dim), k.shape[1], v.shape[1]


def check_kind(weight: Tensor, name: str, x: Tensor) -> None:
    """Raise unless an input has the parameters' dtype, autocast aside, and device."""
    if x.dtype != weight.dtype and not (
        x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
    ):
        raise TypeError(
            f"{NAME}: {name} must have the parameters' dtype {weight.dtype} "
            f"(or run under autocast), got {x.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(
            f"{NAME}: {name} must be on the parameters' device {weight.device}, got {x.device}"
        )


def layout(
    module: nn.MultiheadAttention, rank: int, batch: int | str, length: int | str, features: int
) -> str:
    """A shape as the module expects it, for messages."""
    if rank == 2:
        return f"({length}, {features})"
    first, second = (batch, length) if module.batch_first else (length, batch)
    return f"({first}, {second}, {features})"


def _check_input(
    module: nn.MultiheadAttention,
    weight: Tensor,
    name: str,
    x: Tensor,
    rank: int,
    batch: int | None,
    length: int | None,
    features: int,
) -> None:
    """Raise unless x fits its rank, the sizes given (None: any) and the parameters."""
    if x.is_nested:
        require.fail(NAME, name, "dense as query is", f"nested of layout {x.layout}", TypeError)
    if x.layout is not torch.strided:
        require.fail(NAME, name, "a dense strided Tensor", f"layout {x.layout}", TypeError)
    shape = x.shape
    batch_dim, length_dim = (0, 1) if module.batch_first else (1, 0)
    if (
        len(shape) != rank
        or shape[-1] != features
        or (batch is not None and shape[batch_dim] != batch)
        or (length is not None and shape[length_dim if rank == 3 else 0] != length)
    ):
        names = layout(module, rank, "B", "T" if name == "query" else "S", features)
        sizes = layout(
            module,
            rank,
            "*" if batch is None else batch,
            "*" if length is None else length,
            features,
        )
        required = names if name == "query" else f"{names} = {sizes}"
        raise ValueError(f"{NAME}: {name} must be {required}, got {tuple(shape)}")
    check_kind(weight, name, x)


def plain_mask(
    attn_mask: Any, is_causal: bool, need_weights: bool, device: torch.device
) -> tuple[Tensor | None, bool]:
    """attn_mask and is_causal, of which one decides alone: with weights attn_mask, as in torch.

    Torch's ``CausalBias`` becomes a bool mask, True = masked out.
    """
    if type(attn_mask) not in PLAIN and is_causal_bias(attn_mask):
        return ~attn_mask._materialize(device), False
    return (None, True) if is_causal and not need_weights else (attn_mask, False)


def apart(attn_mask: Any) -> tuple[Any, Any]:
    """attn_mask as torch has it, and as a `BlockMask` or torch's: one of both."""
    return (None, attn_mask) if is_block_mask(attn_mask) else (attn_mask, None)


def beside_blocks(
    blocks: Any,
    sizes: tuple[int, int, int, int],
    q: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    appended: int,
) -> Tensor | None:
    """A bias that also masks what a bool mask does, beside a BlockMask, which is checked.

    ``sizes`` are ``(B, H, T, S)`` of whole sequences, ``q`` is the projected query.
    """
    if appended:
        requirement = "a Tensor where add_bias_kv or add_zero_attn appends keys"
        require.fail(NAME, "attn_mask", requirement, "a BlockMask")
    block_mask(NAME, "attn_mask", blocks, q, sizes)
    if mask is None:
        return bias
    masking = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return masking if bias is None else bias + masking


def split_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    appended: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Torch's two masks as `attention` takes them: a bool mask (True = attend) and a float bias.

    Two masks are combined only where both are bool or both float, at the smallest broadcast shape.

    Args:
        attn_mask: any of the forms of `MultiheadAttention.forward`, or None.
        key_padding_mask: ``(B, S)``, or ``(S,)`` when B is 1, or None.
        sizes: ``(B, H, T, S)`` before any key is appended.
        device: query's.
        appended: keys put before the others, all of which are attended.
    """
    excluded: Tensor | None = None
    bias: Tensor | None = None
    for name, mask, view in (
        ("key_padding_mask", key_padding_mask, _viewed_key_padding_mask),
        ("attn_mask", attn_mask, _viewed_attn_mask),
    ):
        if mask is None:
            continue
        _check_mask(name, mask, device)
        given = view(mask, sizes)
        if given.dtype == torch.bool:
            excluded = given if excluded is None else excluded | given
        else:
            bias = given if bias is None else bias + given
    mask = None if excluded is None else ~excluded
    if appended:
        mask, bias = (_attend_appended(x, appended, sizes[3]) for x in (mask, bias))
    return mask, bias


def _viewed_key_padding_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A view of key_padding_mask that broadcasts to ``(B, H, T, S)``."""
    batch, _, _, source = sizes
    if mask.dim() == 1 and batch == 1:
        mask = mask.unsqueeze(0)
    if mask.shape != (batch, source):
        unbatched = f" or (S,) = ({source},)" if batch == 1 else ""
        raise ValueError(
            f"{NAME}: key_padding_mask must be (B, S) = ({batch}, {source})"
            f"{unbatched}, got {tuple(mask.shape)}"
        )
    return mask.view(batch, 1, 1, source)


def _viewed_attn_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A view of attn_mask that broadcasts to ``(B, H, T, S)``."""
    batch, heads, target, source = sizes
    view = mask
    if mask.dim() == 3:
        if mask.shape[0] == batch * heads:
            view = mask.view(batch, heads, *mask.shape[1:])
        else:
            view = mask.unsqueeze(1)
    fits = all(
        n in (1, full) for n, full in zip(reversed(view.shape), reversed(sizes), strict=False)
    )
    if not (2 <= view.dim() <= 4 and fits):
        raise ValueError(
            f"{NAME}: attn_mask must be (T, S) = ({target}, {source}), "
            f"(B * num_heads, T, S) = ({batch * heads}, {target}, {source}), (B, T, S) or "
            f"broadcastable to (B, num_heads, T, S) = {sizes}, got {tuple(mask.shape)}"
        )
    return view


def _check_mask(name: str, mask: Any, device: torch.device) -> None:
    meaning = "bool (True = masked out) or floating point (added to the scores)"
    require.tensor(NAME, name, mask, f"a Tensor, {meaning}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        require.fail(NAME, name, meaning, mask.dtype, TypeError)
    if mask.device != device:
        require.fail(NAME, name, f"on query's device {device}", mask.device)
    require.memory(NAME, name, mask)


def _attend_appended(mask: Tensor | None, appended: int, source: int) -> Tensor | None:
    if mask is None:
        return None
    value = 1.0 if mask.dtype == torch.bool else 0.0
    return F.pad(mask.expand(*mask.shape[:-1], source), (appended, 0), value=value)
