"""MultiheadAttention under torch's other machinery: exporters, compilers, parametrizations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from attnfast import MultiheadAttention, replace, restore

B, T, E, H = 2, 5, 16, 4

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
    "extras": {
        "num_kv_heads": 2,
        "window": (3, 0),
        "softcap": 2.0,
        "sinks": True,
        "alibi": True,
        "similarity": "cosine",
    },
}


class Masked(nn.Module):
    """Self-attention with padding, which exporters take as an input."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = MultiheadAttention(E, H, batch_first=True, **options)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x, key_padding_mask=padding, is_causal=True)
        return out, weights


def padded(batch: int = B, length: int = T) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, length // 2 :] = True
    padding[1] = True  # nothing to attend
    return torch.randn(batch, length, E), padding


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_onnx(options: dict[str, Any], exporter: str, tmp_path: Path) -> None:
    """Our operators become ONNX's own, for any batch and length, and ONNX Runtime agrees."""
    model, path = Masked(**options).eval(), str(tmp_path / "model.onnx")
    names: dict[str, Any] = {"input_names": ["x", "padding"], "output_names": ["out", "weights"]}
    if exporter == "dynamo":
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        shapes = {"x": axes, "padding": axes}
        torch.onnx.export(
            model, padded(), path, dynamo=True, dynamic_shapes=shapes, verbose=False, **names
        )
    else:
        torch.onnx.export(model, padded(), path, dynamo=False, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, padding = padded(3, 9) if exporter == "dynamo" else padded()
    results = session.run(None, {"x": x.numpy(), "padding": padding.numpy()})
    with torch.no_grad():
        expected = model(x, padding)
    for got, want in zip(results, expected, strict=True):
        numpy.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)
    assert not torch.onnx.is_in_onnx_export()


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_export(options: dict[str, Any]) -> None:
    """torch.export keeps our operator, for any batch and length."""
    model = Masked(**options).eval()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with torch.no_grad():
        program = torch.export.export(model, padded(), dynamic_shapes=(axes, axes))
    operators = {str(node.target) for node in program.graph.nodes}
    assert "attnfast.cpu_fwd.default" in operators
    inputs = padded(3, 9)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripting_raises_clearly() -> None:
    model = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    replace(model)
    for module in (MultiheadAttention(E, H), model):
        with pytest.raises(NotImplementedError) as raised:
            torch.jit.script(module)
        assert str(raised.value) == (
            "MultiheadAttention: torch.jit.script cannot compile attnfast's kernels: use "
            "torch.compile or torch.export, or call attnfast.restore(model) before scripting"
        )
    restore(model)
    torch.jit.script(model)


@pytest.mark.parametrize("where", ["in_proj_weight", "out_proj.weight"])
def test_parametrizations_take_part(where: str) -> None:
    """Weights are read on every forward, so what computes them trains."""
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, T, E)
    plain = ours(x, x, x)[0]
    name, _, inner = where.rpartition(".")
    owner = ours.get_submodule(name)
    parametrizations.weight_norm(owner, inner)
    torch.testing.assert_close(ours(x, x, x)[0], plain)  # as initialised, the same weight
    magnitudes = owner.parametrizations[inner].original0
    with torch.no_grad():
        magnitudes *= 2
    assert not torch.allclose(ours(x, x, x)[0], plain)
    ours(x, x, x)[0].square().sum().backward()
    assert magnitudes.grad.abs().sum() > 0
    with parametrize.cached():
        ours(x, x, x)


@pytest.mark.filterwarnings("ignore:.*is_fx_tracing.*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_encoder_trains_as_the_eager_one(dtype: torch.dtype) -> None:
    """The whole of it in one graph, with padding and under autocast."""

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dropout=0.0)
        model = nn.TransformerEncoder(layer, 2)
        replace(model)
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        x, padding = torch.randn(4, T, E), torch.zeros(4, T, dtype=torch.bool)
        padding[0, 3:] = True
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = step(x, src_key_padding_mask=padding)
            loss = out[~padding].float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    eager = losses(False)
    assert eager[-1] < eager[0]
    assert losses(True) == pytest.approx(eager, rel=1e-5 if dtype == torch.float32 else 1e-2)
