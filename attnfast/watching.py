"""Who is shown every call of attention, with its statistics: watchers of `attnfast.lens`."""

from __future__ import annotations

from typing import Any

# Each has a method run(compute, inputs, options, backend, names) -> Outputs.
now: tuple[Any, ...] = ()
