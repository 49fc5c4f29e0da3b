"""tests/test_varlen.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_varlen import *  # noqa: F403
