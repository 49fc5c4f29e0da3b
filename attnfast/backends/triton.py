"""The Triton kernels: what they refuse, and their operators, imported when called.

Triton is never imported here: whether it is there, and which version, is read from its files.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..call import OPERATORS
from . import FUSED_DTYPES, Backend, Problem, gpus, other_dtype, too_wide

OLDEST = (3, 6)
MAX_HEAD_DIM = 512
OLDEST_CAPABILITY = (8, 0)
OPS = ops.define("triton")
_LIBRARY = torch.library.Library("attnfast", "IMPL")


def implementation(kind: str) -> Any:
    """An operator's implementation, which imports the kernels and Triton when it is called."""

    def run(*args: Any) -> Any:
        return getattr(import_module("attnfast.kernels.backend"), kind)(*args)

    return run


for _kind in OPERATORS:
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(f"triton_{_kind}", implementation(_kind), _key)


def version() -> str | None:
    """The installed Triton's version, or None."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"__version__ = '([^']+)'", Path(spec.origin).read_text())
    return found[1] if found else "unknown"


def missing() -> str | None:
    """Why Triton cannot be used at all on this machine, or None."""
    oldest = ".".join(map(str, OLDEST))
    if VERSION is None:
        return f"Triton is not installed: pip install 'triton>={oldest}'"
    numbers = re.match(r"(\d+)\.(\d+)", VERSION)
    if numbers is not None and tuple(map(int, numbers.groups())) < OLDEST:
        return f"Triton {VERSION} is too old: pip install 'triton>={oldest}'"
    return None


def no_compiler() -> str | None:
    """Triton compiles a little C for every GPU."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    if any(map(shutil.which, names)):  # Triton takes CC as one word
        return None
    return f"Triton finds no C compiler ({', '.join(names)}): install gcc, or name one in CC"


VERSION = version()
MISSING = missing()
NO_COMPILER = no_compiler()


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def imported_without_interpreter() -> bool:
    """Whether Triton was imported before it could know that it is to interpret."""
    jit = sys.modules.get("triton.runtime.jit")
    language = sys.modules.get("triton.language.standard")
    return jit is not None and language is not None and isinstance(language.cdiv, jit.JITFunction)


def unsupported(problem: Problem) -> str | None:
    """Why Triton refuses a problem, or None."""
    reason = other_dtype(problem, FUSED_DTYPES) or too_wide(problem, MAX_HEAD_DIM) or MISSING
    if reason is not None:
        return reason
    if problem.device.type == "cpu":
        if not interpreted():
            return "takes CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1"
        if imported_without_interpreter():
            return (
                "Triton was imported before TRITON_INTERPRET=1 was set: set it before Python starts"
            )
        return None
    if NO_COMPILER is not None and not interpreted():
        return NO_COMPILER
    return gpus.too_old(gpus.capability(problem.device.index or 0), OLDEST_CAPABILITY)


def details() -> str:
    """Triton's version and how it runs."""
    return f"Triton {VERSION}" + (", interpreted" if interpreted() else "")


ROW = Backend("triton", unsupported, OPS, implementation("workspace"), details)
