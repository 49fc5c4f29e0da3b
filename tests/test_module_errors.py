"""Each error message of MultiheadAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import B, E, H, S, T
from torch import Tensor
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right

from attnfast import MultiheadAttention

X = torch.zeros(B, T, E)
OTHER = torch.zeros(B, S, E)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0, 0],) * 3, {}, ValueError, "query must be (B, T, 12) or (T, 12), got (12,)"),
        ((X[..., :8],) * 3, {}, ValueError, "query must be (B, T, 12), got (2, 5, 8)"),
        ((X[0, :, :8],) * 3, {}, ValueError, "query must be (T, 12), got (5, 8)"),
        ((X, X[0], X[0]), {}, ValueError, "key must be (B, S, 12) = (2, *, 12), got (5, 12)"),
        ((X, X[:1], X[:1]), {}, ValueError, "key must be (B, S, 12) = (2, *, 12), got (1, 5, 12)"),
        ((X[0], X, X), {}, ValueError, "key must be (S, 12) = (*, 12), got (2, 5, 12)"),
        ((X, X, OTHER), {}, ValueError, "value must be (B, S, 12) = (2, 5, 12), got (2, 4, 12)"),
        (
            (X.double(),) * 3,
            {},
            TypeError,
            "query must have the parameters' dtype torch.float32 (or run under autocast), "
            "got torch.float64",
        ),
        (
            (X, X.to("meta"), X),
            {},
            ValueError,
            "key must be on the parameters' device cpu, got meta",
        ),
        (
            (X, X, X),
            {"key_padding_mask": torch.zeros(B, S).bool()},
            ValueError,
            "key_padding_mask must be (B, S) = (2, 5), got (2, 4)",
        ),
        (
            (X[0], X[0], X[0]),
            {"key_padding_mask": torch.zeros(S).bool()},
            ValueError,
            "key_padding_mask must be (B, S) = (1, 5) or (S,) = (5,), got (1, 4)",
        ),
        (
            (X, X, X),
            {"key_padding_mask": torch.zeros(B, T).int()},
            TypeError,
            "key_padding_mask must be bool (True = masked out) or floating point (added to the "
            "scores), got torch.int32",
        ),
        (
            (X, X, masked_tensor(X, X > 0)),
            {},
            TypeError,
            "value must be a Tensor without a mask of its own (get_data() and get_mask() are two "
            "arguments), got MaskedTensor",
        ),
        (
            (X, X, X),
            {"key_padding_mask": masked_tensor(X[..., 0], X[..., 0] > 0)},
            TypeError,
            "key_padding_mask must be a Tensor without a mask of its own (get_data() and "
            "get_mask() are two arguments), got MaskedTensor",
        ),
        (
            (causal_lower_right(5, 5),) * 3,
            {},
            TypeError,
            "query must be a Tensor of values, got CausalBias",
        ),
        (
            (X, X, X),
            {"attn_mask": torch.zeros(T, T).byte()},
            TypeError,
            "attn_mask must be bool (True = masked out) or floating point (added to the scores), "
            "got torch.uint8",
        ),
        (
            (X, OTHER, OTHER),
            {"attn_mask": torch.zeros(T, T)},
            ValueError,
            "attn_mask must be (T, S) = (5, 4), (B * num_heads, T, S) = (6, 5, 4), (B, T, S) or "
            "broadcastable to (B, num_heads, T, S) = (2, 3, 5, 4), got (5, 5)",
        ),
        (
            (X, OTHER, OTHER),
            {"attn_mask": torch.zeros(3, T, S)},
            ValueError,
            "attn_mask must be (T, S) = (5, 4), (B * num_heads, T, S) = (6, 5, 4), (B, T, S) or "
            "broadcastable to (B, num_heads, T, S) = (2, 3, 5, 4), got (3, 5, 4)",
        ),
    ],
)
def test_errors(
    args: tuple[Tensor, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(error) as raised:
        module(*args, **kwargs)
    assert str(raised.value) == f"MultiheadAttention: {message}"


def test_errors_name_the_layout() -> None:
    module = MultiheadAttention(E, H, kdim=7)
    key = torch.zeros(S, B, 7)
    with pytest.raises(ValueError, match=r"value must be \(S, B, 12\) = \(4, 2, 12\), got"):
        module(torch.zeros(T, B, E), key, key)


def test_a_head_count_that_does_not_divide() -> None:
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(10, 3)
    with pytest.raises(ValueError, match="embed_dim must be from 1"):
        MultiheadAttention(0, 3)


NESTED = torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
A_TENSOR = "a Tensor, bool (True = masked out) or floating point (added to the scores)"


@pytest.mark.parametrize(
    ("wrong", "got", "as_mask"),
    [
        (X.numpy(), "ndarray", None),
        ([[1.0]], "list", None),
        (3, "int", None),
        ("x", "str", None),
        (X.to_sparse(), "layout torch.sparse_coo", None),
        (X[0].to_sparse_csr(), "layout torch.sparse_csr", None),
        (NESTED, "nested of layout torch.jagged", "layout torch.jagged"),
    ],
    ids=["numpy", "list", "int", "str", "sparse", "csr", "nested"],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_other_kinds_of_things(wrong: Any, got: str, as_mask: str | None, gradients: bool) -> None:
    """One line that names the argument, on the short way through the layer and the long one."""
    module = MultiheadAttention(E, H, batch_first=True)
    dense = isinstance(wrong, Tensor)
    required = "a dense strided Tensor" if dense else "a Tensor"
    mask_required = required if dense else A_TENSOR
    rows: dict[str, tuple[Any, dict[str, Any], str]] = {
        "query": ((wrong, X, X), {}, required),
        "key": ((X, wrong, X), {}, required),
        "value": ((X, X, wrong), {}, required),
        "attn_mask": ((X,) * 3, {"attn_mask": wrong}, mask_required),
        "key_padding_mask": (
            (X,) * 3,
            {"key_padding_mask": wrong},
            required if dense else A_TENSOR,
        ),
    }
    for name, (args, kwargs, what) in rows.items():
        if wrong is NESTED and name == "query":
            continue  # it is the others that have to be nested then
        if wrong is NESTED and name in ("key", "value"):
            what = "dense as query is"
        found = as_mask if as_mask and "mask" in name else got
        with torch.set_grad_enabled(gradients), pytest.raises(TypeError) as raised:
            module(*args, need_weights=False, **kwargs)
        assert str(raised.value) == f"MultiheadAttention: {name} must be {what}, got {found}"


def test_masks_on_another_device() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    for name in ("attn_mask", "key_padding_mask"):
        mask = torch.zeros(T if name == "attn_mask" else B, T, device="meta")
        with pytest.raises(ValueError, match=f"{name} must be on query's device cpu, got meta"):
            module(X, X, X, **{name: mask})


def test_integers_under_autocast() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="key must have the parameters' dtype"),
    ):
        module(X, X.long(), X)


@pytest.mark.parametrize("need_weights", [True, False])
def test_flags_are_judged_by_truth(need_weights: bool) -> None:
    """As torch's are: None, numbers, 0-d tensors."""
    module = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, T, E)
    for causal in (False, True):
        expected = module(x, x, x, is_causal=causal, need_weights=need_weights)
        for flag in (torch.tensor(True), 1) if causal else (None, 0, torch.tensor(False)):
            for gradients in (True, False):
                with torch.set_grad_enabled(gradients):
                    actual = module(x, x, x, is_causal=flag, need_weights=need_weights)
                torch.testing.assert_close(actual, expected)
