"""Triton's kernels on CPU tensors, in Triton's interpreter: only under ``TRITON_INTERPRET=1``.

Here the backend called "cpu" is Triton's, so that tests of the CPU backend are tests of Triton
where they are imported. `make test-triton` runs all of it, tests/test_triton.py a sample.
"""

from __future__ import annotations

import os

import pytest

from attnfast import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_in_place_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are Triton's, and values are checked as the CPU's operators check them."""
    row = dispatch.TRITON._replace(name="cpu")
    monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": (row, dispatch.REFERENCE)})
    monkeypatch.setitem(dispatch.OPS, "cpu", dispatch.TRITON.ops)
    monkeypatch.setenv("ATTNFAST_CHECK", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Numpy, which interprets, warns of what a GPU does silently: log 0, 1 / 0."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
