"""MultiheadAttention where torch's module fails, what it hands to the kernel, and within torch."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

import attnfast.nn.attention
from attnfast import MultiheadAttention


def test_fully_masked_rows_are_zero() -> None:
    """Torch answers NaN and poisons the gradients of every sample; here sample 1 is as if alone."""
    theirs, ours = pair(batch_first=True)
    x = torch.randn(B, T, E, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0] = True
    assert theirs(x, x, x, key_padding_mask=padding)[0].isnan().any()

    floats = torch.zeros(B, T, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for mask, average in itertools.product((padding, floats), (True, False)):
        kwargs = {"key_padding_mask": mask, "average_attn_weights": average}
        both = results(ours, Call("", (x, x, x), kwargs, [x]), cotangent=1.0)
        assert (both["out"][0] == ours.out_proj.bias).all()
        assert (both["weights"][0] == 0).all()
        assert (both["gradient of input 0"][0] == 0).all()

        sample = x[1:].detach().requires_grad_()
        kwargs["key_padding_mask"] = None
        alone = results(ours, Call("", (sample,) * 3, kwargs, [sample]), cotangent=1.0)
        alone["gradient of out_proj.bias"] += T  # sample 0's output is this bias
        assert_same({n: g[1:] if n in DATA else g for n, g in both.items()}, alone)


DATA = ("out", "weights", "gradient of input 0")


@pytest.mark.parametrize("training", [True, False])
def test_a_fully_masked_query(training: bool) -> None:
    _, ours = pair(batch_first=True)
    ours.train(training)
    mask = causal_mask(T, T)
    mask[2] = True
    x = torch.randn(B, T, E, dtype=torch.float64)
    out, weights = ours(x, x, x, attn_mask=mask)
    assert (out[:, 2] == ours.out_proj.bias).all()
    assert (weights[:, 2] == 0).all()
    assert weights[:, [0, 1, 3, 4]].sum(-1).allclose(torch.ones(()).double())


@pytest.mark.parametrize(
    "shape",
    [(B, T, S), (1, T, S), (B, 1, S), (1, S), (T, 1), (B, H, T, S), (1, H, T, S), (B, 1, 1, S)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("appended", [False, True])
def test_masks_of_any_broadcastable_shape(
    shape: tuple[int, ...], kind: str, appended: bool
) -> None:
    theirs, ours = pair(batch_first=True, add_bias_kv=appended, add_zero_attn=appended)
    query, key = torch.randn(B, T, E).double(), torch.randn(B, S, E).double()
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if kind == "bool":
        mask = random_mask(*shape)
    wide = mask.unsqueeze(1) if mask.dim() == 3 else mask
    wide = wide.expand(B, H, T, S).reshape(B * H, T, S)
    actual = ours(query, key, key, attn_mask=mask)
    expected = theirs(query, key, key, attn_mask=wide)
    torch.testing.assert_close(actual, expected)
    if kind == "float":
        (got,) = torch.autograd.grad(actual[0].square().sum(), mask)
        (want,) = torch.autograd.grad(expected[0].square().sum(), mask)
        torch.testing.assert_close(got, want)


# What reaches the kernel: no copies, no expanded masks, few linears.


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of `attention` by the module, with its result as `result`."""
    calls = []
    attention = attnfast.nn.attention.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        result = attention(q, k, v, **kwargs)
        calls.append(dict(q=q, k=k, v=v, result=result, **kwargs))
        return result

    monkeypatch.setattr(attnfast.nn.attention, "attention", spy)
    return calls


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("relation", ["self", "shared", "apart"])
def test_projections_are_views_of_few_linears(
    batch_first: bool,
    relation: str,
    reached: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, ours = pair(batch_first=batch_first)
    projected = []
    linear = F.linear

    def spy(*args: Any) -> Tensor:
        projected.append(linear(*args))
        return projected[-1]

    monkeypatch.setattr(F, "linear", spy)
    ours(*sequences(ours, relation, True, torch.float64), need_weights=False)
    in_projections = {"self": 1, "shared": 2, "apart": 3}[relation]
    assert len(projected) == in_projections + 1
    storages = {x.untyped_storage().data_ptr() for x in projected[:-1]}
    (call,) = reached
    for name in "qkv":
        assert call[name].untyped_storage().data_ptr() in storages
        assert call[name].stride(-1) == 1


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_are_merged_as_a_view(batch_first: bool, reached: list[dict[str, Any]]) -> None:
    _, ours = pair(torch.float32, batch_first=batch_first)
    merged = []
    ours.out_proj.register_forward_pre_hook(lambda _, args: merged.append(args[0]))
    ours(*sequences(ours, "shared", True, torch.float32), need_weights=False)
    (call,) = reached
    assert merged[0].untyped_storage().data_ptr() == call["result"].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("attn_mask", "padding", "mask_shape", "bias_shape"),
    [
        (None, "bool", (B, 1, 1, S), None),
        (None, "float", None, (B, 1, 1, S)),
        ("bool", None, (T, S), None),
        ("float", None, None, (T, S)),
        ("bool", "bool", (B, 1, T, S), None),
        ("float", "float", None, (B, 1, T, S)),
        ("float", "bool", (B, 1, 1, S), (T, S)),
        ("bool", "float", (T, S), (B, 1, 1, S)),
    ],
)
def test_masks_stay_small(
    attn_mask: str | None,
    padding: str | None,
    mask_shape: tuple[int, ...] | None,
    bias_shape: tuple[int, ...] | None,
    reached: list[dict[str, Any]],
) -> None:
    _, ours = pair()
    make = {"bool": random_mask, "float": torch.randn}
    query, key, value = sequences(ours, "apart", True, torch.float64)
    ours(
        query,
        key,
        value,
        attn_mask=make[attn_mask](T, S) if attn_mask else None,
        key_padding_mask=make[padding](B, S) if padding else None,
    )
    (call,) = reached
    assert (None if call["mask"] is None else tuple(call["mask"].shape)) == mask_shape
    assert (None if call["bias"] is None else tuple(call["bias"].shape)) == bias_shape
    if mask_shape:
        assert call["mask"].dtype == torch.bool
    assert call["return_weights"] == "mean"


