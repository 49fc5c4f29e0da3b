"""What `MultiheadAttention` requires of its inputs, and its masks as `attention` takes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "MultiheadAttention"


def check_inputs(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor | None, value: Tensor | None
) -> None:
    """Raise what the projections would report without naming the argument."""
    rank = query.dim()
    if rank not in (2, 3):
        batched = layout(module, 3, "B", "T", module.embed_dim)
        unbatched = layout(module, 2, "B", "T", module.embed_dim)
        raise ValueError(
            f"{NAME}: query must be {batched} or {unbatched}, got {tuple(query.shape)}"
        )
    _check_input(module, "query", query, rank, None, None, module.embed_dim)
    if key is None or value is None or (query is key is value and module._qkv_same_embed_dim):
        return
    batch = query.shape[0 if module.batch_first else 1] if rank == 3 else None
    _check_input(module, "key", key, rank, batch, None, module.kdim)
    source = key.shape[1 if module.batch_first and rank == 3 else 0]
    _check_input(module, "value", value, rank, batch, source, module.vdim)


def check_kind(module: nn.MultiheadAttention, name: str, x: Tensor) -> None:
    """Raise unless an input has the parameters' dtype, autocast aside, and device."""
    weight = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
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
    name: str,
    x: Tensor,
    rank: int,
    batch: int | None,
    length: int | None,
    features: int,
) -> None:
    """Raise unless x fits its rank, the sizes given (None: any) and the parameters."""
    if x.is_nested:
        raise TypeError(
            f"{NAME}: {name} must not be a nested tensor of layout {x.layout}: use "
            "layout=torch.jagged for query, key and value, or pad and give key_padding_mask "
            "(in nn.TransformerEncoder set use_nested_tensor to False, as attnfast.replace does)"
        )
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
    check_kind(module, name, x)


def split_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, sizes: tuple[int, int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Torch's two masks as `attention` takes them: a bool mask (True = attend) and a float bias.

    Two masks are combined only where both are bool or both float, at the smallest broadcast shape.

    Args:
        attn_mask: any of the forms of `MultiheadAttention.forward`, or None.
        key_padding_mask: ``(B, S)``, or ``(S,)`` when B is 1, or None.
        sizes: ``(B, H, T, S)`` before any key is appended.
    """
    excluded: Tensor | None = None
    bias: Tensor | None = None
    for given in (
        None if key_padding_mask is None else _checked_key_padding_mask(key_padding_mask, sizes),
        None if attn_mask is None else _checked_attn_mask(attn_mask, sizes),
    ):
        if given is None:
            continue
        if given.dtype == torch.bool:
            excluded = given if excluded is None else excluded | given
        else:
            bias = given if bias is None else bias + given
    return None if excluded is None else ~excluded, bias


def _checked_key_padding_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A view of key_padding_mask that broadcasts to ``(B, H, T, S)``."""
    batch, _, _, source = sizes
    _check_mask_dtype("key_padding_mask", mask)
    if mask.dim() == 1 and batch == 1:
        mask = mask.unsqueeze(0)
    if mask.shape != (batch, source):
        unbatched = f" or (S,) = ({source},)" if batch == 1 else ""
        raise ValueError(
            f"{NAME}: key_padding_mask must be (B, S) = ({batch}, {source})"
            f"{unbatched}, got {tuple(mask.shape)}"
        )
    return mask[:, None, None]


def _checked_attn_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A view of attn_mask that broadcasts to ``(B, H, T, S)``."""
    batch, heads, target, source = sizes
    _check_mask_dtype("attn_mask", mask)
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


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{NAME}: {name} must be bool (True = masked out) or floating point "
            f"(added to the scores), got {mask.dtype}"
        )


def attend_appended(mask: Tensor | None, appended: int, source: int) -> Tensor | None:
    """Extend a mask or bias over keys put before the others, all of which are attended."""
    if mask is None:
        return None
    value = 1.0 if mask.dtype == torch.bool else 0.0
    return F.pad(mask.expand(*mask.shape[:-1], source), (appended, 0), value=value)
