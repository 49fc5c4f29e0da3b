"""Who is shown every call of attention, with its statistics: `attnfast.lens.observe`."""

from __future__ import annotations

from typing import Any

now: Any = None  # has a method run(compute, inputs, options, backend, names) -> Outputs
