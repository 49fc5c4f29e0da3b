"""torch.compile, with dynamic shapes, and torch.export: the same numbers, one graph, no warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import attnfast


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one graph through AOTAutograd, forward and backward, of any sizes."""
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def graphs() -> int:
    """How many graphs the test has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def leaves(B: int, T: int, S: int, D: int = 16, D_v: int = 8) -> tuple[Tensor, ...]:
    """A transposed q (B, 6, T, D), k, v, bias (6, 1, S), sinks (6,)."""
    shapes = (B, T, 6, D), (B, 3, S, D), (B, 3, S, D_v), (6, 1, S), (6,)
    q, k, v, bias, sinks = (torch.randn(shape) for shape in shapes)
    return tuple(x.requires_grad_() for x in (q.transpose(1, 2), k, v, bias, sinks))


def everything(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> list[Tensor]:
    out, lse, stats, weights = attnfast.attention(
        q,
        k,
        v,
        bias=bias,
        sinks=sinks,
        causal=True,
        align="bottom_right",
        window=(50, None),
        softcap=3.0,
        dropout_p=0.2,
        return_lse=True,
        return_stats="received",
        return_weights="mean",
    )
    return [out, lse, stats.entropy, weights, stats.received, stats.max_logit]


def assert_same(function: Any, other: Any, inputs: tuple[Tensor, ...], grads: int = 1) -> None:
    """Results, their strides, and the gradients of the first few of them."""
    found = []
    for call in (function, other):
        torch.manual_seed(0)
        results = call(*inputs)
        results = results if isinstance(results, (list, tuple)) else [results]
        wanted = [x for x in inputs if x.requires_grad]
        cotangents = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in results[:grads]]
        gradients = torch.autograd.grad(list(results[:grads]), wanted, cotangents)
        found.append([*results, *gradients])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)
        assert x.stride() == y.stride()


def test_every_option_with_dynamic_shapes_is_one_graph() -> None:
    function = compiled(everything)
    for B, T, S in ((2, 10, 12), (2, 7, 30), (5, 40, 11)):
        assert_same(function, everything, leaves(B, T, S), grads=4)
    assert graphs() == 1


def test_inductor() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnfast.attention(q * 2, k, v, causal=True).transpose(1, 2).flatten(2).relu()

    assert_same(torch.compile(f, fullgraph=True), f, leaves(2, 10, 12)[:3])


def test_one_tensor_as_query_key_and_value() -> None:
    def f(x: Tensor) -> Tensor:
        return attnfast.attention(x, x, x, causal=True)

    function = compiled(f)
    for T in (5, 9):
        assert_same(function, f, (torch.randn(2, 3, T, 8, requires_grad=True),))
    assert graphs() == 1


def test_varlen_with_shared_boundaries() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, ...]:
        out, stats, weights = attnfast.varlen_attention(
            q,
            k,
            v,
            ends,
            ends,
            longest,
            longest,
            causal=True,
            return_stats=True,
            return_weights=True,
        )
        return out, stats.entropy, weights

    function = compiled(f)
    for lengths in ((3, 4, 2, 8), (0, 5, 7, 2), (1, 12, 3)):
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        total = int(ends[-1])
        q, k, v = (torch.randn(total, 3, 8, requires_grad=True) for _ in range(3))

        def at(call: Any, ends: Tensor = ends, longest: int = max(lengths)) -> Any:
            return lambda *qkv: call(*qkv, ends, longest)

        assert_same(at(function), at(f), (q, k, v), grads=3)
    assert graphs() == 1


def test_chosen_keys() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
        return attnfast.attention(q, k, v, indices=indices, causal=True, align="bottom_right")

    function = compiled(f)
    for T, S, K in ((5, 9, 4), (3, 20, 7)):
        indices = torch.arange(2 * T * K).view(2, T, K) % S
        assert_same(function, f, (*leaves(2, T, S)[:3], indices))
    assert graphs() == 1


def test_windows_of_heads() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, window: Tensor) -> Tensor:
        return attnfast.attention(q, k, v, window=window, causal=True, align="bottom_right")

    function = compiled(f)
    for T, S in ((5, 9), (3, 20)):
        q, k, v = leaves(2, T, S)[:3]
        window = torch.arange(-1, 2 * q.shape[1] - 1).view(-1, 2)
        assert_same(function, f, (q, k, v, window))
    assert graphs() == 1


def test_decode() -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return attnfast.decode_attention(q, k, v, lengths, window=(9, None), return_lse=True)

    function = compiled(decode)
    for B, S in ((2, 20), (3, 33)):
        q, k, v = (x.detach() for x in leaves(B, 1, S)[:3])
        lengths = torch.randint(1, S, (B,))
        for x, y in zip(function(q, k, v, lengths), decode(q, k, v, lengths), strict=True):
            assert torch.equal(x, y)
    assert graphs() == 1


def test_sdpa() -> None:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attnfast.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    function = compiled(sdpa)
    for B, T, S in ((2, 10, 12), (3, 11, 7)):
        inputs = (*leaves(B, T, S)[:3], torch.rand(T, S) < 0.5)
        assert_same(function, sdpa, inputs)
    assert graphs() == 1


def test_the_reference_of_fp64() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnfast.attention(q, k, v, causal=True, return_lse=True)

    function = torch.compile(f, fullgraph=True, dynamic=True, backend="eager")
    for B, T, S in ((2, 10, 12), (4, 7, 9)):
        inputs = [x.detach().double().requires_grad_() for x in leaves(B, T, S)[:3]]
        assert_same(function, f, tuple(inputs), grads=2)
    assert graphs() == 1


def test_autocast() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attnfast.attention(q, k, v)

    assert compiled(f)(*leaves(2, 10, 12)[:3]).dtype == torch.bfloat16
    assert_same(compiled(f), f, leaves(2, 10, 12)[:3])


def test_nothing_is_traced_that_torch_2_10_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks the graph where torch is asked whether a device has autocast."""

    def untraceable(device: str) -> bool:
        torch._dynamo.graph_break()
        return device == "cpu"

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", untraceable)

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            fused = attnfast.attention(q, k, v, backend="cpu")
        return fused, attnfast.attention(q, k, v, backend="reference")

    q, k, v = (x.detach() for x in leaves(2, 10, 12)[:3])
    torch.compile(f, fullgraph=True, backend="eager")(q, k, v)


