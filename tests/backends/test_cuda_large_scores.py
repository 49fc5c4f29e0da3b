"""The CUDA kernels on scores, options and numbers of any size: what test_large_scores.py asks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from accuracy import check
from cases import Case, bf16, fp16, fp32, problem, run
from dense import Cotangents, Trial
from emulation import check_case
from torch import Tensor
from torch.testing import assert_close

import attnfast
from attnfast import ops
from attnfast.call import DecodeInputs, DecodeOptions, Inputs, Options

fp64 = torch.float64
LOWEST = torch.finfo(fp32).min
WHOLE = Case(B=1, H=4, bias="ts", bias_dtype=fp32, stats=2, weights="per head",
             grads=("out", "lse", "entropy", "weights"))  # fmt: skip
CALLS = (
    WHOLE,
    replace(WHOLE, name="causal", causal=True, weights="mean"),
    replace(WHOLE, name="window", window=(40, 9), align="bottom_right", D=40, D_v=24),
    replace(WHOLE, name="mask", mask="bs", H_kv=1, dropout_p=0.2),
    replace(WHOLE, name="softcap", softcap=2.0, sinks=True),
    replace(WHOLE, name="varlen", lengths=((5, 70), (70, 5)), H=2, causal=True),
)
both = pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)


def with_inputs(given: Trial, **changes: Tensor) -> Trial:
    return given._replace(inputs=given.inputs._replace(**changes))


@pytest.mark.parametrize("constant", [-1e4, -1e9, LOWEST, 1e9])
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_a_constant_changes_no_bit(case: Case, constant: float) -> None:
    """With q or k zero each score is the constant to its last bit; the other has a gradient."""
    for zero, dtype in (("q", bf16), ("k", fp16)):
        given = problem(replace(case, dtype=dtype))
        x = torch.zeros_like(getattr(given.inputs, zero))
        found = []
        for height in (0.0, constant):
            assert given.inputs.bias is not None
            changes = {zero: x, "bias": torch.full_like(given.inputs.bias, height)}
            if case.sinks:
                changes["sinks"] = torch.full((case.H,), height)
            found.append(run(with_inputs(given, **changes), "cuda"))
        flat, high = found
        for name in set(flat) - {"lse", "max_logit"}:
            assert torch.equal(flat[name], high[name]), name
        seen = flat["lse"] > -torch.inf
        assert_close(high["lse"][seen], flat["lse"][seen] + constant)


# Plain calls, in every form of backward, and calls with options.
EQUAL = {
    "short": {"T": 70, "S": 100},
    "wide": {"T": 70, "S": 100, "D": 128},
    "long": {"T": 150, "S": 130, "H_kv": 1},
    "causal": {"T": 150, "S": 130, "causal": True, "align": 130},
    "statistics": {"T": 20, "S": 130, "stats": 2, "weights": "per head"},
    "dropout": {"T": 20, "S": 130, "dropout_p": 0.3, "weights": "mean"},
    "mask": {"T": 20, "S": 130, "mask": "s"},
    "sinks": {"T": 20, "S": 130, "sinks": True, "stats": 1},
    "varlen": {"lengths": ((5, 70), (33, 130))},
}


@pytest.mark.parametrize("height", [1e3, 4e6, 3.6e9, 1e12])
@pytest.mark.parametrize("name", EQUAL)
def test_equal_products_of_any_size(name: str, height: float) -> None:
    """Each key gets the same, forward, weights and backward, as of products near zero."""
    given = problem(Case(name, **{"B": 1, "D": 16, "dtype": bf16, **EQUAL[name]}))
    found = []
    for scale in (1e-20, height / given.inputs.q.shape[3] / 2**8):
        level = scale * given.inputs.q.shape[3] * 2**8
        changes = {x: torch.full_like(getattr(given.inputs, x), 16.0) for x in ("q", "k")}
        if given.inputs.sinks is not None:
            changes["sinks"] = torch.full((2,), level)
        scaled = with_inputs(given, **changes)._replace(options=given.options._replace(scale=scale))
        found.append(run(scaled, "cuda"))
    flat, high = found
    for result in set(flat) - {"lse", "max_logit", "dq", "dk"}:
        if name == "sinks":  # which are fp32's rounding away from the products
            assert_close(flat[result], high[result], rtol=2e-2, atol=1e-2)
        else:
            assert torch.equal(flat[result], high[result]), result
    assert not any(x.isnan().any() for x in high.values())
    seen = flat["lse"] > -torch.inf
    assert_close(high["lse"][seen], flat["lse"][seen] + height)


EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window": (20, 3)},
    {"softcap": 30.0},
    {"softcap": 1e-20},
    {"mask": torch.arange(70) % 3 > 0},
    {"bias": torch.linspace(-3, 3, 70)},
    {"dropout_p": 0.2},
    {"sinks": torch.tensor([1.0, -1.0])},
    {"alibi_slopes": torch.tensor([0.5, 0.1])},
)


@both
@pytest.mark.parametrize("scale", [1e3, -1e4, 0.0, 3.6e9, 4e10, -1e20, 1e30, 3e38, -3e38, 1e-38])
def test_probabilities_are_at_most_one(scale: float, dtype: torch.dtype) -> None:
    """Of scores that fp32 holds: weights in [0, 1] that sum to 1, and no NaN in any gradient."""
    size = 1 if abs(scale) < 1e37 else 0.02
    for extras in EXTRAS:
        q, k, v = ((torch.randn(1, 2, 70, 16) * size).to(dtype).requires_grad_() for _ in range(3))
        call = {"scale": scale, "backend": "cuda", **extras}
        out, stats, weights = attnfast.attention(
            q, k, v, return_stats="received", return_weights=True, **call
        )
        results = [out, stats.entropy, stats.focus, stats.received, weights]
        results += torch.autograd.grad((out.sum(), stats.entropy.sum()), (v,))
        plain = attnfast.attention(q, k, v, **call)
        assert_close(plain, out, rtol=2e-2, atol=2e-2) if "dropout_p" not in extras else None
        results += [plain, *torch.autograd.grad(plain.sum(), (v,))]
        assert not any(x.isnan().any() for x in results), extras
        assert (stats.focus <= 1).all()
        if not extras.keys() & {"dropout_p", "sinks"}:
            atol = 8 * torch.finfo(dtype).eps
            assert_close(weights.float().sum(-1), torch.ones(1, 2, 70), rtol=0, atol=atol)
        if extras.keys() <= {"softcap", "sinks", "alibi_slopes"}:
            tensors = (x.detach() for x in (q[:, :, :1], k, v))
            decoded = attnfast.decode_attention(*tensors, torch.tensor([70]), **call)
            assert not decoded.isnan().any(), extras


@both
def test_options_of_extreme_size(dtype: torch.dtype) -> None:
    """A softcap of 3e38 caps nothing; a sink of 2.4e38 takes all, and one of -3e38 nothing."""
    q, k, v = (torch.randn(1, 3, 40, 16).to(dtype) for _ in range(3))
    cache = (q[:, :, :1], k, v, torch.tensor([40]))
    plain = attnfast.attention(q, k, v, backend="cuda")
    decoded = attnfast.decode_attention(*cache, backend="cuda")
    close: dict[str, Any] = {"rtol": 1e-2, "atol": 4 * torch.finfo(dtype).eps}
    for softcap in (1e19, 3e30, 3.4e38):
        call: dict[str, Any] = {"softcap": softcap, "backend": "cuda"}
        assert_close(attnfast.attention(q, k, v, **call), plain, **close)
        assert_close(attnfast.decode_attention(*cache, **call), decoded, **close)
    for size, bias in product((2.4e38, 3.4e38), (None, torch.zeros(40))):
        sinks = torch.full((3,), size).requires_grad_()
        call = {"bias": bias, "sinks": sinks, "return_lse": True, "backend": "cuda"}
        out, lse, stats, weights = attnfast.attention(
            q, k, v, return_stats=True, return_weights=True, **call
        )
        assert (lse == size).all()
        assert all((x == 0).all() for x in (out, weights, stats.entropy, stats.focus))
        loss = lse.sum() + stats.entropy.sum() + out.float().sum()
        assert torch.equal(torch.autograd.grad(loss, sinks)[0], torch.full((3,), 40.0))
        call["sinks"] = sinks.detach()
        out, lse = attnfast.decode_attention(*cache, **call)
        assert (out == 0).all()
        assert (lse == size).all()
        call |= {"sinks": -sinks.detach(), "return_lse": False}
        assert_close(attnfast.attention(q, k, v, **call), plain, **close)
        assert_close(attnfast.decode_attention(*cache, **call), decoded, **close)


@both
@pytest.mark.parametrize("lowest", [LOWEST, torch.finfo(fp64).min, -1e30])
def test_finite_minus_infinities_mask_as_the_infinite_one_does(
    dtype: torch.dtype, lowest: float
) -> None:
    """Beside ordinary keys, to the gradient of the entropy: 0 times a huge score is 0."""
    case = Case("masked", B=1, T=40, S=70, stats=2, weights="mean", dtype=dtype,
                bias="ts", bias_dtype=fp64, grads=("out", "entropy", "weights"))  # fmt: skip
    given = problem(case)
    assert given.inputs.bias is not None
    found = []
    for low in (lowest, -torch.inf):
        bias = given.inputs.bias.clone()
        bias[..., 40:] = low
        found.append(run(with_inputs(given, bias=bias), "cuda"))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name
    whole = with_inputs(given, bias=torch.full_like(given.inputs.bias, lowest))
    weights = run(whole, "cuda")["weights"]
    assert_close(
        weights.float().sum(-1), torch.ones(1, 40), rtol=0, atol=8 * torch.finfo(dtype).eps
    )


@both
@pytest.mark.parametrize("S", [1, 2, 130])
def test_inf_in_an_attended_value_stays_in_its_column(dtype: torch.dtype, S: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype) for n in (3, S, S))
    v[0, 0, -1, 1] = torch.inf
    for out in (
        attnfast.attention(q, k, v, backend="cuda"),
        attnfast.attention(q, k, v, bias=torch.zeros(S), backend="cuda"),
        attnfast.decode_attention(q[:, :, :1], k, v, torch.tensor([S]), backend="cuda"),
    ):
        assert (out[0, 0, :, 1] == torch.inf).all()
        assert out[..., 2:].isfinite().all()
        assert out[0, 1].isfinite().all()


# What allows query t of T a key s, in plain calls and in those with options.
REACH: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal, long": {"causal": True, "T": 150, "S": 150},
    "causal, wide": {"causal": True, "D": 128},
    "window": {"window": (9, 5), "T": 150, "S": 90},
    "window, grouped": {"window": (9, 5), "H": 4, "H_kv": 2, "softcap": 3.0},
    "mask": {"mask": "ts"},
    "mask, dropout": {"mask": "ts", "causal": True, "dropout_p": 0.2, "T": 150},
    "bias": {"bias": "ts", "masking_bias": True},
    "sinks": {"mask": "ts", "sinks": True},
    "varlen": {"lengths": ((70, 90),), "causal": True},
}


@both
@pytest.mark.parametrize("name", REACH)
def test_nan_of_a_query_reaches_no_key_that_it_does_not_attend(
    name: str, dtype: torch.dtype
) -> None:
    """Query 20 is NaN; the gradient of query 7 is, which where masks allow it has no keys."""
    case = Case(name, **{"B": 1, "T": 70, "S": 90, "D": 16, "dtype": dtype, **REACH[name]})
    given = problem(case)
    inputs = given.inputs
    assert given.cotangents.out is not None
    t, s = torch.arange(inputs.q.shape[2]).view(-1, 1), torch.arange(inputs.k.shape[2])
    allowed = torch.ones(len(t), len(s), dtype=torch.bool)
    if inputs.mask is not None:
        mask = inputs.mask.clone()
        mask[..., 7, :], mask[..., 20, :15] = False, False
        allowed &= mask[0, 0]
        given = with_inputs(given, mask=mask)
    if inputs.bias is not None:
        bias = inputs.bias.clone()
        bias[..., 7, :], bias[..., 20, :15] = -torch.inf, -torch.inf
        allowed &= bias[0, 0] > -torch.inf
        given = with_inputs(given, bias=bias)
    if case.causal:
        allowed &= s <= t
    if case.window != (-1, -1):
        allowed &= (s - t >= -case.window[0]) & (s - t <= case.window[1])
    clean = run(given, "cuda")
    if not allowed[7].any():
        grad = given.cotangents.out.clone()
        grad[:, :, 7] = torch.nan
        given = given._replace(cotangents=given.cotangents._replace(out=grad))
        for result, x in run(given, "cuda").items():
            assert torch.equal(x, clean[result]), result
    q = inputs.q.clone()
    q[:, :, 20, 3] = torch.nan
    dirty = run(with_inputs(given, q=q), "cuda")
    attended = allowed[20]
    assert attended.any()
    assert not attended.all()
    for result in ("dk", "dv"):
        assert torch.equal(dirty[result][:, :, ~attended], clean[result][:, :, ~attended]), result
        assert dirty[result][:, :, attended].isnan().all(), result
    others = torch.arange(len(t)) != 20
    assert torch.equal(dirty["dq"][:, :, others], clean["dq"][:, :, others])
    assert dirty["dq"][:, :, 20].isnan().all()


def test_integers_beyond_int32_are_not_wrapped() -> None:
    """The raw operators take int64: what int32 lacks counts as its nearest number."""
    q, k, v = (torch.randn(1, 2, 20, 32).to(bf16) for _ in range(3))
    one = Options(0.2, causal=True)
    far, near = (
        [ops.CUDA.fwd(*Inputs(q, k, v, align=torch.tensor([x])), *one) for x in (y, -y)]
        for y in (2**32, 10**6)
    )
    for x, y in zip(far, near, strict=True):
        assert torch.equal(x[0], y[0])
        assert torch.equal(x[1], y[1])
    for x in (2**63 - 1, -(2**63)):
        far_offset = ops.CUDA.fwd(*Inputs(q, k, v), *one._replace(align_offset=x))
        assert torch.equal(far_offset[0], far[x < 0][0])
    ends, cut = torch.tensor([0, 2**32 + 5]), torch.tensor([0, 20])
    packed = one._replace(max_seqlen_q=20, max_seqlen_k=20)
    results = [
        ops.CUDA.fwd(*Inputs(q, k, v, cu_seqlens_q=x, cu_seqlens_k=x), *packed)[0]
        for x in (ends, cut)
    ]
    assert torch.equal(*results)
    for lengths in ((2**32 + 3, 20), (-(2**32) + 3, 0)):
        caches = [DecodeInputs(q, k, v, torch.tensor([x])) for x in lengths]
        found = [ops.CUDA.decode(*x, *DecodeOptions(0.2))[0] for x in caches]
        assert torch.equal(*found)
    pages = k[0].reshape(2, 5, 4, 32).permute(1, 2, 0, 3).contiguous()
    tables = (torch.tensor([[2**32 + 1, -(2**32) + 1]]), torch.tensor([[4, 0]]))
    caches = [DecodeInputs(q, pages, pages, torch.tensor([8]), x) for x in tables]
    found = [ops.CUDA.decode(*x, *DecodeOptions(0.2))[0] for x in caches]
    assert torch.equal(*found)


@both
def test_large_random_scores(dtype: torch.dtype) -> None:
    """Of thousands, in every form of backward."""
    for D, T, S in ((64, 100, 128), (128, 70, 128), (64, 150, 200), (192, 40, 60)):
        case = Case("large", B=1, H_kv=1, D=D, T=T, S=S, spread=25.0, dtype=dtype, causal=T > 100)
        check_case(case)
        check_case(replace(case, stats=2, weights="mean", grads=("out", "lse", "weights")))


@both
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("options", [{}, {"softcap": 3000.0}, {"mask": "ts"}], ids=str)
def test_rows_of_any_height_beside_each_other(
    options: dict[str, Any], D: int, dtype: torch.dtype
) -> None:
    """Maxima from 0 to thousands in one warp, rows without keys, and a row of NaN."""
    case = Case("rows", B=1, H=1, H_kv=1, T=150, S=200, D=D, dtype=dtype, causal=True, align=-30)
    given = problem(replace(case, **options))
    q = (given.inputs.q * torch.linspace(0, 900, 150).view(150, 1)).to(dtype)
    given = with_inputs(given, q=q)
    found = run(given, "cuda")
    check(found, given)
    lse = found["lse"]
    assert (lse == -torch.inf).any()
    assert (lse > 1500).any()
    q = q.clone()
    q[:, :, 77] = torch.nan
    forward = with_inputs(given, q=q)._replace(cotangents=Cotangents())
    dirty = run(forward, "cuda")
    check(dirty, forward)
    assert dirty["out"][0, 0, 77].isnan().all()


@both
def test_inputs_near_the_largest(dtype: torch.dtype) -> None:
    """Scores up to 1e9 in fp16, and to 1e36 in bf16."""
    spread = 1e4 if dtype == fp16 else 1e17
    for D, T, S in ((64, 100, 128), (128, 150, 200)):
        case = Case("largest", B=1, H=1, H_kv=1, D=D, T=T, S=S, spread=spread, dtype=dtype)
        check_case(replace(case, grads=()))
        check_case(replace(case, causal=True, softcap=20.0, grads=()))
