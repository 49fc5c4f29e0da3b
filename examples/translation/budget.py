"""How many steps fit the time that a run is promised to take."""

from __future__ import annotations

from search_demo.budget import steps_that_fit

RUN = 420.0  # seconds of a whole run; the minute to eight is left for what cannot be foreseen
MEASURING = 120  # steps that measuring and translating afterwards take as long as
FEWEST, MOST = 150, 800  # steps of the training
FEWEST_COMPARED, MOST_COMPARED = 50, 150  # steps of the comparison with dropout
COMPARED = 5  # the comparison, which trains both, gets one step in so many that still fit
FIRST = 10  # steps that are timed where nothing was compared


def compared_steps(elapsed: float, each: float) -> int:
    """How many steps to compare with dropout.

    Args:
        elapsed: seconds since the run began.
        each: seconds that a step takes, the slower model's.
    """
    left = RUN - elapsed - MEASURING * each
    return steps_that_fit(left / COMPARED, each, FEWEST_COMPARED, MOST_COMPARED)


def training_steps(done: int, elapsed: float, each: float) -> int:
    """How many steps to train in all.

    Args:
        done: those done already.
        elapsed: seconds since the run began.
        each: seconds that a step takes.
    """
    left = RUN - elapsed - MEASURING * each
    more = max(0, int(left / each))
    return min(max(done + more, FEWEST), MOST)
