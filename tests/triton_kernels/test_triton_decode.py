"""tests/test_decode.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_decode import *  # noqa: F403
