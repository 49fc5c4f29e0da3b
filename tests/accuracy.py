"""The accuracy rule: the one comparison of numbers in this project's tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from dense import Trial, dense
from torch import Tensor

from attnfast.call import Inputs, Outputs
from attnfast.reference import reference_attention

Results = dict[str, Tensor]  # by the names of `dense.dense`

STATISTICS = ("max_logit", "entropy", "reach", "focus")
FP32_RESULTS = ("lse", *STATISTICS, "received")


def check(actual: Results, problem: Trial) -> None:
    """Hold every output and gradient of a call to the accuracy rule.

    Names, shapes and dtypes must agree first, then the positions and signs of NaN and Inf. Then,
    with truth the reference in fp64 and ``error = |actual - truth|``:

        max error   <=  2 max |eager - truth|   +  4 max unit
        mean error  <=  2 mean |eager - truth|  +  4 mean unit

    `eager` is the same computation in plain PyTorch, all of it in the input's dtype; in fp32 for
    lse, statistics and column sums, which are fp32 results. `unit` is the size of the rounding
    errors of the sums that the result has, in fp64, as `dense` derives it: the root of the squares
    of what may be rounded to the dtype, the result itself too, and fp32's eps for the scores. To
    it comes the spacing of the dtype's subnormal numbers, below which nothing can be told apart.

    Where eager has no digit left (overflow, NaN, an error beyond a quarter of the largest value),
    it is no baseline: fp32, rounded to the dtype, takes its place.

    Raises:
        AssertionError: one line for each result that fails, with errors and bounds.
    """
    hold(actual, expected(problem))


def hold(actual: Results, wanted: dict[str, Expected]) -> None:
    """The same of results of which it is known what the rule wants."""
    verdicts = _verdicts(actual, wanted)
    faults = [f"{name}: {verdict.fault}" for name, verdict in verdicts.items() if verdict.fault]
    assert not faults, "\n".join(["beyond the accuracy rule", *faults])


def margins(actual: Results, problem: Trial) -> dict[str, float]:
    """By result, the error as a share of what `check` allows, of maximum and mean the larger.

    Infinite where shape, dtype, NaN or Inf are wrong; 0 where there is nothing to compare.
    """
    return {name: verdict.margin for name, verdict in _verdicts(actual, expected(problem)).items()}


def check_formulas(actual: Results, problem: Trial) -> None:
    """Hold the reference itself to the rule, with `dense` as the truth and no baseline."""
    faults = []
    for name, (value, unit) in dense(problem).items():
        if name in actual:
            fault = _judge(actual[name], expected_one(value, actual[name].dtype, [], unit)).fault
            faults += [f"{name}: {fault}"] if fault else []
    assert not faults, "\n".join(["beyond the formulas' rounding errors", *faults])


def reference_results(problem: Trial, compute_dtype: torch.dtype | None) -> Results:
    """The reference's outputs and, by autograd, its gradients."""
    inputs, leaves = with_leaves(problem.inputs)
    outputs = reference_attention(inputs, problem.options, compute_dtype=compute_dtype)
    return differentiate(outputs, leaves, problem)


def in_double(problem: Trial) -> Trial:
    """The same problem with every floating-point input in fp64."""
    wide = (x.double() if x is not None and x.is_floating_point() else x for x in problem.inputs)
    return problem._replace(inputs=Inputs(*wide))


