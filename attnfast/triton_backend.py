"""The Triton backend's row of the table: what it refuses, and its operators, imported when called.

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

from . import ops
from .call import OPERATORS

OLDEST = (3, 6)
MAX_HEAD_DIM = 512
OLDEST_CAPABILITY = (8, 0)
GLUON_HEAD_DIMS = (64, 128, 256)
LARGEST_SCALE = 2.0**100  # of Gluon: beyond, scores leave their units of log2
OPS = ops.define("triton")
GLUON_OPS = ops.define("gluon")
_LIBRARY = torch.library.Library("attnfast", "IMPL")


def _implementation(kind: str) -> Any:
    """An operator's implementation, which imports the kernels and Triton when it is called."""

    def run(*args: Any) -> Any:
        return getattr(import_module(".kernels.backend", __package__), kind)(*args)

    return run


for _kind in OPERATORS:
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(f"triton_{_kind}", _implementation(_kind), _key)
    _gluon = _implementation("gluon_fwd" if _kind == "fwd" else _kind)  # the forward only
    _LIBRARY.impl(f"gluon_{_kind}", _gluon, "CUDA")


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


def capability(index: int) -> tuple[int, int]:
    """An NVIDIA GPU's compute capability; of any other device more than enough."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return (99, 0)
    found = torch.cuda.get_device_properties(index)  # a constant to torch.compile
    return found.major, found.minor


@functools.cache
def imported_without_interpreter() -> bool:
    """Whether Triton was imported before it could know that it is to interpret."""
    jit = sys.modules.get("triton.runtime.jit")
    language = sys.modules.get("triton.language.standard")
    return jit is not None and language is not None and isinstance(language.cdiv, jit.JITFunction)


def unsupported(problem: Any) -> str | None:
    """Why Triton refuses a problem, or None."""
    widest = max(problem.D, problem.D_v)
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(problem.dtype).removeprefix("torch.")
        return f"takes float32, bfloat16 and float16, got {name}"
    if widest > MAX_HEAD_DIM:
        return f"takes D and D_v up to {MAX_HEAD_DIM}, got {widest}"
    if MISSING is not None:
        return MISSING
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
    found = capability(problem.device.index or 0)
    if found < OLDEST_CAPABILITY:
        oldest, got = (".".join(map(str, x)) for x in (OLDEST_CAPABILITY, found))
        return f"needs a GPU of compute capability {oldest} or later, got {got}"
    return None


def gluon_unsupported(problem: Any) -> str | None:
    """Why the experimental forward for Hopper refuses a problem, or None."""
    options, D = problem.options, problem.D
    tensors = problem.mask or problem.bias or problem.alibi or problem.sinks or problem.align
    plain = options._replace(scale=1.0, causal=False, deterministic=False, align_bottom_right=False)
    reasons = (
        (problem.device.type == "cpu", "runs on GPUs only: Triton cannot interpret Gluon"),
        (problem.kind != "attention", f"takes attention only, got {problem.kind}"),
        (
            problem.dtype not in (torch.bfloat16, torch.float16),
            f"takes bfloat16 and float16, got {str(problem.dtype).removeprefix('torch.')}",
        ),
        (
            problem.D_v != D or D not in GLUON_HEAD_DIMS,
            f"takes D = D_v of {GLUON_HEAD_DIMS}, got {D} and {problem.D_v}",
        ),
        (
            bool(tensors)
            or plain != type(options)(scale=1.0)
            or not 0 < options.scale <= LARGEST_SCALE,
            "takes no options but causal, a bottom-right align and a scale in (0, 2**100]",
        ),
        (problem.S == 0, "needs keys"),
    )
    reason = next((text for holds, text in reasons if holds), None) or unsupported(problem)
    if reason is None and capability(problem.device.index or 0) not in ((9, 0), (99, 0)):
        return "needs a GPU of compute capability 9.0"
    return reason


def workspace(problem: Any) -> tuple[int, int]:
    """Bytes: the sums of decoding's pieces; backward a number per row, and sums of dbias."""
    rows = problem.T * problem.H * (1 if problem.kind == "varlen" else problem.B)
    if problem.kind == "decode":
        pieces = max(min(-(-problem.S // 256), 128), 1)
        return 4 * rows * pieces * (problem.D_v + 2), 0
    return 0, 4 * rows + (16 << 20 if problem.bias is not None else 0)


def details() -> str:
    """Triton's version and how it runs."""
    return f"Triton {VERSION}" + (", interpreted" if interpreted() else "")
