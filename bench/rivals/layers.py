"""Who competes in the rows of whole layers: ours, torch's, and one written by hand around SDPA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnfast
from attnfast import lens

from .. import OURS
from ..clock import Call, Results
from ..grid import DTYPES, ENCODER_LAYERS, EncoderCase, LayerCase, WatchedCase, padding_mask
from ..race import Entries

BY_HAND = "linear + torch.sdpa"
UNOBSERVED = "attnfast, not observed"
Forward = Callable[[Tensor], Results]


def layer_entries(
    case: LayerCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """Self-attention by a whole layer; the arguments are those of `attention.entries`."""
    dtype = DTYPES[case.dtype]
    made: dict[str, Any] = {"batch_first": True, "dtype": dtype, "device": device}
    stock = nn.MultiheadAttention(case.E, case.H, **made).train(case.mode == "train")
    mask = padding_mask(case.B, case.T, device) if case.padding else None
    layers: dict[str, tuple[nn.Module, Forward]] = {}
    if backend is not None:
        ours = attnfast.MultiheadAttention(case.E, case.H, backend=backend, **made)
        ours.load_state_dict(stock.state_dict())
        ours.train(case.mode == "train")
        layers[OURS] = (ours, _module(ours, case, mask))
    layers["nn.MultiheadAttention"] = (stock, _module(stock, case, mask))
    absent = {}
    if case.weights:
        absent[BY_HAND] = "gives no weights"
    else:
        layers[BY_HAND] = (stock, _by_hand(stock, case, mask))
    xs = [
        torch.randn(case.B, case.T, case.E, device=device)
        .to(dtype)
        .requires_grad_(case.mode == "train")
        for _ in range(copies)
    ]
    grad = torch.randn(case.B, case.T, case.E, device=device).to(dtype)
    calls = {
        name: [_pass(module, forward, x, grad, case.mode) for x in xs]
        for name, (module, forward) in layers.items()
    }
    return Entries(calls, absent)


def _module(module: nn.Module, case: LayerCase, mask: Tensor | None) -> Forward:
    def forward(x: Tensor) -> Results:
        out, averages = module(x, x, x, key_padding_mask=mask, need_weights=case.weights)
        return {"out": out, "weights": averages} if case.weights else {"out": out}

    return forward


def _by_hand(stock: nn.MultiheadAttention, case: LayerCase, mask: Tensor | None) -> Forward:
    """The layer that people write: one projection, `F.scaled_dot_product_attention`, another."""
    attend = None if mask is None else ~mask[:, None, None]

    def forward(x: Tensor) -> Results:
        packed = F.linear(x, stock.in_proj_weight, stock.in_proj_bias)
        q, k, v = packed.view(case.B, case.T, 3, case.H, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        joined = heads.transpose(1, 2).reshape(case.B, case.T, case.E)
        return {"out": F.linear(joined, stock.out_proj.weight, stock.out_proj.bias)}

    return forward


def _pass(module: nn.Module, forward: Forward, x: Tensor, grad: Tensor, mode: str) -> Call:
    leaves = {"x": x, **dict(module.named_parameters())}

    def inference() -> Results:
        with torch.no_grad():
            return forward(x)

    def training() -> Results:
        results = forward(x)
        gradients = torch.autograd.grad(results["out"], list(leaves.values()), grad)
        named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
        return {name: result.detach() for name, result in results.items()} | named

    return training if mode == "train" else inference


def encoder_entries(
    case: EncoderCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """A Transformer encoder, stock and after `attnfast.replace`; arguments as before.

    Inference, or a whole training step: forward, backward and AdamW.
    """
    models: dict[str, nn.Module] = {}
    stock, xs, mask = _encoder(case, device, copies)
    if backend is not None:
        models[OURS] = copy.deepcopy(stock)
        attnfast.replace(models[OURS], backend=backend, verbose=False)
    models["nn.TransformerEncoder"] = stock
    make = _steps if case.mode == "step" else _inferences
    return Entries({name: make(model, case, xs, mask) for name, model in models.items()}, {})


def watched_entries(
    case: WatchedCase, backend: str, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """A training step of our encoder, observed and not; arguments as before."""
    plain, xs, mask = _encoder(case, device, copies)
    attnfast.replace(plain, backend=backend, verbose=False)
    watched = copy.deepcopy(plain)

    def observed(step: Call) -> Results:
        with lens.observe(watched, shares=case.layer == "shares"):
            return step()

    steps = _steps(watched, case, xs, mask)
    ours = [lambda step=step: observed(step) for step in steps]
    return Entries({OURS: ours, UNOBSERVED: _steps(plain, case, xs, mask)}, {})


def _encoder(
    case: EncoderCase, device: torch.device, copies: int
) -> tuple[nn.Module, list[Tensor], Tensor | None]:
    """Torch's encoder, as many inputs, and the mask of their padding."""
    block = nn.TransformerEncoderLayer(
        case.E, case.H, 4 * case.E, dropout=0.0, activation="gelu", batch_first=True, device=device
    )
    stock = nn.TransformerEncoder(block, ENCODER_LAYERS).train(case.mode == "step")
    xs = [torch.randn(case.B, case.T, case.E, device=device) for _ in range(copies)]
    return stock, xs, padding_mask(case.B, case.T, device) if case.padding else None


def _kept(case: EncoderCase, mask: Tensor | None, device: torch.device) -> Tensor:
    """(B, T, 1): False where torch gives zeros in inference and something else in training."""
    return torch.ones(case.B, case.T, 1, device=device).bool() if mask is None else ~mask[..., None]


def _steps(
    model: nn.Module, case: EncoderCase, xs: list[Tensor], mask: Tensor | None
) -> list[Call]:
    dtype, device = DTYPES[case.dtype], xs[0].device
    kept = _kept(case, mask, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(x: Tensor) -> Results:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = model(x, src_key_padding_mask=mask) * kept
        loss = out.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"out": out.detach().to(dtype), "loss": loss.detach().to(dtype)}

    return [lambda x=x: step(x) for x in xs]


def _inferences(
    model: nn.Module, case: EncoderCase, xs: list[Tensor], mask: Tensor | None
) -> list[Call]:
    dtype = DTYPES[case.dtype]
    kept = _kept(case, mask, xs[0].device)
    model.to(dtype)
    given = [x.to(dtype) for x in xs]

    def call(x: Tensor) -> Results:
        with torch.inference_mode():
            out = model(x, src_key_padding_mask=mask)
            return {"out": out * kept[:, : out.shape[1]]}

    return [lambda x=x: call(x) for x in given]
