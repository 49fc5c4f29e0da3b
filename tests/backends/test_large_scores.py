"""Scores of any size: what softmax removes changes nothing, nothing overflows where it need not.

A row's maximum and the log of its sum are kept apart for the passes after the forward, and every
pass rounds scores alike: so equal scores give 1 / S, however large.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, fp32, problem, run
from dense import Trial
from torch import Tensor
from torch.testing import assert_close

import attnfast
from attnfast import ops

WHOLE = Case(bias="ts", bias_dtype=fp32, H=4, stats=2, weights="per head",
             grads=("out", "lse", "entropy", "weights"))  # fmt: skip
CALLS = (
    WHOLE,
    replace(WHOLE, name="causal", causal=True, weights="mean"),
    replace(WHOLE, name="window", window=(40, 9), align="bottom_right", D=40, D_v=24),
    replace(WHOLE, name="mask", mask="bs", H_kv=1, dropout_p=0.2),
    replace(WHOLE, name="bias_per_head", bias="bht", T=300, S=192, D=64),
    replace(WHOLE, name="softcap", softcap=2.0, sinks=True),
    replace(WHOLE, name="one_query", T=1, bias="bh", grads=("out", "lse"), stats=0, weights="none"),
    replace(WHOLE, name="varlen", lengths=((5, 70), (70, 5), (66, 67)), causal=True),
)


def with_inputs(given: Trial, **changes: Tensor) -> Trial:
    return given._replace(inputs=given.inputs._replace(**changes))


@pytest.mark.parametrize("zero", ["q", "k"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("constant", [-1e4, -1e9, torch.finfo(fp32).min, 1e9])
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_a_constant_changes_no_bit(
    backend: str, case: Case, constant: float, dtype: torch.dtype, zero: str
):
    """A mask of finite minus infinities over whole rows, as others make them, or any other height.

    With q or k zero each score is the constant to its last bit; the other has a gradient.
    """
    given = problem(replace(case, dtype=dtype))
    x = torch.zeros_like(getattr(given.inputs, zero))
    found = {}
    for height in (0.0, constant):
        changes = {zero: x, "bias": torch.full_like(given.inputs.bias, height)}
        if given.inputs.sinks is not None:
            changes["sinks"] = torch.full((case.H,), height)
        found[height] = run(with_inputs(given, **changes), backend)
    flat, high = found.values()
    for name in set(flat) - {"lse", "max_logit", "dsinks"}:
        if backend == "cpu" and dtype != torch.bfloat16 and ops.cpu_isa() in ("amx", "tiles16"):
            # large scores leave the planes
            assert_close(high[name], flat[name])
        else:
            assert torch.equal(flat[name], high[name]), name
    if "dsinks" in flat:
        assert_close(flat["dsinks"].float(), high["dsinks"].float())
    seen = flat["lse"] > -torch.inf
    assert_close(high["lse"][seen], flat["lse"][seen] + constant)
    assert not seen.all() or case.mask is None


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [1e3, 4e6, 3.6e9, 1e12])
def test_equal_products_of_any_size(
    backend: str, height: float, dtype: torch.dtype, T: int
) -> None:
    """Each of S keys gets 1 / S, forward, weights and backward; with and without all extras."""
    S, root = 130, min(height**0.5, 200.0)
    for extras in ({}, {"causal": True, "align": S}, {"H_kv": 1}, {"dropout_p": 0.3}):
        q = torch.full((2, 2, T, 16), root, dtype=dtype)
        k = torch.full((2, extras.get("H_kv", 2), S, 16), root, dtype=dtype).requires_grad_()
        v = torch.randn(2, k.shape[1], S, 24).to(dtype).requires_grad_()
        options = {name: x for name, x in extras.items() if name != "H_kv"} | {"backend": backend}
        if "dropout_p" in options:
            options["dropout_seed"] = torch.tensor([3, 5])
        found = []
        for scale in (0.0, height / (16 * root * root)):
            call: Any = {"scale": scale, "return_stats": "received", "return_weights": True}
            out, stats, weights = attnfast.attention(q, k, v, **call, **options)
            step = attnfast.attention(q, k, v, scale=scale, **options)  # for T = 1 another kernel
            grads = torch.autograd.grad((step * out.detach()).sum(), (v, k))
            found.append((out, step, stats.focus, stats.received, weights, grads[0]))
            assert not grads[1].isnan().any()
        for flat, high in zip(*found, strict=True):
            assert_close(high, flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e3, -1e4, 1e8, 3.6e9, 4e10, -1e20, 1e30, 3e38, -3e38, 1e-38])
def test_probabilities_are_at_most_one(backend: str, scale: float, dtype: torch.dtype) -> None:
    """Of scores that fp32 holds: weights in [0, 1] that sum to 1, and no NaN in any gradient."""
    small = 1 if abs(scale) < 1e37 else 0.02
    options: tuple[dict[str, Any], ...] = (
        {},
        {"causal": True},
        {"window": (20, 3)},
        {"softcap": 30.0},
        {"softcap": 1e-20},
        {"mask": torch.rand(2, 1, 70, 70) > 0.3},
        {"mask": torch.rand(2, 1, 1, 70) > 0.3},
        {"bias": torch.randn(70, 70)},
        {"dropout_p": 0.2},
        {"sinks": torch.randn(2)},
        {"alibi_slopes": torch.rand(2)},
    )
    for extras in options:
        q, k, v = ((torch.randn(2, 2, 70, 16) * small).to(dtype).requires_grad_() for _ in range(3))
        out, stats, weights = attnfast.attention(
            *(q, k, v),
            scale=scale,
            return_stats="received",
            return_weights=True,
            backend=backend,
            **extras,
        )
        results = [out, stats.entropy, stats.focus, stats.received, weights, stats.lse]
        results += torch.autograd.grad((out.sum(), stats.entropy.sum()), (v, k, q))[:1]
        assert not any(x.isnan().any() for x in results), extras
        assert (stats.focus <= 1).all()
        if "dropout_p" not in extras and "sinks" not in extras:
            torch.testing.assert_close(
                weights.float().sum(-1),
                torch.ones(2, 2, 70),
                rtol=0,
                atol=8 * torch.finfo(dtype).eps,
            )
        lengths = torch.tensor([70, 33])
        decodes = {n: x for n, x in extras.items() if n in ("softcap", "sinks", "alibi_slopes")}
        decoded = attnfast.decode_attention(
            *(x.detach() for x in (q[:, :, :1], k, v)),
            lengths,
            scale=scale,
            backend=backend,
            **decodes,
        )
        assert not decoded.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_extreme_size(backend: str, dtype: torch.dtype) -> None:
    """A softcap of 3e38 caps nothing; a sink of 2.4e38 takes all, and one of -3e38 nothing."""
    attention = functools.partial(attnfast.attention, backend=backend)
    decode_attention = functools.partial(attnfast.decode_attention, backend=backend)
    q, k, v = (torch.randn(2, 3, 40, 16).to(dtype) for _ in range(3))
    plain = attention(q, k, v)
    for softcap in (1e19, 3e30, 3.4e38):
        assert_close(attention(q, k, v, softcap=softcap), plain)
    lengths = torch.tensor([40, 40])
    decode = (q[:, :, :1], k, v, lengths)
    assert_close(decode_attention(*decode, softcap=3.4e38), decode_attention(*decode))
    for size in (2.4e38, 3.4e38):
        sinks = torch.full((3,), size)
        for bias in (None, torch.zeros(40)):
            out, lse, stats, weights = attention(
                q, k, v, bias=bias, sinks=sinks, return_lse=True, return_stats=True,
                return_weights=True,
            )  # fmt: skip
            assert (out == 0).all()
            assert (lse == size).all()
            assert (weights == 0).all()
            assert (stats.entropy == 0).all()
            decoded, lse = decode_attention(*decode, sinks=sinks, bias=bias, return_lse=True)
            assert (decoded == 0).all()
            assert (lse == size).all()
            assert_close(attention(q, k, v, bias=bias, sinks=-sinks), plain)


@pytest.mark.parametrize("S", [1, 2, 5, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_in_an_attended_value_stays_in_its_column(
    backend: str, dtype: torch.dtype, S: int
) -> None:
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype) for n in (3, S, S))
    v[0, 0, -1, 1] = torch.inf
    calls = {
        "attention": functools.partial(attnfast.attention, k=k, v=v),
        "bias": functools.partial(attnfast.attention, k=k, v=v, bias=torch.zeros(S)),
        "decode": functools.partial(
            attnfast.decode_attention, k_cache=k, v_cache=v, cache_seqlens=torch.tensor([S])
        ),
    }
    for name, call in calls.items():
        for T in (1, 3):
            if name == "decode" and S < T:
                continue
            out = call(q[:, :, :T], backend=backend)
            last = out[0, 0, -1]
            assert last[1] == torch.inf, name
            assert out[..., 2:].isfinite().all(), name
            assert out[0, 1].isfinite().all(), name


@pytest.mark.reference(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_a_query_reaches_no_key_that_it_does_not_attend(
    backend: str, dtype: torch.dtype
) -> None:
    """NaN in q, and NaN gradients of queries without keys: 0 * NaN in no dk and no dv."""
    mask = torch.rand(1, 1, 70, 90) < 0.5
    mask[..., 7, :] = False
    mask[..., 9, :45] = False
    for case in (Case(T=70, S=90, grads=("out",)), Case(T=70, S=90, sinks=True, H=4)):
        given = problem(replace(case, dtype=dtype))
        q, grad = given.inputs.q.clone(), given.cotangents.out.clone()
        grad[:, :, 7] = torch.nan
        given = with_inputs(given, mask=mask)
        given = given._replace(cotangents=given.cotangents._replace(out=grad))
        results = run(given, backend)
        assert all(x.isfinite().all() for name, x in results.items() if name[0] == "d")
        q[:, :, 9, 3] = torch.nan
        results = run(with_inputs(given, q=q), backend)
        for name in ("dk", "dv"):
            assert not results[name][:, :, ~mask[0, 0, 9]].isnan().any(), name
            assert results[name][:, :, mask[0, 0, 9]].isnan().any(-1).all(), name
        assert results["dq"][:, :, 9].isnan().all()
        assert not results["dq"][:, :, :9].isnan().any()
