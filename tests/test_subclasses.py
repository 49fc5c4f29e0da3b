"""Tensor subclasses: taken for what they stand for, asked, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from malformed_calls import Asked, Named, Refusing, Wrapped
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import attnfast

SHAPES = [(6, 6), (6, 9), (9, 6)]
BIASES = pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])


def qkv(T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = (2, 4, T, 8), (2, 4, S, 8), (2, 4, S, 8)
    q, k, v = (torch.randn(shape, generator=rng) for shape in shapes)
    return q, k, v


@BIASES
@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias_is_torchs(make: Any, T: int, S: int) -> None:
    q, k, v = qkv(T, S)
    want = F.scaled_dot_product_attention(q, k, v, make(T, S)._materialize()).nan_to_num()
    for out in (
        attnfast.scaled_dot_product_attention(q, k, v, make(T, S)),
        attnfast.scaled_dot_product_attention(q[0], k[0], v[0], make(T, S))[None],
        attnfast.attention(q, k, v, bias=make(T, S)),
        attnfast.attention(q, k, v, mask=make(T, S), backend="reference"),
        attnfast.attention(q, k, v, mask=make(T, S), bias=torch.zeros(T, S)),
    ):
        assert type(out) is Tensor
        torch.testing.assert_close(out, want[: len(out)])


@BIASES
@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias_in_the_layer(make: Any, T: int, S: int) -> None:
    layer = attnfast.MultiheadAttention(16, 4, batch_first=True).eval()
    query, key = torch.randn(2, T, 16), torch.randn(2, S, 16)
    masked = ~make(T, S)._materialize()
    padding = torch.zeros(2, S, dtype=torch.bool)
    padding[1, -2:] = True
    for gradients in (False, True):
        for options in ({}, {"need_weights": False}, {"is_causal": True, "need_weights": False}):
            with torch.set_grad_enabled(gradients):
                rest = {name: x for name, x in options.items() if name != "is_causal"}
                inputs = {"query": query, "key": key, "value": key, "key_padding_mask": padding}
                want = layer(**inputs, attn_mask=masked, **rest)
                got = layer(**inputs, attn_mask=make(T, S), **options)
            torch.testing.assert_close(got, want)


def test_causal_bias_is_explained_as_causal() -> None:
    q, k, v = qkv(6, 9)
    text = attnfast.explain(q, k, v, bias=causal_lower_right(6, 9))
    assert "causal=True, align=bottom_right" in text


CALLS: dict[str, Any] = {
    "attention": lambda x: attnfast.attention(x, x, x, return_lse=True),
    "varlen_attention": lambda x: attnfast.varlen_attention(
        *(x[0].transpose(0, 1),) * 3, *(torch.tensor([0, 6], dtype=torch.int32),) * 2, 6, 6
    ),
    "decode_attention": lambda x: attnfast.decode_attention(
        x[:, :, :1], x, x, torch.tensor([3, 6], dtype=torch.int32)
    ),
    "scaled_dot_product_attention": lambda x: attnfast.scaled_dot_product_attention(x, x, x),
}
EVERY = pytest.mark.parametrize(("name", "call"), CALLS.items(), ids=CALLS)


@EVERY
def test_types_and_modes_are_asked_as_by_torch(name: str, call: Any) -> None:
    x = qkv(6, 6)[0]
    asked: list[str] = []

    class Own(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            asked.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            asked.append(func.__name__)
            return func(*args, **(kwargs or {}))

    want = call(x)
    got = call(x.as_subclass(Own))
    assert asked.count(name) == 1
    assert type(got[0] if isinstance(got, tuple) else got) is Own
    torch.testing.assert_close(got, want, rtol=0, atol=0, check_device=False)
    asked.clear()
    with Mode():
        torch.testing.assert_close(call(x), want, rtol=0, atol=0)
    assert asked.count(name) == 1


@EVERY
@pytest.mark.parametrize("kind", [Named, Asked, Wrapped, nn.Parameter, nn.Buffer])
def test_subclasses_that_hold_values(name: str, call: Any, kind: Any) -> None:
    x = qkv(6, 6)[0]
    with torch.no_grad():
        got = call(x.as_subclass(kind) if kind in (Named, Asked) else kind(x))
        want = call(x)
    plain = torch.utils._pytree.tree_map(lambda y: getattr(y, "held", y).as_subclass(Tensor), got)
    torch.testing.assert_close(plain, want)


@EVERY
def test_subclasses_that_refuse(name: str, call: Any) -> None:
    with pytest.raises(NotImplementedError, match="Refusing has no"):
        call(Refusing(qkv(6, 6)[0]))


@EVERY
def test_fake_tensors_pass(name: str, call: Any) -> None:
    x = qkv(6, 6)[0]
    want = call(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = call(mode.from_tensor(x))
    pairs = zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, want)), strict=True)
    assert all(fake.shape == real.shape and fake.stride() == real.stride() for fake, real in pairs)


def test_negated_views_are_read_as_what_they_are() -> None:
    q, k, v = qkv(6, 6)
    negated = torch.complex(q, q).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(attnfast.attention(negated, k, v), attnfast.attention(-q, k, v))


def test_functions_are_leaves_of_a_symbolic_trace() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attnfast.attention(q, k, v, causal=True) + 1

    q, k, v = qkv(6, 6)
    traced = torch.fx.symbolic_trace(Model())
    assert attnfast.attention in {node.target for node in traced.graph.nodes}
    torch.testing.assert_close(traced(q, k, v), Model()(q, k, v))
