"""Programs that torch.export and torch.distributed.pipelining capture train as their modules do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.func import functional_call, grad

import attnfast


class AllResults(nn.Module):
    """Attention by every differentiable tensor, with every differentiable result."""

    def __init__(self, weights: bool | str, dropout_p: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.randn(2, 2, 7, 8))
        self.v = nn.Parameter(torch.randn(2, 2, 7, 4))
        self.bias = nn.Parameter(torch.randn(4, 5, 7))
        self.sinks = nn.Parameter(torch.randn(4))
        self.weights, self.dropout_p = weights, dropout_p

    def forward(self, q: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        out, lse, stats, weights = attnfast.attention(
            q,
            self.k,
            self.v,
            bias=self.bias,
            sinks=self.sinks,
            causal=True,
            align="bottom_right",
            softcap=3.0,
            dropout_p=self.dropout_p,
            dropout_seed=seed,
            return_lse=True,
            return_stats=True,
            return_weights=self.weights,
        )
        return out, lse, stats.entropy, weights


class Varlen(nn.Module):
    """One tensor as query, key and value, one of boundaries."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(7, 2, 8))

    def forward(self, scale: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        x = self.x * scale
        return (attnfast.varlen_attention(x, x, x, ends, ends, 4, 4, causal=True),)


class Layers(nn.Module):
    """Layers with every kind of parameter, and torch's around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        attnfast.replace(self.first)
        self.second = attnfast.MultiheadAttention(
            16, 4, batch_first=True, num_kv_heads=2, sinks=True, alibi=True, similarity="cosine"
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        out, weights = self.second(x, x, x, is_causal=True)
        return x + out, weights


def results(weights: bool | str, dropout_p: float) -> tuple[nn.Module, tuple[Tensor, ...]]:
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    return AllResults(weights, dropout_p), (q, torch.tensor([3, 4]))


MODELS = {
    "every result": lambda: results(True, 0.3),
    "mean weights": lambda: results("mean", 0.0),
    "varlen": lambda: (Varlen(), (torch.ones(1), torch.tensor([0, 3, 7]))),
    "layers": lambda: (Layers(), (torch.randn(3, 5, 16, requires_grad=True),)),
}


def gradients(run: Any, parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """First and second derivatives of all results by parameters and inputs."""
    leaves = [*parameters.values(), *(x for x in inputs if x.requires_grad)]
    loss = sum(x.sin().sum() for x in run(*inputs))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    return [*first, *second]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_has_the_gradients_of_its_module(name: str, strict: bool) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    expected = gradients(model, dict(model.named_parameters()), inputs)
    program = torch.export.export(model, inputs, strict=strict)
    for kind, exported in (
        ("as captured", program.module()),
        ("decomposed", program.run_decompositions().module()),
    ):
        parameters = dict(exported.named_parameters())
        found = gradients(exported, {n: parameters[n] for n, _ in model.named_parameters()}, inputs)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, msg=lambda text, kind=kind: f"{kind}: {text}")


def test_a_program_captured_without_gradients_trains_after_a_file(tmp_path: Any) -> None:
    model, inputs = MODELS["layers"]()
    with torch.no_grad():
        program = torch.export.export(model, inputs)
    torch.export.save(program, tmp_path / "layers.pt2")
    loaded = torch.export.load(tmp_path / "layers.pt2").module()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, loaded)]
    losses = []
    for module, optimizer in zip((model, loaded), optimizers, strict=True):
        losses.append([])
        for _ in range(3):
            loss = module(inputs[0].detach())[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*losses)
    assert losses[0][2] < losses[0][0]


def test_an_exported_program_can_be_compiled_and_transformed() -> None:
    model, (x,) = MODELS["layers"]()
    exported = torch.export.export(model, (x,)).module()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def derivative(module: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(module, parameters, (x.detach(),))[0].square().sum()

        return grad(loss)(parameters)

    expected = derivative(model)
    torch.testing.assert_close(derivative(exported), expected)
    compiled = torch.compile(exported, backend="aot_eager", fullgraph=True)
    compiled(x)[0].square().sum().backward()
    for name, p in exported.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_pipeline_stages_train_as_their_model_does() -> None:
    torch.manual_seed(0)
    model, (x,) = MODELS["layers"]()
    x = x.detach()
    halves = torch.randn(2, *x.shape)
    for half in halves:
        model(half)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    pipe = pipeline(model, (x,), split_spec={"second": SplitPoint.BEGINNING})
    stages = [pipe.get_stage_module(i) for i in range(pipe.num_stages)]
    assert len(stages) == 2
    for half in halves:
        stages[1](stages[0](half))[0].square().sum().backward()
    found = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    torch.testing.assert_close(found, expected)
