"""Which masks a model of transformers gets with attnfast, and why.

Code that is made for fused attention gets bool masks, or none where being causal says it all, as
from transformers' ``sdpa_mask``; where their structure is understood, they come as a
`StructuredMask`, and their bools are not made for attention. All other code gets eager's float
masks, which every model can take, and a warning that says why. What its classes and its module say
of themselves decides, never a model's name.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _mask_functions

NAME = "attnfast.integrations.transformers"
UNKNOWN = "none of its models is loaded"
# Code that takes a way of its own where the implementation is called "sdpa".
ASKS_THE_NAME = re.compile(r"""_attn_implementation\s*(==|!=|in|not in)\s*[^\n:]*["']sdpa["']""")
# But not if the other way is to pass the keys that were chosen, which bool masks may go with,
PASSES_KEYS = "indices=sparse_indices"
# or if it only drops queries, where every mask is there to drop them too.
DROPS_QUERIES = re.compile(ASKS_THE_NAME.pattern + r"[^\n]*\n\s*and \(logits_to_keep > 1 or ")
ALWAYS_CAUSAL = "self.is_causal = True"  # layers that are causal whenever they get no mask


class Needs(NamedTuple):
    """What models of one class of configuration need.

    Attributes:
        eager: Why they need eager's masks; None if they do not.
        all_masks: Whether no mask at all would be taken for a causal one.
        causal_masks: Whether no mask at all would not be taken for a causal one.
    """

    eager: str | None
    all_masks: bool = False
    causal_masks: bool = False


_needs: dict[type, Needs] = {}


def attention_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """What transformers' mask functions call under our name."""
    masks = sys.modules["transformers.masking_utils"]
    mask: Tensor | None
    if why_eager(config) is not None:
        mask = masks.eager_mask(*args, config=config, **kwargs)
        return mask
    needs = _needs_of(type(config))
    if needs.all_masks:
        kwargs["allow_is_bidirectional_skip"] = False
    of_layers_alone = getattr(config, "use_bidirectional_attention", None) is True
    if needs.causal_masks or of_layers_alone:
        kwargs["allow_is_causal_skip"] = False
    if args or "mask_function" not in kwargs:
        mask = masks.sdpa_mask(*args, config=config, **kwargs)
        return mask
    return _mask_functions.attention_mask(masks.sdpa_mask, config=config, **kwargs)


def why_eager(config: Any) -> str | None:
    """Why models of a configuration, or of its text model's, need eager's masks; None if not.

    Warns once per class of configuration that does.
    """
    text = getattr(config, "text_config", None)
    kinds = [type(config)] if text is None else [type(config), type(text)]
    reasons: list[str | None] = [_needs_of(kind).eager for kind in kinds]
    return next((reason for reason in reasons if reason is not None), None)


def forget() -> None:
    """Forget what was found, and thereby what was warned about."""
    _needs.clear()


@torch.compiler.assume_constant_result
def _needs_of(kind: type) -> Needs:
    if kind not in _needs:
        found = _needs[kind] = _found(kind)
        if found.eager is not None:
            warnings.warn(
                f"{NAME}: models of {kind.__name__} get the float masks of eager attention,"
                f" T x S of them: {found.eager}",
                stacklevel=4,
            )
    return _needs[kind]


def _found(kind: type) -> Needs:
    """From the classes and the source of the models that have this configuration."""
    models = _models(kind)
    if not models:
        return Needs(UNKNOWN)
    for model in models:
        fused = model._supports_flash_attn and model._supports_attention_backend
        if not (model._supports_sdpa or fused):
            name = model.__name__
            return Needs(f"{name} supports neither sdpa nor other fused attention")
    all_masks = causal_masks = False
    for module in sorted({model.__module__ for model in models}):
        try:
            source = inspect.getsource(sys.modules[module])
        except (KeyError, OSError, TypeError):
            return Needs(f"the source of {module} cannot be read")
        rest = DROPS_QUERIES.sub("", source)
        if ASKS_THE_NAME.search(rest) and PASSES_KEYS not in source:
            return Needs(f"{module} does otherwise where attention is called 'sdpa'")
        all_masks = all_masks or ALWAYS_CAUSAL in source
        causal_masks = causal_masks or rest != source
    return Needs(None, all_masks, causal_masks)


def _models(kind: type) -> list[Any]:
    """Loaded models of a configuration or of its nearest base, or else those beside it."""
    base = sys.modules["transformers.modeling_utils"].PreTrainedModel
    loaded = sorted(set(_subclasses(base)), key=lambda model: model.__qualname__)
    for ancestor in kind.__mro__:
        found = [model for model in loaded if model.config_class is ancestor]
        if found:
            return found
    package = kind.__module__.rpartition(".")[0]
    return [model for model in loaded if package and model.__module__.startswith(f"{package}.")]


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
