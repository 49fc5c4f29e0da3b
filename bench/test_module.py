"""The whole layer, ours against `torch.nn.MultiheadAttention` with the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast

from . import OURS
from .environment import Settings
from .shapes import DTYPES, LayerCase, padding_mask
from .timing import Call, Race


@pytest.mark.benchmark(group="module", disable_gc=True)
def test_module(layer_case: LayerCase, race: Race, settings: Settings) -> None:
    _, B, T, E, H, dtype, mode, weights, padding = layer_case
    made: dict[str, Any] = {"batch_first": True, "dtype": DTYPES[dtype]}
    stock = nn.MultiheadAttention(E, H, **made)
    layer = attnfast.MultiheadAttention(E, H, backend=settings.backend, **made)
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(B, T, E, dtype=DTYPES[dtype], requires_grad=mode == "train")
    grad = torch.randn(B, T, E, dtype=DTYPES[dtype])
    mask = padding_mask(B, T) if padding else None

    def call(module: nn.MultiheadAttention) -> Call:
        module.train(mode == "train")
        leaves = {"x": x, **dict(module.named_parameters())}

        def forward() -> dict[str, Tensor]:
            out, averages = module(x, x, x, key_padding_mask=mask, need_weights=weights)
            return {"out": out, "weights": averages} if weights else {"out": out}

        def inference() -> dict[str, Tensor]:
            with torch.no_grad():
                return forward()

        def training() -> dict[str, Tensor]:
            results = forward()
            gradients = torch.autograd.grad(results["out"], list(leaves.values()), grad)
            named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
            return {name: result.detach() for name, result in results.items()} | named

        return training if mode == "train" else inference

    race(layer_case, {OURS: call(layer), "nn.MultiheadAttention": call(stock)})
