"""What tests of the emulated CUDA kernels share: how to run a case, how to make kernels go wrong.

The emulator is loaded when attnfast is imported, if ``ATTNFAST_EMULATOR`` is set, as pytest's
``--backend cuda`` does; `test_emulator.py` runs a sample in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accuracy import check
from cases import Case, problem, run

SEEDS = range(6)


class Place(NamedTuple):
    """One call of a primitive in the kernels' source, and what it cost while it was counted."""

    op: str
    file: str
    line: int
    requests: int = 0
    cost: int = 0  # shared-memory wavefronts or global-memory sectors
    least: int = 0  # the same in the best layout

    def __str__(self) -> str:
        """As the emulator's sabotage names it."""
        return f"{self.op} {self.file} {self.line}"


def check_case(case: Case) -> None:
    """Hold a case to the accuracy rule."""
    given = problem(case)
    check(run(given, "cuda"), given)


@contextmanager
def schedule(seed: int, threads: int = 1) -> Iterator[None]:
    """Run kernels on the schedule of that seed, on so many host threads."""
    names = {"ATTNFAST_EMULATOR_SEED": str(seed), "ATTNFAST_EMULATOR_THREADS": str(threads)}
    with environment(names):
        yield


@contextmanager
def architecture(number: int) -> Iterator[None]:
    """Have the emulator play a GPU of that architecture, 75 for sm_75."""
    with environment({"ATTNFAST_EMULATOR_ARCH": str(number)}):
        yield


@contextmanager
def environment(names: dict[str, str]) -> Iterator[None]:
    """With these environment variables set."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def sabotage(kind: str, place: Place, amount: int = 0) -> Iterator[None]:
    """Have one call of a primitive go wrong."""
    torch.ops.attnfast.emulator_sabotage(kind, str(place), amount)
    try:
        yield
    finally:
        torch.ops.attnfast.emulator_sabotage("none", "", 0)


def places(run: Callable[[], None]) -> list[Place]:
    """Every call of a primitive in the kernels that are run, with its costs."""
    torch.ops.attnfast.emulator_count(True)
    run()
    lines = torch.ops.attnfast.emulator_counts().splitlines()
    torch.ops.attnfast.emulator_count(False)
    words = [line.split() for line in lines]
    return [Place(op, file, *map(int, numbers)) for op, file, *numbers in words]


def caught(run: Callable[[], None]) -> str | None:
    """What the emulator or the accuracy rule finds wrong with a run within six seeds, or None."""
    for seed in SEEDS:
        with schedule(seed):
            try:
                run()
            except (AssertionError, RuntimeError, ValueError) as error:
                return str(error)
    return None
