"""One architecture's generation, by eager attention and by attnfast, with every kind of cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from . import inputs, models
from .differences import Different, close

MAPPINGS = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
NEW = 6  # tokens: more than a tiny window
WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
}


def model_class(name: str) -> Any:
    """The class that generates, of a model type; None if there is none."""
    for mapping in MAPPINGS:
        found = mapping.get(name)
        if found is not None:
            return getattr(transformers, found if isinstance(found, str) else found[0], None)
    return None


def compare(cls: Any, config: Any, implementation: str, ran: list[str]) -> None:
    """Tokens and logits of both, padded on the left, in every way in which eager's generates.

    Raises:
        Different: Where they are not equal.
    """
    try:
        eager = models.make(cls, config, "eager")
        models.spread(eager)
        ours = models.make(cls, config, implementation)
        ours.load_state_dict(eager.state_dict())
        for model in (eager, ours):
            _name_tokens(model.generation_config)
        given = _prompt(eager)
    except Exception:
        return
    for way, more in WAYS.items() if given is not None else ():
        try:
            expected = _generated(eager, given, more)
        except Exception:
            continue
        found = _generated(ours, given, more)
        _check(expected, found, way)
        ran.append(way)
        cache = getattr(expected, "past_key_values", None)
        if way != "beams" and any(getattr(cache, "is_sliding", ())):
            ran.append(f"{way}, sliding")


def _name_tokens(config: Any) -> None:
    """Tokens without which nothing is generated, where the model names none."""
    for name, token in {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 0}.items():
        if getattr(config, name) is None:
            setattr(config, name, token)


def _prompt(model: Any) -> dict[str, Any] | None:
    """Inputs padded on the left with which a model generates."""
    for given in inputs.sets(model, "left"):
        prompt = {key: x for key, x in given.items() if not key.startswith("decoder_")}
        try:
            _generated(model, prompt, {})
        except Exception:
            continue
        return prompt
    return None


def _generated(model: Any, given: dict[str, Any], more: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **copy.deepcopy(given),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **more,
    )


def _check(expected: Any, found: Any, way: str) -> None:
    a, b = expected.sequences, found.sequences
    if way == "beams":
        close(expected.sequences_scores, found.sequences_scores, f"{way}: scores")
        return
    if a.shape != b.shape:
        raise Different(f"{way}: {tuple(b.shape)} tokens, not {tuple(a.shape)}")
    new = len(expected.logits)
    for i, (x, y) in enumerate(zip(expected.logits, found.logits, strict=True)):
        close(x, y, f"{way}: logits of token {i}")
        at = a.shape[1] - new + i
        if not torch.equal(a[:, at], b[:, at]):
            return  # a tie, after which the sequences are others
