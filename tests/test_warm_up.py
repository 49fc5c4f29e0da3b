"""warm_up: which call it makes, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnfast
from attnfast import dispatch
from attnfast.call import Upstream
from attnfast.ops import Ops

x = torch.randn(1, 2, 6, 8)
ends, lengths = torch.tensor([0, 2, 6]), torch.tensor([6])
packed = x[0].transpose(0, 1)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The operators of the CPU's backend that are called, and their arguments."""
    called: list[tuple[str, tuple[Any, ...]]] = []
    first, *others = dispatch.BACKENDS["cpu"]
    assert first.ops is not None

    def heard(name: str) -> Callable[..., Any]:
        def operator(*args: Any) -> Any:
            called.append((name, args))
            return getattr(first.ops, name)(*args)

        return operator

    row = first._replace(ops=Ops(*map(heard, Ops._fields)))
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", (row, *others))
    return called


@pytest.mark.parametrize("strange", [False, True])
@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((x, x, x), {"causal": True}, ["fwd"]),
        ((packed, packed, packed, ends, ends, 4, 4), {"dropout_p": 0.5}, ["fwd"]),
        ((x, x, x, lengths), {"softcap": 3.0}, ["decode"]),
    ],
    ids=["attention", "varlen", "decode"],
)
def test_it_makes_the_call(
    args: Any, options: Any, expected: list[str], strange: bool, operators: list[Any]
) -> None:
    """With what is in the tensors, and their places in memory: the operator gets the same."""
    if strange:
        args = [torch.cat([y, y], -1)[..., 1:9] if y is args[0] else y for y in args]
    state = torch.get_rng_state()
    assert attnfast.warm_up(*args, **options) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in operators] == expected
    function = attnfast.varlen_attention if len(args) > 4 else attnfast.attention
    (attnfast.decode_attention if len(args) == 4 else function)(*args, **options)
    (_, first), (_, second) = operators
    for mine, later in zip(first, second, strict=True):
        if isinstance(later, torch.Tensor):
            assert (mine.shape, mine.dtype, mine.stride()) == (
                later.shape, later.dtype, later.stride(),
            )  # fmt: skip
            assert mine.data_ptr() % 16 == later.data_ptr() % 16
        else:
            assert mine == later


@pytest.mark.parametrize("returned", [{}, {"return_lse": True, "return_stats": True}])
def test_gradients_too(returned: dict[str, Any], operators: list[Any]) -> None:
    """For the output alone, and for all that is returned; nothing is left behind."""
    q, bias = x.clone().requires_grad_(), torch.randn(1, 1, 6, 6, requires_grad=True)
    attnfast.warm_up(q * 1, q, x, bias=bias, **returned)
    names = [name for name, _ in operators]
    assert names == ["fwd", "bwd", *["bwd"] * bool(returned)]
    given = [Upstream(*args[: len(Upstream._fields)]) for _, args in operators[1:]]
    assert [one.grad_lse is not None for one in given] == [False, True][: len(given)]
    assert all(one.need_dbias for one in given)
    assert q.grad is None
    assert bias.grad is None


def test_without_gradients_none(operators: list[Any]) -> None:
    q = x.clone().requires_grad_()
    with torch.no_grad():
        attnfast.warm_up(q, q, q)
    assert [name for name, _ in operators] == ["fwd"]


def test_too_late(monkeypatch: pytest.MonkeyPatch, operators: list[Any]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must be called before a graph is captured"):
        attnfast.warm_up(x, x, x)
    assert not operators


def test_errors_are_the_calls() -> None:
    with pytest.raises(TypeError, match="warm_up: as a call of attention: missing a required"):
        attnfast.warm_up(x, x)
    with pytest.raises(ValueError, match="attention: softcap must"):
        attnfast.warm_up(x, x, x, softcap=-1.0)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call"):
        attnfast.warm_up(*[x.double()] * 3, backend="cpu")
