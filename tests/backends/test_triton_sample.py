"""A sample of everything, small enough for every run of the tests: every option with gradients.

Tiles are smaller than elsewhere, so that short sequences still have several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from accuracy import check
from attnfast.kernels import configs
from cases import DTYPES, EVERYTHING, OPTIONS, Case, bf16, fp16, fp32, problem, run
from decode_cases import CASES as DECODE_CASES
from decode_cases import WAYS, judge, make

from attnfast.block_index import with_dense_mask

SMALL = configs.Config(32, 16, 4, 1)
MAX_OFFSET = 2**29  # of align as an int


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "INTERPRETER", SMALL)


def cut(case: Case, dtype: torch.dtype) -> Case:
    """The case with few queries and keys, but more than a tile of each."""
    group = case.H // case.H_kv
    if case.lengths:
        lengths = tuple((min(t, 35), min(s, 20)) for t, s in case.lengths[:3])
        return replace(case, lengths=lengths, H=group, H_kv=1, dtype=dtype)
    return replace(case, B=1, H=group, H_kv=1, T=35, S=min(case.S, 37), dtype=dtype)


def sample() -> Iterator[Case]:
    for i, case in enumerate(OPTIONS):
        yield cut(case, DTYPES[i % 3])
    for T, S in ((1, 1), (1, 40), (40, 1), (32, 16), (33, 17)):
        yield Case("sizes", B=1, H=1, H_kv=1, T=T, S=S, causal=T > S)
    for D, D_v in ((1, 40), (40, 1), (80, 96), (512, 8)):
        yield Case("head_dims", B=1, H=1, H_kv=1, T=17, S=18, D=D, D_v=D_v, dtype=bf16)
    for blocks, options in (
        ("blocks 64", {"causal": True}),
        ("blocks 64", {"window": (90, 20), "stats": 2, "weights": "mean", "bias": "hts"}),
        ("heads 128", {"H": 2, "grads": ("out", "weights"), "weights": "per head"}),
    ):
        plain = Case("blocks", B=1, H=1, H_kv=1, T=140, S=270, blocks=blocks, dtype=fp16)
        yield replace(plain, **options)
    for kept in ("bh", "s", "t", "b"):
        yield Case(f"bias_{kept}", bias=kept, B=1, H=2, H_kv=1, T=35, S=20, dtype=fp16)


@pytest.mark.parametrize("case", list(sample()), ids=str)
def test_case(case: Case) -> None:
    given = problem(case)
    check(run(given, "triton"), given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [DECODE_CASES[i] for i in (1, 7, 8, 11, 18, 26)], ids=str)
def test_decode(case: object, way: str) -> None:
    call = make(replace(case, H_kv=1, H=2, dtype=bf16))
    judge(WAYS[way](call, "triton"), call)


UNATTENDED = (
    Case("mask", mask="bs"),
    Case("mask_softcap", mask="bs", bias="ts", softcap=3.0, alibi="h", stats=2),
    Case("bias", bias="s", masking_bias=True),
    Case("causal", causal=True, stats=2),
    Case("window", window=(-1, 3), weights="mean", grads=("out", "weights")),
    Case("blocks", blocks="graph 64", stats=2),
)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", UNATTENDED, ids=lambda case: case.name)
def test_unattended_keys_may_hold_anything(case: Case, value: float) -> None:
    """Forward and all gradients; the last tiles of queries and keys are partly padding."""
    given = problem(replace(case, B=1, H=1, H_kv=1, T=20, S=37, dtype=bf16))
    inputs = given.inputs
    dead = torch.arange(37).view(1, 1, 37, 1) >= {"causal": 20, "window": 23}.get(case.name, 37)
    if inputs.mask is not None:
        dead = dead | ~inputs.mask[:, :, 0].unsqueeze(-1)
    if case.blocks:
        mask = with_dense_mask(inputs, 20, 37).mask
        dead = dead | ~mask.any(2).unsqueeze(-1)
        assert dead.any()
    if case.masking_bias:
        dead = dead | (inputs.bias[:, :, 0] == -torch.inf).unsqueeze(-1)
    poisoned = inputs._replace(
        k=inputs.k.masked_fill(dead, value), v=inputs.v.masked_fill(dead, value)
    )
    given = given._replace(inputs=poisoned)
    check(run(given, "triton"), given)


FAR = 2**31 - 1
NEAR = replace(cut(Case(stats=1, alibi="h"), fp32), H=1)


@pytest.mark.parametrize(
    ("align", "window"),
    [
        (FAR, (FAR - 5, FAR)),
        (-FAR, (FAR, FAR - 5)),
        (2**30, (2**30, 2**30)),
        (-(2**30), (2**30, 2**30)),
        (-FAR, (FAR, FAR)),
    ],
)
def test_positions_beyond_32_bits(align: int, window: tuple[int, int]) -> None:
    """Shift and window add up in 64 bits; what is left of both is exact to the key."""
    given = problem(replace(NEAR, align=max(-MAX_OFFSET, min(align, MAX_OFFSET)), window=window))
    check(run(given, "triton"), given)
    entries = torch.full((1,), align).int()
    given = problem(replace(NEAR, align="tensor", window=window))
    given = given._replace(inputs=given.inputs._replace(align=entries))
    check(run(given, "triton"), given)


@pytest.mark.parametrize("case", [
    Case(causal=True), Case(window=(3, 2)), Case(causal=True, sinks=True), Case(mask="bts"),
], ids=str)  # fmt: skip
def test_a_query_of_nan_reaches_the_keys_that_it_attends(case: Case) -> None:
    given = problem(replace(case, B=1, H=1, H_kv=1, T=35, S=37))
    inputs = given.inputs
    q = inputs.q.clone()
    q[0, 0, 20, 3] = torch.nan
    results = run(given._replace(inputs=inputs._replace(q=q)), "triton")
    attended = torch.arange(37) <= 20 if case.causal else torch.ones(37, dtype=torch.bool)
    if inputs.mask is not None:
        attended = inputs.mask[0, 0, 20]
    if case.window != (-1, -1):
        attended = (torch.arange(37) - 20).abs() <= 3
        attended[23] = False
    for name in ("dk", "dv"):
        assert torch.equal(results[name][0, 0].isnan().any(-1), attended), name
    assert torch.equal(results["dq"][0, 0].isnan().any(-1), torch.arange(35) == 20)


def test_tiles_of_eight_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that the backward's tiles are anywhere: fp32 with D of 512 in 99 KB."""
    for name in ("dq", "dkdv", "dbias"):
        tile = configs.choose("sm_89", name, 4, 512, 512, False)
        assert min(tile[:2]) == 8
        monkeypatch.setitem(configs.trial, name, tile)
    case = Case("D512", B=1, H=2, H_kv=1, T=21, S=26, D=300, bias="hts", causal=True, dtype=fp32)
    given = problem(case)
    check(run(given, "triton"), given)


def test_every_run_gives_the_same_bits() -> None:
    given = problem(cut(EVERYTHING, fp32))
    first, second = run(given, "triton"), run(given, "triton")
    for name, result in first.items():
        assert torch.equal(result, second[name]), name
