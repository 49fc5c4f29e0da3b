"""What the heads of a model do: how broadly, how sharply and how far away they look."""

from __future__ import annotations

from .balance import BalanceLoss
from .callbacks import lightning_callback, trainer_callback
from .clip import QKClip
from .maps import attention_map, top_keys
from .monitor import Monitor
from .observe import observe
from .products import apply, apply_transposed
from .report import report
from .rollout import rollout
from .seen import Seen, compare, load
from .windows import Windowed, apply_windows

__all__ = [
    "BalanceLoss",
    "Monitor",
    "QKClip",
    "Seen",
    "Windowed",
    "apply",
    "apply_transposed",
    "apply_windows",
    "attention_map",
    "compare",
    "lightning_callback",
    "load",
    "observe",
    "report",
    "rollout",
    "top_keys",
    "trainer_callback",
]
