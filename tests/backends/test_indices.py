"""Chosen keys: a list is a set, whatever its order, its strides, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import Results, check
from cases import DTYPES, Case, problem, run
from dense import Trial
from torch import Tensor

import attnfast

CHOSEN = Case("chosen", indices=40, apart=True, H=6, T=6, S=150, stats=1, sinks=True,
              causal=True, align="bottom_right", grads=("out", "lse", "entropy"))  # fmt: skip


def with_indices(given: Trial, indices: Tensor) -> Trial:
    return given._replace(inputs=given.inputs._replace(indices=indices))


def assert_equal(results: Results, expected: Results) -> None:
    assert results.keys() == expected.keys()
    for name, x in results.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_is_a_set(backend: str, dtype: torch.dtype) -> None:
    """Another order, keys twice and more places without a key change no bit."""
    given = problem(replace(CHOSEN, dtype=dtype))
    indices = given.inputs.indices
    order = torch.randperm(indices.shape[3], generator=torch.Generator().manual_seed(0))
    more = torch.cat([indices[..., order], indices[..., :9], indices.new_full((2, 2, 6, 5), -1)], 3)
    assert_equal(run(with_indices(given, more), backend), run(given, backend))


def test_any_strides_and_int64(backend: str) -> None:
    given = problem(CHOSEN)
    expected = run(given, backend)
    indices = given.inputs.indices
    across = indices.mT.contiguous().mT, indices.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (indices.long(), *across):
        assert_equal(run(with_indices(given, same), backend), expected)
    shared = indices[:1, :1, :1].expand(2, 2, 6, 40)
    assert_equal(
        run(with_indices(given, shared), backend),
        run(with_indices(given, shared.contiguous()), backend),
    )


def test_lists_of_every_key_are_attention_without_lists(backend: str) -> None:
    given = problem(CHOSEN)
    every = torch.arange(150, dtype=torch.int32).expand(2, 1, 6, 150)
    check(run(with_indices(given, every), backend), given._replace(
        inputs=given.inputs._replace(indices=None)))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_keys_of_many(backend: str, dtype: torch.dtype) -> None:
    """Keys on both sides of every boundary of the sets' words."""
    given = problem(Case(B=1, H=3, H_kv=1, T=5, S=9000, D=8, dtype=dtype, indices=7))
    edges = (0, 63, 64, 4095, 4096, 8191, 8999)
    indices = torch.tensor(edges).int().expand(1, 1, 5, 7)
    given = with_indices(given, indices)
    check(run(given, backend), given)


@pytest.mark.parametrize(("T", "S", "K"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (4, 0, 0)])
def test_nothing(backend: str, T: int, S: int, K: int) -> None:
    q, k = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (T, S))
    indices = torch.full((2, T, K), -1)
    out, lse = attnfast.attention(q, k, k, indices=indices, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros(2, 4, T, 8))
    assert torch.equal(lse, torch.full((2, 4, T), -torch.inf))
    dq, dk = torch.autograd.grad(out.sum() + lse.nan_to_num(0, neginf=0).sum(), (q, k))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_no_list_names_has_no_effect(backend: str, bad: float) -> None:
    given = problem(CHOSEN)
    indices = given.inputs.indices
    indices = torch.where(indices % 5 == 0, -1, indices)
    unseen = (torch.arange(150) % 5 == 0).view(150, 1)
    given = with_indices(given, indices)
    expected = run(given, backend)
    inputs = given.inputs
    k, v = (torch.where(unseen, bad, x) for x in (inputs.k, inputs.v))
    assert_equal(run(given._replace(inputs=inputs._replace(k=k, v=v)), backend), expected)


def test_nan_reaches_those_that_list_it(backend: str) -> None:
    q = torch.randn(1, 4, 6, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, 20, 8) for _ in range(2))
    v[:, :, 3] = torch.nan
    indices = torch.arange(18).view(1, 6, 3)  # query 1 lists key 3
    v.requires_grad_()
    out = attnfast.attention(q, k, v, indices=indices, backend=backend)
    rows = out.isnan().any(-1)
    assert torch.equal(rows, (torch.arange(6) == 1).expand(1, 4, 6))
    dq, dv = torch.autograd.grad(out.sum(), (q, v))
    assert torch.equal(dq.isnan().any(-1), rows)
    assert dv.isfinite().all()
