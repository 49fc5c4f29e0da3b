"""Compiled kernels, their PTX executed: every option over more than one tile, odd addresses."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch
from accuracy import check
from cases import DTYPES, EVERYTHING, OPTIONS, Case, bf16, fp16, problem, run
from decode_cases import CASES as DECODE_CASES
from decode_cases import WAYS, judge, make
from ptx import session
from torch import Tensor

ARCHS = ("75", "80", "90")
HALF = (fp16,) if session.ARCH == "75" else (bf16, fp16)
T, S, D = 150, 200, 64  # no tile has more of them


def grown(case: Case) -> Case:
    """The case at a size of several tiles, with one key head."""
    group = case.H // case.H_kv
    if case.lengths:
        return replace(case, H=group, H_kv=1, D=D, D_v=0)
    B = 1 if case.mask is None and not case.bias else 2  # the last entry is masked altogether
    return replace(case, B=B, H=group, H_kv=1, T=T, S=S, D=D, D_v=0)


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
def test_option(backend: str, case: Case) -> None:
    """In one dtype on each architecture, and in another on the next."""
    dtypes = DTYPES if backend == "triton" else HALF
    turn = zlib.crc32(case.name.encode()) + ARCHS.index(session.ARCH)
    given = problem(grown(replace(case, dtype=dtypes[turn % len(dtypes)])))
    check(run(given, backend), given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("i", range(len(DECODE_CASES)), ids=lambda i: DECODE_CASES[i].name)
def test_decode(backend: str, way: str, i: int) -> None:
    """In a 16-bit dtype, fp32 being the table's."""
    call = make(replace(DECODE_CASES[i], received=True, dtype=HALF[i % len(HALF)]))
    judge(WAYS[way](call, backend), call)


def shifted(x: Tensor, elements: int) -> Tensor:
    """The same numbers, so many elements past an address that is a multiple of 16."""
    memory = x.new_full((x.numel() + 16,), torch.nan)
    begin = -memory.data_ptr() % 16 // x.element_size() + elements
    return memory[begin : begin + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("name", ["causal", "everything_long"])
def test_kernels_for_another_alignment(backend: str, name: str) -> None:
    """One call after another at addresses, and with strides, of which some are no multiple of 16.

    A kernel that is taken for a call it was not compiled for reads at an address that the machine
    refuses.
    """
    case = next(case for case in OPTIONS if case.name == name)
    for D in (64, 40, 33):
        given = problem(replace(grown(case), D=D, D_v=D, T=70, S=70, dtype=HALF[0]))
        for elements in (0, 1, 4, 8, 1, 0):
            moved = {x: shifted(getattr(given.inputs, x), elements) for x in "qkv"}
            moved_too = given._replace(inputs=given.inputs._replace(**moved))
            check(run(moved_too, backend), given)


@pytest.mark.parametrize("seed", range(6))
def test_no_schedule_changes_a_bit(
    backend: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(grown(replace(EVERYTHING, dtype=fp16)))
    monkeypatch.setenv("ATTNFAST_EMULATOR_SEED", "99")
    first = run(given, backend)
    monkeypatch.setenv("ATTNFAST_EMULATOR_SEED", str(seed))
    for name, result in run(given, backend).items():
        assert torch.equal(result, first[name]), name
