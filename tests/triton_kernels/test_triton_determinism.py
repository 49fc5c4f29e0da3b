"""tests/test_determinism.py with Triton's kernels in the place of the CPU's, see conftest.py."""

from test_determinism import *  # noqa: F403
