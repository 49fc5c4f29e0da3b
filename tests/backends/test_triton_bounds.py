"""Memory: nothing is read or written out of bounds, whatever lengths and pages hold.

Programs beyond 16 bits are here too; offsets beyond 31 bits are in test_triton_layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import check
from attnfast.kernels import attention_bwd, attention_decode, attention_fwd
from attnfast.kernels import launch as launching
from cases import DTYPES, EVERYTHING, Case, bf16, fp32, problem, run
from decode_cases import CASES as DECODE_CASES
from decode_cases import WAYS, judge, make
from dense import Trial
from test_given_back import CALLS as GIVEN_BACK
from test_given_back import EACH, complaint
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

import attnfast

MARGIN, CANARY = 64, -123.0


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Every tensor that the backend makes lies between canaries; a call asserts that all live."""
    stores: list[Tensor] = []
    plain_new_empty, plain_in_order = Tensor.new_empty, attention_fwd.empty_in_order

    def guarded(like: Tensor) -> Tensor:
        if not like.is_floating_point() or not like.numel():
            return like
        store = torch.full((like.numel() + 2 * MARGIN,), CANARY, dtype=like.dtype)
        stores.append(store)
        inside = store[MARGIN : MARGIN + like.numel()].fill_(torch.nan)
        return inside.as_strided(like.shape, like.stride(), inside.storage_offset())

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return guarded(plain_new_empty(self, *args, **kwargs))

    def in_order(like: Tensor, last: int) -> Tensor:
        return guarded(plain_in_order(like, last))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    for module in (attention_fwd, attention_bwd, attention_decode):
        monkeypatch.setattr(module, "empty_in_order", in_order)

    def alive() -> None:
        assert stores
        for store in stores:
            assert (store[:MARGIN] == CANARY).all()
            assert (store[-MARGIN:] == CANARY).all()

    return alive


def poisoned(x: Tensor | None) -> Tensor | None:
    """The same numbers inside a tensor of NaN (true, where bool), so that no neighbour is zero."""
    if x is None or not (x.is_floating_point() or x.dtype == torch.bool):
        return x
    fill = True if x.dtype == torch.bool else torch.nan
    larger = x.new_full([n + 7 for n in x.shape], fill)
    return larger[tuple(slice(3, 3 + n) for n in x.shape)].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(), ((30, 50), (1, 70), (65, 7))], ids=["dense", "varlen"])
def test_everything(lengths: Any, dtype: torch.dtype, canaries: Callable[[], None]) -> None:
    case = replace(EVERYTHING, dtype=dtype, lengths=lengths, mask=None if lengths else "bhts")
    given = problem(replace(case, B=1, H=2, H_kv=1, T=67, S=69))
    surrounded = given._replace(
        inputs=type(given.inputs)(*map(poisoned, given.inputs)),
        cotangents=type(given.cotangents)(*map(poisoned, given.cotangents)),
    )
    check(run(surrounded, "triton"), given)
    canaries()


@pytest.mark.parametrize("way", WAYS)
def test_decoding(way: str, canaries: Callable[[], None]) -> None:
    call = make(replace(DECODE_CASES[-1], dtype=bf16))
    call = call._replace(q=poisoned(call.q), k=poisoned(call.k), v=poisoned(call.v))
    judge(WAYS[way](call, "triton"), call)
    canaries()


ENDS = (
    [0, 500, 400, 2**31 - 1],
    [-7, -3, 20, 90],
    [0, 5, 3, 1],
    [90, 10, 2**31 - 1, -(2**31)],
)


@pytest.mark.parametrize("longest", [(90, 90), (3, 5)])
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_ends_that_lead_astray(
    ends: list[int],
    longest: tuple[int, int],
    canaries: Callable[[], None],
) -> None:
    """Without ATTNFAST_CHECK they are clamped: results mean little, but nothing is touched."""
    case = Case(lengths=((30, 30), (30, 30), (30, 30)), stats=2, weights="mean", grads=("out",))
    given = problem(case)
    boundaries = torch.tensor(ends).int()
    inputs = given.inputs._replace(cu_seqlens_q=boundaries, cu_seqlens_k=boundaries.flip(0))
    options = given.options._replace(max_seqlen_q=longest[0], max_seqlen_k=longest[1])
    results = run(Trial(inputs, options, given.cotangents), "triton")
    canaries()
    assert results["dq"].isfinite().all()


@pytest.mark.parametrize("length", [-1, 21, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("page", [-1, 5, 2**31 - 1])
def test_pages_and_lengths_that_lead_astray(
    page: int, length: int, canaries: Callable[[], None]
) -> None:
    q, pages = torch.randn(2, 2, 1, 8), torch.randn(5, 4, 2, 8)
    table = torch.tensor([[0, 1, page, 4, 2], [2, page, 4, 0, 1]]).int()
    lengths = torch.tensor([20, length]).int()
    out = attnfast.decode_attention(q, pages, pages, lengths, page_table=table, backend="triton")
    canaries()
    assert out.isfinite().all()


def test_a_cache_without_pages() -> None:
    """No page is the nearest to a wrong one: nothing is read, not what lies before them."""
    q, memory = torch.randn(2, 2, 1, 8), torch.full((3, 4, 2, 8), torch.nan)
    table, lengths = torch.zeros(2, 5).int(), torch.tensor([20, 3]).int()
    pages = memory[2:2]
    out = attnfast.decode_attention(q, pages, pages, lengths, page_table=table, backend="triton")
    assert not out.any()


@pytest.mark.parametrize(("call", "name"), EACH, ids=lambda x: getattr(x, "__name__", x))
def test_a_storage_given_back(call: Any, name: str) -> None:
    given = GIVEN_BACK[call]()
    given[name].untyped_storage().resize_(0)
    said = complaint(call, "triton", **given)
    assert re.search(rf"{name} must (have its|be in) memory", said)


def test_aligns_beyond_all_positions() -> None:
    q, k = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 9, 8)
    outs = [
        attnfast.attention(q, k, k, causal=True, align=align, backend="triton")
        for align in (torch.tensor([far, -far - 1]).int() for far in (2**31 - 1, 2**29))
    ]
    assert torch.equal(*outs)
    assert outs[0][0].any(-1).all()
    assert not outs[0][1].any()


@pytest.mark.parametrize(("B", "H"), [(66_000, 1), (1, 66_000), (270, 260)])
def test_the_last_of_66000_heads(B: int, H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last few programs of each kernel; all would take the interpreter an hour."""
    few = 3
    given = problem(
        Case(B=B, H=H, H_kv=H, T=2, S=3, D=2, causal=True, dropout_p=0.2, stats=1, dtype=fp32)
    )
    place = interpreter_builder.set_grid_idx
    skipped = 0

    def last_programs(job: launching.Launch) -> None:
        nonlocal skipped
        skipped = job.grid - few
        plain(job._replace(grid=few))

    plain = launching.launch
    monkeypatch.setattr(
        interpreter_builder, "set_grid_idx", lambda x, y, z: place_at(x + skipped, y, z)
    )

    def place_at(x: int, y: int, z: int) -> None:
        interpreter_builder.grid_dim = (skipped + few, 1, 1)
        place(x, y, z)

    for module in (attention_fwd, attention_bwd):
        monkeypatch.setattr(module, "launch", last_programs)
    results = run(given, "triton")
    monkeypatch.undo()
    expected = run(given, "reference")
    for name in ("out", "lse", "dq", "dk", "dv"):
        last, truth = (x[name].flatten(0, 1)[-few:] for x in (results, expected))
        torch.testing.assert_close(last, truth)
