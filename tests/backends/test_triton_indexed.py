"""Triton's kernels over chosen keys: terms held a few queries at a time, and lists of anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import check
from attnfast.kernels import attention_indexed_bwd
from cases import Case, problem, run

import attnfast

SMALL = Case("small", B=1, H=4, H_kv=2, T=5, S=20, D=8, indices=9, apart=True)


def test_terms_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries at a time, the last alone: every sum goes on where it stood."""
    given = problem(SMALL)
    monkeypatch.setattr(attention_indexed_bwd, "PARTS_BYTES", 2 * 4 * 2 * 10 * 16)
    check(run(given, "triton"), given)


def test_keys_out_of_range_are_none() -> None:
    given = problem(replace(SMALL, grads=()))
    indices = given.inputs.indices
    outside = torch.where(indices == -1, 20, indices)
    outside[..., 0] = torch.iinfo(torch.int32).max
    inside = indices.index_fill(3, torch.tensor(0), -1)
    results = [
        run(given._replace(inputs=given.inputs._replace(indices=x)), "triton")
        for x in (outside, inside)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, results), strict=True))


def test_keys_out_of_range_raise_where_values_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFAST_CHECK", "1")
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"indices must lie in \[-1, 2\), got 2 for query 0"):
        attnfast.attention(q, q, q, indices=torch.full((1, 2, 1), 2), backend="triton")
