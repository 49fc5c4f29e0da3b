"""tests/test_properties.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_properties import *  # noqa: F403
