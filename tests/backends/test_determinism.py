"""Bitwise promises: every run, any number of threads, and a row whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import Results
from cases import DTYPES, EVERYTHING, OPTIONS, Case, bf16, fp16, fp32, problem, run
from dense import Cotangents, Trial
from torch import Tensor

from attnfast.call import Inputs

ROW_RESULTS = ("out", "lse", "dq")
LARGER = (
    Case("larger", T=300, S=300, D=64, grads=("out", "lse")),
    Case("larger_gqa", B=1, H=6, H_kv=2, T=513, S=513, D=40, causal=True, bias="ts"),
    Case("larger_varlen", H=4, H_kv=2, lengths=((1, 300), (200, 200), (70, 3)), bias="hts"),
    Case("larger_heads", B=2, H=5, H_kv=5, T=130, S=2100, D=128),  # packed a few at a time
    Case("larger_row", B=1, H=8, H_kv=2, T=1, S=2100, D=64),
    replace(EVERYTHING, name="larger_everything", T=300, S=257, weights="mean"),
)
INDEXED = Case("indexed", B=1, H=8, H_kv=1, T=300, S=2100, D=64, indices=400, causal=True,
               align="bottom_right")  # fmt: skip
BITS = {fp32: torch.int32, bf16: torch.int16, fp16: torch.int16}


def assert_same_bits(results: Results, expected: Results) -> None:
    for name, x in results.items():
        bits = BITS[x.dtype]
        assert x.contiguous().view(bits).equal(expected[name].contiguous().view(bits)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_every_run_gives_the_same_bits(
    backend: str, case: Case, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    given = problem(replace(case, dtype=dtype))
    threads(2)
    first = run(given, backend, deterministic=True)
    for _ in range(3):
        assert_same_bits(run(given, backend, deterministic=True), first)


@pytest.mark.parametrize("case", [
    *OPTIONS, *LARGER, INDEXED, *(replace(case, dtype=bf16) for case in OPTIONS[::4]),
    *(replace(case, dtype=dtype) for case in LARGER for dtype in (bf16, fp16)),
], ids=str)  # fmt: skip
def test_any_number_of_threads_gives_the_same_bits(
    case: Case, threads: Callable[[int], None]
) -> None:
    given = problem(case)
    threads(1)
    expected = run(given, "cpu")
    for number in (2, 5):
        threads(number)
        assert_same_bits(run(given, "cpu"), expected)


def entry(given: Trial, b: int) -> Trial:
    """Batch entry b as a call of its own."""
    B = len(given.inputs.q)

    def of(x: Tensor | None) -> Tensor | None:
        return x[b : b + 1] if x is not None and x.dim() > 1 and len(x) == B else x

    inputs = Inputs(*(of(x) for x in given.inputs))
    if inputs.align is not None:
        inputs = inputs._replace(align=inputs.align[b : b + 1])
    return Trial(inputs, given.options, Cotangents(*(of(x) for x in given.cotangents)))


BATCHES = (
    Case("plain", B=5),
    Case("causal", B=5, causal=True, T=129),
    Case("gqa", B=5, H=6, H_kv=2, D=64, causal=True),
    Case("masks", B=5, mask="bs", bias="bhts", alibi="bh", align="tensor", window=(90, 20)),
    Case("row", B=5, T=1, S=300, H=4, H_kv=1, D=64),
    Case("row_masks", B=5, T=1, S=300, mask="bs", bias="bs", sinks=True, softcap=5.0),
    Case("long", B=3, T=300, S=300, D=64, grads=("out", "lse")),
    Case("heads", B=3, H=3, H_kv=3, T=130, S=2100, D=128),
    replace(EVERYTHING, name="everything", B=5, dropout_p=0.0),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BATCHES, ids=lambda case: case.name)
def test_a_row_does_not_depend_on_the_batch(
    backend: str, case: Case, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Each entry alone, on one thread, has the bits that it has among the others, on two."""
    given = problem(replace(case, dtype=dtype))
    threads(2)
    together = run(given, backend, deterministic=True)
    threads(1)
    for b in range(case.B):
        alone = run(entry(given, b), backend, deterministic=True)
        assert_same_bits(
            {name: together[name][b : b + 1] for name in ROW_RESULTS},
            {name: alone[name] for name in ROW_RESULTS},
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_other_entries_values(backend: str, dtype: torch.dtype) -> None:
    """With dropout, whose mask counts the entries, and with NaN in all entries but one."""
    given = problem(replace(EVERYTHING, B=4, dtype=dtype))
    expected = run(given, backend, deterministic=True)
    tensors = {name: getattr(given.inputs, name).clone() for name in ("q", "k", "v")}
    for x in tensors.values():
        x[[0, 1, 3]] = torch.nan
    poisoned = given._replace(inputs=given.inputs._replace(**tensors))
    results = run(poisoned, backend, deterministic=True)
    names = (*ROW_RESULTS, "dk", "dv", "entropy", "weights")
    assert_same_bits(
        {name: results[name][2:3] for name in names}, {name: expected[name][2:3] for name in names}
    )


def sequence(given: Trial, i: int) -> Trial:
    """Sequence i of a varlen call as a varlen call of its own."""
    inputs = given.inputs
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    rows = slice(*inputs.cu_seqlens_q[i : i + 2].tolist())
    keys = slice(*inputs.cu_seqlens_k[i : i + 2].tolist())
    slopes, align = inputs.alibi_slopes, inputs.align
    alone = inputs._replace(
        q=inputs.q[:, :, rows],
        k=inputs.k[:, :, keys],
        v=inputs.v[:, :, keys],
        alibi_slopes=slopes if slopes is None or len(slopes) == 1 else slopes[i : i + 1],
        align=None if align is None else align[i : i + 1],
        cu_seqlens_q=torch.tensor([0, rows.stop - rows.start]).int(),
        cu_seqlens_k=torch.tensor([0, keys.stop - keys.start]).int(),
    )
    out, lse, entropy, weights = given.cotangents
    cotangents = Cotangents(
        None if out is None else out[:, :, rows],
        None if lse is None else lse[:, :, rows],
        None if entropy is None else entropy[:, :, rows],
        None if weights is None else weights[i : i + 1],
    )
    return Trial(alone, given.options, cotangents)


PACKED = (
    Case("plain", lengths=((70, 70), (1, 300), (129, 129), (0, 9), (33, 0), (64, 65))),
    Case("causal", lengths=((70, 70), (300, 300), (7, 129)), causal=True, align="bottom_right"),
    Case("everything", lengths=((70, 70), (1, 129), (129, 5)), **{
        name: getattr(EVERYTHING, name) for name in
        ("H", "H_kv", "causal", "window", "softcap", "alibi", "sinks", "bias", "stats", "weights")
    }, align="tensor", grads=("out", "lse", "entropy", "weights")),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_a_row_does_not_depend_on_other_sequences(
    backend: str, case: Case, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    given = problem(replace(case, dtype=dtype))
    threads(2)
    together = run(given, backend, deterministic=True)
    threads(1)
    ends = given.inputs.cu_seqlens_q
    assert ends is not None
    for i in range(len(case.lengths)):
        alone = run(sequence(given, i), backend, deterministic=True)
        rows = slice(int(ends[i]), int(ends[i + 1]))
        assert_same_bits(
            {name: together[name][:, :, rows] for name in ROW_RESULTS},
            {name: alone[name] for name in ROW_RESULTS},
        )
