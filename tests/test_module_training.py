"""The short way of self-attention with gradients: the long way's bits, or not taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_module_inference import KINDS, B, E, H, T, layer, masks, taken
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import attnfast
from attnfast.nn import fast_path

__all__ = ["taken"]  # a fixture
SHORT = ["SELF_ATTENTION", "SELF_ATTENTION_BWD"]
WEIGHTS: tuple[dict[str, Any], ...] = (
    {"need_weights": False},
    {},
    {"average_attn_weights": False},
)


def gradients(module: nn.Module, x: Tensor, of_weights: bool = False, **given: Any) -> list[Tensor]:
    """The output, the weights, the gradients of x and parameters, and what dropout has drawn."""
    torch.manual_seed(3)
    out, weights = module(x, x, x, **given)
    results = [out] if weights is None else [out, weights]
    loss = sum(y.float().sin().sum() for y in results[: 1 + of_weights])
    leaves = [y for y in (x, *module.parameters()) if y.requires_grad]
    return [*results, *torch.autograd.grad(loss, leaves), torch.get_rng_state()]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for y, z in zip(found, expected, strict=True):
        assert torch.equal(y, z)


def long(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], *args: Any, **given: Any
) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(fast_path, "takes", lambda *_: False)
        return call(*args, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [1, 2, T, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_the_long_ways_bits(
    kind: str,
    length: int,
    batch_first: bool,
    dtype: torch.dtype,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(B, length, E).to(dtype)
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    for dropout in (0.0, 0.3):
        module = layer(batch_first=batch_first, dropout=dropout).to(dtype).train()
        for weights in WEIGHTS:
            given = masks(kind, length) | weights
            found = gradients(module, x, **given)
            assert taken == SHORT
            taken.clear()
            agree(found, long(monkeypatch, gradients, module, x, **given))
            assert not taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("features", "heads"), [(64, 4), (64, 1), (96, 2), (5, 5)])
@pytest.mark.parametrize("length", [3, 40, 130])
def test_other_sizes(
    length: int,
    features: int,
    heads: int,
    dtype: torch.dtype,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = attnfast.MultiheadAttention(features, heads, dtype=dtype)
    x = torch.randn(length, B, features, dtype=dtype, requires_grad=True)
    found = gradients(module, x, need_weights=False)
    assert taken == SHORT
    agree(found, long(monkeypatch, gradients, module, x, need_weights=False))


@pytest.mark.parametrize("weights", WEIGHTS[1:], ids=["mean", "heads"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_through_weights(
    batch_first: bool,
    dropout: float,
    weights: dict[str, Any],
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layer(batch_first=batch_first, dropout=dropout).train()
    x = torch.randn(B, B, E, requires_grad=True)
    given: dict[str, Any] = {"of_weights": True, **weights}
    found = gradients(module, x, **given)
    assert taken == SHORT[:1]
    agree(found, long(monkeypatch, gradients, module, x, **given))

    def of_weights_alone() -> Any:
        return torch.autograd.grad(module.eval()(x, x, x, **weights)[1].sin().sum(), x)

    agree(of_weights_alone(), long(monkeypatch, of_weights_alone))


@pytest.mark.parametrize("shape", [(0, T, E), (B, 0, E)])
def test_nothing_to_do(
    shape: tuple[int, ...], taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(), torch.randn(shape, requires_grad=True)
    found = gradients(module, x)
    assert taken == SHORT
    agree(found, long(monkeypatch, gradients, module, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(
    dtype: torch.dtype, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(), torch.randn(B, T, E).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(module, x)
        assert taken == SHORT
        agree(found, long(monkeypatch, gradients, module, x))


@pytest.mark.parametrize("trained", ["in_proj_weight", "in_proj_bias", "out_proj.bias", "x"])
def test_frozen_parameters(trained: str, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    x = torch.randn(B, T, E, requires_grad=trained == "x")
    found = gradients(module, x)
    assert taken == SHORT[: 1 if trained == "out_proj.bias" else 2]
    agree(found, long(monkeypatch, gradients, module, x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_of_the_output_as_they_lie(
    batch_first: bool, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(batch_first=batch_first)
    module.out_proj = nn.Identity()
    x = torch.randn(B, T, E, requires_grad=True)
    for upstream in (
        torch.ones(()).expand(B, T, E),
        torch.randn(E).expand(B, T, E),
        torch.randn(B, E, T).transpose(1, 2),
        torch.randn(T, B, E).transpose(0, 1),
        torch.randn(B, T, 3 * E)[..., E : 2 * E],
    ):

        def gradient(upstream: Tensor = upstream) -> Any:
            return torch.autograd.grad(module(x, x, x, need_weights=False)[0], x, upstream)

        found = gradient()
        assert taken == SHORT
        taken.clear()
        agree(found, long(monkeypatch, gradient))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "need_weights": False}])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_derivatives(
    dropout: float,
    options: dict[str, Any],
    batch_first: bool,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layer(batch_first=batch_first, dropout=dropout).train()
    x = torch.randn(B, T, E, requires_grad=True)

    def second() -> list[Tensor]:
        torch.manual_seed(3)
        results = [y for y in module(x, x, x, **options) if y is not None]
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(sum(y.sin().sum() for y in results), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(y.cos().sum() for y in first), leaves)]

    found = second()
    assert taken[0] == SHORT[0]
    agree(found, long(monkeypatch, second))


class Silent(Function):
    """The identity, without a gradient."""

    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: None)


def test_no_gradient_arrives(taken: list[str]) -> None:
    module, x = layer(), torch.randn(B, T, E, requires_grad=True)
    out, _ = module(x, x, x, need_weights=False)
    assert torch.autograd.grad(Silent.apply(out).sum(), x, allow_unused=True) == (None,)
    assert taken == SHORT[:1]


def test_a_graph_may_be_walked_again(taken: list[str]) -> None:
    module, x = layer(dropout=0.3).train(), torch.randn(B, T, E, requires_grad=True)
    out, _ = module(x, x, x, need_weights=False)
    first, again = (torch.autograd.grad(out.sum(), x, retain_graph=True) for _ in range(2))
    agree(list(first), list(again))
    out.sum().backward()
    assert taken == SHORT + SHORT[1:] * 2
    assert x.grad is not None
    assert torch.equal(x.grad, first[0])
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_what_was_saved_must_not_change(taken: list[str]) -> None:
    module, x = layer(), torch.randn(B, T, E, requires_grad=True)
    bias = torch.randn(B, H, T, T)
    out, _ = module(x, x, x, need_weights=False, attn_mask=bias)
    bias.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    module.out_proj = nn.Identity()
    out, _ = module(x, x, x, need_weights=False)
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert taken == SHORT[:1] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool, taken: list[str]) -> None:
    module, x = layer(dropout=0.3).train(), torch.randn(B, T, E, requires_grad=True)
    expected = gradients(module, x, need_weights=False)[:-1]
    taken.clear()
    torch.manual_seed(3)
    out = checkpoint(lambda y: module(y, y, y, need_weights=False)[0], x, use_reentrant=reentrant)
    out.sin().sum().backward()
    assert taken == [*SHORT[:1], *SHORT]
    agree([out, x.grad, *(p.grad for p in module.parameters())], expected)


def test_saved_tensors_go_through_hooks(taken: list[str]) -> None:
    module, x = layer(), torch.randn(B, T, E, requires_grad=True)
    expected = gradients(module, x)
    taken.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: y.numpy(force=True), torch.from_numpy):
        agree(gradients(module, x), expected)
    assert taken == SHORT


def test_hooks_see_the_output(taken: list[str]) -> None:
    module, x, seen = layer(), torch.randn(B, T, E, requires_grad=True), []
    module.out_proj.register_forward_hook(lambda *_: seen.append("forward"))
    module.out_proj.register_full_backward_hook(lambda *_: seen.append("backward"))
    gradients(module, x)
    assert taken == SHORT
    assert seen == ["forward", "backward"]


def test_whoever_watches_the_backward_sees_the_operators_that_they_know(
    taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(), torch.randn(B, T, E, requires_grad=True)
    many = torch.randn(3, B, T, E)

    def mapped() -> Any:
        out, _ = module(x, x, x, need_weights=False)
        return torch.autograd.grad(out, x, many, is_grads_batched=True)

    found = mapped()
    assert taken == SHORT
    agree(found, long(monkeypatch, mapped))
    taken.clear()

    def pulled_back() -> Any:
        out, _ = module(x, x, x, need_weights=False)
        pull = lambda y: torch.autograd.grad(out, x, y, retain_graph=True)  # noqa: E731
        return torch.func.vmap(pull)(many)

    found = pulled_back()
    assert taken == SHORT[:1]
    agree(found, long(monkeypatch, pulled_back))
    out, _ = module(x, x, x, need_weights=False)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert taken == SHORT[:1] * 2
    assert torch.ops.attnfast.cpu_bwd in counter.get_flop_counts()["Global"]


def test_what_goes_the_long_way(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(dropout=0.3).train(), torch.randn(B, T, E, requires_grad=True)
    bias = torch.randn(T, T, requires_grad=True)
    module(x, x, x, attn_mask=bias)[0].sum().backward()
    assert bias.grad is not None
    module(x, x.clone(), x)
    module(x[0], x[0], x[0])
    torch.func.grad(lambda y: module(y, y, y)[0].sum())(x)
    with torch.autograd.forward_ad.dual_level():
        module(x, x, x)
    with FlopCounterMode(display=False):
        module(x, x, x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x, x, x, need_weights=False)[0].sum().backward()
    monkeypatch.setenv("ATTNFAST_BACKEND", "reference")
    module(x, x, x)
    monkeypatch.delenv("ATTNFAST_BACKEND")
    for p, error in ((1.5, ValueError), (float("nan"), ValueError), ("half", TypeError)):
        module.dropout = p
        with pytest.raises(error, match="attention: dropout_p must be"):
            module(x, x, x)
    module.dropout = 1
    module(x, x, x)
    assert not taken
    module.dropout = 1.0
    module(x, x, x)
    with torch.no_grad():
        module(x, x, x, attn_mask=bias)
    assert taken == SHORT[:1] * 2


def test_the_operators_refuse_what_does_not_fit() -> None:
    layer = (torch.randn(B, T, 3 * E), H, True, None, None, False, 0.0, None)
    out, norm, _ = torch.ops.attnfast.cpu_self_attention(*layer, 0)
    backward = torch.ops.attnfast.cpu_self_attention_bwd
    for grad in (out[1:], out.transpose(0, 1), out[..., 1:], out.double(), out[0]):
        with pytest.raises(RuntimeError, match="grad_out and out must be merged heads"):
            backward(grad, out, norm, *layer)
    for given in (norm[:2], norm.double(), norm.transpose(2, 3)):
        with pytest.raises(RuntimeError, match="norm must be what the forward returned"):
            backward(out, out, given, *layer)
    with pytest.raises(RuntimeError, match="dropout_seed must have 2 elements, got 3"):
        backward(out, out, norm, *layer[:-2], 0.5, torch.zeros(3, dtype=torch.int64))
