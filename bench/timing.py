"""How one row is measured: the contestants take turns, after their results were seen to agree.

Ours and every rival run in the same process on the same inputs, one call each per round, so that
whatever else happens on the machine happens to all of them. Medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from . import OURS
from .shapes import Case

Call = Callable[[], dict[str, Tensor]]  # the results by name
Race = Callable[[Case, dict[str, Call]], None]  # the fixture of that name

FEWEST_ROUNDS = 3
LONG_S = 5.0  # a rival's call that takes longer runs once, and that run is its time

# The largest |ours - rival| / |rival| of a result, in Euclidean norms. How exact ours is, the tests
# say with their accuracy rule; this keeps a kernel that computes something else out of the tables.
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def race(
    benchmark: BenchmarkFixture,
    contestants: dict[str, Call],
    *,
    flop: float,
    budget_s: float,
    most_rounds: int,
) -> dict[str, Any]:
    """Time the contestants in turn; ours goes into pytest-benchmark's own statistics as well.

    Args:
        benchmark: The fixture of the running test.
        contestants: ``OURS`` and at least one rival.
        flop: Floating-point operations of one call, for the rates.
        budget_s: Seconds that the rounds may take. At least ``FEWEST_ROUNDS`` are run all the same,
            unless a rival is slower than ``LONG_S``: then one round, its first call.
        most_rounds: Rounds for calls that take next to no time.

    Returns:
        The measured part of a row of results, as ``bench.report`` reads it: per contestant times
        in seconds, rounds and GFLOP/s; ``rival``, the fastest of the others; ``ratio``, its median
        over ours; ``ratio_quartiles`` over the rounds; ``once``, whose first call stands.

    Raises:
        AssertionError: A rival's results are not ours.
    """
    rivals = [name for name in contestants if name != OURS]
    first: dict[str, float] = {}
    results: dict[str, dict[str, Tensor]] = {}
    for name, call in contestants.items():
        first[name], results[name] = timed(call)
    differences = {name: disagreement(results[OURS], results[name], name) for name in rivals}
    results.clear()

    once = [name for name in rivals if first[name] > LONG_S]
    round_s = sum(first.values())
    if most_rounds > 1 and round_s < budget_s:
        round_s = sum(timed(call)[0] for call in contestants.values())
    rounds = min(most_rounds, max(FEWEST_ROUNDS, int(budget_s / round_s)))
    samples = {name: [first[name]] if name in once else [] for name in contestants}

    def rivals_turn() -> None:
        for name in rivals:
            if name not in once:
                samples[name].append(timed(contestants[name])[0])

    def our_turn() -> None:
        samples[OURS].append(timed(contestants[OURS])[0])

    benchmark.pedantic(our_turn, setup=rivals_turn, rounds=1 if once else rounds)
    summaries = {name: summary(seconds, flop) for name, seconds in samples.items()}
    rival = min(rivals, key=lambda name: float(summaries[name]["median_s"]))
    ratios = [theirs / ours for theirs, ours in zip(samples[rival], samples[OURS], strict=True)]
    return {
        "contestants": summaries,
        "rival": rival,
        "ratio": summaries[rival]["median_s"] / summaries[OURS]["median_s"],
        "ratio_quartiles": quartiles(ratios)[::2],
        "once": once,
        "differences": differences,
    }


def timed(call: Call) -> tuple[float, dict[str, Tensor]]:
    """Seconds that one call took, and its results."""
    start = time.perf_counter()
    results = call()
    return time.perf_counter() - start, results


def summary(seconds: list[float], flop: float) -> dict[str, float]:
    """Median, quartiles and minimum of the times, their number, and the rate at the median."""
    low, median, high = quartiles(seconds)
    return {
        "rounds": len(seconds),
        "median_s": median,
        "q1_s": low,
        "q3_s": high,
        "min_s": min(seconds),
        "gflops": flop / median / 1e9,
    }


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles; the second is the median. All the same if there is one value."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def disagreement(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], rival: str
) -> dict[str, float]:
    """|ours - theirs| / |theirs| of every result, by name.

    Raises:
        AssertionError: One of them is beyond ``AGREEMENT``, or NaN; or names or shapes differ.
    """
    assert ours.keys() == theirs.keys(), f"bench: results {list(ours)} against {list(theirs)}"
    differences = {}
    for name, x in theirs.items():
        assert ours[name].shape == x.shape, (
            f"bench: {name} is {tuple(ours[name].shape)}, {rival} has {tuple(x.shape)}"
        )
        error = torch.linalg.vector_norm(ours[name].float() - x.float())
        difference = float(error / torch.linalg.vector_norm(x.float()).clamp_min(1e-30))
        limit = AGREEMENT[x.dtype]
        assert difference <= limit, (
            f"bench: {name} differs from {rival} by {difference:.2g} of its norm, limit {limit:g}"
        )
        differences[name] = difference
    return differences
