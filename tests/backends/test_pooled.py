"""Pooled probabilities: every case of the table, in cells of every kind, for every backend."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from accuracy import Expected, expected_one, hold, in_double
from cases import CASES, Case, bf16, problem
from dense import Trial, dense
from torch import Tensor

from attnfast.call import BY_DISTANCE, DISTANCES, LARGEST, MEAN
from attnfast.pooled import pooled
from attnfast.reference import reference_pooled

KINDS = {"mean": MEAN, "largest": LARGEST, "by distance": BY_DISTANCE}
Cells = tuple[int, int, int]  # kind, rows, columns


def trial(case: Case) -> Trial:
    """The case without what pooling leaves out of account, and without gradients."""
    given = problem(case)
    options = given.options._replace(dropout_p=0.0, weights=2, stats=0)
    return Trial(given.inputs._replace(dropout_seed=None), options, type(given.cotangents)())


def cells_of(case: Case) -> Iterator[Cells]:
    """One number of cells for each kind, another for other cases."""
    T, S = case.T, case.S
    if case.lengths:
        T, S = (max(lengths) for lengths in zip(*case.lengths, strict=True))
    counts = ((1, 66), (3, 5), (7, 1), (T, S), (T + 3, 2))
    for kind in KINDS.values():
        rows, columns = counts[(zlib.crc32(repr(case).encode()) + 2 * kind) % len(counts)]
        yield kind, rows, DISTANCES if kind == BY_DISTANCE else columns


def tokens_of(given: Trial) -> tuple[Tensor, Tensor]:
    """Few different ones, so that many are equal."""
    rng = torch.Generator().manual_seed(7)
    sizes = ((x.shape[0], x.shape[2]) for x in given.inputs[:2])
    of_q, of_k = (torch.randint(5, size, generator=rng).int() for size in sizes)
    return of_q, of_k


def by_hand(x: Tensor, given: Trial, cells: Cells, tokens: tuple[Tensor, Tensor]) -> Tensor:
    """Cell by cell, of what is (B, H, T, S) or of every sequence (sequences, H, most T, most S)."""
    inputs, options, _ = given
    kind, rows, columns = cells
    result = torch.zeros(*x.shape[:2], rows, columns, dtype=x.dtype)
    for b in range(x.shape[0]):
        T, S = x.shape[2:]
        q_rows, k_rows, entry = slice(0, T), slice(0, S), b
        if inputs.cu_seqlens_q is not None:
            q_rows = slice(*inputs.cu_seqlens_q[b : b + 2].tolist())
            k_rows = slice(*inputs.cu_seqlens_k[b : b + 2].tolist())
            T, S, entry = q_rows.stop - q_rows.start, k_rows.stop - k_rows.start, 0
        align = options.align_offset + (S - T if options.align_bottom_right else 0)
        align += 0 if inputs.align is None else int(inputs.align[b])
        back = torch.arange(T).view(T, 1) + align - torch.arange(S)
        same = tokens[0][entry, q_rows].view(T, 1) == tokens[1][entry, k_rows]
        whole = x[b, :, :T, :S]
        if kind == BY_DISTANCE:
            chosen = torch.stack([belongs(c, back, same) for c in range(columns)])
            for r, (p, of_row) in enumerate(
                zip(cut(whole, 1, rows), cut(chosen, 1, rows), strict=True)
            ):
                result[b, :, r] = torch.where(of_row, p[:, None], 0).sum((2, 3))
            continue
        for r, of_row in enumerate(cut(whole, 1, rows)):
            sums, largest = of_row.sum(1), F.pad(of_row, (0, 0, 0, 1)).amax(1)  # (H, S)
            for c, cell in enumerate(cut(largest if kind == LARGEST else sums, 1, columns)):
                mean = cell.sum(1) / max(of_row.shape[1] * cell.shape[1], 1)
                result[b, :, r, c] = mean if kind == MEAN else F.pad(cell, (0, 1)).amax(1)
    return result


def cut(x: Tensor, dim: int, cells: int) -> tuple[Tensor, ...]:
    """Each cell's part of a dimension."""
    return x.tensor_split([c * x.shape[dim] // cells for c in range(1, cells)], dim)


def belongs(column: int, back: Tensor, same: Tensor) -> Tensor:
    """Which pairs of a query and a key are in a column of BY_DISTANCE."""
    if column == 64:
        return (torch.arange(back.shape[1]) == 0).expand(back.shape)
    if column == 65:
        return same & (back != 0)
    if column == 32:
        return back == 0
    power = column - 33 if column > 32 else 31 - column
    far = back if column > 32 else -back
    return (far >= 2**power) & (far < 2 ** (power + 1))


def of_reference(given: Trial, cells: Cells, dtype: torch.dtype) -> Tensor:
    tokens = tokens_of(given) if cells[0] == BY_DISTANCE else (None, None)
    return reference_pooled(*given[:2], *cells, *tokens, compute_dtype=dtype)


def run(given: Trial, cells: Cells, backend: str) -> Tensor:
    tokens = tokens_of(given) if cells[0] == BY_DISTANCE else (None, None)
    named = dict(zip(("tokens_q", "tokens_k"), tokens, strict=True))
    return pooled("attention", *given[:2], *cells, backend, **named)


def check(found: Tensor, given: Trial, cells: Cells) -> None:
    """The accuracy rule."""
    hold({"pooled": found}, {"pooled": expected_of(given, cells)})


def expected_of(given: Trial, cells: Cells) -> Expected:
    """What the rule wants; errors of p are those of the weights that are not rounded to a half."""
    in_fp32 = given._replace(inputs=given.inputs._replace(
        **{name: getattr(given.inputs, name).float() for name in "qkv"}))  # fmt: skip
    unit = by_hand(dense(in_fp32)["weights"].unit, given, cells, tokens_of(given))
    truth = of_reference(in_double(given), cells, torch.float64)
    baseline = of_reference(given, cells, torch.float32)
    return expected_one(truth, torch.float32, [baseline], unit)


TAKEN = [case for case in CASES if not case.indices]


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_reference(case: Case) -> None:
    """The specification in fp64 against loops over the cells of formulas written apart from it."""
    wide = in_double(trial(case))
    weights = dense(wide)["weights"]
    for cells in cells_of(case):
        truth, unit = (by_hand(x, wide, cells, tokens_of(wide)) for x in weights)
        found = of_reference(wide, cells, torch.float64)
        hold({"pooled": found}, {"pooled": expected_one(truth, torch.float64, [], unit)})


@pytest.mark.reference(7)
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_case(backend: str, case: Case) -> None:
    given = trial(case)
    for cells in cells_of(case):
        check(run(given, cells, backend), given, cells)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_nan_is_nan_in_all_of_its_cells(backend: str, kind: str) -> None:
    """As in the weights; also in those that position or a mask leaves out."""
    blocks = {"causal": True, "blocks": "heads 64"} if kind == "largest" else {"window": (20, 5)}
    given = trial(Case("nan", B=1, H=1, H_kv=1, T=130, S=200, D=16, dtype=bf16, **blocks))
    given.inputs.q[0, 0, 70, 3] = torch.nan
    cells = (KINDS[kind], 13, DISTANCES if kind == "by distance" else 9)
    found = run(given, cells, backend)
    expected = of_reference(given, cells, torch.float32).isnan()
    assert expected.any()
    assert torch.equal(found.isnan(), expected)
    assert torch.equal(expected[0, 0].any(1).nonzero(), torch.tensor([[7]]))


LONG = Case("long", lengths=((5, 70), (700, 300), (300, 5), (0, 3)), H=3, H_kv=1, causal=True,
            align="bottom_right", sinks=True)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_of_many_queries(backend: str, rows: int, kind: str) -> None:
    """More than a block has, in some of the sequences."""
    given = trial(LONG)
    cells = (KINDS[kind], rows, DISTANCES if kind == "by distance" else 4)
    check(run(given, cells, backend), given, cells)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_that_does_not_count_may_be_nan(backend: str, kind: str) -> None:
    given = trial(Case("nan", causal=True, dtype=bf16, T=100, S=100))
    expected = run(given, (KINDS[kind], 10, DISTANCES), backend)
    q = given.inputs.q.clone()
    q[1, 0, 40] = torch.nan
    given = given._replace(inputs=given.inputs._replace(q=q))
    tokens = tokens_of(given) if kind == "by distance" else (None, None)
    found = pooled("attention", *given[:2], KINDS[kind], 10, DISTANCES, backend,
                   tokens_q=tokens[0], tokens_k=tokens[1], real=~q.isnan().any(3))  # fmt: skip
    same = (found == expected).all(3)
    assert found.isfinite().all()
    assert not same[1, 0, 4]
    assert same.sum() == same.numel() - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 30])
def test_any_number_of_threads(backend: str, rows: int, kind: str) -> None:
    given = trial(Case("threads", B=1, T=1500, S=1500, causal=True))
    cells = (KINDS[kind], rows, DISTANCES if kind == "by distance" else 7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(given, cells, backend)
        torch.set_num_threads(2)
        assert torch.equal(run(given, cells, backend), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("T", "S"), [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing(backend: str, kind: str, T: int, S: int) -> None:
    given = trial(Case(T=T, S=S))
    columns = DISTANCES if kind == "by distance" else 3
    found = run(given, (KINDS[kind], 2, columns), backend)
    assert torch.equal(found, torch.zeros(2, 2, 2, columns))


def test_indices_are_refused(backend: str) -> None:
    given = trial(Case(indices=3))
    message = "attention: indices must be left out where probabilities are pooled, got a list of 3"
    with pytest.raises(ValueError, match=message):
        run(given, (MEAN, 1, 1), backend)
