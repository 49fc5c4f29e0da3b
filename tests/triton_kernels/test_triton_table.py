"""tests/test_table.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_table import *  # noqa: F403