def test_dropout_of_forward_and_backward_agree() -> None:
    """Attention is linear in v, so <dv, v> = <grad, out>, if both drop the same entries."""
    for function in (torch.compile(dropped, fullgraph=True), compiled(dropped), dropped):
        q, k, v = leaves(2, 40, 50)[:3]
        out = function(q, k, v)
        grad = torch.randn_like(out)
        (dv,) = torch.autograd.grad(out, v, grad)
        torch.testing.assert_close((dv * v).sum(), (grad * out).sum())


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attnfast.attention(q, k, v, dropout_p=0.5)


def test_a_second_derivative_of_a_compiled_call_raises() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    out = compiled(lambda *x: attnfast.attention(*x))(q, k, v)
    with pytest.raises(RuntimeError, match=r"requires create_graph=False"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    torch._dynamo.reset()
    with functorch_config.patch(donated_buffer=False):
        out = compiled(lambda *x: attnfast.attention(*x))(q, k, v)
        (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
        torch.autograd.grad(first.square().sum(), q)


def test_an_error_in_compiled_code_is_the_same_error() -> None:
    q, k, v = leaves(2, 5, 7)[:3]
    with pytest.raises(Exception, match=r"attention: window's left side must be from 0 to"):
        compiled(lambda *x: attnfast.attention(*x, window=(-1, 2)))(q, k, v)
    with pytest.raises(ValueError, match=r"^attention: window's left side must be from 0 to"):
        torch.compile(lambda *x: attnfast.attention(*x, window=(-1, 2)), backend="eager")(q, k, v)


class Model(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, lse, stats = attnfast.attention(
            q, k, v, bias=bias, causal=True, return_lse=True, return_stats=True
        )
        return out, lse, stats.breadth


class VarlenModel(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        out = attnfast.varlen_attention(q, k, v, ends, ends, longest, longest, align="bottom_right")
        assert isinstance(out, Tensor)
        return out


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_export_with_dynamic_shapes(strict: bool, grad_enabled: bool) -> None:
    dim = torch.export.Dim
    B, T, S = dim("B", min=2), dim("T", min=2), dim("S", min=2)
    q, k, v, bias = (x.detach() for x in leaves(2, 10, 12)[:4])
    shapes = ({0: B, 2: T}, {0: B, 2: S}, {0: B, 2: S}, {2: S})
    with torch.set_grad_enabled(grad_enabled):
        program = torch.export.export(
            Model(), (q, k, v, bias), dynamic_shapes=shapes, strict=strict
        )
        targets = [str(node.target) for node in program.graph.nodes]
        assert "attnfast.cpu_fwd.default" in targets
        q, k, v, bias = (x.detach() for x in leaves(5, 30, 21)[:4])
        for x, y in zip(program.module()(q, k, v, bias), Model()(q, k, v, bias), strict=True):
            assert torch.equal(x, y)
            assert x.stride() == y.stride()


def test_export_of_varlen_survives_a_file(tmp_path: Any) -> None:
    dim = torch.export.Dim
    total = dim("total", min=2)
    q = torch.randn(7, 2, 4)
    program = torch.export.export(
        VarlenModel(),
        (q, q + 1, q + 2, torch.tensor([0, 3, 7]), 5),
        dynamic_shapes=({0: total}, {0: total}, {0: total}, {0: dim("ends", min=2)}, dim.DYNAMIC),
    )
    torch.export.save(program, tmp_path / "varlen.pt2")
    loaded = torch.export.load(tmp_path / "varlen.pt2").module()
    q = torch.randn(20, 2, 4)
    arguments = (q, q + 1, q + 2, torch.tensor([0, 3, 3, 15, 20]), 12)
    assert torch.equal(loaded(*arguments), VarlenModel()(*arguments))


def test_make_fx_sees_one_operator() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = (x.detach() for x in leaves(2, 5, 7)[:3])
    graph = make_fx(lambda *x: attnfast.attention(*x), tracing_mode="symbolic")(q, k, v)
    assert sum("cpu_fwd" in str(node.target) for node in graph.graph.nodes) == 1
    assert torch.equal(graph(q, k, v), attnfast.attention(q, k, v))
