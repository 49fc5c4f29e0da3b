"""Long sequences in transformers' models: no mask of all scores is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnfast.integrations import _mask_functions as functions
from attnfast.integrations import transformers as integration
from tools.transformers_sweep import configs, models


@pytest.fixture(autouse=True)
def name() -> Iterator[str]:
    yield integration.register()
    integration.unregister()


class Largest(TorchDispatchMode):
    """The most elements that any operator's result had; masks by structure have none."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(results):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return results


LONG = 8192
KINDS = ("Mistral", "Gemma", "Gemma2", "Gemma3", "GptOss", "Qwen2", "Qwen3", "Llama4")


def long_model(kind: str, implementation: str) -> Any:
    """Tiny, with windows or chunks of four tokens where it has any."""
    cls = getattr(transformers, f"{kind}ForCausalLM")
    return models.make(cls, configs.tiny_config(cls.config_class, "fixed"), implementation).model


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_of_all_scores_is_made(kind: str, padding: str, name: str) -> None:
    model, ids = long_model(kind, name), torch.randint(3, 50, (1, LONG))
    own = torch.ones_like(ids)
    own[:, {"none": slice(0), "left": slice(100), "right": slice(-100, None)}[padding]] = 0
    with torch.no_grad(), Largest() as largest:
        model(ids, attention_mask=own)
    assert LONG <= largest.elements < LONG * LONG


def test_masks_as_bools_are_of_all_scores(name: str) -> None:
    """Which `Largest` sees."""
    functions.forget()
    with torch.no_grad(), Largest() as largest:
        long_model("Mistral", name)(torch.randint(3, 50, (1, LONG)))
    assert largest.elements >= LONG * LONG
