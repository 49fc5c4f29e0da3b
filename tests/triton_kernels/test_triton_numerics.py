"""tests/test_numerics.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_numerics import *  # noqa: F403
