"""Tensors whose storage was given back (FSDP, offloading): an error names them, nothing is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfast

INT32 = torch.int32


def arguments() -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, 4, 6, 8),
        "k": torch.randn(2, 2, 7, 8),
        "v": torch.randn(2, 2, 7, 5),
        "mask": torch.ones(6, 7, dtype=torch.bool),
        "bias": torch.randn(4, 6, 7),
        "alibi_slopes": torch.rand(2, 4),
        "sinks": torch.randn(4),
        "align": torch.tensor([1, 2], dtype=INT32),
        "dropout_seed": torch.tensor([3, 4]),
    }


def chosen() -> dict[str, Tensor]:
    given = {name: x for name, x in arguments().items() if name in "qkv"}
    return given | {"indices": torch.arange(48, dtype=INT32).view(2, 6, 4) % 7}


def packed() -> dict[str, Tensor]:
    return {
        "q": torch.randn(9, 4, 8),
        "k": torch.randn(11, 2, 8),
        "v": torch.randn(11, 2, 5),
        "cu_seqlens_q": torch.tensor([0, 4, 9], dtype=INT32),
        "cu_seqlens_k": torch.tensor([0, 5, 11], dtype=INT32),
    }


def cached() -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, 4, 2, 8),
        "k_cache": torch.randn(5, 4, 2, 8),
        "v_cache": torch.randn(5, 4, 2, 8),
        "cache_seqlens": torch.tensor([3, 8], dtype=INT32),
        "page_table": torch.tensor([[0, 1], [2, 4]], dtype=INT32),
        "bias": torch.randn(4, 1, 1),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
    }


def dense_call(backend: str, **given: Any) -> Any:
    return attnfast.attention(dropout_p=0.5, backend=backend, **given)


def chosen_call(backend: str, **given: Any) -> Any:
    return attnfast.attention(backend=backend, **given)


def varlen_call(backend: str, **given: Any) -> Any:
    return attnfast.varlen_attention(max_seqlen_q=5, max_seqlen_k=6, backend=backend, **given)


def decode_call(backend: str, **given: Any) -> Any:
    return attnfast.decode_attention(backend=backend, **given)


CALLS: dict[Callable[..., Any], Callable[[], dict[str, Tensor]]] = {
    dense_call: arguments,
    chosen_call: chosen,
    varlen_call: packed,
    decode_call: cached,
}
EACH = [(call, name) for call, make in CALLS.items() for name in make()]


def second_half(x: Tensor) -> Tensor:
    """The same values, behind others: a pointer to them is not null without a storage."""
    return torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape)


def turned(x: Tensor) -> Tensor:
    """The same values, with the last dimension first: what torch copies before kernels see it."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


MADE = [
    (call, name, made)
    for call, name in EACH
    for made in (Tensor.clone, second_half, turned, Tensor.long, Tensor.bfloat16)
    if made is not Tensor.long or CALLS[call]()[name].dtype is INT32
    if made is not Tensor.bfloat16 or name in ("bias", "sinks")
]


def complaint(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What a call raises, as text: a traceback would print the tensors, and crash."""
    try:
        call(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("call", "name", "made"), MADE, ids=lambda x: getattr(x, "__name__", x))
def test_every_argument(call: Any, name: str, made: Any, backend: str) -> None:
    given = CALLS[call]()
    x = given[name]
    call(backend, **given)  # right, before
    given[name] = made(x)
    given[name].untyped_storage().resize_(0)
    said = (
        rf"ValueError: \w*attention: {name} must (have its|be in) memory, got a storage of 0 bytes"
    )
    assert re.match(said, complaint(call, backend, **given))


@pytest.mark.parametrize(("call", "name"), EACH, ids=lambda x: getattr(x, "__name__", x))
def test_a_storage_that_has_become_smaller(call: Any, name: str) -> None:
    given = CALLS[call]()
    storage = given[name].untyped_storage()
    storage.resize_(storage.nbytes() - given[name].element_size())
    said = rf"ValueError: \w*attention: {name} must (have its|be in) memory, got a storage of \d+"
    assert re.match(said, complaint(call, "cpu", **given))


def test_autocast_reads_nothing_either() -> None:
    given = arguments()
    given["k"].untyped_storage().resize_(0)
    with torch.autocast("cpu"):
        assert "attention: k must be in memory" in complaint(dense_call, "cpu", **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_names_are_those_of_the_function(name: str, dtype: torch.dtype) -> None:
    shapes = {
        "query": (1, 1, 4, 8),
        "key": (1, 1, 5, 8),
        "value": (1, 1, 5, 8),
        "attn_mask": (4, 5),
    }
    given = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    given[name].untyped_storage().resize_(0)
    said = rf"ValueError: scaled_dot_product_attention: {name} must (have its|be in) memory"
    assert re.match(said, complaint(attnfast.scaled_dot_product_attention, **given))


def test_backward() -> None:
    """Every tensor that is saved for it, those that forward has made among them."""
    named = set()
    count = last = 0
    while count <= last:
        given = arguments()
        for name in ("q", "k", "v", "bias", "sinks"):
            given[name].requires_grad_()
        out = attnfast.attention(dropout_p=0.5, **given)
        saved = [x for x in out.grad_fn.saved_tensors if x is not None]
        saved[count].untyped_storage().resize_(0)
        said = re.match(
            r"\w+Error: attention: (\w+) must (?:have its|be in) memory, got a storage of 0 bytes",
            complaint(out.backward, torch.ones(out.shape)),
        )
        assert said is not None
        named.add(said[1])
        count, last = count + 1, len(saved) - 1
    assert len(named) == len(saved) >= len(given) + 2


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_the_layers_masks(name: str, kind: torch.dtype) -> None:
    layer = attnfast.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5) if name == "attn_mask" else torch.zeros(2, 5)
    mask = mask.to(kind)
    mask.untyped_storage().resize_(0)
    with torch.no_grad():
        assert f"{name} must be in memory" in complaint(layer, x, x, x, **{name: mask})


def test_empty_tensors_need_no_memory() -> None:
    x = torch.randn(2, 3, 0, 8)
    x.untyped_storage().resize_(0)
    assert attnfast.attention(x, x, x).shape == x.shape
    assert attnfast.attention(x.double(), x.double(), x.double()).shape == x.shape