def with_leaves(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs whose differentiable tensors are leaves that want gradients, and these by name."""
    leaves = {
        name: getattr(inputs, name).detach().requires_grad_()
        for name in ("q", "k", "v", "bias", "sinks")
        if getattr(inputs, name) is not None
    }
    return inputs._replace(**leaves), leaves


def differentiate(outputs: Outputs, leaves: dict[str, Tensor], problem: Trial) -> Results:
    """Outputs by name, and the gradients of the leaves by the problem's cotangents."""
    stats = (
        {} if outputs.stats is None else dict(zip(STATISTICS, outputs.stats.unbind(0), strict=True))
    )
    named = {"out": outputs.out, "lse": outputs.lse, **stats}
    named |= {} if outputs.received is None else {"received": outputs.received}
    named |= {} if outputs.weights is None else {"weights": outputs.weights}
    results = {name: x.detach() for name, x in named.items()}
    given = {n: g for n, g in problem.cotangents._asdict().items() if g is not None}
    if given:
        gradients = torch.autograd.grad(
            [named[name] for name in given],
            list(leaves.values()),
            [g.to(named[name].dtype) for name, g in given.items()],
            allow_unused=True,
        )
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            results["d" + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


class Expected(NamedTuple):
    """What the rule of `check` holds a result to."""

    truth: Tensor  # fp64; where its dtype has NaN or Inf, that
    dtype: torch.dtype
    bound_max: float  # of errors where truth is finite, as the next
    bound_mean: float


def expected(problem: Trial) -> dict[str, Expected]:
    """Of every output and gradient of a call, by name."""
    inputs = problem.inputs
    truth = reference_results(in_double(problem), torch.float64)
    eager = reference_results(problem, inputs.q.dtype)
    eager32 = reference_results(problem, torch.float32)
    sums = dense(problem)
    want = torch.promote_types(inputs.q.dtype, torch.float32)
    results = {}
    for name, value in truth.items():
        baselines = [eager32[name]] if name in FP32_RESULTS else [eager[name], eager32[name]]
        dtype = want if name in FP32_RESULTS else _dtype(name, inputs)
        results[name] = expected_one(value, dtype, baselines, sums[name].unit)
    return results


def expected_one(
    truth: Tensor, dtype: torch.dtype, baselines: list[Tensor], unit: Tensor
) -> Expected:
    """Of one result, of a unit that the caller derives; of the baselines the first with digits."""
    rounded = truth.to(dtype)
    special = ~rounded.isfinite()
    marked = torch.where(special, rounded.double(), truth)
    if special.all():
        return Expected(marked, dtype, 0.0, 0.0)
    info = torch.finfo(dtype)
    rounding = info.eps * truth.abs() / 12**0.5  # of the result itself
    unit = torch.hypot(unit, rounding)[~special] + info.eps * info.smallest_normal
    bound_max, bound_mean = 4 * unit.max(), 4 * unit.mean()
    for baseline in baselines:
        eager = _error(baseline.to(dtype), truth, special)
        if eager.max() <= truth[~special].abs().max() / 4:
            bound_max, bound_mean = bound_max + 2 * eager.max(), bound_mean + 2 * eager.mean()
            break
    return Expected(marked, dtype, float(bound_max), float(bound_mean))


class _Verdict(NamedTuple):
    """What is wrong with a result, or None; and its error as a share of the bound."""

    fault: str | None
    margin: float


def _verdicts(actual: Results, wanted: dict[str, Expected]) -> dict[str, _Verdict]:
    assert set(actual) == set(wanted), f"results {sorted(actual)}, expected {sorted(wanted)}"
    return {name: _judge(result, wanted[name]) for name, result in actual.items()}


def _judge(result: Tensor, wanted: Expected) -> _Verdict:
    truth, dtype, bound_max, bound_mean = wanted
    if result.shape != truth.shape or result.dtype != dtype:
        got = f"{result.dtype} {tuple(result.shape)}"
        return _Verdict(f"{got}, expected {dtype} {tuple(truth.shape)}", torch.inf)
    special = ~truth.isfinite()
    same = torch.where(
        special, result.eq(truth) | result.isnan() & truth.isnan(), result.isfinite()
    )
    if not same.all():
        where = tuple((~same).nonzero()[0].tolist())
        fault = (
            f"{(~same).sum()} NaN or Inf out of place, first at {where}: {result[where]}, "
            f"expected {truth[where]}"
        )
        return _Verdict(fault, torch.inf)
    if special.all():
        return _Verdict(None, 0.0)
    error = _error(result, truth, special)
    margin = max(float(error.max()) / bound_max, float(error.mean()) / bound_mean)
    if error.max() <= bound_max and error.mean() <= bound_mean:
        return _Verdict(None, margin)
    fault = (
        f"max error {error.max():.3g}, bound {bound_max:.3g}; "
        f"mean error {error.mean():.3g}, bound {bound_mean:.3g}"
    )
    return _Verdict(fault, margin)


def _error(result: Tensor, truth: Tensor, special: Tensor) -> Tensor:
    """|result - truth| where truth is finite, infinite where result is not."""
    error = (result.double() - truth)[~special].abs()
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _dtype(name: str, inputs: Inputs) -> torch.dtype:
    source = {"dbias": inputs.bias, "dsinks": inputs.sinks}.get(name)
    return inputs.q.dtype if source is None else source.dtype
