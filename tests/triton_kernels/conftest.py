"""Triton's kernels on CPU tensors, in Triton's interpreter: only under ``TRITON_INTERPRET=1``.

Here the backend called "cpu" is Triton's, so that tests of the CPU backend are tests of Triton
where they are imported. `make test-triton` runs all of it, tests/test_triton.py a sample.
"""

from __future__ import annotations

import os

import hypothesis
import pytest

from attnfast import dispatch
from attnfast.backends import reference, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

# The interpreter is slow: of the tests that other backends run too, one in so many.
ONE_IN = {
    "test_triton_numerics": 3,
    "test_triton_layouts": 2,
    "test_triton_dropout": 4,
    "test_triton_varlen": 4,
    "test_triton_decode": 2,
    "test_triton_determinism": 5,
    "test_triton_large_scores": 9,
}
# What others are for, or takes too many programs: test_triton_bounds has the last of those.
LEFT_OUT = {
    "test_reference",
    "test_public_reference",
    "test_instruction_set",
    "test_more_than_65535_heads",
    "test_more_than_65535_sequences",
    "test_any_number_of_threads_gives_the_same_bits",
    "test_threads_and_runs_give_the_same_bits",
    "test_equals_attention_of_each_sequence",
    "test_attention_of_one_query_is_a_step",  # the CPU's own way to such calls
    "test_maximum_costs_nothing",
    "test_one_long_sequence_among_short_ones",
}

if INTERPRETED:
    parent = hypothesis.settings.get_profile("default")
    hypothesis.settings.register_profile("interpreter", parent, max_examples=40)
    hypothesis.settings.load_profile("interpreter")


@pytest.fixture(autouse=True)
def triton_in_place_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are Triton's, and values are checked as the CPU's operators check them."""
    row = triton.ROW._replace(name="cpu")
    monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": (row, reference.ROW)})
    monkeypatch.setenv("ATTNFAST_CHECK", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one in so many; numpy, which interprets, warns of what a GPU does silently: 1 / 0."""
    kept, left_out = [], []
    for i, item in enumerate(items):
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        name = getattr(item, "originalname", item.name)
        module = item.path.stem
        few = i % ONE_IN.get(module, 1) and item.name != name  # what has no parameters stays
        (left_out if few or name in LEFT_OUT else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
