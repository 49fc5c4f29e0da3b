"""Two runs of the benchmarks beside each other: noise is no regression, and a slowdown is found.

The runs are made up: contestants whose calls take as long as on a busy machine. Between two runs
everything drifts, a row's minute may be a bad one for all of its contestants, each of them falls
into another place of memory, and single rounds are disturbed.
"""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest

from bench import compare, race, results

SUITES = ("forward", "backward", "decode", "module", "encoder")
ROWS = 40  # of each suite
QUIET, BUSY = 0.01, 0.03  # standard deviations of a contestant's time from one run to the next


def true_times(rng):
    """What every contestant of every row takes: from 30 us to 2 s."""
    rows = {}
    for suite in SUITES:
        for i in range(ROWS):
            ours = 10 ** rng.uniform(-4.5, 0.3)
            rivals = {"a": ours * rng.uniform(0.7, 3), "b": ours * rng.uniform(1, 4)}
            rows[suite, str(i)] = {"attnfast": ours, **rivals}
    return rows


def timed(rng, seconds, noise):
    """The measured part of a row whose calls take these seconds."""
    rounds = max(5, min(200, int(0.5 / sum(seconds.values()))))
    minute = math.exp(abs(rng.gauss(0, 2 * noise)))  # what else the machine does meanwhile
    place = {name: math.exp(rng.gauss(0, noise)) for name in seconds}
    samples = {name: [] for name in seconds}
    for _ in range(rounds):
        for name, x in seconds.items():
            burst = rng.uniform(1.1, 2.0) if rng.random() < 0.08 else 1.0
            jitter = math.exp(rng.gauss(0, noise))
            samples[name].append(x * minute * place[name] * jitter * burst)
    found = {}
    for name, x in samples.items():
        q1, median, q3 = race.quartiles(x)
        quarters = {"q1_s": q1, "median_s": median, "q3_s": q3}
        found[name] = {"rounds": rounds, "min_s": min(x), **quarters}
    return found


def a_run(rng, rows, noise, slowdown=lambda key: 1.0):
    """A run of all rows, of which ours is slower by a factor."""
    drift = math.exp(rng.gauss(0, 0.05))
    made = []
    for key, seconds in rows.items():
        given = {name: x * drift for name, x in seconds.items()}
        given["attnfast"] *= slowdown(key)
        place = {"suite": key[0], "id": key[1], "backend": "cpu"}
        made.append({**place, "contestants": timed(rng, given, noise)})
    return results.Run(Path("made-up.json"), {}, made)


def regressions(seed, noise, slowdown=lambda key: 1.0):
    """The rows and the suites that are called slower."""
    rng = random.Random(seed)
    rows = true_times(rng)
    before = a_run(rng, rows, noise)
    changes = compare.compare(before, a_run(rng, rows, noise, slowdown))
    slower = {(x.suite, x.id) for x in changes.itertuples() if x.regression}
    return slower, compare.slower_suites(changes)


@pytest.mark.parametrize("noise", [QUIET, BUSY])
def test_noise_is_no_regression(noise):
    for seed in range(25):
        assert regressions(seed, noise) == (set(), []), seed


def test_the_medians_alone_would_cry_wolf():
    """The made-up noise is one that a threshold by itself does not stand."""
    rng = random.Random(0)
    rows = true_times(rng)
    before, after = (a_run(rng, rows, BUSY) for _ in range(2))
    ratios = compare.compare(before, after)["ratio"]
    assert sum(x > 1.1 for x in ratios) > 5 or sum(x < 1 / 1.1 for x in ratios) > 5


def test_a_slowdown_of_all_rows_is_found():
    for seed in range(5):
        slower, suites = regressions(seed, QUIET, lambda key: 1.15)
        assert len(slower) > 0.85 * len(SUITES) * ROWS, seed
        assert set(suites) == set(SUITES), seed


def test_a_slowdown_of_one_row_is_found():
    found = 0
    for seed in range(20):
        key = (SUITES[seed % len(SUITES)], str(seed))
        slower, suites = regressions(seed, QUIET, lambda x, key=key: 1.15 ** (x == key))
        assert slower <= {key}, seed
        assert suites == []
        found += slower == {key}
    assert found >= 16


def test_on_a_busy_machine_a_slowdown_of_a_suite_is_found():
    for seed in range(10):
        _, suites = regressions(seed, BUSY, lambda key: 1.15 ** (key[0] == "module"))
        assert suites == ["module"], seed


def test_the_noise_is_that_of_the_rivals():
    rng = random.Random(1)
    rows = true_times(rng)
    before = a_run(rng, rows, QUIET)
    once, fast = (a_run(rng, rows, QUIET, lambda key, x=x: x) for x in (1.0, 3.0))
    same, slow = (compare.noise(before, x) for x in (once, fast))
    assert statistics.mean(same[1:]) == pytest.approx(statistics.mean(slow[1:]), rel=0.5)
    assert QUIET < same.long < 6 * QUIET
    louder = compare.noise(before, a_run(rng, rows, 4 * QUIET))
    assert louder.long > 2 * same.long


@pytest.mark.parametrize(("rounds", "factor", "slower"), [(1, 1.15, 0), (1, 1.3, 1), (3, 1.15, 1)])
def test_a_single_call_is_held_to_twice_the_threshold(rounds, factor, slower):
    def run(ours):
        def one(x):
            return dict.fromkeys(("median_s", "q1_s", "q3_s", "min_s"), x) | {"rounds": rounds}

        row = {"suite": "forward", "id": "x", "backend": "cpu"}
        row["contestants"] = {"attnfast": one(ours), "a": one(2.0)}
        return results.Run(Path("x.json"), {}, [row])

    [found] = compare.compare(run(1.0), run(factor))["regression"]
    assert found == bool(slower)
