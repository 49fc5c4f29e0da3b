"""Each error message of MultiheadAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import B, E, H, S, T
from torch import Tensor

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
    with pytest.raises(ValueError, match="must be greater than 0"):
        MultiheadAttention(0, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    nested = torch.nested.nested_tensor([X[0], X[1]])
    with pytest.raises(TypeError) as raised:
        module(nested, nested, nested)
    assert str(raised.value) == (
        "MultiheadAttention: query must not be a nested tensor of layout torch.strided: use "
        "layout=torch.jagged for query, key and value, or pad and give key_padding_mask "
        "(in nn.TransformerEncoder set use_nested_tensor to False, as attnfast.replace does)"
    )
