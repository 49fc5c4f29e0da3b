"""How much work fits the time that a demo is promised to take: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Limits(NamedTuple):
    """How many steps are done at least and at most, whatever the time."""

    least: int
    most: int


# The search.
EMBEDDING = 60.0  # seconds for embedding everything twice
LONGEST, SHORTEST, APART = 256, 48, 16  # tokens after which a text may be cut off
STATISTICS = 1.1  # breadth and focus cost a tenth beside both models' passes
TUNING = 60.0  # seconds of fine-tuning both
TUNED = Limits(10, 50)  # its steps

# The translation.
RUN = 420.0  # seconds of a whole run; the minute to eight is left for what cannot be foreseen
MEASURING = 120  # steps that measuring and translating afterwards take as long as
TRAINED = Limits(150, 800)  # steps of the training
COMPARED = Limits(50, 150)  # steps of the comparison with dropout
SHARE = 5  # the comparison, which trains both, gets one step in so many that still fit
FIRST = 10  # steps that are timed where nothing was compared


def steps_that_fit(seconds: float, each: float, limits: Limits, done: int = 0) -> int:
    """How many steps to do in all, `done` of them done already.

    Args:
        seconds: that the others may take.
        each: seconds that a step takes.
        limits: of the steps in all.
        done: those done already.
    """
    return min(max(done + max(0, int(seconds / each)), limits.least), limits.most)


def longest_that_fits(lengths: Sequence[int], seconds: float, each: float) -> int:
    """After how many tokens to cut texts off, so that all of them fit a time.

    Args:
        lengths: tokens of the texts, uncut.
        seconds: the time.
        each: seconds that a token takes.

    Returns:
        The largest of 48, 64, ..., 256 with which they fit, and 48 where none is.
    """
    for longest in range(LONGEST, SHORTEST, -APART):
        if each * sum(min(length, longest) for length in lengths) <= seconds:
            return longest
    return SHORTEST


def compared_steps(elapsed: float, each: float) -> int:
    """How many steps to compare with dropout.

    Args:
        elapsed: seconds since the run began.
        each: seconds that a step takes, the slower model's.
    """
    return steps_that_fit((RUN - elapsed - MEASURING * each) / SHARE, each, COMPARED)


def training_steps(done: int, elapsed: float, each: float) -> int:
    """How many steps to train in all.

    Args:
        done: those done already.
        elapsed: seconds since the run began.
        each: seconds that a step takes.
    """
    return steps_that_fit(RUN - elapsed - MEASURING * each, each, TRAINED, done)
