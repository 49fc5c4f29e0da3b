"""Tiles that were the fastest on hardware: written by ``python -m bench tune``, not by hand."""

from __future__ import annotations

# (architecture, pass, bytes of an element, largest D and D_v) -> BLOCK_M, BLOCK_N, warps, stages
TUNED: dict[tuple[str, str, int, int], tuple[int, int, int, int]] = {}
