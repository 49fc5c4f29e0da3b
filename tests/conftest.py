"""Hypothesis profiles, one torch thread and a fresh compiler per test, the instruction sets."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from ptx import session

torch.set_num_threads(1)  # tests that need more ask for them

hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("default"), derandomize=False, max_examples=5000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


BACKENDS = ("cpu", "triton", "gluon", "cuda", "reference")
MINUTES = {"test_emulator", "test_isa", "test_triton"}  # tests in processes of their own
ON_THE_CPU = {"triton": "TRITON_INTERPRET", "cuda": "ATTNFAST_EMULATOR"}  # read when imported


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make test-triton ARGS="--part 1/4"``: every test belongs to one of the parts."""
    parser.addoption("--part", default="1/1", metavar="N/M", help="the N-th of M parts")
    parser.addoption(
        "--every-case", action="store_true", help="the whole case table over many processes"
    )
    parser.addoption(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="whose kernels tests/backends tests, Triton's interpreted and CUDA's on the emulator,"
        " or under ATTNFAST_PTX their PTX executed; may be repeated (default: cpu, and a sample for"
        " the reference)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports attnfast, have its other backends take CPU tensors."""
    chosen = config.getoption("--backend") or []
    if os.environ.get("ATTNFAST_PTX"):
        session.begin(chosen)
        return
    for backend in chosen:
        if backend in ON_THE_CPU:
            os.environ.setdefault(ON_THE_CPU[backend], "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the part that was asked for, those that take a minute first."""
    part, parts = map(int, config.getoption("--part").split("/"))
    digests = [int(hashlib.sha256(item.name.encode()).hexdigest(), 16) for item in items]
    chosen = [digest % parts == part - 1 for digest in digests]
    config.hook.pytest_deselected(
        items=[x for x, here in zip(items, chosen, strict=True) if not here]
    )
    kept = [x for x, here in zip(items, chosen, strict=True) if here]
    items[:] = sorted(kept, key=lambda item: item.path.stem not in MINUTES)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What torch.compile remembers of other tests counts towards its limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def threads() -> object:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which instruction sets of the CPU backend ran, and why others did not."""
    lines = {
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "isa"
    }
    if lines:
        terminalreporter.section("instruction sets of the CPU backend")
        for line in sorted(lines):
            terminalreporter.write_line(line)
