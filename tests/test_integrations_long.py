"""Long sequences in transformers' models: no mask of all scores is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from test_integrations_transformers import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnfast.integrations import _mask_functions as functions
from attnfast.integrations import transformers as integration


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
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
QWEN = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8} | SIZES
QWEN |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


def long_model(kind: str, implementation: str) -> Any:
    if kind in ("mistral", "gemma2", "gpt_oss"):
        return build(kind, implementation, sliding_window=64, head_dim=8, **SIZES)
    if kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            **QWEN, layer_types=["sliding_attention", "full_attention"]
        )
    elif kind == "gemma":
        config = transformers.GemmaConfig(**QWEN)
    else:
        config = (
            transformers.Qwen3Config(**QWEN)
            if kind == "qwen3"
            else transformers.Qwen2Config(**QWEN)
        )
    config._attn_implementation = implementation
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    "kind", ["mistral", "gemma", "gemma2", "gemma3", "gpt_oss", "qwen2", "qwen3"]
)
def test_no_mask_of_all_scores_is_made(kind: str, padding: str, name: str) -> None:
    model, ids = long_model(kind, name), torch.randint(3, 50, (1, LONG))
    own = torch.ones_like(ids)
    own[:, {"none": slice(0), "left": slice(100), "right": slice(-100, None)}[padding]] = 0
    with torch.no_grad(), Largest() as largest:
        model.model(ids, attention_mask=own)
    assert LONG <= largest.elements < LONG * LONG / 8


def test_masks_as_bools_are_of_all_scores(name: str) -> None:
    """Which `Largest` sees."""
    functions.forget()
    with torch.no_grad(), Largest() as largest:
        long_model("mistral", name).model(torch.randint(3, 50, (1, LONG)))
    assert largest.elements >= LONG * LONG
