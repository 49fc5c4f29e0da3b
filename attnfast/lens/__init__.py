"""What the heads of a model do: how broadly, how sharply and how far away they look."""

from __future__ import annotations

from .observe import observe
from .seen import Seen, compare, load

__all__ = ["Seen", "compare", "load", "observe"]
