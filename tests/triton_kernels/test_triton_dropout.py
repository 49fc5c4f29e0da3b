"""tests/test_dropout.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_dropout import *  # noqa: F403
