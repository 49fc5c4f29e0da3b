"""The CUDA kernels twice: g++'s on the emulator and nvcc's on the PTX machine, on the same numbers.

Both have the same products and sums of matrices, to the bit: tensor cores', eight products at a
time, of which what does not fit is dropped. What differs:

- exp2: the emulator rounds the host's and clears the last bit; the machine errs as far as the PTX
  ISA allows. Where the exponents are whole, both are exact.
- log2 and tanh: the host's library's, and CUDA's, which nvcc expands. The backward takes log2 l.
- nvcc fuses a product and a sum where C++ has two operations, g++ for the emulator does not.

So the largest score has the same bits for all inputs, and all of the forward but logarithms where
the exponents are whole. The accuracy rule holds the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from accuracy import Results, check
from cases import DTYPES, OPTIONS, Case, fp16, problem, run
from decode_cases import CASES as DECODE_CASES
from decode_cases import WAYS, Call, judge, make
from dense import Trial
from ptx import session
from torch import Tensor

T = TypeVar("T")
HALF = [fp16] if session.ARCH == "75" else DTYPES[1:]
UNIT = float(torch.tensor(math.log(2)))  # a scale by which scores are exponents of 2
OF_SCORES = {"max_logit"}
OF_WHOLE_EXPONENTS = OF_SCORES | {"out", "weights", "reach", "focus"}
WHOLE = (
    "causal", "causal_wide", "bottom_right", "align-7", "align_tensor", "window", "gqa", "stats",
    "mask_padding", "mask_full", "dropout", "dropout_most", "weights", "weights_mean_gqa",
    "varlen", "varlen_causal", "varlen_right",
)  # fmt: skip
ORDINARY = (
    "causal", "softcap", "alibi_batch", "bias_gqa", "sinks_all_grads", "dropout", "weights_empty",
    "window_causal", "everything_mean", "varlen_everything",
)  # fmt: skip


@pytest.fixture(autouse=True)
def of_cuda(request: pytest.FixtureRequest) -> None:
    if reason := session.left_out(request.config, "cuda", session.ARCH):
        pytest.skip(reason)


def twice(call: Callable[[], T]) -> tuple[T, T]:
    """On the emulator, and on the PTX machine."""
    torch.ops.attnfast.emulator_ptx("")
    try:
        emulated = call()
    finally:
        torch.ops.attnfast.emulator_ptx(str(session.FOLDER))
    return emulated, call()


def grown(name: str, dtype: torch.dtype) -> Case:
    """A case of more than one tile."""
    case = next(case for case in OPTIONS if case.name == name)
    sizes = {} if case.lengths else {"B": 2, "T": 90, "S": 130}
    return replace(case, D=64, D_v=0, dtype=dtype, **sizes)


def whole(x: Tensor, most: int, share: float = 1.0) -> Tensor:
    """Of the same shape, whole numbers, of which a share is not zero."""
    rng = torch.Generator().manual_seed(x.numel())
    kept = torch.rand(x.shape, generator=rng) < share
    return (torch.randint(-most, most + 1, x.shape, generator=rng) * kept).to(x.dtype)


def with_whole_exponents(given: Trial) -> Trial:
    """The problem with scores that are whole numbers, and v too."""
    x = given.inputs
    return given._replace(
        inputs=x._replace(q=whole(x.q, 1, 0.4), k=whole(x.k, 1, 0.4), v=whole(x.v, 3))
    )


def agree(emulated: Results, executed: Results, names: set[str]) -> None:
    """To the bit, in what is named."""
    for name in names & emulated.keys():
        assert torch.equal(emulated[name].view(torch.uint8), executed[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_exponents(name: str, dtype: torch.dtype) -> None:
    given = with_whole_exponents(problem(replace(grown(name, dtype), scale=UNIT)))
    emulated, executed = twice(lambda: run(given, "cuda"))
    agree(emulated, executed, OF_WHOLE_EXPONENTS)
    check(executed, given)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_numbers(name: str, dtype: torch.dtype) -> None:
    """Scores, the rows without keys, and which weights dropout leaves."""
    case = replace(grown(name, dtype), stats=1)
    if not case.lengths:
        case = replace(case, weights="per head")
    given = problem(case)
    emulated, executed = twice(lambda: run(given, "cuda"))
    if not case.softcap:  # of a tanh
        agree(emulated, executed, OF_SCORES)
    assert torch.equal(emulated["lse"].isinf(), executed["lse"].isinf())
    if "weights" in emulated:
        assert torch.equal(emulated["weights"] == 0, executed["weights"] == 0)
    for results in (emulated, executed):
        check(results, given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "many_queries", "long_row", "window"])
def test_decoding(name: str, way: str) -> None:
    """Of whole exponents: of pieces that a second kernel combines too."""
    case = next(case for case in DECODE_CASES if case.name == name)
    call = make(replace(case, scale=UNIT, dtype=HALF[-1]))
    used = call.k.isfinite()
    k = whole(call.k, 1, 0.4).where(used, torch.nan)
    call = Call(whole(call.q, 1, 0.4), k, whole(call.v, 3).where(used, torch.nan), *call[3:])
    (emulated, _), (executed, lse) = twice(lambda: WAYS[way](call, "cuda"))
    assert torch.equal(emulated, executed)
    judge((executed, lse), call)
