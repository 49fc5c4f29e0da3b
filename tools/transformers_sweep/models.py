"""Tiny models of every architecture of transformers, made generically.

Sizes come from the names of the configuration's fields, inputs from the names of ``forward``'s
parameters. Nothing here knows an architecture by its name.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from . import configs, inputs

LARGEST = 110_000_000  # parameters


class CannotBuild(Exception):
    """Why there is no tiny model of an architecture."""


def model_classes() -> dict[str, type[transformers.PreTrainedModel]]:
    """One model class for every configuration that has one, by the configuration's ``model_type``.

    transformers' own choice for ``AutoModel`` where it has one, else the first that computes.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    folder = Path(inspect.getfile(transformers)).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        try:
            importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError:
            continue
    chosen: dict[str, type[transformers.PreTrainedModel]] = {}
    base = transformers.PreTrainedModel
    ordered = sorted(_subclasses(base), key=lambda c: (len(c.__name__), c.__name__))
    for cls in ordered:
        config = cls.config_class
        if not isinstance(config, type) or not cls.__module__.startswith("transformers.models."):
            continue
        name = config.model_type or config.__name__
        names = MODEL_MAPPING_NAMES.get(name, ())
        preferred = cls.__name__ in ((names,) if isinstance(names, str) else names)
        computes = cls.forward is not nn.Module.forward
        if preferred or (computes and name not in chosen):
            chosen[name] = cls
    return dict(sorted(chosen.items()))


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def build(cls: type[transformers.PreTrainedModel]) -> tuple[Any, Any, dict[str, Any]]:
    """A model with eager attention, its configuration, and inputs that it takes.

    Raises:
        CannotBuild: No sizes that were tried give a model that runs.
    """
    reason = ""
    source = inspect.getsource(sys.modules[cls.__module__])
    for way in configs.WAYS:
        try:
            config = configs.tiny_config(cls.config_class, way, source)
            with torch.device("meta"):
                count = sum(p.numel() for p in make(cls, config, "eager").parameters())
            if count > LARGEST:
                reason = reason or f"{count / 1e6:.0f} million parameters"
                continue
            model = make(cls, config, "eager")
            spread(model)
            return model, config, first_that_runs(model)
        except Exception as error:  # whatever a model says of sizes that it was not made for
            reason = told(error)
    raise CannotBuild(reason)


def first_that_runs(model: Any) -> dict[str, Any]:
    """Inputs without padding that a model takes; else what it says of the most that it is given."""
    reason: tuple[int, Exception] = (0, CannotBuild("forward takes none of the inputs known"))
    for given in inputs.sets(model, "none"):
        try:
            run(model, given)
        except Exception as error:
            reason = (len(given), error) if len(given) > reason[0] else reason
        else:
            return given
    raise reason[1]


def run(model: Any, given: dict[str, Any], **more: Any) -> Any:
    """One forward pass without gradients, its random numbers always the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**copy.deepcopy(given), **more)


def make(cls: type[transformers.PreTrainedModel], config: Any, implementation: str) -> Any:
    """A model in evaluation, as it is loaded with ``attn_implementation=``."""
    torch.manual_seed(0)
    return cls._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def told(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:150]


def spread(model: nn.Module) -> None:
    """Weights large enough for uneven attention, the same for every model of these shapes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and p.is_floating_point():
                p.normal_(std=1.5 * p.shape[-1] ** -0.5, generator=generator)
            elif not torch.isfinite(p).all():
                p.normal_(std=0.1, generator=generator)
