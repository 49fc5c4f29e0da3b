"""The dropout mask, bit for bit that of the reference: recovered from results of every kernel."""

from __future__ import annotations

import pytest
import torch
from accuracy import check
from cases import DTYPES, Case, fp32, problem, run
from torch import Tensor

import attnfast
from attnfast.call import Inputs, Options
from attnfast.distributed.context import PLACED
from attnfast.functional import run as attend
from attnfast.reference import dropout_mask

SEEDS = ((0, 0), (1, 2), (-1, -1), (2**63 - 1, 2**32 - 1), (2**40 + 17, 2**33 + 5), (-(2**63), 9))
SIZES = (
    (2, 3, 5, 9),
    (1, 1, 1, 1),
    (1, 2, 65, 129),
    (2, 1, 130, 300),
    (1, 4, 1, 77),
    (3, 2, 70, 8),
)


def kept(
    backend: str, sizes: tuple[int, ...], p: float, seed: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Which entries the forward with weights, the forward without, and the backward keep.

    Equal scores make every probability 1 / S, so a zero is a dropped one. The values are unit
    vectors, so out is the matrix of probabilities; so are the gradients of out, and dv is its
    transpose.
    """
    B, H, T, S = sizes
    D_v = max(S, T)
    q, k = torch.zeros(B, H, T, 4, dtype=dtype), torch.zeros(B, H, S, 4, dtype=dtype)
    units = torch.eye(D_v, dtype=dtype)
    v = units[:S].expand(B, H, S, D_v).clone().requires_grad_()
    arguments = {"dropout_p": p, "dropout_seed": seed, "backend": backend}
    out = attnfast.attention(q, k, v, **arguments)
    _, weights = attnfast.attention(q, k, v, return_weights=True, **arguments)
    (dv,) = torch.autograd.grad(out, v, units[:T].expand(B, H, T, D_v))
    return weights != 0, out[..., :S] != 0, dv[..., :T].mT != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_every_kernel_drops_what_the_reference_drops(
    backend: str, sizes: tuple[int, int, int, int], p: float, dtype: torch.dtype
) -> None:
    for seed in map(torch.tensor, SEEDS):
        expected = dropout_mask(seed, *sizes, p)
        for found in kept(backend, sizes, p, seed, dtype):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_count_as_entries_and_positions_are_local(backend: str, causal: bool) -> None:
    given = problem(
        Case(lengths=((9, 20), (0, 4), (70, 70)), dropout_p=0.5, weights="per head", causal=causal)
    )
    weights = run(given, backend)["weights"]
    for i, (T, S) in ((0, (9, 20)), (2, (70, 70))):
        seed = given.inputs.dropout_seed
        assert seed is not None
        expected = dropout_mask(seed, 1, 2, T, S, 0.5, batch_start=i)[0]
        if causal:
            expected = expected.tril()
        assert torch.equal(weights[i, :, :T, :S] != 0, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_a_call_drops_what_the_call_drops(backend: str, dtype: torch.dtype) -> None:
    """A part's seed says where it begins: heads 5 to 7 of 8, queries from 29, keys from 88."""
    if backend not in PLACED:
        pytest.skip(f"{backend} counts from its own first row: attnfast.distributed refuses it")
    B, H, T, S, p = 2, 3, 37, 70, 0.4
    seed = torch.tensor([3, 4, 8, 5, 29, 88])
    expected = dropout_mask(seed[:2], B, 8, 29 + T, 88 + S, p)[:, 5:, 29:, 88:]
    assert torch.equal(dropout_mask(seed, B, H, T, S, p), expected)
    q, k = torch.zeros(B, H, T, 4, dtype=dtype), torch.zeros(B, H, S, 4, dtype=dtype)
    units = torch.eye(S, dtype=dtype)
    v = units.expand(B, H, S, S).clone().requires_grad_()
    inputs, options = Inputs(q, k, v, dropout_seed=seed), Options(scale=1.0, dropout_p=p)
    out = attend("attention", inputs, options, backend).out
    (dv,) = torch.autograd.grad(out, v, units[:T].expand(B, H, T, S))
    weights = attend("attention", inputs, options._replace(weights=2), backend).weights
    assert weights is not None
    for found in (weights != 0, out != 0, dv[..., :T].mT != 0):
        assert torch.equal(found, expected)


def test_no_dropout_is_no_dropout(backend: str) -> None:
    given = problem(Case(causal=True))
    seeded = given._replace(inputs=given.inputs._replace(dropout_seed=torch.tensor([1, 2])))
    for name, result in run(seeded, backend).items():
        assert torch.equal(result, run(given, backend)[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_dropped_is_zero(backend: str, dtype: torch.dtype) -> None:
    """Out, weights and all gradients; lse and statistics are those before dropout."""
    case = Case(dtype=dtype, dropout_p=1.0, stats=2, weights="per head", grads=("out", "weights"))
    given = problem(case)
    results = run(given, backend)
    check(results, given)
    for name in ("out", "weights", "dq", "dk", "dv"):
        assert not results[name].any(), name
    whole = run(given._replace(options=given.options._replace(dropout_p=0.0)), backend)
    for name in ("lse", "max_logit", "entropy", "reach", "received"):
        assert torch.equal(results[name], whole[name]), name


def test_the_seed_comes_from_torch(backend: str) -> None:
    q, k, v = problem(Case(dtype=fp32)).inputs[:3]

    def out() -> Tensor:
        return attnfast.attention(q, k, v, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    first, second = out(), out()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(out(), first)
    assert torch.equal(out(), second)
