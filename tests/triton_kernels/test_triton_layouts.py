"""tests/test_layouts.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_layouts import *  # noqa: F403