def test_causal_padding_needs_no_mask_of_pairs(reached: list[dict[str, Any]]) -> None:
    """A training step of a decoder: with the hint, only the padding reaches the kernel."""
    _, ours = pair()
    x = torch.randn(T, B, E, dtype=torch.float64)
    ours(
        x,
        x,
        x,
        attn_mask=causal_mask(T, T),
        key_padding_mask=random_mask(B, T),
        is_causal=True,
        need_weights=False,
    )
    (call,) = reached
    assert call["causal"]
    assert tuple(call["mask"].shape) == (B, 1, 1, T)
    assert call["bias"] is None


def test_extras_reach_the_kernel(reached: list[dict[str, Any]]) -> None:
    module = MultiheadAttention(E, H, backend="reference", deterministic=True)
    x = torch.randn(T, B, E)
    module(x, x, x)
    (call,) = reached
    assert call["backend"] == "reference"
    assert call["deterministic"] is True


# Dropout, training and evaluation.


def test_dropout_drops_and_scales_weights() -> None:
    """The returned weights are those used: 0 or 1 / (1 - p) times the undropped, as torch's."""
    _, ours = pair(batch_first=True, dropout=0.25)
    x = torch.randn(16, 32, E, dtype=torch.float64)
    plain = ours.eval()(x, x, x, average_attn_weights=False)[1]
    ours.train()
    torch.manual_seed(5)
    out, weights = ours(x, x, x, average_attn_weights=False)
    ratio = weights / plain
    kept = ratio != 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4 / 3))
    count = kept.numel()
    assert abs(kept.double().mean() - 0.75) < 5 * (0.75 * 0.25 / count) ** 0.5

    value = F.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    value = value.unflatten(-1, (H, -1)).transpose(1, 2)
    expected = ours.out_proj((weights @ value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(out, expected)

    torch.manual_seed(5)
    again, average = ours(x, x, x)
    torch.testing.assert_close((again, average), (out, weights.mean(1)))
    assert not torch.equal(ours(x, x, x)[0], out)


def test_dropout_of_everything() -> None:
    _, ours = pair(dropout=1.0)
    x = torch.randn(T, B, E, dtype=torch.float64)
    out, weights = ours(x, x, x)
    assert (out == ours.out_proj.bias).all()
    assert (weights == 0).all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_evaluation_is_training_without_dropout(need_weights: bool) -> None:
    """Torch takes another path in evaluation without gradients; its results agree with ours."""
    theirs, ours = pair(torch.float32, batch_first=True, dropout=0.5)
    x = torch.randn(B, T, E)
    kwargs = {"key_padding_mask": random_mask(B, T), "need_weights": need_weights}
    ours.eval()
    out, weights = ours(x, x, x, **kwargs)
    with torch.inference_mode():
        inferred, inferred_weights = ours(x, x, x, **kwargs)
        torch.testing.assert_close(theirs.eval()(x, x, x, **kwargs), (inferred, inferred_weights))
    assert torch.equal(inferred, out)
    assert not need_weights or torch.equal(inferred_weights, weights)
    ours.dropout = 0.0
    assert torch.equal(ours.train()(x, x, x, **kwargs)[0], out)


# The module as a citizen of torch.


def test_out_proj_is_called() -> None:
    """Adapters replace or hook the output projection."""
    _, ours = pair()
    x = torch.randn(T, B, E, dtype=torch.float64)
    before = ours(x, x, x)[0]
    ours.out_proj.register_forward_hook(lambda _, __, output: output + 1)
    torch.testing.assert_close(ours(x, x, x)[0], before + 1)


def test_weights_are_read_on_every_call() -> None:
    theirs, ours = pair()
    x = torch.randn(T, B, E, dtype=torch.float64)
    ours(x, x, x)
    for module in (theirs, ours):
        module.in_proj_weight = nn.Parameter(
            torch.linspace(-1, 1, 3 * E * E).view(3 * E, E).double()
        )
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Any) -> None:
    ours = MultiheadAttention(E, H, add_bias_kv=True, backend="reference", deterministic=True)
    x = torch.randn(T, B, E)
    twin = copied(ours)
    assert (twin.backend, twin.deterministic) == ("reference", True)
    torch.testing.assert_close(twin(x, x, x), ours(x, x, x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """No further from the truth than torch's module under the same autocast."""
    torch.manual_seed(0)
    theirs, ours = pair(torch.float32, batch_first=True, add_bias_kv=True)
    x = torch.randn(8, 32, E, requires_grad=True)
    truth = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double())[0]

    def error(module: nn.Module) -> float:
        with torch.autocast("cpu", dtype=dtype):
            out = module(x, x, x)[0]
            assert module(x, x, x, need_weights=False)[0].dtype == dtype
        assert out.dtype == dtype
        out.float().sum().backward()
        assert module.in_proj_weight.grad.dtype == torch.float32
        assert module.in_proj_weight.grad.isfinite().all()
        return (out - truth).abs().max().item()

    assert error(ours) <= 2 * error(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    _, ours = pair(dtype, add_bias_kv=True)
    x = torch.randn(T, B, E, dtype=dtype)
    out, weights = ours(x, x, x, key_padding_mask=random_mask(B, T))
    assert out.dtype == weights.dtype == dtype
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_whole(need_weights: bool) -> None:
    """One graph, forward and backward, for any batch size and length."""
    _, ours = pair(torch.float32, batch_first=True, add_bias_kv=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7)):
        x = torch.randn(batch, length, E, requires_grad=True)
        call = Call(
            "",
            (x, x, x),
            {"key_padding_mask": random_mask(batch, length), "need_weights": need_weights},
            [x],
        )
        call.kwargs["attn_mask"] = random_mask(length, length)
        expected, actual = results(ours, call), results(compiled, call)
        assert_same({n.replace("_orig_mod.", ""): x for n, x in actual.items()}, expected)


def test_empty_batch() -> None:
    _theirs, ours = pair(batch_first=True)
    x = torch.randn(0, T, E, dtype=torch.float64)
    out, weights = ours(x, x, x, key_padding_mask=random_mask(0, T))
    assert out.shape == (0, T, E)
    assert weights.shape == (0, T, T)
