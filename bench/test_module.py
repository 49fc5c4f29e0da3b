"""The whole layer, ours against `torch.nn.MultiheadAttention` with the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnfast

from . import OURS
from .environment import Settings
from .shapes import LayerCase
from .timing import Call, Race


@pytest.mark.benchmark(group="module", disable_gc=True)
def test_module(layer_case: LayerCase, race: Race, settings: Settings) -> None:
    _, B, T, E, H, mode, weights, padding = layer_case
    stock = nn.MultiheadAttention(E, H, batch_first=True)
    layer = attnfast.MultiheadAttention(E, H, batch_first=True, backend=settings.backend)
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(B, T, E, requires_grad=mode == "train")
    grad = torch.randn(B, T, E)
    lengths = torch.linspace(T, T // 2, B).long()  # a quarter of the batch is padding
    mask = torch.arange(T) >= lengths[:, None] if padding else None  # (B, T), True = padding

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
