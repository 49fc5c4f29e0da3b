"""Second derivatives: those of the reference, right, in linear memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import in_double, with_leaves
from cases import Case, outputs, problem
from dense import Trial
from torch import Tensor

from attnfast import second_order
from attnfast.call import Inputs
from attnfast.reference import reference_attention

ALL_GRADS = ("out", "lse", "entropy", "weights")
CASES = {
    "plain": Case(T=5, S=7, D=4),
    "every option": Case(
        T=5,
        S=7,
        D=4,
        D_v=3,
        H=4,
        H_kv=2,
        causal=True,
        align="bottom_right",
        window=(5, -1),
        softcap=3.0,
        alibi="bh",
        sinks=True,
        mask="bs",
        bias="ht",
        dropout_p=0.3,
        weights="per head",
        stats=1,
        grads=ALL_GRADS,
    ),
    "aligned apart": Case(
        T=6,
        S=9,
        D=4,
        causal=True,
        align="tensor",
        bias="hts",
        masking_bias=True,
        weights="mean",
        grads=("lse", "weights"),
    ),
    "chosen keys": Case(
        T=6,
        S=9,
        D=4,
        H=4,
        H_kv=2,
        indices=5,
        apart=True,
        sinks=True,
        causal=True,
        align="bottom_right",
        stats=1,
        grads=("out", "lse", "entropy"),
    ),
    "heads with windows of their own": Case(
        T=6,
        S=9,
        D=4,
        H=4,
        H_kv=2,
        windows=((2, 0), (-1, 1), (0, -1), (-1, -1)),
        align="tensor",
        sinks=True,
        stats=1,
        grads=("out", "lse", "entropy"),
    ),
    "varlen": Case(
        lengths=((3, 2), (0, 4), (5, 7), (2, 0)),
        H=4,
        H_kv=2,
        D=4,
        causal=True,
        align="bottom_right",
        sinks=True,
        alibi="bh",
        mask="ts",
        bias="hs",
        dropout_p=0.3,
        weights="per head",
        stats=1,
        grads=ALL_GRADS,
    ),
    "out alone, every option": Case(
        T=5,
        S=7,
        D=4,
        D_v=3,
        H=4,
        H_kv=2,
        causal=True,
        align="bottom_right",
        window=(5, -1),
        alibi="bh",
        mask="bts",
        bias="ht",
        dropout_p=0.3,
    ),
    "out alone, chosen keys": Case(
        T=6, S=9, D=4, H=4, H_kv=2, indices=5, causal=True, align="bottom_right"
    ),
    "out alone, windows": Case(
        T=6,
        S=9,
        D=4,
        H=4,
        windows=((2, 0), (-1, 1), (0, -1), (-1, -1)),
        align="tensor",
        bias="hts",
        masking_bias=True,
    ),
    "out alone, varlen": Case(
        lengths=((3, 2), (0, 4), (5, 7), (2, 0)),
        H=4,
        H_kv=2,
        D=4,
        causal=True,
        align="bottom_right",
        mask="ts",
        bias="hs",
        dropout_p=0.3,
    ),
}


def named_outputs(inputs: Inputs, case: Trial, backend: str) -> dict[str, Tensor]:
    found = outputs(inputs, case.options, backend)
    stats = {} if found.stats is None else {"entropy": found.stats[1]}
    return {"out": found.out, "lse": found.lse, "weights": found.weights, **stats}


def derivatives(case: Trial, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First gradients, and the gradients of a random combination of them by all that they read."""
    inputs, leaves = with_leaves(case.inputs)
    cotangents = {
        name: g.detach().requires_grad_()
        for name, g in case.cotangents._asdict().items()
        if g is not None
    }
    results = named_outputs(inputs, case, backend)
    first = torch.autograd.grad(
        [results[name] for name in cotangents],
        list(leaves.values()),
        [g.to(results[name].dtype) for name, g in cotangents.items()],
        create_graph=True,
        allow_unused=True,
    )
    first = {name: g for name, g in zip(leaves, first, strict=True) if g is not None}
    rng = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(x.shape, generator=rng) for name, x in leaves.items()}
    combination = sum((g * weights[name]).sum() for name, g in first.items())
    sources = {**leaves, **cotangents}
    second = torch.autograd.grad(combination, list(sources.values()), allow_unused=True)
    second = {name: g for name, g in zip(sources, second, strict=True) if g is not None}
    return {name: g.detach() for name, g in first.items()}, second


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected.keys() | actual.keys():
        wanted = expected.get(name, torch.zeros(()))
        torch.testing.assert_close(
            actual[name] if name in actual else torch.zeros_like(wanted),
            wanted.expand_as(actual[name]) if wanted.dim() == 0 else wanted,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("block", [1 << 20, 16], ids=["one block", "blocks of rows"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_second_derivatives_are_those_of_the_reference(
    case: Case, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_order, "BLOCK_ELEMENTS", block)
    made = problem(case)
    first, second = derivatives(made, "cpu")
    expected_first, expected_second = derivatives(made, "reference")
    assert_all_close(first, expected_first)
    assert_all_close(second, expected_second)
    assert {"q", "k"} <= second.keys()
    assert any(g.abs().max() > 0.1 for g in second.values())


@pytest.mark.parametrize("of", ["qkv", "qv", "kv"])
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize(("T", "row"), [(5, 4), (9, 4), (9, 3)], ids=["square", "tall", "idle row"])
def test_nan_goes_no_further_than_in_the_reference(
    name: str, of: str, T: int, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a causal mask: the closed form in blocks of rows, the reference differentiated twice."""
    monkeypatch.setattr(second_order, "BLOCK_ELEMENTS", 16)
    case = replace(CASES["plain"], T=T, S=5, align="bottom_right", causal=True)
    inputs, options, cotangents = in_double(problem(case))
    grads = {"out": cotangents.out.double()}
    toward = {x: torch.randn_like(getattr(inputs, x)) for x in of}
    spoilt = grads["out"] if name == "out" else getattr(inputs, name)
    spoilt[0, 0, row, 1] = torch.nan
    closed = second_order.second_derivatives(inputs, options, grads, toward)

    def twice(block: Any, x: Any, d_o: Tensor, toward: Any) -> Any:
        pullback = second_order.vjp(lambda x, dy: block.backward(x, dy, toward), x, {"out": d_o})
        return pullback(toward)

    monkeypatch.setattr(second_order, "closed_form", twice)
    torch.testing.assert_close(
        closed, second_order.second_derivatives(inputs, options, grads, toward), equal_nan=True
    )
    seen = name in ("k", "v") or row >= T - 5
    assert any(x.isnan().any() for x in closed.values()) == seen
    assert not all(x.isnan().all() for x in closed.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_derivatives_of_half_precision_are_taken_in_fp32(dtype: torch.dtype) -> None:
    case = replace(CASES["every option"], dtype=dtype)
    made = problem(case)
    inputs, options, cotangents = made
    grads = {name: getattr(cotangents, name) for name in ALL_GRADS}
    rng = torch.Generator().manual_seed(0)
    toward = {
        name: torch.randn(getattr(inputs, name).shape, generator=rng).to(dtype)
        for name in ("q", "k", "v", "bias", "sinks")
    }
    half = second_order.second_derivatives(inputs, options, grads, toward)
    exact = second_order.second_derivatives(
        in_double(made).inputs,
        options,
        {name: g.double() for name, g in grads.items()},
        {name: x.double() for name, x in toward.items()},
    )
    for name, x in half.items():
        torch.testing.assert_close(x, exact[name].to(x.dtype))  # one rounding apart


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_second_derivative_is_the_derivative_of_the_first(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against finite differences in fp64, so that the reference is not its own witness."""
    monkeypatch.setattr(second_order, "BLOCK_ELEMENTS", 64)
    inputs, options, cotangents = in_double(problem(case))
    grads = {n: g.double() for n, g in cotangents._asdict().items() if g is not None}
    names = [n for n in ("q", "k", "v", "bias", "sinks") if getattr(inputs, n) is not None]

    def combination(point: dict[str, Tensor]) -> Tensor:
        leaves = {name: point[name].detach().requires_grad_() for name in names}
        found = reference_attention(inputs._replace(**leaves), options)
        results = {"out": found.out, "lse": found.lse, "weights": found.weights}
        results |= {} if found.stats is None else {"entropy": found.stats[1]}
        first = torch.autograd.grad(
            [results[name] for name in grads],
            list(leaves.values()),
            [point[f"grad_{name}"] for name in grads],
            allow_unused=True,
        )
        pairs = zip(first, toward.values(), strict=True)
        return sum(((g * w).sum() for g, w in pairs if g is not None), torch.zeros(()))

    rng = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=rng, dtype=torch.float64)

    point = {name: getattr(inputs, name) for name in names}
    toward = {name: noise(x) for name, x in point.items()}
    point |= {f"grad_{name}": g for name, g in grads.items()}
    direction = {name: noise(x) for name, x in point.items()}
    step = 1e-5
    ahead = combination({name: x + step * direction[name] for name, x in point.items()})
    behind = combination({name: x - step * direction[name] for name, x in point.items()})
    second = second_order.second_derivatives(inputs, options, grads, toward)
    slope = sum((second[name] * direction[name]).sum() for name in point)
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("names", "most"), [(("out",), 4000), (("out", "lse"), 1000)])
def test_blocks_of_rows_keep_memory_linear(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], most: int
) -> None:
    blocks, seen = second_order.blocks, []

    def spy(*args: Any) -> Iterator[second_order.Block]:
        for block in blocks(*args):
            seen.append(block)
            yield block

    monkeypatch.setattr(second_order, "BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(second_order, "blocks", spy)
    for case in (Case(B=2, H=4, T=100, S=39), Case(lengths=((50, 3), (9, 300), (0, 5)))):
        inputs, options, _ = problem(case)
        B, H, T, _ = inputs.q.shape
        results = {"out": (B, H, T, inputs.v.shape[3]), "lse": (B, H, T)}
        grads = {name: torch.randn(results[name]) for name in names}
        seen.clear()
        second_order.second_derivatives(inputs, options, grads, {"q": torch.ones_like(inputs.q)})
        for block in seen:
            height = block.rows.stop - block.rows.start
            S = block.k_rows.stop - block.k_rows.start
            assert height == 1 or B * H * height * S <= most
        assert sum(block.rows.stop - block.rows.start for block in seen) == T
