"""Projections by oneDNN or in fp32: torch.nn.functional.linear's results, or itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import attnfast
from attnfast.nn import linear as projections
from attnfast.nn.linear import ProjectionLinear, linear


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Give every size to oneDNN, on every machine; the shapes of what it computes are listed."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    seen: list[tuple[int, ...]] = []
    plain = projections._onednn

    def listed(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        seen.append((*x.shape, weight.shape[0]))
        return plain(x, weight, *others)

    monkeypatch.setattr(projections, "_onednn", listed)
    monkeypatch.setattr(projections, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(projections, "_half_is_slow", lambda _: False)
    monkeypatch.setattr(projections, "WORTH_IT", 0)
    monkeypatch.setattr(projections, "WORTH_IT_WITH_GRADIENTS", 0)
    return seen


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Convert every bf16 or fp16 product, on every machine; the shapes of those are listed."""
    seen: list[tuple[int, ...]] = []
    plain = projections._in_fp32

    def listed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((*x.shape, weight.shape[0]))
        return plain(x, weight, bias)

    monkeypatch.setattr(projections, "_in_fp32", listed)
    monkeypatch.setattr(projections, "_half_is_slow", lambda _: True)
    monkeypatch.setattr(projections, "_mkl_is_slow", lambda: False)
    monkeypatch.setattr(projections, "WORTH_CONVERTING", 0)
    return seen


def operands(*lead: int, bias: bool = True) -> list[Tensor | None]:
    torch.manual_seed(0)
    return [torch.randn(*lead, 24), torch.randn(40, 24), torch.randn(40) if bias else None]


