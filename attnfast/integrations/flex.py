"""``torch.nn.attention.flex_attention`` on our kernels, which train on the CPU too.

Torch compiles any ``score_mod``; ours is a closed set, fused and differentiable already: what a
function does to the score is found by calling it once on a score that records it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..block_mask import BlockMask
from ..flex_mask import from_flex
from ..functional import attention
from ..requirements import fail
from ._score_mods import Edits, edits_of

NAME = "attnfast.integrations.flex"
FUNCTION = "flex_attention"

_original: Any = None  # torch's function, while ours is active
_causal: weakref.WeakKeyDictionary[BlockMask, bool] = weakref.WeakKeyDictionary()


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    """As torch's function of the same name and arguments, by `attnfast.attention`.

    Args:
        query: ``(B, H, T, D)``, float32, bfloat16 or float16.
        key: ``(B|1, H_kv, S, D)``.
        value: ``(B|1, H_kv, S, D_v)``.
        score_mod: ``score_mod(score, b, h, q, k)``, in this order and each at most once: the score
            times numbers, ``c * tanh(score / c)`` (softcap), ``+`` and ``-`` of what depends on
            b, h, q and k alone (a bias, with gradients of the tensors in it), and ``torch.where``
            with -inf. ``slope[h] * abs(q - k)`` taken off (ALiBi), or ``slope[h] * (q - k)`` where
            the mask is causal, costs no memory; any other bias has as many elements as its shape in
            b, h, q and k that it depends on.
        block_mask: A `attnfast.BlockMask`, or torch's.
        scale: Default ``D ** -0.5``.
        enable_gqa: Whether key may have fewer heads than query.
        return_lse: Also return the lse, float32 ``(B, H, T)``, differentiable.
        kernel_options: Of torch's kernels: ours choose their tiles themselves.
        return_aux: torch's ``AuxRequest``: lse, max_scores, or both, in an ``AuxOutput``.

    Returns:
        out ``(B, H, T, D_v)``, or (out, lse), or (out, AuxOutput).

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit, or ``score_mod`` does something else; the message says
            what.

    Paper: FlexAttention (arXiv:2412.05496).
    """
    if not enable_gqa and query.shape[-3] != key.shape[-3]:
        got = f"{key.shape[-3]} and {query.shape[-3]}"
        fail(FUNCTION, "key", "of as many heads as query without enable_gqa=True", got)
    if key.shape[0] == 1 != query.shape[0]:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    mask = block_mask
    if mask is not None and not isinstance(mask, BlockMask):
        mask = from_flex(mask)
    given: dict[str, Any] = {}
    if score_mod is not None:
        sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        edits = edits_of(FUNCTION, score_mod, sizes, query.device)
        given = _arguments(edits, mask, query.shape[3] ** -0.5 if scale is None else scale)
    wants_max = return_aux is not None and return_aux.max_scores
    found = attention(
        query,
        key,
        value,
        mask=mask,
        return_lse=True,
        return_stats=wants_max,
        **({"scale": scale} | given),
    )
    out, lse = found[:2]
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        highest = found[2].max_logit if wants_max else None
        return out, AuxOutput(lse if return_aux.lse else None, highest)
    return (out, lse) if return_lse else out


def activate() -> None:
    """Compute torch's ``flex_attention`` on CPU tensors by attnfast, in this whole process.

    Every loaded module that has imported torch's function gets ours, which hands tensors of other
    devices on to torch's. What ``torch.compile`` has made of torch's before stays torch's. Nothing
    happens if attnfast is active already.
    """
    global _original
    if _original is not None:
        return
    from torch.nn.attention import flex_attention as module

    _original = module.flex_attention
    _replace(_original, _for_the_cpu)


def restore() -> None:
    """Undo `activate`. Nothing happens unless attnfast is active."""
    global _original
    if _original is not None:
        _replace(_for_the_cpu, _original)
        _original = None


def _for_the_cpu(query: Tensor, *args: Any, **kwargs: Any) -> Any:
    function = flex_attention if query.device.type == "cpu" else _original
    return function(query, *args, **kwargs)


def _replace(old: Any, new: Any) -> None:
    """Have every module that has one function under its name have the other."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(FUNCTION) is old:
            setattr(module, FUNCTION, new)


def _arguments(edits: Edits, mask: BlockMask | None, scale: float) -> dict[str, Any]:
    """What `attention` is given for the edits of a score."""
    slopes, bias = edits.slopes, edits.bias
    if slopes is not None and not (edits.absolute or (mask is not None and _is_causal(mask))):
        slopes, bias = None, edits.with_distances()
    given = {"scale": scale * edits.factor, "softcap": edits.softcap, "bias": bias}
    return given | ({} if slopes is None else {"alibi_slopes": slopes})


def _is_causal(mask: BlockMask) -> bool:
    """Whether no query attends a key after it."""
    found = _causal.get(mask)
    if found is None:
        _, _, T, S = mask.shape
        after = BlockMask.from_mask_mod(
            lambda b, h, q, k: k > q, 1, 1, T, S, mask.device, mask.block_size
        )
        found = _causal[mask] = (mask & after).density == 0
    return found
