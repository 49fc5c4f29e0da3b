"""Hypothesis profiles, one torch thread and a fresh compiler per test, the instruction sets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

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
