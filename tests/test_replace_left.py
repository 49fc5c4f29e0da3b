"""What replace leaves as it is, what it refuses, and what restore refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfast import MultiheadAttention, replace, restore

E, H, B, T = 16, 4, 3, 6


class Windowed(nn.MultiheadAttention):
    """A subclass, which may compute anything."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return query, None


class Narrow(Windowed):
    """A subclass of a subclass."""


class Relative(nn.MultiheadAttention):
    """A subclass with a parameter of its own, which ours would not know of."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.distances = nn.Parameter(torch.zeros(3))


def test_what_is_left() -> None:
    model = nn.ModuleDict(
        {
            "subclass": Windowed(E, H),
            "patched": nn.MultiheadAttention(E, H),
            "ours": MultiheadAttention(E, H, backend="reference"),
            "plain": nn.MultiheadAttention(E, H),
        }
    )
    model.patched.forward = lambda *args, **kwargs: args[0]
    report = replace(model)
    assert report.replaced == ("plain",)
    assert report.left == (
        (
            "subclass",
            f"{__name__}.Windowed is a subclass with behaviour of its own "
            "(subclasses=True swaps it)",
        ),
        ("patched", "its forward was overridden on the instance"),
        ("ours", "it is an attnfast.MultiheadAttention already"),
    )
    assert str(report).splitlines() == [
        "replace: 1 of 4 attention modules replaced",
        "  replaced  plain",
        f"  left      subclass: {__name__}.Windowed is a subclass with behaviour of its own "
        "(subclasses=True swaps it)",
        "  left      patched: its forward was overridden on the instance",
        "  left      ours: it is an attnfast.MultiheadAttention already",
    ]
    assert type(model.subclass) is Windowed
    assert type(model.patched) is nn.MultiheadAttention
    assert restore(model) == 1
    assert type(model.ours) is MultiheadAttention
    assert model.ours.backend == "reference"


@pytest.mark.parametrize(
    ("subclasses", "replaced"),
    [
        (True, ("a", "b", "plain")),
        (Windowed, ("a", "b", "plain")),
        (Narrow, ("b", "plain")),
        ((Narrow, Relative), ("b", "plain")),
    ],
    ids=str,
)
def test_subclasses_are_swapped_when_named(subclasses: Any, replaced: tuple[str, ...]) -> None:
    model = nn.ModuleDict(
        {
            "a": Windowed(E, H),
            "b": Narrow(E, H),
            "c": Relative(E, H),
            "plain": nn.MultiheadAttention(E, H),
        }
    )
    kinds = [type(m) for m in model.values()]
    report = replace(model, subclasses=subclasses)
    assert report.replaced == replaced
    x = torch.randn(T, B, E)
    with torch.no_grad():
        for name in replaced:
            stock = nn.MultiheadAttention(E, H)
            stock.load_state_dict(model[name].state_dict())
            torch.testing.assert_close(model[name](x, x, x), stock(x, x, x))
    if subclasses is not Narrow and subclasses is not Windowed:
        assert (
            "c",
            f"{__name__}.Relative differs from torch.nn.MultiheadAttention in distances",
        ) in report.left
    twin = copy.deepcopy(model)
    for made in (model, twin):
        assert restore(made) == len(replaced)
        assert [type(m) for m in made.values()] == kinds
        assert made.a(x, x, x)[0] is x


def test_quantizable_attention_is_left() -> None:
    """It computes with linears of its own, whatever in_proj_weight holds."""
    model = nn.Sequential(torch.ao.nn.quantizable.MultiheadAttention(E, H))
    ((name, why),) = replace(model, subclasses=True).left
    assert name == "0"
    assert "differs from torch.nn.MultiheadAttention in" in why
    assert "linear_Q" in why


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"subclasses": nn.Linear},
            TypeError,
            "replace: subclasses must be a bool or subclasses of torch.nn.MultiheadAttention, "
            "got <class 'torch.nn.modules.linear.Linear'>",
        ),
        (
            {"subclasses": ("Windowed",)},
            TypeError,
            "replace: subclasses must be a bool or subclasses of torch.nn.MultiheadAttention, "
            "got 'Windowed'",
        ),
        (
            {"backend": "gpu"},
            ValueError,
            "replace: backend must be one of ('auto', 'cpu', 'triton', 'gluon', 'cuda', "
            "'reference'), got 'gpu'",
        ),
    ],
)
def test_bad_options_change_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = nn.MultiheadAttention(E, H)
    with pytest.raises(error) as raised:
        replace(model, **options)
    assert str(raised.value) == message
    assert type(model) is nn.MultiheadAttention


def test_nothing_to_replace() -> None:
    report = replace(nn.Linear(2, 2))
    assert report.replaced == report.left == ()
    assert str(report) == (
        "replace: nothing to replace: the model has no torch.nn.MultiheadAttention (attention "
        "modules of other classes are not touched)"
    )


def test_restore_refuses_a_class_changed_since() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H), "b": nn.MultiheadAttention(E, H)})
    replace(model)
    torch.nn.utils.parametrize.register_parametrization(model.b, "in_proj_weight", nn.Identity())
    with pytest.raises(ValueError) as raised:
        restore(model)
    assert str(raised.value) == (
        "restore: b must be attnfast's MultiheadAttention as replace left it, got "
        "ParametrizedMultiheadAttention: remove parametrizations and wrappers first"
    )
    assert type(model.a) is MultiheadAttention
    torch.nn.utils.parametrize.remove_parametrizations(model.b, "in_proj_weight")
    assert restore(model) == 2


@pytest.mark.parametrize("function", [replace, restore])
def test_not_a_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError) as raised:
        function([nn.MultiheadAttention(E, H)])
    name = function.__name__
    assert str(raised.value) == f"{name}: model must be a torch.nn.Module, got list"
