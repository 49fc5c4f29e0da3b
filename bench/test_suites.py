"""Every row of every suite: ``-k "decode and bfloat16"`` selects some by suite, shape and dtype."""

from __future__ import annotations

import pytest

from .conftest import Measure
from .grid import Case


@pytest.mark.benchmark(disable_gc=True)
def test_row(case: Case, measure: Measure) -> None:
    measure(case)
