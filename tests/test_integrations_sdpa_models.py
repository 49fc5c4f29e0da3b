"""Models that call torch's function run our kernels while `integrations.sdpa` is active."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from kernel_calls import kernel_calls
from torch import Tensor, nn

from attnfast.integrations import sdpa


@pytest.fixture
def active() -> Iterator[None]:
    sdpa.activate()
    yield
    sdpa.restore()


def transformer(dropout: float) -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 32, dropout=dropout, batch_first=True)


def translate(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A padded source and a causal target, and which of the target's positions count."""
    rng = torch.Generator().manual_seed(1)
    source, target = (torch.randn(3, n, 16, generator=rng) for n in (7, 5))
    padding = torch.arange(7) >= torch.tensor([7, 4, 2])[:, None]
    out = model(
        source,
        target,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.bool),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
        tgt_is_causal=True,
    )
    return out, padding


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_transformer_uses_it() -> None:
    """Six attentions: two encoder layers, and two decoder layers that attend to both sides."""
    stock, ours = transformer(0.0), transformer(0.0)
    answers = []
    for model, turn, attentions in ((stock, sdpa.restore, 0), (ours, sdpa.activate, 6)):
        turn()
        try:
            learn = lambda m=model: translate(m)[0].square().sum().backward()  # noqa: E731
            assert kernel_calls(learn) == attentions
            with torch.no_grad():
                assert kernel_calls(lambda m=model: translate(m.eval())) == attentions
                answers.append(translate(model)[0])
        finally:
            sdpa.restore()
    torch.testing.assert_close(*answers)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("active")
def test_torchs_transformer_drops_in_the_kernel() -> None:
    model = transformer(0.1)
    assert kernel_calls(lambda: translate(model)) == 6


@pytest.fixture(scope="module")
def vision_transformer() -> Any:
    """The class of timm, imported without torchvision, which timm only needs for image files."""
    parts = ("ops", "ops.misc", "transforms", "transforms.functional", "datasets")
    parts += ("models", "models.feature_extraction")
    names = ["torchvision", *(f"torchvision.{part}" for part in parts)]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, MagicMock(name=name))
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = nn.BatchNorm2d
        from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer


def test_timms_vit_uses_it(vision_transformer: Any) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = vision_transformer(**options, num_classes=5)
    images = torch.randn(3, 3, 32, 32)

    def run() -> list[Tensor]:
        out = model(images)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    expected = run()
    assert kernel_calls(run) == 0
    sdpa.activate()
    try:
        assert kernel_calls(run) == options["depth"]
        torch.testing.assert_close(run(), expected)
        dropping = vision_transformer(**options, num_classes=5, attn_drop_rate=0.1)
        assert kernel_calls(lambda: dropping(images)) == options["depth"]
        with torch.inference_mode():
            assert kernel_calls(lambda: model.eval()(images)) == options["depth"]
    finally:
        sdpa.restore()
