"""One row per error message of the public functions: type, and the whole text."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from error_rows import (
    ATTENTION,
    HALF,
    INT32,
    INT64,
    Row,
    decode,
    dense,
    lengths,
    paged,
    sdpa,
    varlen,
    z,
)
from torch.nn.attention.bias import causal_lower_right

import attnfast

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
    *(
        (
            function,
            {name: torch.tensor(values)},
            ValueError,
            f"{name} must be from -2147483648 to 2147483647, got {got}",
        )
        for function, name, values, got in (  # what would be right, were it taken modulo 2**32
            (varlen, "cu_seqlens_q", [0, 4, 2**32 + 10], 2**32 + 10),
            (varlen, "cu_seqlens_k", [-(2**32), 5, 12], -(2**32)),
            (varlen, "align", [2**32, 0], 2**32),
            (dense, "align", [2**63 - 1, 0], 2**63 - 1),
            (decode, "cache_seqlens", [2**32 + 3, 16], 2**32 + 3),
            (paged, "page_table", [[0, -7], [2**32 + 2, 4]], 2**32 + 2),
        )
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
    (
        decode,
        {"bias": causal_lower_right(1, 16)},
        TypeError,
        "bias must be a Tensor of values, got CausalBias",
    ),
    (
        decode,
        {"cache_seqlens": lengths(3, 16).to_sparse()},
        TypeError,
        "cache_seqlens must be a dense strided Tensor, got layout torch.sparse_coo",
    ),
    (
        decode,
        {"q": z(2, 1, 4, 64), "k_cache": z(2, 16, 2, 64), "v_cache": z(2, 16, 2, 32)},
        ValueError,
        "k_cache must be of a number of heads that divides H = 1, got H_kv = 16: if the tensors "
        "are (B, T, H, D), give q.transpose(1, 2), k_cache.transpose(1, 2), "
        "v_cache.transpose(1, 2)",
    ),
    (
        decode,
        {"block_table": None},
        TypeError,
        "block_table must be given as page_table=, got block_table=",
    ),
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
    (
        sdpa,
        {"key": z(2, 4, 12, 64).to_sparse()},
        TypeError,
        "key must be a dense strided Tensor, got layout torch.sparse_coo",
    ),
    (
        sdpa,
        {"attn_mask": causal_lower_right(10, 11)},
        ValueError,
        "attn_mask must be a CausalBias for (T, S) = (10, 12), got one for (10, 11)",
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


ARGUMENTS = [*ATTENTION, *VARLEN, *DECODE, *SDPA]


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
