"""Masks of transformers by their structure: what is understood, and what the bools are."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_integrations_transformers import build
from torch import Tensor, nn
from transformers import masking_utils as library

import attnfast
from attnfast.integrations import _mask_functions as functions
from attnfast.integrations import transformers as integration
from attnfast.integrations._structured_mask import StructuredMask


@pytest.fixture(autouse=True)
def name() -> Iterator[str]:
    yield integration.register()
    integration.unregister()


IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 4, 5], [7, 0, 1, 2, 3, 4, 5]])
LEFT = torch.arange(7) >= torch.tensor([[0], [3]])
RIGHT = torch.arange(7) < torch.tensor([[7], [2]])
causal, everything = library.causal_mask_function, library.bidirectional_mask_function
sliding = library.sliding_window_causal_mask_function
both_ways = library.sliding_window_bidirectional_mask_function


def chunks(size: int) -> Any:
    return library.chunked_causal_mask_function(size, torch.zeros(2, dtype=torch.int64))


def documents(function: Any, positions: Tensor = POSITIONS, ids: Tensor = IDS) -> Any:
    remapped = library.remap_positions_for_packed_sequence(function, positions)
    return library.and_masks(remapped, library.packed_sequence_mask_function(ids))


# A function; T, S, what else transformers asks for; what is understood.
UNDERSTOOD: dict[str, tuple[Any, int, int, dict[str, Any], dict[str, Any]]] = {
    "causal": (causal, 7, 7, {}, {"causal": True}),
    "everything": (everything, 5, 7, {}, {"causal": False}),
    "window": (sliding(3), 7, 7, {}, {"causal": True, "left": 2}),
    "window of one": (sliding(1), 7, 7, {}, {"left": 0}),
    "both ways": (both_ways(2), 7, 7, {}, {"left": 2, "right": 2}),
    "two windows": (library.and_masks(sliding(4), both_ways(2)), 7, 7, {}, {"left": 2}),
    "left padding": (sliding(3), 7, 7, {"attention_mask": LEFT}, {"left": 2}),
    "right padding": (everything, 7, 7, {"attention_mask": RIGHT}, {"causal": False}),
    "no padding": (causal, 7, 7, {"attention_mask": LEFT | True}, {"keys": None}),
    "a cache": (causal, 3, 7, {"q_offset": 4, "attention_mask": LEFT}, {"offset": 4}),
    "a step": (causal, 1, 7, {"q_offset": 6, "attention_mask": LEFT}, {"offset": 6}),
    "a static cache": (causal, 3, 9, {"q_offset": torch.tensor(4)}, {}),
    "a static cache, padded": (causal, 3, 9, {"attention_mask": LEFT}, {}),
    "a sliding cache": (sliding(4), 3, 5, {"q_offset": 4, "kv_offset": 2}, {"offset": 2}),
    "a sliding cache, padded": (
        sliding(4),
        3,
        5,
        {"q_offset": 4, "kv_offset": 2, "attention_mask": LEFT},
        {"offset": 2, "left": 3},
    ),
    "documents": (documents(causal), 7, 7, {}, {"causal": True, "longest": 6}),
    "chunks": (chunks(3), 7, 7, {}, {"causal": True, "longest": 3}),
    "chunks, none padded": (chunks(5), 7, 7, {"attention_mask": LEFT | True}, {"longest": 5}),
    "documents with a window": (documents(sliding(2)), 7, 7, {}, {"left": 1, "longest": 6}),
}


@pytest.mark.parametrize(
    ("function", "T", "S", "more", "known"), UNDERSTOOD.values(), ids=UNDERSTOOD
)
def test_bools_are_transformers(
    function: Any, T: int, S: int, more: dict[str, Any], known: dict[str, Any]
) -> None:
    asked = {"batch_size": 2, "q_length": T, "kv_length": S, "mask_function": function} | more
    mask = functions.attention_mask(library.sdpa_mask, **asked, allow_is_causal_skip=False)
    assert isinstance(mask, StructuredMask)
    assert {name: getattr(mask, name) for name in known} == known
    expected = library.sdpa_mask(**asked, allow_is_causal_skip=False)
    assert mask.shape == expected.shape
    assert 0 < expected.sum() < expected.numel() or function is everything
    assert torch.equal(mask.dense(), expected)


def other_window(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx > q_idx - 3


NOT_UNDERSTOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "somebody's own": (other_window, {}),
    "and somebody's own": (library.and_masks(causal, other_window), {}),
    "a union": (library.or_masks(causal, causal), {}),
    "a partial function": (functools.partial(causal), {}),
    "blocks": (library.blockwise_overlay(IDS), {}),
    "chunks of a cache": (chunks(3), {"q_length": 3, "q_offset": 4}),
    "padded chunks": (chunks(3), {"attention_mask": LEFT}),
    "chunks that begin later": (library.chunked_causal_mask_function(3, IDS[:, 3]), {}),
    "chunks of documents": (documents(chunks(3)), {}),
    "a document that goes on": (documents(causal, ids=IDS % 2), {}),
    "positions that jump": (documents(causal, positions=POSITIONS**2), {}),
    "positions without documents": (
        library.remap_positions_for_packed_sequence(causal, POSITIONS),
        {},
    ),
    "padded documents": (documents(causal), {"attention_mask": LEFT}),
}


@pytest.mark.parametrize(("function", "more"), NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_what_is_not_understood_is_bools(function: Any, more: dict[str, Any]) -> None:
    asked = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": function} | more
    mask = functions.attention_mask(library.sdpa_mask, **asked, allow_is_causal_skip=False)
    assert type(mask) is Tensor
    assert torch.equal(mask, library.sdpa_mask(**asked, allow_is_causal_skip=False))


CHUNKS = library.chunked_causal_mask_function(3, torch.tensor([0, 2]))
IN_BLOCKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "somebody's own": (library.and_masks(causal, other_window), {}),
    "a union": (library.or_masks(sliding(2), library.blockwise_overlay(IDS)), {}),
    "chunks, padded": (CHUNKS, {"attention_mask": LEFT}),
    "later chunks": (CHUNKS, {"q_length": 3, "q_offset": 4}),
    "a static cache": (CHUNKS, {"q_length": 3, "q_offset": torch.tensor(4)}),
    "a sliding cache": (
        CHUNKS,
        {"q_length": 3, "kv_length": 5, "q_offset": 4, "kv_offset": 2, "attention_mask": LEFT},
    ),
    "one that asks": (lambda b, h, q, k: torch.where(q < 3, k <= q, k == IDS[b, q]), {}),
}


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize(("function", "more"), IN_BLOCKS.values(), ids=IN_BLOCKS)
def test_any_function_is_a_mask_in_blocks(
    function: Any, more: dict[str, Any], use_vmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "BY_BLOCKS", 1)
    asked = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": function} | more
    asked |= {"allow_is_causal_skip": False, "use_vmap": use_vmap}
    mask = functions.attention_mask(library.sdpa_mask, **asked)
    expected = library.sdpa_mask(**asked)
    assert mask.blocks is not None
    assert torch.equal(mask.dense(), expected)
    asked["q_length"] = 1
    assert type(functions.attention_mask(library.sdpa_mask, **asked)) is Tensor


def test_a_function_of_single_numbers_alone_is_bools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "BY_BLOCKS", 1)

    def whole(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q.max()

    asked = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": whole}
    mask = functions.attention_mask(library.sdpa_mask, **asked, allow_is_causal_skip=False)
    assert type(mask) is Tensor
    assert torch.equal(mask, library.sdpa_mask(**asked, allow_is_causal_skip=False))


def test_another_meaning_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers whose windows are one wider."""

    def overlay(sliding_window: int) -> Callable[..., Any]:
        def inner_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
            return k >= q - sliding_window

        return inner_mask

    asked = {"batch_size": 1, "q_length": 7, "kv_length": 7, "allow_is_causal_skip": False}
    assert functions.structured(1, 7, 7, mask_function=causal) is not None
    monkeypatch.setattr(library, "sliding_window_overlay", overlay)
    functions.forget()
    functions.learn()
    assert functions.structured(1, 7, 7, mask_function=causal) is None
    mask = functions.attention_mask(library.sdpa_mask, **asked, mask_function=sliding(3))
    assert type(mask) is Tensor


