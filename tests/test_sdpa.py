"""`scaled_dot_product_attention` against torch's own, over every form of its arguments."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnfast

fp64 = torch.float64
PADDING = torch.tensor([True, True, False, True, False, True, True])
CORNER = torch.ones(5, 7, dtype=torch.bool).tril()
EMPTY_ROW = CORNER.clone().index_fill_(0, torch.tensor([2]), False)


def added(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, torch.Size(shape).numel(), dtype=fp64).view(shape)


Shape = tuple[int, ...]
FORMS: dict[str, tuple[Shape, Shape, Shape, dict[str, Any]]] = {
    "2-D": ((5, 4), (7, 4), (7, 3), {}),
    "2-D, mask": ((5, 4), (7, 4), (7, 3), {"attn_mask": CORNER}),
    "3-D": ((2, 5, 4), (2, 7, 4), (2, 7, 3), {"is_causal": True}),
    "3-D, mask per batch entry": ((2, 5, 4), (2, 7, 4), (2, 7, 4), {"attn_mask": added(2, 5, 7)}),
    "3-D, grouped": ((8, 5, 4), (4, 7, 4), (4, 7, 4), {"enable_gqa": True}),
    "4-D": ((2, 4, 5, 4), (2, 4, 7, 4), (2, 4, 7, 3), {"scale": 0.3}),
    "T > S, causal": ((2, 4, 9, 4), (2, 4, 7, 4), (2, 4, 7, 4), {"is_causal": True}),
    "bool mask": ((2, 4, 5, 4), (2, 4, 7, 4), (2, 4, 7, 4), {"attn_mask": CORNER}),
    "padding mask": ((2, 4, 5, 4), (2, 4, 7, 4), (2, 4, 7, 4), {"attn_mask": PADDING[None]}),
    "empty row": ((2, 4, 5, 4), (2, 4, 7, 4), (2, 4, 7, 4), {"attn_mask": EMPTY_ROW}),
    "float mask": ((2, 4, 5, 4), (2, 4, 7, 4), (2, 4, 7, 4), {"attn_mask": added(2, 1, 5, 7)}),
    "-inf row": (
        (2, 4, 5, 4),
        (2, 4, 7, 4),
        (2, 4, 7, 4),
        {"attn_mask": added(5, 7).masked_fill(~EMPTY_ROW, -torch.inf)},
    ),
    "grouped": ((2, 4, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4), {"enable_gqa": True}),
    "grouped apart": ((2, 8, 5, 4), (2, 4, 7, 4), (2, 2, 7, 4), {"enable_gqa": True}),
    "one key head": ((2, 4, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4), {}),
    "one query head": ((2, 1, 5, 4), (2, 4, 7, 4), (2, 4, 7, 4), {}),
    "one value head": ((2, 4, 5, 4), (2, 4, 7, 4), (2, 1, 7, 4), {}),
    "batch broadcasts": ((2, 4, 5, 4), (1, 4, 7, 4), (1, 4, 7, 4), {}),
    "ranks differ": ((2, 4, 5, 4), (4, 7, 4), (7, 4), {}),
    "5-D": ((3, 2, 4, 5, 4), (3, 2, 4, 7, 4), (3, 2, 4, 7, 4), {}),
    "5-D, shared mask": (
        (3, 2, 4, 5, 4),
        (3, 2, 4, 7, 4),
        (3, 2, 4, 7, 4),
        {"attn_mask": added(1, 1, 4, 5, 7)},
    ),
    "5-D, 4-D mask": (
        (3, 2, 4, 5, 4),
        (3, 2, 4, 7, 4),
        (3, 2, 4, 7, 4),
        {"attn_mask": added(2, 1, 5, 7)},
    ),
    "5-D, mask of the first dimension": (
        (3, 2, 4, 5, 4),
        (3, 1, 4, 7, 4),
        (1, 2, 4, 7, 4),
        {"attn_mask": added(3, 1, 1, 5, 7)},
    ),
    "no keys": ((2, 4, 5, 4), (2, 4, 0, 4), (2, 4, 0, 4), {}),
    "no queries": ((2, 4, 0, 4), (2, 4, 3, 4), (2, 4, 3, 4), {}),
    "5-D, no batch": ((0, 2, 4, 5, 4), (0, 2, 4, 7, 4), (0, 2, 4, 7, 4), {}),
    "all dropped": ((2, 4, 5, 4), (2, 4, 7, 4), (2, 4, 7, 4), {"dropout_p": 1.0}),
}


def results(function: Any, form: Any) -> list[Tensor]:
    """Output and every gradient, a float mask's included."""
    *shapes, options = form
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=rng, dtype=fp64).requires_grad_() for shape in shapes)
    leaves = [q, k, v]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.clone().requires_grad_()}
        leaves.append(options["attn_mask"])
    out = function(q, k, v, **options)
    grad = torch.randn(out.shape, generator=rng, dtype=fp64)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_torchs(form: Any) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = results(F.scaled_dot_product_attention, form)
    for x, y in zip(results(attnfast.scaled_dot_product_attention, form), expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, torch.nan_to_num(y))  # where torch says NaN, zero


