"""attnfast as an attention implementation of Hugging Face's transformers.

As in::

    from attnfast.integrations import transformers

    name = transformers.register()
    model = AutoModel.from_pretrained(folder, attn_implementation=name)
    model.set_attn_implementation(name)  # or a model that is there already

Two functions are registered under the name: `attention_forward`, and for the masks one that gives
bool masks, or none where being causal says it all, as with "sdpa"; and eager's float masks, with a
warning, to models that are not made for those: their attention may be code of their own. Causal
masks, sliding windows, padding, packed sequences and the caches' offsets are passed on as what they
are: their T x S bools are never made, unless a model's own code reads them.

Results are those of eager attention, but for queries that attend nothing, such as padding: they
give zeros, where eager attends everything evenly.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import attention
from . import _mask_functions
from . import _structured_mask as structured
from . import _transformers_calls as calls
from . import _transformers_masks as masks
from ._transformers_masks import NAME

IMPLEMENTATION = "attnfast"
REFUSED = {  # arguments of a layer, and what they are
    "head_mask": "a factor per head",
    "block_indices": "blocks of keys per query",
}


def register() -> str:
    """Make ``attn_implementation="attnfast"`` known to transformers, in this whole process.

    Models that exist keep what they have. Registering again does nothing.

    Returns:
        The name for ``attn_implementation=`` and ``model.set_attn_implementation``: "attnfast".

    Raises:
        ImportError: transformers is not installed, or has no attention and mask interfaces.
        ValueError: somebody else has registered that name.
    """
    library = _library()
    known = library.AttentionInterface._global_mapping.get(IMPLEMENTATION)
    if known not in (None, attention_forward):
        owner = f"{known.__module__}.{known.__qualname__}"
        raise ValueError(f"{NAME}: the name {IMPLEMENTATION!r} must be free, it is {owner}")
    library.AttentionInterface.register(IMPLEMENTATION, attention_forward)
    library.AttentionMaskInterface.register(IMPLEMENTATION, masks.attention_mask)
    _mask_functions.learn()
    return IMPLEMENTATION


def unregister() -> None:
    """Undo `register`. Models that use attnfast must be given another implementation first.

    Nothing happens unless attnfast is registered.

    Raises:
        ImportError: as `register`.
    """
    library = _library()
    if library.AttentionInterface._global_mapping.get(IMPLEMENTATION) is attention_forward:
        del library.AttentionInterface._global_mapping[IMPLEMENTATION]
        library.AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)
        masks.forget()
        _mask_functions.forget()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model's attention layer calls in place of transformers' ``sdpa_attention_forward``.

    Masks are the model's: where there is one, it alone decides, sliding windows included. Without
    one, more than one query are causal if ``is_causal`` says so, or else the layer's attribute of
    that name; a causal ``sliding_window`` then holds too. Without one, nothing is masked in models
    that get eager's masks.

    Args:
        module: the layer; read are its ``is_causal``, and ``config.output_attentions``.
        query: ``(B, H, T, D)``, a transposed view.
        key: ``(B, H_kv, S, D)``, not repeated for grouped queries.
        value: ``(B, H_kv, S, D_v)``.
        attention_mask: bool, True = attend, or float, to be added; broadcastable to
            ``(B, H, T, S)``.
        dropout: probability, of the weights.
        scaling: factor of the scores; default ``D ** -0.5``.
        is_causal: default ``module.is_causal``, and True if there is no such attribute.
        position_bias: added to the scaled scores, broadcastable to ``(B, H, T, S)``;
            differentiable (T5).
        sliding_window: keys that a query attends, its own included.
        softcap: see `attnfast.attention` (Gemma 2).
        s_aux: one logit per head, ``(H,)``, in the denominator alone; differentiable (gpt-oss).
        sinks: likewise one per query, ``(B, H, T, 1)`` (Inkling 2).
        **kwargs: of these count ``output_attentions``, which is True too while transformers records
            attentions; ``deterministic``; ``indices``, int ``(B, T, K)``, the only keys that a
            query may attend (DeepSeek V3.2); and without a mask ``cu_seq_lens_q``,
            ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``, by which a batch of one holds
            many sequences. ``head_mask`` and ``block_indices`` are refused.

    Returns:
        out ``(B, T, H, D_v)``, and with ``output_attentions`` the weights after dropout,
        ``(B, H, T, S)``, else None.

    Raises:
        TypeError: as `attnfast.attention`.
        ValueError: as `attnfast.attention`; an option that is refused; ``cu_seq_lens_q`` together
            with ``position_bias``, ``sinks``, ``indices`` or ``output_attentions``, or with a batch
            of more than one.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{NAME}: {name} ({what}) must be None, got one:"
                f" load {_model_of(module)} with attn_implementation='eager'"
            )
    T, config = query.shape[2], getattr(module, "config", None)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    eager = config is not None and masks.why_eager(config) not in (None, masks.UNKNOWN)
    causal = bool(is_causal) and attention_mask is None and not eager
    options: dict[str, Any] = {
        "causal": causal,
        "window": (sliding_window - 1, None) if causal and sliding_window is not None else None,
        "align": "top_left" if T > 1 else "bottom_right",  # a single query is the newest
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": float(dropout),
        "deterministic": kwargs.get("deterministic") or None,
    }
    with_weights, indices = _wants_weights(config, kwargs), kwargs.get("indices")
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        asked = with_weights or None
        given = {"output_attentions": asked, "position_bias": position_bias, "indices": indices}
        given["sinks"] = sinks
        for name, one in given.items():
            if one is not None:
                raise ValueError(f"{NAME}: {name} must not come with cu_seq_lens_q, got both")
        if query.shape[0] != 1:
            requirement = "a batch of one for cu_seq_lens_q"
            raise ValueError(f"{NAME}: query must be {requirement}, got {tuple(query.shape)}")
        return calls.packed(query, key, value, kwargs, options), None

    (B, _, S, _), bias = key.shape, position_bias
    mask: Any = attention_mask
    lengths = calls.whole(key) if T == 1 else None
    if isinstance(mask, structured.StructuredMask):
        packed = mask.ends is not None
        beyond = packed and (with_weights or bias is not None or sinks is not None)
        beyond = beyond or (indices is not None and (packed or mask.blocks is not None))
        if beyond or not structured.fits(mask, B, T, S):
            mask = mask.dense()
        else:
            options |= structured.options(mask)
            if packed:
                ends = {"cu_seq_lens_q": mask.ends, "max_length_q": mask.longest}
                return calls.packed(query, key, value, ends, options), None
            lengths = structured.lengths(mask) if T == 1 else None
            keys = None if mask.keys is None else mask.keys[:, None, None]
            mask = keys if mask.blocks is None else mask.blocks
    if isinstance(mask, Tensor) and mask.is_floating_point():
        bias = mask if bias is None else bias + mask
        mask = None
    if query.shape[0] == 1 < B:  # learned queries
        query = query.expand(B, -1, -1, -1)
    if indices is not None:
        if calls.gathers(query, mask, bias, dropout, with_weights):
            options["indices"], mask, lengths = calls.attended(indices, mask), None, None
        else:
            chosen = torch.zeros((*indices.shape[:2], S), dtype=torch.bool, device=key.device)
            chosen = chosen.scatter(-1, indices.long(), True)[:, None]
            mask = chosen if mask is None else mask & chosen
    drops_or_learns = dropout or calls.needs_gradients(query, key, value, bias, s_aux)
    more = with_weights or sinks is not None or drops_or_learns or options["deterministic"]
    if not (lengths is None or more):
        return calls.decoded(query, key, value, lengths, mask, bias, options), None
    options |= {"return_lse": sinks is not None, "return_weights": with_weights}
    result = attention(query, key, value, mask=mask, bias=bias, **options)
    out, weights = calls.with_sinks(result, sinks, with_weights)
    return out.transpose(1, 2).contiguous(), weights  # a view: out has query's memory order


def _wants_weights(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call or the configuration says so, or transformers' hooks wait for weights."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(config, "output_attentions", None)
    capturing = sys.modules.get("transformers.utils.output_capturing")  # not in 5.0
    if not asked and capturing is not None:
        collected = capturing._active_collector.get() or {}
        asked = any(name.endswith("attentions") for name in collected)
    return bool(asked)


def _model_of(module: nn.Module) -> str:
    """The model's type as its configuration says it, for messages."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return f"a {model_type!r} model" if model_type else "the model"


def _library() -> Any:
    """The transformers package, if it has what `register` needs."""
    try:
        library = importlib.import_module("transformers")
        masking = importlib.import_module("transformers.masking_utils")
        importlib.import_module("transformers.modeling_utils")
        library.AttentionInterface, library.AttentionMaskInterface  # noqa: B018
        masking.sdpa_mask, masking.eager_mask  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{NAME}: transformers 5 must be installed: {error}") from None
    return library
