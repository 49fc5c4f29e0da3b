"""Huge scores, NaN and Inf, and rows without keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import check
from cases import DTYPES, Case, fp16, fp32, problem, run
from dense import Trial
from torch import Tensor

from attnfast.block_index import with_dense_mask
from attnfast.call import Inputs

ALL_GRADS = ("out", "lse", "entropy")
POISON = (torch.nan, torch.inf, -torch.inf)


def with_inputs(given: Trial, **changes: Tensor) -> Trial:
    return given._replace(inputs=given.inputs._replace(**changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_scores_near_1e5(backend: str, dtype: torch.dtype, causal: bool) -> None:
    """Scores of standard deviation 1e5: exp overflows unless the maximum is subtracted first."""
    given = problem(
        Case(
            dtype=dtype, D=64, spread=316.0, causal=causal, stats=2, weights="mean", grads=ALL_GRADS
        )
    )
    results = run(given, backend)
    assert results["max_logit"].max() > 1e5
    check(results, given)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_near_1e5(backend: str, dtype: torch.dtype, sign: int) -> None:
    """All scores are 2**17, or -2**17: the entropy must be log S to fp32's last digits."""
    given = problem(Case(dtype=dtype, D=64, stats=1, grads=ALL_GRADS))
    q = torch.full_like(given.inputs.q, 128.0 * sign)
    k = torch.full_like(given.inputs.k, 128.0)
    given = with_inputs(given, q=q, k=k)
    check(run(given, backend), given)


@pytest.mark.parametrize("size", [1e5, 1e9, 1e30])
@pytest.mark.parametrize("dims", ["bhts", "bs"])
def test_huge_bias(backend: str, dims: str, size: float) -> None:
    """A bias of -size masks, but is not -inf: a row of nothing else attends all its keys."""
    given = problem(Case(bias=dims, stats=1, grads=ALL_GRADS, B=3))
    bias = given.inputs.bias
    assert bias is not None
    bias = torch.where(bias > 0, 0.0, -size)
    bias[0] = -size
    q = given.inputs.q.clone()
    q[0] = 0.0  # fp32 has no digits for scores beside the bias
    given = with_inputs(given, bias=bias, q=q)
    results = run(given, backend)
    check(results, given)
    assert results["lse"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_the_lowest_number(backend: str, dtype: torch.dtype) -> None:
    """A mask made of finfo.min, as others make them: a row of nothing else attends all its keys."""
    given = problem(Case(dtype=dtype, bias="bs", stats=1, B=3))
    bias = given.inputs.bias
    assert bias is not None
    lowest = torch.finfo(dtype).min
    given = with_inputs(given, bias=torch.where(bias > 0, 0.0, lowest).to(dtype))
    check(run(given, backend), given)
    everywhere = with_inputs(given, bias=torch.full_like(bias, lowest))
    results = run(everywhere, backend)
    check(results, everywhere)
    assert results["lse"].isfinite().all()
    if dtype != fp16:  # the scores vanish beside 3e38, so all keys are equal
        assert (results["entropy"] > 4.8).all()


MAGNITUDES = {  # of q, k, v and the gradient of out
    "large values": (1.0, 1.0, 1e30, 1.0),
    "small values": (1.0, 1.0, 1e-35, 1.0),
    "large keys": (1e-34, 1e34, 1.0, 1.0),
    "large queries": (1e34, 1e-34, 1.0, 1.0),
    "small gradients": (1.0, 1.0, 1.0, 1e-35),
    "large gradients": (1.0, 1.0, 1.0, 1e30),
}


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("dtype", [fp32, torch.bfloat16], ids=str)
def test_extreme_magnitudes(backend: str, dtype: torch.dtype, name: str) -> None:
    """Of one batch entry only. Where fp32 is split into bf16, small parts would underflow."""
    given = problem(Case(dtype=dtype, B=2, H=2, H_kv=1, T=270, S=140, D=40, grads=("out",)))
    *sizes, of_grad = MAGNITUDES[name]
    scaled = {}
    for x, size in zip("qkv", sizes, strict=True):
        scaled[x] = getattr(given.inputs, x).clone()
        scaled[x][0] *= size
    given = with_inputs(given, **scaled)
    grad = given.cotangents.out.clone()
    grad[0] *= of_grad
    given = given._replace(cotangents=given.cotangents._replace(out=grad))
    results = run(given, backend)
    check(results, given)
    for entry in range(2):  # neither hides behind the other's errors
        alone = given._replace(
            inputs=given.inputs._replace(
                **{x: getattr(given.inputs, x)[entry : entry + 1] for x in "qkv"}
            ),
            cotangents=given.cotangents._replace(out=grad[entry : entry + 1]),
        )
        check(run(alone, backend), alone)


@pytest.mark.parametrize("dtype", [fp32, torch.bfloat16], ids=str)
def test_a_sink_that_takes_nearly_all(backend: str, dtype: torch.dtype) -> None:
    """The lse rounds to the sink, as without keys, but the keys still have gradients."""
    given = problem(Case(dtype=dtype, sinks=True, T=270, S=140, D=40, grads=("lse",)))
    sinks = torch.full_like(given.inputs.sinks, 20.0)
    given = with_inputs(given, sinks=sinks, k=given.inputs.k / 8)
    results = run(given, backend)
    assert (results["lse"] == 20.0).any()
    assert (results["dk"] != 0).any()
    check(results, given)


@pytest.mark.parametrize("which", ["k", "v", "q"])
@pytest.mark.parametrize("dtype", [fp32, torch.bfloat16], ids=str)
def test_infinity_among_the_inputs(backend: str, dtype: torch.dtype, which: str) -> None:
    """One Inf, attended: its traces in the output are where plain PyTorch's are."""
    given = problem(Case(dtype=dtype, B=2, H=2, H_kv=1, T=270, S=140, D=40))
    x = getattr(given.inputs, which).clone()
    x[0, 0, 7, 3] = torch.inf
    given = with_inputs(given, **{which: x})
    out, expected = run(given, backend)["out"], plain(given)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isposinf(), expected.isposinf())
    assert torch.equal(out.isneginf(), expected.isneginf())
    assert expected.isfinite().any()
    assert not expected.isfinite().all()


