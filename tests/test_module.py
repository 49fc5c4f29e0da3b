"""MultiheadAttention gives torch.nn.MultiheadAttention's results, gradients and checkpoints."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from modules import (
    B,
    Call,
    E,
    H,
    S,
    T,
    assert_same,
    causal_mask,
    pair,
    random_mask,
    results,
    sequences,
)
from torch import Tensor, nn

from attnfast import MultiheadAttention

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


def masks(batched: bool, s: int, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every attn_mask form with every key_padding_mask form."""
    batch = B if batched else 1
    padding_shape = (B, s) if batched else (s,)
    attn_masks = {
        "": None,
        "2-D bool": random_mask(T, s),
        "2-D float": torch.randn(T, s, dtype=dtype).masked_fill(random_mask(T, s), -torch.inf),
        "3-D bool": random_mask(batch * H, T, s),
        "3-D float": torch.randn(batch * H, T, s, dtype=dtype),
    }
    paddings = {
        "": None,
        "bool": random_mask(*padding_shape),
        "float": torch.randn(padding_shape, dtype=dtype),
    }
    for (attn, attn_mask), (pad, padding) in itertools.product(
        attn_masks.items(), paddings.items()
    ):
        yield (
            f"attn_mask {attn}, padding {pad}",
            {"attn_mask": attn_mask, "key_padding_mask": padding},
        )


def calls(module: nn.Module, dtype: torch.dtype) -> Iterator[Call]:
    """Every way to call forward that torch's module accepts and answers without NaN."""
    relations = ["self", "shared", "apart"] if module._qkv_same_embed_dim else ["apart"]
    weights = [(False, True), (True, True), (True, False)]
    for relation, batched in itertools.product(relations, (True, False)):
        args = sequences(module, relation, batched, dtype)
        s = T if relation == "self" else S
        for (name, given), (need, average) in itertools.product(masks(batched, s, dtype), weights):
            floats = [m for m in given.values() if m is not None and m.is_floating_point()]
            tensors = list({id(x): x for x in (*args, *floats)}.values())
            for x in tensors:
                x.requires_grad_()
            kwargs = {**given, "need_weights": need, "average_attn_weights": average}
            label = (
                f"{relation}, {'batched' if batched else 'unbatched'}, {name}, {need=}, {average=}"
            )
            yield Call(label, tuple(args), kwargs, tensors)


CONSTRUCTORS = [
    {
        "bias": bias,
        "add_bias_kv": kv,
        "add_zero_attn": zero,
        "batch_first": first,
        "kdim": k,
        "vdim": v,
    }
    for bias, (k, v), kv, zero, first in itertools.product(
        (True, False), ((None, None), (7, 5)), (False, True), (False, True), (True, False)
    )
]
COMMON = CONSTRUCTORS[:8]  # with biases, key and value as wide as the query


def over(options: list[dict[str, Any]]) -> pytest.MarkDecorator:
    ids = ["-".join(name for name, value in o.items() if value) or "plain" for o in options]
    return pytest.mark.parametrize("options", options, ids=ids)


@over(CONSTRUCTORS)
def test_everything_torch_accepts(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs, ours = pair(**options)
    for call in calls(theirs, torch.float64):
        assert_same(results(ours, call), results(theirs, call), call.name)


@over(COMMON)
def test_everything_torch_accepts_in_single_precision(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs, ours = pair(torch.float32, **options)
    for call in calls(theirs, torch.float32):
        assert_same(results(ours, call), results(theirs, call), call.name)


@over(COMMON)
def test_causal_hint(options: dict[str, Any]) -> None:
    """is_causal with the causal mask, or without any mask, equals torch's result for that mask."""
    torch.manual_seed(0)
    theirs, ours = pair(**options)
    for call in calls(theirs, torch.float64):
        if call.kwargs["attn_mask"] is None:
            s = T if call.args[0] is call.args[1] else S
            call = call._replace(kwargs={**call.kwargs, "attn_mask": causal_mask(T, s)})
            expected = results(theirs, call)
            assert_same(results(ours, call, is_causal=True), expected, call.name)
            alone = results(ours, call, is_causal=True, attn_mask=None)
            assert_same(alone, expected, f"{call.name}, no attn_mask")


def test_causal_hint_is_torchs() -> None:
    """With and without weights, also where the mask is not what the hint promises."""
    theirs, ours = pair()
    x = torch.randn(T, B, E, dtype=torch.float64)
    for mask in (causal_mask(T, T), random_mask(T, T)):
        for need in (True, False):
            kwargs = {"attn_mask": mask, "is_causal": True, "need_weights": need}
            assert_same(
                dict(enumerate(ours(x, x, x, **kwargs))),
                dict(enumerate(theirs(x, x, x, **kwargs))),
            )


@pytest.mark.parametrize("training", [True, False])
def test_torch_samples(training: bool) -> None:
    """Torch's own samples for its module, and its reference for unbatched input."""
    from torch.testing._internal.common_modules import module_db

    info = next(i for i in module_db if i.module_cls is nn.MultiheadAttention)
    samples = info.module_inputs_func(info, "cpu", torch.float64, True, training)
    assert len(samples) == 64
    for sample in samples:
        theirs = nn.MultiheadAttention(**sample.constructor_input.kwargs, dtype=torch.float64)
        ours = MultiheadAttention(**sample.constructor_input.kwargs, dtype=torch.float64)
        ours.load_state_dict(theirs.state_dict())
        ours.train(training)
        theirs.train(training)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        out, weights = ours(*args, **kwargs)
        for expected in (
            theirs(*args, **kwargs),
            sample.reference_fn(ours, *args, **kwargs),
        ):
            torch.testing.assert_close((out, weights), expected)


def test_signatures() -> None:
    """Torch's parameters with their defaults, in order; ours come after, keyword-only."""

    def parameters(function: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.kind is not p.KEYWORD_ONLY]

    assert parameters(MultiheadAttention.__init__) == parameters(nn.MultiheadAttention.__init__)
    assert parameters(MultiheadAttention.forward) == parameters(nn.MultiheadAttention.forward)


@over(CONSTRUCTORS)
def test_checkpoints_load_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(theirs.state_dict(), ours.state_dict())


def test_same_initial_parameters() -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, H, add_bias_kv=True)
    torch.manual_seed(3)
    assert_same(MultiheadAttention(E, H, add_bias_kv=True).state_dict(), theirs.state_dict())
