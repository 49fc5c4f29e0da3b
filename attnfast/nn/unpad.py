"""``nn.TransformerEncoder`` without its padding: what `replace` has it do in inference.

torch's encoder turns a padded batch into a nested tensor there, so that no layer computes padding,
and bypasses its layers' attention for it. Two hooks on the encoder do the same for layers that call
our `MultiheadAttention`: the batch goes in as a jagged nested tensor and comes out padded again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import HOOK, MultiheadAttention
from .extras import appended_keys, counts_positions
from .linear import is_watched
from .transformer import TransformerEncoderLayer

# Multiply-adds of padding per layer below which skipping it costs more: a jagged tensor's operators
# go through Python.
WORTH_IT = 1 << 25


def skip(encoder: nn.TransformerEncoder) -> None:
    """Have an encoder skip padding; twice is once."""
    encoder._forward_pre_hooks[HOOK] = before
    encoder._forward_hooks[HOOK] = after
    cast(Any, encoder._forward_hooks).move_to_end(HOOK, last=False)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        getattr(encoder, f"{name}_with_kwargs")[HOOK] = True


def keep(encoder: nn.Module) -> None:
    """Undo `skip`."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        getattr(encoder, name).pop(HOOK, None)
        getattr(encoder, f"{name}_with_kwargs").pop(HOOK, None)


def before(
    encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the encoder with a jagged ``src`` and no mask, or None to leave them."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or encoder.training:
        return None
    names = ("src", "mask", "src_key_padding_mask", "is_causal")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    src: Any = given.get("src")
    padding: Any = given.get("src_key_padding_mask")
    if given.get("mask") is not None or given.get("is_causal") or not _fits(src, padding):
        return None
    kept = ~padding
    lengths = kept.sum(1)
    skipped = padding.numel() - int(lengths.sum())
    if skipped * 12 * src.shape[2] ** 2 < WORTH_IT or not _is_plain(encoder) or is_watched():
        return None
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shortest, longest = (int(x) for x in lengths.aminmax())
    jagged: Any = torch.nested.nested_tensor_from_jagged(
        src[kept], offsets, min_seqlen=shortest, max_seqlen=longest
    )
    jagged.attnfast_kept = kept
    return (), {**given, "src": jagged, "src_key_padding_mask": None}


def after(
    encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | None:
    """The padded output where `before` took the padding away: there it is what torch's is."""
    kept = getattr(kwargs.get("src"), "attnfast_kept", None)
    if kept is None:
        return None
    rows = output.values()
    padded: Tensor = rows.new_zeros((*kept.shape, rows.shape[-1]))
    if encoder.norm is not None:
        padded += encoder.norm(padded[:1, :1])
    padded[kept] = rows
    return padded


def _fits(src: Any, padding: Any) -> bool:
    """Whether these are a padded batch as plain tensors on the CPU.

    On a GPU the sequences' lengths would have to be waited for.
    """
    return (
        type(src) is Tensor
        and type(padding) is Tensor
        and src.dim() == 3
        and src.is_cpu
        and padding.is_cpu
        and padding.dtype == torch.bool
        and padding.shape == src.shape[:2]
        and padding.numel() > 0
        and not torch._C._is_any_autocast_enabled()
    )


def _is_plain(encoder: nn.TransformerEncoder) -> bool:
    """Whether its layers are torch's with our attention as torch's, and nobody else's hooks see."""
    return all(map(_is_plain_layer, encoder.layers)) and _hooks(encoder) == 2 + len(encoder.layers)


def _is_plain_layer(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    return (
        type(layer) in (nn.TransformerEncoderLayer, TransformerEncoderLayer)
        and type(attention) is MultiheadAttention
        and attention.batch_first
        and not (appended_keys(attention) or counts_positions(attention))
        and not attention.collect_stats
    )


def _hooks(encoder: nn.Module) -> int:
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in encoder.modules())
