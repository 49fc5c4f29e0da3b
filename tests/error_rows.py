"""The calls that the tests of error messages change, and the rows for `attention`'s arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right

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

OTHER_LAYOUTS: list[Row] = [
    (
        dense,
        {name: made},
        TypeError,
        f"{name} must be a dense strided Tensor, got {got}",
    )
    for name, flat in {
        "q": z(2, 4, 10, 64),
        "mask": z(10, 12, dtype=torch.bool),
        "bias": z(10, 12),
        "sinks": z(4, 1)[:, 0],
        "alibi_slopes": z(2, 4),
        "align": z(2, 1, dtype=INT64)[:, 0],
        "dropout_seed": z(2, 1, dtype=INT64)[:, 0],
    }.items()
    for got, made in {
        "layout torch.sparse_coo": flat.to_sparse(),
        "layout torch.jagged": torch.nested.nested_tensor([z(3, 4)], layout=torch.jagged),
        "a nested one": torch.nested.nested_tensor([z(3, 4)]),
    }.items()
]

OTHER_NAMES: list[Row] = [
    (
        dense,
        {"attn_mask": None},
        TypeError,
        "attn_mask must be given as mask= (bool, True = attend) or bias= (float, added to the "
        "scores), got attn_mask=",
    ),
    (dense, {"is_causal": True}, TypeError, "is_causal must be given as causal=, got is_causal="),
    (
        dense,
        {"q": z(2, 10, 4, 64), "k": z(2, 12, 4, 64), "v": z(2, 12, 4, 64)},
        ValueError,
        "k must be of a number of heads that divides H = 10, got H_kv = 12: if the tensors are "
        "(B, T, H, D), give q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)",
    ),
    (
        dense,
        {"bias": causal_lower_right(9, 12)},
        ValueError,
        "bias must be a CausalBias for (T, S) = (10, 12), got one for (9, 12)",
    ),
    *(
        (
            dense,
            {"mask": causal_lower_right(10, 12)} | others,
            ValueError,
            "mask must be a Tensor or None with causal, align, window or alibi_slopes, got a "
            "CausalBias, which has an alignment of its own",
        )
        for others in (
            {"causal": True},
            {"align": 0},
            {"window": (1, 1)},
            {"alibi_slopes": z(4)},
        )
    ),
    (
        dense,
        {"sinks": causal_lower_right(1, 4)},
        TypeError,
        "sinks must be a Tensor of values, got CausalBias",
    ),
    (
        dense,
        {"mask": masked_tensor(z(10, 12), z(10, 12) == 0)},
        TypeError,
        "mask must be a Tensor without a mask of its own (get_data() and get_mask() are two "
        "arguments), got MaskedTensor",
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

WINDOWS = z(4, 2, dtype=INT32)
OPTIONS: list[Row] = [
    (dense, {"causal": 1}, TypeError, "causal must be True or False, got 1"),
    (dense, {"causal": None}, TypeError, "causal must be True or False, got None"),
    (decode, {"return_received": 1}, TypeError, "return_received must be True or False, got 1"),
    (
        dense,
        {"window": 5},
        TypeError,
        "window must be None, (left, right), each None or an int, or an int32 Tensor (H, 2), "
        "(5, 5) or (5, 0) for example, got 5",
    ),
    (
        dense,
        {"window": "local"},
        TypeError,
        "window must be None, (left, right), each None or an int, or an int32 Tensor (H, 2), got "
        "'local'",
    ),
    (dense, {"window": z(4, 2)}, TypeError, "window must be int32, got torch.float32"),
    (dense, {"window": WINDOWS[:3]}, ValueError, "window must be (H, 2) = (4, 2), got (3, 2)"),
    (varlen, {"window": WINDOWS[0]}, ValueError, "window must be (H, 2) = (4, 2), got (2,)"),
    (decode, {"window": WINDOWS.T}, ValueError, "window must be (H, 2) = (4, 2), got (2, 4)"),
    (
        dense,
        {"window": WINDOWS.to("meta")},
        ValueError,
        "window must be on q's device cpu, got meta",
    ),
    (
        dense,
        {"window": WINDOWS.long() + 2**31},
        ValueError,
        "window must be from -2147483648 to 2147483647, got 2147483648",
    ),
    *(
        (
            call,
            {"window": WINDOWS.index_fill(0, torch.tensor(2), -2)} | backend,
            ValueError,
            "window must hold -1, for no bound, or more, got -2 for head 2",
        )
        for call in (dense, varlen, decode)
        for backend in ({}, {"backend": "reference"})
    ),
    (dense, {"window": (1, 2, 3)}, ValueError, "window must be (left, right), got 3 entries"),
    (
        dense,
        {"window": (-1, None)},
        ValueError,
        "window's left side must be from 0 to 2147483647, or None for no bound, got -1",
    ),
    (
        dense,
        {"window": (None, 2**31)},
        ValueError,
        "window's right side must be from 0 to 2147483647, or None for no bound, got 2147483648",
    ),
    (
        dense,
        {"window": (0.5, 1)},
        TypeError,
        "window's left side must be an int, or None for no bound, got 0.5",
    ),
    (
        dense,
        {"window": (True, 1)},
        TypeError,
        "window's left side must be an int, or None for no bound, got True",
    ),
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
        "align must be from -536870912 to 536870912, got -2147483648",
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
    (
        dense,
        {"scale": torch.nn.Parameter(torch.zeros(3, 3))},
        TypeError,
        "scale must be a number that is finite in float32, got Parameter of shape (3, 3)",
    ),
    (
        dense,
        {"scale": 10**99},
        ValueError,
        f"scale must be a number that is finite in float32, got {'1'.ljust(56, '0')} ...",
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
    (
        dense,
        {"dropout_p": torch.zeros(2, 2)},
        TypeError,
        "dropout_p must be a number in [0, 1], got Tensor of shape (2, 2)",
    ),
    (
        dense,
        {"deterministic": ["a" * 99]},
        TypeError,
        f"deterministic must be None or True or False, got ['{'a' * 54} ...",
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

BLOCKS = attnfast.BlockMask.nothing((1, 1, 1, 2), 64)
DECODED_MASKS = [
    (
        decode,
        {"mask": z(1, 1)},
        TypeError,
        "mask must be bool, True = attend (what is to be added to the scores is a bias), "
        "got torch.float32",
    ),
    (
        decode,
        {"mask": z(1, 16, dtype=torch.bool)},
        ValueError,
        "mask must be broadcastable to (B, H, T, T) = (2, 4, 1, 1), got (1, 16)",
    ),
    (
        decode,
        {"mask": BLOCKS},
        ValueError,
        "mask must be a BlockMask that broadcasts to (B, H, T, S) = (2, 4, 1, 1), got (1, 1, 1, 2)",
    ),
]

LISTS = z(2, 10, 5, dtype=INT32)
ALONE = {"mask": z(10, 12, dtype=torch.bool), "bias": z(10, 12), "alibi_slopes": z(4)}
CHOSEN_KEYS: list[Row] = [
    (
        dense,
        {"indices": [[0]]},
        TypeError,
        "indices must be an int32 Tensor (B, T, K) or (B, H_kv, T, K), got list",
    ),
    (dense, {"indices": LISTS.float()}, TypeError, "indices must be int32, got torch.float32"),
    *(
        (
            dense,
            {"indices": z(*shape, dtype=INT32)},
            ValueError,
            "indices must be (B, T, K) or (B, H_kv, T, K) = (2, 10, *) or (2, 2, 10, *), got "
            f"{shape}",
        )
        for shape in ((10, 5), (2, 12, 5), (1, 10, 5), (2, 4, 10, 5), (2, 1, 10, 5))
    ),
    (
        dense,
        {"indices": LISTS.to("meta")},
        ValueError,
        "indices must be on q's device cpu, got meta",
    ),
    (
        dense,
        {"indices": LISTS.long() + 2**31},
        ValueError,
        "indices must be from -2147483648 to 2147483647, got 2147483648",
    ),
    *(
        (
            dense,
            {"indices": LISTS.index_fill(1, torch.tensor(7), wrong)} | backend,
            ValueError,
            f"indices must lie in [-1, 12), got {wrong} for query 7 of batch entry 0",
        )
        for wrong in (12, -2)
        for backend in ({}, {"backend": "reference"})
    ),
    *(
        (
            dense,
            {"indices": LISTS, name: x},
            ValueError,
            f"{name} must be None with indices, which alone say what a query attends, got a Tensor",
        )
        for name, x in ALONE.items()
    ),
    (
        dense,
        {"indices": LISTS, "dropout_p": 0.1},
        ValueError,
        "dropout_p must be 0 with indices, got 0.1",
    ),
    (
        dense,
        {"indices": LISTS, "return_stats": "received"},
        ValueError,
        "return_stats must be True or False with indices, whose kernels sum nothing by key in"
        " forward, got 'received'",
    ),
    (
        dense,
        {"indices": LISTS, "window": WINDOWS},
        ValueError,
        "window must be (left, right) or None with indices, of which heads that share keys read one"
        " list, got a Tensor",
    ),
    *(
        (
            dense,
            {"indices": LISTS, "return_weights": asked},
            ValueError,
            f"return_weights must be False with indices: weights are T x S numbers, got {asked!r}",
        )
        for asked in (True, "mean")
    ),
    *(
        (
            call,
            {"indices": LISTS},
            TypeError,
            "indices must be left out: only attention() takes them, for sequences of one length,"
            " got indices=",
        )
        for call in (varlen, decode)
    ),
]

ATTENTION = [
    *TENSORS,
    *OTHER_LAYOUTS,
    *OTHER_NAMES,
    *OPTIONAL_TENSORS,
    *OPTIONS,
    *CHOSEN_KEYS,
    *DECODED_MASKS,
]
