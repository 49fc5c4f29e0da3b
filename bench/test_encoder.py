"""A Transformer encoder, stock against `attnfast.replace`: inference, and a whole training step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attnfast

from . import OURS
from .environment import Settings
from .shapes import DTYPES, ENCODER_LAYERS, EncoderCase, padding_mask
from .timing import Call, Race


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.benchmark(group="encoder", disable_gc=True)
def test_encoder(encoder_case: EncoderCase, race: Race, settings: Settings) -> None:
    _, B, T, E, H, dtype, mode, padding = encoder_case
    half = DTYPES[dtype] if DTYPES[dtype] != torch.float32 else None
    block = nn.TransformerEncoderLayer(
        E, H, 4 * E, dropout=0.0, activation="gelu", batch_first=True
    )
    stock = nn.TransformerEncoder(block, ENCODER_LAYERS).train(mode == "step")
    ours = copy.deepcopy(stock)
    attnfast.replace(ours, backend=settings.backend, verbose=False)
    x = torch.randn(B, T, E)
    mask = padding_mask(B, T) if padding else None
    kept = torch.ones(B, T, 1).bool() if mask is None else ~mask[..., None]  # torch zeroes padding

    def training(model: nn.Module) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> dict[str, Tensor]:
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                out = model(x, src_key_padding_mask=mask) * kept
            loss = out.float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"out": out.detach().to(DTYPES[dtype]), "loss": loss.detach().to(DTYPES[dtype])}

        return step

    def inference(model: nn.Module) -> Call:
        given = x.to(DTYPES[dtype])
        model.to(DTYPES[dtype])

        def call() -> dict[str, Tensor]:
            with torch.inference_mode():
                out = model(given, src_key_padding_mask=mask)
                return {"out": out * kept[:, : out.shape[1]]}

        return call

    make = training if mode == "step" else inference
    race(encoder_case, {OURS: make(ours), "nn.TransformerEncoder": make(stock)})