ZEROS = [sizes for sizes in product((0, 1), (0, 2), (0, 3), (0, 2), (0, 4), (0, 5)) if 0 in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, fp64], ids=str)
def test_every_size_may_be_zero(dtype: torch.dtype) -> None:
    """Also H, E and E_v, alone and together: without features all keys weigh the same."""
    for B, H, L, S, E, E_v in ZEROS:
        q, k, v = torch.randn(B, H, L, E), torch.randn(B, H, S, E), torch.randn(B, H, S, E_v)
        q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
        for options in (
            {},
            {"is_causal": True},
            {"scale": 0.3},
            {"enable_gqa": True},
            {"attn_mask": torch.ones(L, S, dtype=torch.bool)},
            {"attn_mask": torch.ones(B, H, L, S, dtype=torch.bool)},
            {"attn_mask": torch.linspace(-2, 2, L * S).view(L, S).to(dtype)},
        ):
            outs = [
                function(q, k, v, **options)
                for function in (
                    attnfast.scaled_dot_product_attention,
                    F.scaled_dot_product_attention,
                )
            ]
            torch.testing.assert_close(*outs)
            found, expected = (torch.autograd.grad(out.sum(), (q, k, v)) for out in outs)
            torch.testing.assert_close(found, expected)


def test_torchs_own_samples() -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    count = 0
    for sample in op.sample_inputs("cpu", fp64, requires_grad=False):
        options = sample.kwargs | {"dropout_p": 0.0}
        found, expected = (
            function(sample.input, *sample.args, **options)
            for function in (
                attnfast.scaled_dot_product_attention,
                F.scaled_dot_product_attention,
            )
        )
        torch.testing.assert_close(found, expected)
        count += 1
    assert count >= 20


def test_the_signature_is_torchs() -> None:
    parameters = inspect.signature(attnfast.scaled_dot_product_attention).parameters
    text = F.scaled_dot_product_attention.__doc__ or ""
    documented = text[text.index("(") + 1 : text.index(")")].replace("\n", " ").split(",")
    assert [x.strip().partition("=")[0] for x in documented] == list(parameters)
    q = torch.randn(1, 1, 2, 4)
    for function in (attnfast.scaled_dot_product_attention, F.scaled_dot_product_attention):
        with pytest.raises(TypeError):
            function(q, q, q, None, 0.0, False, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_the_fused_backend_and_copies_nothing(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 9, 3, 4, 16).to(dtype).transpose(1, 3).unbind(2)
    mask = torch.rand(2, 1, 1, 9) < 0.7
    found = attnfast.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(found, attnfast.attention(q, k, v, mask=mask, backend="cpu"))
    q.requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.data_ptr()) or x, lambda x: x
    ):
        attnfast.scaled_dot_product_attention(q, k, v, mask)
    assert {x.data_ptr() for x in (q, k, v, mask)} <= set(saved)


def test_it_drops_without_being_told_to_train() -> None:
    v = torch.eye(64).view(1, 1, 64, 64)
    q = torch.zeros_like(v)
    torch.manual_seed(0)
    weights = attnfast.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
    torch.testing.assert_close(weights.unique(), torch.tensor([0.0, 1 / 64 / 0.75]))
    assert 0.7 < (weights > 0).float().mean() < 0.8
