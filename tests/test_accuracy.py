"""The rule itself: it accepts the reference and catches every mistake planted here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import Results, check, in_double, reference_results
from cases import DTYPES, EVERYTHING, Case, problem
from dense import Cotangents, Trial
from torch import Tensor

from attnfast.call import Inputs

LEAN = Case("lean", T=65, S=90, D=16)  # one option at a time is added


def options(**changes: object) -> Callable[[Trial], Trial]:
    return lambda p: p._replace(options=p.options._replace(**changes))


def inputs(change: Callable[[Inputs], dict[str, object]]) -> Callable[[Trial], Trial]:
    return lambda p: p._replace(inputs=p.inputs._replace(**change(p.inputs)))


def without(cotangent: str) -> Callable[[Trial], Trial]:
    return lambda p: p._replace(cotangents=p.cotangents._replace(**{cotangent: None}))


MISTAKES: dict[str, tuple[Case, Callable[[Trial], Trial]]] = {
    "scale missing": (LEAN, options(scale=1.0)),
    "causal edge one too far": (replace(LEAN, causal=True), options(align_offset=1)),
    "causal edge one too near": (replace(LEAN, causal=True), options(align_offset=-1)),
    "bottom_right taken for top_left": (
        replace(LEAN, causal=True, align="bottom_right"),
        options(align_bottom_right=False),
    ),
    "left edge one too far": (replace(LEAN, window=(20, 9)), options(window_left=21)),
    "right edge one too near": (replace(LEAN, window=(20, 9)), options(window_right=8)),
    "mask ignored": (replace(LEAN, mask="bs"), inputs(lambda i: {"mask": None})),
    "bias ignored": (replace(LEAN, bias="ts"), inputs(lambda i: {"bias": i.bias * 0})),
    "bias before softcap": (
        replace(LEAN, bias="", softcap=2.0),
        inputs(lambda i: {"bias": i.bias * 0, "q": i.q + 0.1}),
    ),
    "softcap ignored": (replace(LEAN, softcap=1.5), options(softcap=0.0)),
    "ALiBi of the wrong sign": (
        replace(LEAN, alibi="h"),
        inputs(lambda i: {"alibi_slopes": -i.alibi_slopes}),
    ),
    "sink ignored": (replace(LEAN, sinks=True), inputs(lambda i: {"sinks": i.sinks - 30})),
    "another dropout mask": (
        replace(LEAN, dropout_p=0.1),
        inputs(lambda i: {"dropout_seed": i.dropout_seed + 1}),
    ),
    "heads of the wrong group": (
        replace(LEAN, H=4, H_kv=2),
        inputs(lambda i: {"k": i.k.flip(1), "v": i.v.flip(1)}),
    ),
    "dlse dropped": (replace(LEAN, grads=("out", "lse")), without("lse")),
    "dH dropped": (replace(LEAN, stats=1, grads=("out", "entropy")), without("entropy")),
    "dW dropped": (
        replace(LEAN, D_v=1, weights="per head", grads=("out", "weights")),
        without("weights"),
    ),
    "dW of the mean not divided by H": (
        replace(LEAN, weights="mean", grads=("out", "weights")),
        lambda p: p._replace(cotangents=p.cotangents._replace(weights=2 * p.cotangents.weights)),
    ),
    "offset lost among all options": (EVERYTHING, options(align_bottom_right=False)),
    "causal lost among all options": (EVERYTHING, options(causal=False)),
}

BREAKS: dict[str, Callable[[Results], None]] = {
    "a row of out lost": lambda r: r["out"][0, 0, 3].zero_(),
    "out of another head": lambda r: r["out"].copy_(r["out"].flip(1)),
    "a NaN": lambda r: r["dq"][0, 0, 0, 0].fill_(torch.nan),
    "lse in log2": lambda r: r["lse"].mul_(1.4427),
    "lse rounded to bf16": lambda r: r["lse"].copy_(r["lse"].bfloat16()),
    "dk of half the rows": lambda r: r["dk"].mul_(0.5),
    "dv without a tile": lambda r: r["dv"][:, :, 64:].zero_(),
    "dq without the scale": lambda r: r["dq"].mul_(4.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str, dtype: torch.dtype) -> None:
    case, change = MISTAKES[mistake]
    right = problem(replace(case, dtype=dtype))
    check(reference_results(right, None), right)
    wrong = change(right)
    results = reference_results(wrong, None)
    if wrong.cotangents == Cotangents():
        results |= {name: x for name, x in reference_results(right, None).items() if name[0] == "d"}
    with pytest.raises(AssertionError, match="accuracy rule"):
        check(results, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damage", BREAKS)
def test_a_damaged_result_is_caught(damage: str, dtype: torch.dtype) -> None:
    right = problem(replace(LEAN, dtype=dtype))
    results = reference_results(right, None)
    BREAKS[damage](results)
    with pytest.raises(AssertionError, match="accuracy rule"):
        check(results, right)


def test_names_and_dtypes_come_first() -> None:
    right = problem(LEAN)
    results = reference_results(right, None)
    with pytest.raises(AssertionError, match="results"):
        check({name: x for name, x in results.items() if name != "dk"}, right)
    with pytest.raises(AssertionError, match=r"out: torch\.float64"):
        check(results | {"out": results["out"].double()}, right)
    with pytest.raises(AssertionError, match=r"lse: torch\.float32"):
        check(results | {"lse": results["lse"][..., :-1]}, right)


def test_a_baseline_without_digits_is_replaced() -> None:
    """Scores near 1e5 overflow fp16 and are noise in bf16: the rule then asks for fp32 digits."""
    for dtype in (torch.float16, torch.bfloat16):
        right = problem(replace(LEAN, dtype=dtype, spread=150.0))
        check(reference_results(right, None), right)
        with pytest.raises(AssertionError, match="out"):
            check(
                reference_results(right, dtype) | {"lse": reference_results(right, None)["lse"]},
                right,
            )


def dropped(a: Tensor) -> Tensor:
    return torch.zeros_like(a)


def a1_and_a2_swapped(a: Tensor) -> Tensor:
    wrong = a.clone()
    wrong[8:, :8], wrong[:8, 8:] = a[:8, 8:], a[8:, :8]
    return wrong


def b0_and_b1_swapped(a: Tensor) -> Tensor:
    return a.roll(8, 1)


def halves_swapped(a: Tensor) -> Tensor:
    return a.unflatten(1, (8, 2)).flip(2).flatten(1)


# What a tensor core's instruction gets instead of its [16, 16] operand a.
FRAGMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropped": dropped,
    "a1 and a2 swapped": a1_and_a2_swapped,
    "b0 and b1 swapped": b0_and_b1_swapped,
    "halves of a pair swapped": halves_swapped,
}
TILES = Case("tiles", B=1, H=1, H_kv=1, T=150, S=200, D=64, bias="bhts", weights="per head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fault", FRAGMENTS)
@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_one_wrong_product_of_a_kernel_is_caught(name: str, fault: str, dtype: torch.dtype) -> None:
    """One of the 16 x 8 x 16 products that a result is summed from, in fp32 everywhere else."""
    given = problem(replace(TILES, dtype=dtype))
    results = reference_results(given, None)
    check(results, given)
    exact = reference_results(in_double(given), torch.float64)
    p, ds = exact["weights"], exact["dbias"] * given.options.scale
    q, k, v = (x.double() for x in given.inputs[:3])
    assert given.cotangents.out is not None
    a, b = {
        "out": (p, v),
        "dq": (ds, k),
        "dk": (ds.mT, q),
        "dv": (p.mT, given.cotangents.out.double()),
    }[name]
    for m, n, depth in ((0, 0, 0), (16, 24, 64), (128, 56, 128)):
        rows, columns, terms = slice(m, m + 16), slice(n, n + 8), slice(depth, depth + 16)
        right = a[0, 0, rows, terms]
        wrong = FRAGMENTS[fault](right) - right
        damaged = {key: x.clone() for key, x in results.items()}
        damaged[name][0, 0, rows, columns] += (wrong @ b[0, 0, terms, columns]).to(dtype)
        with pytest.raises(AssertionError, match=f"accuracy rule\n{name}: max error"):
            check(damaged, given)