def plain(given: Trial) -> Tensor:
    """The output by torch's own operators, in fp64."""
    q, k, v = (getattr(given.inputs, x).double() for x in "qkv")
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q @ k.mT * given.options.scale).softmax(-1) @ v


def _tail(inputs: Inputs, start: int) -> Tensor:
    """Keys from start on, (B, H_kv, S)."""
    B, H_kv, S, _ = inputs.k.shape
    return (torch.arange(S) >= start).expand(B, H_kv, S)


UNATTENDED: dict[str, tuple[Case, Callable[[Inputs], Tensor]]] = {
    "padding mask": (
        Case(mask="bs", B=3),
        lambda i: ~i.mask.expand(3, 2, 1, -1)[:, :, 0],
    ),
    "mask of one head": (
        Case(mask="hs", B=3),
        lambda i: ~i.mask.expand(3, 2, 1, -1)[:, :, 0],
    ),
    "bias of -inf": (
        Case(bias="bs", masking_bias=True),
        lambda i: (i.bias == -torch.inf).expand(2, 2, 1, -1)[:, :, 0],
    ),
    "blocks in part": (
        Case(blocks="documents 64", T=200, S=200),
        lambda i: ~with_dense_mask(i, 200, 200).mask.any(2).expand(2, 2, 200),
    ),
    "blocks in part, statistics": (
        Case(blocks="documents 64", T=200, S=200, stats=2),
        lambda i: ~with_dense_mask(i, 200, 200).mask.any(2).expand(2, 2, 200),
    ),
    "after causal": (Case(causal=True, T=65, S=129), lambda i: _tail(i, 65)),
    "after causal, one key": (Case(causal=True, T=64, S=65), lambda i: _tail(i, 64)),
    "after causal, many queries": (Case(causal=True, T=201, S=300), lambda i: _tail(i, 201)),
    "before the window, many queries": (
        Case(window=(4, -1), T=150, S=301, align="bottom_right"),
        lambda i: ~_tail(i, 147),
    ),
    "outside the window": (Case(window=(-1, 3), T=20, S=300), lambda i: _tail(i, 23)),
    "before the window": (
        Case(window=(3, -1), T=20, S=300, align="bottom_right"),
        lambda i: ~_tail(i, 277),
    ),
    "grouped heads": (
        Case(mask="bs", H=6, H_kv=2, causal=True),
        lambda i: ~i.mask.expand(2, 2, 1, -1)[:, :, 0] | _tail(i, 65),
    ),
    "dropout": (
        Case(mask="bs", dropout_p=0.5, weights="per head", grads=("out", "weights")),
        lambda i: ~i.mask.expand(2, 2, 1, -1)[:, :, 0],
    ),
    "everything else": (
        Case(mask="bs", bias="ts", softcap=3.0, alibi="h", sinks=True, stats=2, weights="mean",
             grads=(*ALL_GRADS, "weights")),
        lambda i: ~i.mask.expand(2, 2, 1, -1)[:, :, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("name", UNATTENDED)
def test_unattended_keys_may_hold_anything(
    backend: str, name: str, value: float, dtype: torch.dtype
) -> None:
    """The results are bitwise those of zeros in their place, and their gradients are zero."""
    case, unattended = UNATTENDED[name]
    given = problem(replace(case, dtype=dtype))
    where = unattended(given.inputs).unsqueeze(-1)
    assert where.any()

    def filled(value: float) -> Trial:
        k, v = given.inputs.k, given.inputs.v
        return with_inputs(given, k=k.masked_fill(where, value), v=v.masked_fill(where, value))

    results, clean = run(filled(value), backend), run(filled(0.0), backend)
    check(results, filled(value))
    for result, expected in zip(results.values(), clean.values(), strict=True):
        assert torch.equal(result, expected)
    for gradient in (results["dk"], results["dv"]):
        assert not gradient.masked_select(where).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", POISON)
def test_varlen_tail_may_hold_anything(backend: str, value: float, dtype: torch.dtype) -> None:
    """Rows past cu_seqlens are queries without keys, and keys that nothing attends."""
    given = problem(
        Case(
            lengths=((30, 70), (65, 5), (20, 40)), dtype=dtype, sinks=True, stats=2, grads=ALL_GRADS
        )
    )
    inputs, (rows, keys) = given.inputs, (95, 75)  # the third sequence is left out
    cut = {
        "cu_seqlens_q": torch.tensor([0, 30, 95]).int(),
        "cu_seqlens_k": torch.tensor([0, 70, 75]).int(),
    }
    for name, start in (("q", rows), ("k", keys), ("v", keys)):
        cut[name] = getattr(inputs, name).clone()
        cut[name][:, :, start:] = value
    shorter = with_inputs(given, **cut)
    results = run(shorter, backend)
    check(results, shorter)
    assert not results["out"][:, :, rows:].any()
    assert not results["dk"][:, :, keys:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_query_stays_in_its_row(backend: str, dtype: torch.dtype) -> None:
    given = problem(Case(dtype=dtype, causal=True, T=129, grads=()))
    q = given.inputs.q.clone()
    q[1, 0, 70, 3] = torch.nan
    results = run(with_inputs(given, q=q), backend)
    expected = torch.zeros(2, 2, 129, dtype=torch.bool)
    expected[1, 0, 70] = True
    assert torch.equal(results["out"].isnan().all(-1), expected)
    assert torch.equal(results["out"].isnan().any(-1), expected)
    assert torch.equal(results["lse"].isnan(), expected)


def rows_without_keys(dtype: torch.dtype) -> tuple[Trial, Tensor]:
    """A problem and which of its rows have no key: all of an entry, and some of the next."""
    grads = (*ALL_GRADS, "weights")
    given = problem(Case(dtype=dtype, mask="bts", stats=2, weights="per head", grads=grads, B=3))
    assert given.inputs.mask is not None
    mask = torch.ones_like(given.inputs.mask)
    mask[0] = False
    mask[1, :, 5:9] = False
    return with_inputs(given, mask=mask), ~mask.any(-1).expand(-1, 2, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(backend: str, dtype: torch.dtype) -> None:
    given, empty = rows_without_keys(dtype)
    results = run(given, backend)
    check(results, given)
    for name in ("out", "entropy", "reach", "weights", "dq"):
        assert not results[name][empty].any(), name
    for name in ("lse", "max_logit"):
        assert (results[name][empty] == -torch.inf).all(), name
    assert not results["dk"][0].any()


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_without_keys_may_hold_anything(
    backend: str, dtype: torch.dtype, value: float
) -> None:
    """As in the reference: NaN in a padded query does not reach dk."""
    given, empty = rows_without_keys(dtype)
    poisoned = with_inputs(given, q=given.inputs.q.masked_fill(empty.unsqueeze(-1), value))
    check(run(poisoned, backend), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_nothing_but_a_sink(backend: str, dtype: torch.dtype) -> None:
    """The lse is the sink, and its gradient goes to the sink."""
    given = problem(
        Case(dtype=dtype, sinks=True, window=(0, 0), align=-1, T=65, grads=("out", "lse"))
    )
    results = run(given, backend)
    check(results, given)
    assert torch.equal(results["lse"][:, :, 0], given.inputs.sinks.float().expand(2, 2))
    assert not results["out"][:, :, 0].any()


def test_no_keys_at_all(backend: str) -> None:
    given = problem(Case(S=0, sinks=True, stats=2, weights="mean", grads=(*ALL_GRADS, "weights")))
    results = run(given, backend)
    check(results, given)
    assert not results["out"].any()


@pytest.mark.parametrize("scale", [0.5, None])
def test_a_single_key_is_its_value(backend: str, scale: float | None) -> None:
    """The probability is exactly 1, so out is v."""
    given = problem(Case(S=1, T=5, spread=30.0, scale=scale))
    results = run(given, backend)
    # Compiled with a small scale, Triton's rounds m once more, and undoes that when it divides.
    if scale or backend != "triton":
        assert torch.equal(results["out"], given.inputs.v.expand(-1, -1, 5, -1))
    assert given.inputs.q.dtype == fp32
    check(results, given)
