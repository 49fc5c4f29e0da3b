"""One row per error message of the public functions: type, and the whole text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnfast

HALF = torch.bfloat16
INT32, INT64 = torch.int32, torch.int64


def z(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def dense(**changes: Any) -> Any:
    arguments = {"q": z(2, 4, 10, 64), "k": z(2, 2, 12, 64), "v": z(2, 2, 12, 32)} | changes
    return attnfast.attention(**arguments)


def varlen(**changes: Any) -> Any:
    arguments = {
        "q": z(10, 4, 64),
        "k": z(12, 2, 64),
        "v": z(12, 2, 32),
        "cu_seqlens_q": torch.tensor([0, 4, 10], dtype=INT32),
        "cu_seqlens_k": torch.tensor([0, 5, 12], dtype=INT32),
        "max_seqlen_q": 6,
        "max_seqlen_k": 7,
    } | changes
    return attnfast.varlen_attention(**arguments)


def decode(**changes: Any) -> Any:
    arguments = {
        "q": z(2, 4, 1, 64),
        "k_cache": z(2, 2, 16, 64),
        "v_cache": z(2, 2, 16, 32),
        "cache_seqlens": torch.tensor([3, 16], dtype=INT32),
    } | changes
    return attnfast.decode_attention(**arguments)


def paged(**changes: Any) -> Any:
    arguments = {
        "k_cache": z(5, 8, 2, 64),
        "v_cache": z(5, 8, 2, 32),
        "page_table": torch.tensor([[0, -7], [2, 4]], dtype=INT32),
    } | changes
    return decode(**arguments)


def sdpa(**changes: Any) -> Any:
    arguments = {"query": z(2, 4, 10, 64), "key": z(2, 4, 12, 64), "value": z(2, 4, 12, 32)}
    return attnfast.scaled_dot_product_attention(**(arguments | changes))


def lengths(*values: int, dtype: torch.dtype = INT32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


Row = tuple[Callable[..., Any], dict[str, Any], type[Exception], str]

TENSORS: list[Row] = [
    (dense, {"q": [1.0]}, TypeError, "q must be a Tensor, got list"),
    (dense, {"v": None}, TypeError, "v must be a Tensor, got NoneType"),
    (
        dense,
        {"k": z(2, 2, 12, 64).to_sparse()},
        TypeError,
        "k must be a dense strided Tensor, got layout torch.sparse_coo",
    ),
    (
        dense,
        {"q": torch.nested.nested_tensor([z(4, 64)], layout=torch.jagged)},
        TypeError,
        "q must be a dense strided Tensor, got layout torch.jagged",
    ),
    (dense, {"q": z(4, 10, 64)}, ValueError, "q must be (B, H, T, D), got (4, 10, 64)"),
    (
        dense,
        {"k": z(2, 12, 64)},
        ValueError,
        "k must be (B, H_kv, S, D) = (2, *, *, 64), got (2, 12, 64)",
    ),
    (
        dense,
        {"k": z(3, 2, 12, 64)},
        ValueError,
        "k must be (B, H_kv, S, D) = (2, *, *, 64), got (3, 2, 12, 64)",
    ),
    (
        dense,
        {"k": z(2, 2, 12, 80)},
        ValueError,
        "k must be (B, H_kv, S, D) = (2, *, *, 64), got (2, 2, 12, 80)",
    ),
    (
        dense,
        {"v": z(2, 2, 11, 64)},
        ValueError,
        "v must be (B, H_kv, S, D_v) = (2, 2, 12, *), got (2, 2, 11, 64)",
    ),
    (
        dense,
        {"v": z(2, 1, 12, 64)},
        ValueError,
        "v must be (B, H_kv, S, D_v) = (2, 2, 12, *), got (2, 1, 12, 64)",
    ),
    (
        dense,
        {"v": z(2, 12)},
        ValueError,
        "v must be (B, H_kv, S, D_v) = (2, 2, 12, *), got (2, 12)",
    ),
    (dense, {"q": z(2, 0, 10, 64)}, ValueError, "q must be of 1 head or more, got H = 0"),
    (
        dense,
        {"k": z(2, 3, 12, 64), "v": z(2, 3, 12, 64)},
        ValueError,
        "k must be of a number of heads that divides H = 4, got H_kv = 3",
    ),
    (
        dense,
        {"k": z(2, 8, 12, 64), "v": z(2, 8, 12, 64)},
        ValueError,
        "k must be of a number of heads that divides H = 4, got H_kv = 8",
    ),
    (
        dense,
        {"k": z(2, 0, 12, 64), "v": z(2, 0, 12, 64)},
        ValueError,
        "k must be of a number of heads that divides H = 4, got H_kv = 0",
    ),
    (
        dense,
        {"q": z(2, 4, 10, 0), "k": z(2, 2, 12, 0)},
        ValueError,
        "q must be of head dim 1 or more, got D = 0",
    ),
    (
        dense,
        {"v": z(2, 2, 12, 0)},
        ValueError,
        "v must be of head dim 1 or more, got D_v = 0",
    ),
    (
        dense,
        {name: z(2, 2, 12, 64, dtype=INT64) for name in "qkv"},
        TypeError,
        "q must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        dense,
        {"k": z(2, 2, 12, 64, dtype=HALF)},
        TypeError,
        "k must be of q's dtype torch.float32, got torch.bfloat16",
    ),
    (
        dense,
        {"v": z(2, 2, 12, 64, dtype=torch.float64)},
        TypeError,
        "v must be of q's dtype torch.float32, got torch.float64",
    ),
    (
        dense,
        {"v": z(2, 2, 12, 64, device="meta")},
        ValueError,
        "v must be on q's device cpu, got meta",
    ),
]

OPTIONAL_TENSORS: list[Row] = [
    (
        dense,
        {"mask": True},
        TypeError,
        "mask must be a Tensor broadcastable to (B, H, T, S), got bool",
    ),
    (
        dense,
        {"mask": z(10, 12)},
        TypeError,
        "mask must be bool, True = attend (what is to be added to the scores is a bias), "
        "got torch.float32",
    ),
    (
        dense,
        {"mask": z(2, 10, 12, dtype=torch.bool)},
        ValueError,
        "mask must be broadcastable to (B, H, T, S) = (2, 4, 10, 12), got (2, 10, 12)",
    ),
    (
        dense,
        {"mask": z(1, 1, 1, 10, 12, dtype=torch.bool)},
        ValueError,
        "mask must be broadcastable to (B, H, T, S) = (2, 4, 10, 12), got (1, 1, 1, 10, 12)",
    ),
    (
        dense,
        {"mask": z(10, 12, dtype=torch.bool, device="meta")},
        ValueError,
        "mask must be on q's device cpu, got meta",
    ),
    (
        dense,
        {"bias": z(10, 12, dtype=torch.bool)},
        TypeError,
        "bias must be float32, bfloat16, float16 or float64 (what is True or False is a mask), "
        "got torch.bool",
    ),
    (
        dense,
        {"bias": z(4, 12, 10)},
        ValueError,
        "bias must be broadcastable to (B, H, T, S) = (2, 4, 10, 12), got (4, 12, 10)",
    ),
    (
        dense,
        {"alibi_slopes": z(4, dtype=HALF)},
        TypeError,
        "alibi_slopes must be float32, got torch.bfloat16",
    ),
    (
        dense,
        {"alibi_slopes": z(3)},
        ValueError,
        "alibi_slopes must be (H,) = (4,) or (B, H) = (2, 4), got (3,)",
    ),
    (
        dense,
        {"alibi_slopes": z(1, 4)},
        ValueError,
        "alibi_slopes must be (H,) = (4,) or (B, H) = (2, 4), got (1, 4)",
    ),
    (
        dense,
        {"alibi_slopes": 0.5},
        TypeError,
        "alibi_slopes must be a Tensor (H,) or (B, H), got float",
    ),
    (
        dense,
        {"alibi_slopes": z(4).requires_grad_()},
        ValueError,
        "alibi_slopes must be without gradient, as slopes have none (detach them; a bias has one),"
        " got requires_grad=True",
    ),
    (dense, {"sinks": z(2)}, ValueError, "sinks must be (H,) = (4,), got (2,)"),
    (
        dense,
        {"sinks": z(4, dtype=INT32)},
        TypeError,
        "sinks must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    (dense, {"sinks": 0.0}, TypeError, "sinks must be a Tensor (H,), got float"),
    (
        dense,
        {"dropout_seed": 3, "dropout_p": 0.5},
        TypeError,
        "dropout_seed must be an int64 Tensor (seed, offset), got int",
    ),
    (
        dense,
        {"dropout_seed": lengths(3, 4)},
        TypeError,
        "dropout_seed must be int64, got torch.int32",
    ),
    (
        dense,
        {"dropout_seed": lengths(3, dtype=INT64)},
        ValueError,
        "dropout_seed must be (seed, offset), of shape (2,), got (1,)",
    ),
    (
        dense,
        {"dropout_seed": z(2, dtype=INT64, device="meta")},
        ValueError,
        "dropout_seed must be on q's device cpu, got meta",
    ),
]

OPTIONS: list[Row] = [
    (dense, {"causal": 1}, TypeError, "causal must be True or False, got 1"),
    (dense, {"causal": None}, TypeError, "causal must be True or False, got None"),
    (
        dense,
        {"window": 5},
        TypeError,
        "window must be None or (left, right), each None or an int, got 5",
    ),
    (dense, {"window": (1, 2, 3)}, ValueError, "window must be (left, right), got 3 entries"),
    (
        dense,
        {"window": (-1, None)},
        ValueError,
        "window's left side must be from 0 to 2147483647, got -1",
    ),
    (
        dense,
        {"window": (None, 2**31)},
        ValueError,
        "window's right side must be from 0 to 2147483647, got 2147483648",
    ),
    (dense, {"window": (0.5, 1)}, TypeError, "window's left side must be an int, got 0.5"),
    (dense, {"window": (True, 1)}, TypeError, "window's left side must be an int, got True"),
    (
        dense,
        {"align": "bottom"},
        ValueError,
        "align must be 'top_left', 'bottom_right', an int or an int Tensor (B,), got 'bottom'",
    ),
    (
        dense,
        {"align": 1.5},
        TypeError,
        "align must be 'top_left', 'bottom_right', an int or an int Tensor (B,), got 1.5",
    ),
    (
        dense,
        {"align": False},
        TypeError,
        "align must be 'top_left', 'bottom_right', an int or an int Tensor (B,), got False",
    ),
    (
        dense,
        {"align": -(2**31)},
        ValueError,
        "align must be from -2147483647 to 2147483647, got -2147483648",
    ),
    (dense, {"align": lengths(1, 2, 3)}, ValueError, "align must be (B,) = (2,), got (3,)"),
    (dense, {"align": z(2)}, TypeError, "align must be int32, got torch.float32"),
    (
        dense,
        {"scale": math.nan},
        ValueError,
        "scale must be a number that is finite in float32, got nan",
    ),
    (
        dense,
        {"scale": -math.inf},
        ValueError,
        "scale must be a number that is finite in float32, got -inf",
    ),
    (
        dense,
        {"scale": 1e39},
        ValueError,
        "scale must be a number that is finite in float32, got 1e+39",
    ),
    (
        dense,
        {"scale": "1"},
        TypeError,
        "scale must be a number that is finite in float32, got '1'",
    ),
    (
        dense,
        {"scale": True},
        TypeError,
        "scale must be a number that is finite in float32, got True",
    ),
    *(
        (
            dense,
            {"softcap": softcap},
            ValueError,
            "softcap must be a number above 0 and finite in float32, or None for no cap, "
            f"got {softcap}",
        )
        for softcap in (0, -1.0, math.nan, math.inf, 1e-39)
    ),
    *(
        (
            dense,
            {"dropout_p": p},
            ValueError,
            f"dropout_p must be a number in [0, 1], got {p}",
        )
        for p in (-0.1, 1.1, math.nan)
    ),
    (dense, {"dropout_p": None}, TypeError, "dropout_p must be a number in [0, 1], got None"),
    (
        dense,
        {"return_stats": "all"},
        ValueError,
        "return_stats must be one of [False, True, 'received'], got 'all'",
    ),
    (
        dense,
        {"return_stats": None},
        TypeError,
        "return_stats must be one of [False, True, 'received'], got None",
    ),
    (
        dense,
        {"return_weights": "received"},
        ValueError,
        "return_weights must be one of [False, 'mean', True], got 'received'",
    ),
    (
        dense,
        {"return_weights": 1},
        TypeError,
        "return_weights must be one of [False, 'mean', True], got 1",
    ),
    (
        dense,
        {"deterministic": 1},
        TypeError,
        "deterministic must be None or True or False, got 1",
    ),
]

VARLEN: list[Row] = [
    (varlen, {"q": z(1, 10, 4, 64)}, ValueError, "q must be (total_q, H, D), got (1, 10, 4, 64)"),
    (
        varlen,
        {"k": z(12, 2, 32)},
        ValueError,
        "k must be (total_k, H_kv, D) = (*, *, 64), got (12, 2, 32)",
    ),
    (
        varlen,
        {"v": z(11, 2, 32)},
        ValueError,
        "v must be (total_k, H_kv, D_v) = (12, 2, *), got (11, 2, 32)",
    ),
    (
        varlen,
        {"cu_seqlens_q": [0, 4, 10]},
        TypeError,
        "cu_seqlens_q must be an int32 Tensor (sequences + 1,), got list",
    ),
    (varlen, {"cu_seqlens_q": z(3)}, TypeError, "cu_seqlens_q must be int32, got torch.float32"),
    (
        varlen,
        {"cu_seqlens_k": z(1, 3, dtype=INT32)},
        ValueError,
        "cu_seqlens_k must be (sequences + 1,) = (*,), got (1, 3)",
    ),
    (
        varlen,
        {"cu_seqlens_q": z(0, dtype=INT32)},
        ValueError,
        "cu_seqlens_q must be (sequences + 1,), of 1 or more entries, got (0,)",
    ),
    (
        varlen,
        {"cu_seqlens_k": lengths(0, 12)},
        ValueError,
        "cu_seqlens_k must be as long as cu_seqlens_q, 3, got 2",
    ),
    (varlen, {"max_seqlen_q": 6.0}, TypeError, "max_seqlen_q must be an int, got 6.0"),
    (
        varlen,
        {"max_seqlen_k": -1},
        ValueError,
        "max_seqlen_k must be from 0 to 2147483647, got -1",
    ),
    (
        varlen,
        {"bias": z(2, 4, 6, 7)},
        ValueError,
        "bias must be broadcastable to (1, H, max_seqlen_q, max_seqlen_k) = (1, 4, 6, 7), "
        "got (2, 4, 6, 7)",
    ),
    (
        varlen,
        {"align": lengths(1, 2, 3)},
        ValueError,
        "align must be (B,) = (2,), got (3,)",
    ),
]

# Values inside tensors: the operator checks them, and Python does for the reference.
VALUES: list[Row] = [
    (
        varlen,
        {"cu_seqlens_q": lengths(1, 4, 10)},
        ValueError,
        "cu_seqlens_q must start with 0, got 1",
    ),
    (
        varlen,
        {"cu_seqlens_k": lengths(0, 7, 5)},
        ValueError,
        "cu_seqlens_k must not decrease, got 5 after 7 at index 2",
    ),
    (
        varlen,
        {"cu_seqlens_k": lengths(0, 7, 13)},
        ValueError,
        "cu_seqlens_k must end within the 12 rows of k, got 13",
    ),
    (
        varlen,
        {"max_seqlen_q": 5},
        ValueError,
        "max_seqlen_q must be at least the longest sequence (6), got 5",
    ),
    (
        decode,
        {"cache_seqlens": lengths(3, 17)},
        ValueError,
        "cache_seqlens must lie in [0, 16], the capacity of the cache, got 17 at index 1",
    ),
    (
        decode,
        {"cache_seqlens": lengths(-1, 16)},
        ValueError,
        "cache_seqlens must lie in [0, 16], the capacity of the cache, got -1 at index 0",
    ),
    (
        paged,
        {"page_table": lengths(0, -7, 2, 5).view(2, 2)},
        ValueError,
        "page_table must hold pages in [0, 5), got 5 at (1, 1)",
    ),
    (
        paged,
        {"page_table": lengths(-1, -7, 2, 4).view(2, 2)},
        ValueError,
        "page_table must hold pages in [0, 5), got -1 at (0, 0)",
    ),
]

DECODE: list[Row] = [
    (decode, {"q": z(4, 1, 64)}, ValueError, "q must be (B, H, T, D), got (4, 1, 64)"),
    (
        decode,
        {"k_cache": z(2, 2, 16, 32)},
        ValueError,
        "k_cache must be (B, H_kv, S, D) = (2, *, *, 64), got (2, 2, 16, 32)",
    ),
    (
        decode,
        {"v_cache": z(2, 2, 15, 32)},
        ValueError,
        "v_cache must be (B, H_kv, S, D_v) = (2, 2, 16, *), got (2, 2, 15, 32)",
    ),
    (
        decode,
        {"k_cache": z(2, 2, 16, 64, dtype=HALF)},
        TypeError,
        "k_cache must be of q's dtype torch.float32, got torch.bfloat16",
    ),
    (
        decode,
        {"cache_seqlens": 3},
        TypeError,
        "cache_seqlens must be an int32 Tensor (B,), got int",
    ),
    (
        decode,
        {"cache_seqlens": lengths(1, 2, 3)},
        ValueError,
        "cache_seqlens must be (B,) = (2,), got (3,)",
    ),
    (
        decode,
        {"q": z(2, 4, 1, 64).requires_grad_()},
        ValueError,
        "q must be without gradient, as decoding has none (detach it, or run under "
        "torch.no_grad()), got requires_grad=True",
    ),
    (
        decode,
        {"sinks": z(4).requires_grad_()},
        ValueError,
        "sinks must be without gradient, as decoding has none (detach it, or run under "
        "torch.no_grad()), got requires_grad=True",
    ),
    (
        decode,
        {"bias": z(2, 4, 1, 15)},
        ValueError,
        "bias must be broadcastable to (B, H, T, S) = (2, 4, 1, 16), got (2, 4, 1, 15)",
    ),
    (
        paged,
        {"q": z(2, 4, 64)},
        ValueError,
        "q must be (B, H, T, D), got (2, 4, 64)",
    ),
    (
        paged,
        {"k_cache": z(5, 0, 2, 64)},
        ValueError,
        "k_cache must be pages (P, page, H_kv, D) = (*, *, *, 64), page of 1 or more, "
        "got (5, 0, 2, 64)",
    ),
    (
        paged,
        {"v_cache": z(5, 8, 4, 32)},
        ValueError,
        "v_cache must be pages (P, page, H_kv, D_v) = (5, 8, 2, *), got (5, 8, 4, 32)",
    ),
    (
        paged,
        {"page_table": z(3, 2, dtype=INT32)},
        ValueError,
        "page_table must be (B, n) = (2, *), got (3, 2)",
    ),
    (paged, {"page_table": z(2, 2)}, TypeError, "page_table must be int32, got torch.float32"),
]

SDPA: list[Row] = [
    (sdpa, {"query": 1}, TypeError, "query must be a Tensor, got int"),
    (sdpa, {"key": z(64)}, ValueError, "key must be of 2 or more dimensions, got (64,)"),
    (
        sdpa,
        {"key": z(2, 4, 12, 32)},
        ValueError,
        "key must be (B, H_kv, S, D) = (2, *, *, 64), got (2, 4, 12, 32)",
    ),
    (
        sdpa,
        {"value": z(2, 4, 11, 32)},
        ValueError,
        "value must be (B, H_kv, S, D_v) = (2, 4, 12, *), got (2, 4, 11, 32)",
    ),
    (
        sdpa,
        {"key": z(3, 4, 12, 64)},
        ValueError,
        "query, key and value must be of leading sizes that broadcast, "
        "got (2, 4, 10, 64), (3, 4, 12, 64), (2, 4, 12, 32)",
    ),
    (
        sdpa,
        {"key": z(2, 2, 12, 64), "value": z(2, 2, 12, 64)},
        ValueError,
        "key must be of query's number of heads, 4 (or a divisor, with enable_gqa=True), got 2",
    ),
    (
        sdpa,
        {"value": z(2, 3, 12, 64), "enable_gqa": True},
        ValueError,
        "value must be of a number of heads that divides query's, 4, got 3",
    ),
    (
        sdpa,
        {"attn_mask": z(10, 12), "is_causal": True},
        ValueError,
        "attn_mask must be None with is_causal=True, got both",
    ),
    (
        sdpa,
        {"attn_mask": z(10, 12, dtype=INT64)},
        TypeError,
        "attn_mask must be bool or float, got torch.int64",
    ),
    (sdpa, {"attn_mask": 3.0}, TypeError, "attn_mask must be a Tensor or None, got float"),
    (
        sdpa,
        {"attn_mask": z(3, 1, 10, 12)},
        ValueError,
        "attn_mask must be broadcastable to (B, H, T, S) = (2, 4, 10, 12), got (3, 1, 10, 12)",
    ),
    (
        sdpa,
        {
            "query": z(3, 2, 4, 10, 64),
            "attn_mask": z(5, 2, 1, 10, 12),
        },
        ValueError,
        "attn_mask must be broadcastable to (..., H, L, S) with leading sizes (3, 2), "
        "got (5, 2, 1, 10, 12)",
    ),
    (sdpa, {"scale": math.nan}, ValueError, "scale must be a number that is finite in float32,"),
    (sdpa, {"dropout_p": 2.0}, ValueError, "dropout_p must be a number in [0, 1], got 2.0"),
]

FUNCTIONS = {
    dense: "attention",
    varlen: "varlen_attention",
    decode: "decode_attention",
    paged: "decode_attention",
    sdpa: "scaled_dot_product_attention",
}


def row_id(row: Row) -> str:
    function, changes, _, message = row
    return re.sub(r"[^\w]+", "-", f"{function.__name__}-{'-'.join(changes)}-{message}")[:70]


def check(row: Row, **more: Any) -> None:
    function, changes, error, message = row
    expected = re.escape(f"{FUNCTIONS[function]}: {message}")
    with pytest.raises(error, match=f"^{expected}") as raised:
        function(**changes, **more)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


ARGUMENTS = [*TENSORS, *OPTIONAL_TENSORS, *OPTIONS, *VARLEN, *DECODE, *SDPA]


@pytest.mark.parametrize("row", ARGUMENTS, ids=row_id)
def test_an_argument(row: Row) -> None:
    check(row)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("row", VALUES, ids=row_id)
def test_values_in_a_tensor(row: Row, backend: str) -> None:
    check(row, backend=backend)


@pytest.mark.parametrize("function", [dense, varlen, decode, paged, sdpa])
def test_the_calls_that_the_rows_change_are_right_themselves(function: Any) -> None:
    assert function().shape[-1] == 32


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float64])
@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 4, 10, 8), (0, 2, 12, 8)),
        ((2, 4, 0, 8), (2, 2, 12, 8)),
        ((2, 4, 10, 8), (2, 2, 0, 8)),
        ((0, 1, 0, 1), (0, 1, 0, 1)),
    ],
    ids=["B=0", "T=0", "S=0", "all"],
)
def test_empty_sizes_are_allowed(shapes: Any, dtype: torch.dtype) -> None:
    q, k, v = (torch.zeros(shapes[i > 0], dtype=dtype, requires_grad=True) for i in range(3))
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    out, lse, stats, weights = attnfast.attention(
        q,
        k,
        v,
        mask=torch.ones(T, S, dtype=torch.bool),
        bias=torch.zeros(H, 1, 1),
        return_lse=True,
        return_stats="received",
        return_weights=True,
    )
    assert out.shape == q.shape
    assert weights.shape == (q.shape[0], H, T, S)
    assert stats.received.shape == (q.shape[0], H, S)
    assert (lse == -torch.inf).all()
    assert not out.any()
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_numpy_numbers_and_other_forms_are_taken() -> None:
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    plain = attnfast.attention(q, k, v, scale=0.5, softcap=2.0, window=(3, None), align=2)
    other = attnfast.attention(
        q,
        k,
        v,
        scale=np.float32(0.5),
        softcap=np.int64(2),
        window=[np.int32(3), None],
        align=np.int64(2),
        dropout_p=np.float64(0),
    )
    per_entry = attnfast.attention(
        q, k, v, scale=0.5, softcap=2, window=(3, None), align=lengths(2, 2, dtype=INT64)
    )
    assert torch.equal(plain, other)
    assert torch.equal(plain, per_entry)


def test_int64_offsets_are_converted() -> None:
    q, k, v = torch.randn(10, 4, 64), torch.randn(12, 2, 64), torch.randn(12, 2, 32)
    long = {
        name: lengths(*values, dtype=INT64)
        for name, values in (("cu_seqlens_q", (0, 4, 10)), ("cu_seqlens_k", (0, 5, 12)))
    }
    assert torch.equal(varlen(q=q, k=k, v=v), varlen(q=q, k=k, v=v, **long))


def test_inputs_are_never_modified() -> None:
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    given = {"bias": torch.randn(10, 12), "sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
    before = [x.clone() for x in (q, k, v, *given.values())]
    for x in (q, k, v, given["bias"], given["sinks"]):
        x.requires_grad_()
    attnfast.attention(q, k, v, causal=True, **given).sum().backward()
    for x, copy in zip((q, k, v, *given.values()), before, strict=True):
        assert torch.equal(x, copy)