def test_an_older_transformers_makes_its_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose masks are asked for by other arguments."""

    def older(batch_size: int, cache_position: Tensor, kv_length: int, **_: Any) -> Tensor:
        return torch.ones(batch_size, 1, cache_position.shape[0], kv_length, dtype=torch.bool)

    monkeypatch.setattr(library, "sdpa_mask", older)
    functions.forget()
    functions.learn()
    asked = {"batch_size": 2, "cache_position": torch.arange(7), "kv_length": 7}
    mask = functions.attention_mask(older, **asked, mask_function=causal)
    assert type(mask) is Tensor
    assert mask.all()


def test_no_mask_where_transformers_makes_none() -> None:
    for function, allowed in (
        (causal, "allow_is_causal_skip"),
        (everything, "allow_is_bidirectional_skip"),
    ):
        asked = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": function}
        asked["allow_is_causal_skip"] = False
        for padding in (None, LEFT | True):
            more = asked | {allowed: True, "attention_mask": padding}
            assert functions.attention_mask(library.sdpa_mask, **more) is None
        more = asked | {allowed: True, "attention_mask": LEFT}
        assert isinstance(functions.attention_mask(library.sdpa_mask, **more), StructuredMask)


# --- a tensor like any other


def mask_of(**said: Any) -> StructuredMask:
    return StructuredMask((2, 1, 4, 6), torch.device("cpu"), causal=True, left=2, **said)


READS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: x + torch.ones(2, 3, 4, 6),
    "a slice": lambda x: x[:, :, :, :4],
    "all of it": lambda x: x[:, :, :, :6],
    "an index": lambda x: x[0],
    "inverted": lambda x: ~x,
    "another dtype": lambda x: x.float(),
    "torch.where": lambda x: torch.where(x, 0.0, -1.0),
    "expanded": lambda x: x.expand(-1, 3, -1, -1),
    "joined": lambda x: torch.cat([x, x], 3),
    "a list": lambda x: torch.tensor(x.tolist()),
    "numpy's": lambda x: torch.from_numpy(x.numpy()),
    "detached": lambda x: x.detach(),
    "copied": copy.deepcopy,
    "cloned": lambda x: x.clone(),
    "in torch's attention": lambda x: F.scaled_dot_product_attention(
        torch.ones(2, 3, 4, 5), torch.ones(2, 3, 6, 5), torch.arange(180.0).view(2, 3, 6, 5), x
    ),
}


@pytest.mark.parametrize(
    ("reader", "compiled"),
    [*((name, False) for name in READS), ("all of it", True), ("joined", True)],
)
def test_reading_gives_the_bools(reader: str, compiled: bool) -> None:
    read = READS[reader]
    torch.compiler.reset()
    keys = torch.tensor([[True] * 6, [False, True, True, True, True, True]])
    mask, bools = mask_of(keys=keys, offset=1), mask_of(keys=keys, offset=1).dense()
    assert (mask.shape, mask.dtype, mask.ndim) == (bools.shape, bools.dtype, 4)
    function = torch.compile(read, backend="aot_eager", fullgraph=True) if compiled else read
    found, expected = function(mask), read(bools)
    assert torch.equal(found if type(found) is Tensor else found.dense(), expected)


def test_a_change_in_place_counts() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    mask = mask_of()
    bools = mask_of().dense()
    for x in (mask, bools):
        x[:, :, 0] = True
    a, b = (integration.attention_forward(nn.Module(), q, k, k, x)[0] for x in (mask, bools))
    assert torch.equal(a, b)
    assert not torch.equal(a, integration.attention_forward(nn.Module(), q, k, k, mask_of())[0])


def test_it_says_what_it_is() -> None:
    assert repr(mask_of()).startswith("StructuredMask((2, 1, 4, 6), causal=True, left=2, offset=0")


# --- attention by structure is attention by bools

ENDS = torch.tensor([0, 3, 5, 7, 8, 14], dtype=torch.int32)
KEYS = torch.arange(7) >= torch.tensor([[0], [2]])
ATTENDED: dict[str, tuple[int, dict[str, Any]]] = {
    "causal": (7, {"causal": True}),
    "everything": (5, {}),
    "window": (7, {"causal": True, "left": 2}),
    "both ways": (7, {"left": 2, "right": 1}),
    "padding": (7, {"causal": True, "left": 4, "keys": KEYS}),
    "padding alone": (4, {"keys": KEYS}),
    "a cache": (3, {"causal": True, "offset": 4, "keys": KEYS}),
    "a static cache": (3, {"causal": True, "offset": torch.tensor(2), "left": 3}),
    "a step": (1, {"causal": True, "offset": 6, "keys": KEYS}),
    "a step within": (1, {"causal": True, "offset": 3, "left": 1}),
    "a step of a static cache": (1, {"causal": True, "offset": torch.tensor(3), "keys": KEYS}),
    "a step before its keys": (1, {"causal": True, "offset": -1}),
    "a step past its keys": (1, {"causal": True, "offset": 8, "left": 3}),
    "a step both ways": (1, {"left": 2, "right": 1, "offset": 4}),
    "a single query": (1, {"keys": KEYS}),
    "documents": (7, {"causal": True, "ends": ENDS, "longest": 6}),
    "documents and a window": (7, {"causal": True, "left": 1, "ends": ENDS, "longest": 6}),
    "documents both ways": (7, {"ends": ENDS, "longest": 6}),
    "blocks": (5, {"blocks": attnfast.BlockMask.from_mask(torch.rand(2, 1, 5, 7) < 0.7)}),
}


READ = {"ends": ("weights", "bias", "indices"), "blocks": ("indices",)}  # as bools
ASKED = ("nothing", "weights", "bias", "indices", "gradients")
COMPILED = ("padding", "a static cache", "a step of a static cache", "documents and a window")


@pytest.mark.parametrize(
    ("attended", "asked"),
    [*itertools.product(ATTENDED, ASKED), *((name, "compiled") for name in COMPILED)],
)
def test_attention_is_that_of_the_bools(
    attended: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    T, said = ATTENDED[attended]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 8).transpose(1, 2) for n, h in ((T, 4), (7, 2), (7, 2)))
    more: dict[str, Any] = {"scaling": 0.4, "softcap": 5.0, "s_aux": torch.randn(4)}
    if asked == "weights":
        more["output_attentions"] = True
    if asked == "bias":
        more["position_bias"] = torch.randn(1, 4, T, 7)
    if asked == "indices":
        more["indices"] = torch.stack([torch.randperm(7)[:4] for _ in range(2 * T)]).view(2, T, 4)
    for x in (q, k, v):
        x.requires_grad_(asked == "gradients")
    forward: Any = integration.attention_forward
    if asked == "compiled":
        torch.compiler.reset()
        # not compiled but by transformers itself
        monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    results = []
    for dense in (False, True):
        mask: Tensor = StructuredMask((2, 1, T, 7), q.device, **said)
        if dense:
            mask = mask.dense()
        out, weights = forward(nn.Module(), q, k, v, mask, **more)
        found = [out] if weights is None else [out, weights]
        if asked == "gradients":
            found += torch.autograd.grad(out.square().sum(), (q, k, v))
        results.append(found)
        made = isinstance(mask, StructuredMask) and mask.bools is not None
        assert dense or made == any(name in said and asked in way for name, way in READ.items())
    torch.testing.assert_close(*results)


def test_a_mask_of_other_sizes_is_read() -> None:
    """Which broadcasts, as bools do."""
    q = torch.randn(3, 2, 4, 8)
    mask = StructuredMask((1, 1, 4, 4), q.device, causal=True)
    out, _ = integration.attention_forward(nn.Module(), q, q, q, mask)
    torch.testing.assert_close(out.transpose(1, 2), attnfast.attention(q, q, q, causal=True))


def test_a_static_caches_offset_is_that_of_the_mask(name: str) -> None:
    """The cache moves on before attention reads the mask."""
    model = build("llama", name)
    cache = transformers.StaticCache(model.config, max_cache_len=8)
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :2], cache=cache)
        found = model(ids[:, 2:], cache=cache).logits
    torch.testing.assert_close(found, expected[:, 2:])