def derivatives(function: Callable[..., Tensor], args: list[Tensor | None]) -> list[Tensor]:
    """The result, its gradients, and the gradients of a function of those."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in args]
    given = [x for x in leaves if x is not None]
    y = function(*leaves)
    first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
    total = first[0].square().sum() + first[1].pow(3).sum()
    second = torch.autograd.grad(total, given, allow_unused=True)
    return [y, *first, *(x for x in second if x is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (3, 7), (2, 3, 4), (1, 1), (0, 4)], ids=str)
def test_results_and_derivatives(
    products: list[tuple[int, ...]], lead: tuple[int, ...], bias: bool
) -> None:
    args = operands(*lead, bias=bias)
    exact = derivatives(F.linear, [None if x is None else x.double() for x in args])
    torchs = derivatives(F.linear, args)
    ours = derivatives(linear, args)
    assert bool(products) == (0 not in lead)
    assert len(ours) == len(exact)
    for x, y, e in zip(ours, torchs, exact, strict=True):
        assert x.shape == y.shape
        if not e.numel():
            continue
        bound = 2 * (y - e).abs().max() + 4 * torch.finfo(torch.float32).eps * e.abs().max()
        assert (x - e).abs().max() <= bound


@pytest.mark.parametrize("way", ["products", "converted", None])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=lambda f: f.__name__)
def test_activations(
    activation: Callable[[Tensor], Tensor],
    gradients: bool,
    way: str | None,
    request: pytest.FixtureRequest,
) -> None:
    """The exact gelu, not the one by tanh, whoever computes it."""
    dtype = torch.bfloat16 if way == "converted" else torch.float32
    seen = request.getfixturevalue(way) if way else []
    args = [x.to(dtype) for x in operands(5) if x is not None]
    with torch.set_grad_enabled(gradients):
        y = linear(*(x.requires_grad_(gradients) for x in args), activation.__name__)
        expected = activation(F.linear(*(x.double() for x in args)))
    assert bool(seen) == bool(way)
    bound = 2e-2 if way == "converted" else 1e-5
    torch.testing.assert_close(y.double(), expected, atol=bound, rtol=bound)
    assert y.requires_grad == gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 3, 4), (0, 4)], ids=str)
def test_half_precision_in_fp32(
    converted: list[tuple[int, ...]], lead: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    """Rounded once: no result is farther from the exact one than half a unit of its last place."""
    args = [None if x is None else x.to(dtype) for x in operands(*lead, bias=bias)]
    leaves = [None if x is None else x.clone().requires_grad_() for x in args]
    exact = [None if x is None else x.double().requires_grad_() for x in args]
    y, expected = linear(*leaves), F.linear(*exact)
    grad = torch.randn(expected.shape).to(dtype)
    given, wanted = ([x for x in xs if x is not None] for xs in (leaves, exact))
    grads = torch.autograd.grad(y, given, grad)
    expected_grads = torch.autograd.grad(expected, wanted, grad.double())
    forward = [
        (*lead, 24, 40),
        (*lead, 40, 24),
        (40, lead[0] * lead[1] * lead[2] if len(lead) > 2 else lead[0], 24),
    ]
    assert converted == ([] if 0 in lead else forward)
    for x, e in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert x.dtype == dtype
        assert x.shape == e.shape
        if e.numel():
            ulp = torch.finfo(dtype).eps * e.abs()
            assert ((x - e).abs() <= 0.51 * ulp + 1e-5 * e.abs().max()).all()


def test_half_precision_second_derivatives(converted: list[tuple[int, ...]]) -> None:
    args = [None if x is None else x.bfloat16() for x in operands(5)]
    ours = derivatives(linear, args)
    exact = derivatives(F.linear, [None if x is None else x.double() for x in args])
    assert len(converted) > 3
    for x, e in zip(ours, exact, strict=True):
        assert (x - e).abs().max() <= 0.02 * e.abs().max()


def test_half_precision_of_other_kinds_is_torchs(converted: list[tuple[int, ...]]) -> None:
    x, weight = torch.ones(5, 24).bfloat16(), torch.ones(40, 24).bfloat16()
    with torch.autocast("cpu"):
        linear(x, weight, None)
    linear(x[0], weight, None)
    torch.compile(linear, fullgraph=True, backend="eager")(x, weight, None)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.float(), None)
    assert not converted
    linear(x, weight, None)
    assert converted


def test_the_layer_in_half_precision(converted: list[tuple[int, ...]]) -> None:
    module = attnfast.MultiheadAttention(32, 4, batch_first=True).bfloat16()
    x = torch.randn(2, 5, 32).bfloat16()
    module(x, x, x)[0].sum().backward()
    assert converted[:2] == [(2, 5, 32, 96), (2, 5, 32, 32)]
    assert len(converted) == 5


def test_transposed_inputs(products: list[tuple[int, ...]]) -> None:
    x = torch.randn(6, 3, 24).transpose(0, 1)
    weight = torch.randn(24, 40).t()
    torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight))
    assert products == [(3, 6, 24, 40)]


def test_only_wanted_gradients_are_computed(products: list[tuple[int, ...]]) -> None:
    x, weight, bias = operands(5)
    assert x is not None
    assert weight is not None
    linear(x, weight.requires_grad_(), bias).sum().backward()
    assert products == [(5, 24, 40), (40, 5, 24)]


def call_with(**changed: torch.dtype) -> Callable[[], Tensor]:
    def call() -> Tensor:
        dtype = changed["dtype"]
        return linear(torch.randn(5, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype), None)

    return call


def under(context: Callable[[], object]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with context():  # type: ignore[attr-defined]
            return linear(torch.randn(5, 24), torch.randn(40, 24), None)

    return call


class Subclass(Tensor):
    pass


TORCHS_OWN = {
    "float64": call_with(dtype=torch.float64),
    "bfloat16": call_with(dtype=torch.bfloat16),
    "autocast": under(lambda: torch.autocast("cpu")),
    "oneDNN switched off": under(lambda: torch.backends.mkldnn.flags(enabled=False)),
    "fake tensors": under(FakeTensorMode),
    "meta device": lambda: linear(
        torch.randn(5, 24, device="meta"), torch.randn(40, 24, device="meta"), None
    ),
    "a vector": lambda: linear(torch.randn(24), torch.randn(40, 24), None),
    "a subclass": lambda: linear(
        torch.randn(5, 24).as_subclass(Subclass), torch.ones(40, 24), None
    ),
    "vmap": lambda: torch.vmap(lambda x: linear(x, torch.ones(40, 24), None))(torch.ones(2, 5, 24)),
    "forward mode": lambda: torch.func.jvp(
        lambda x: linear(x, torch.ones(40, 24), None), (torch.ones(5, 24),), (torch.ones(5, 24),)
    )[1],
    "compile": lambda: torch.compile(linear, fullgraph=True, backend="eager")(
        torch.ones(5, 24), torch.ones(40, 24), None
    ),
    "trace": lambda: torch.jit.trace(
        lambda x, w: linear(x, w, None), (torch.ones(5, 24), torch.ones(40, 24)), check_trace=False
    )(torch.ones(5, 24), torch.ones(40, 24)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:TF32 acceleration")
@pytest.mark.parametrize("name", TORCHS_OWN)
def test_torchs_own_function_is_used(products: list[tuple[int, ...]], name: str) -> None:
    y = TORCHS_OWN[name]()
    assert y.shape[-1] == 40
    assert not products


def test_wrong_shapes_raise_torchs_error(products: list[tuple[int, ...]]) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(torch.ones(5, 23), torch.ones(40, 24), None)
    assert not products


def test_module_projects_by_it(products: list[tuple[int, ...]]) -> None:
    ours = attnfast.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    ours(x, x, x)[0].sum().backward()
    forward = [(2, 5, 32, 96), (2, 5, 32, 32)]
    assert products[:2] == forward
    assert len(products) == 5  # and two gradients of weights, one of an input: x has none


def test_replace_and_restore() -> None:
    stock = nn.MultiheadAttention(32, 4)
    adapted = nn.MultiheadAttention(32, 4)
    adapted.out_proj = nn.Linear(32, 32)  # not torch's class: somebody's own
    model = nn.ModuleList([stock, adapted])
    attnfast.replace(model)
    assert type(stock.out_proj) is ProjectionLinear
    assert type(adapted.out_proj) is nn.Linear
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0].out_proj) is ProjectionLinear
        attnfast.restore(copied)
        assert type(copied[0].out_proj) is NonDynamicallyQuantizableLinear
    attnfast.restore(model)
    assert type(stock.out_proj) is NonDynamicallyQuantizableLinear
    assert type(adapted.out_proj) is nn.Linear
