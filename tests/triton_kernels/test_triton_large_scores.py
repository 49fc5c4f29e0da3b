"""tests/test_large_scores.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_large_scores import *  # noqa: F403
