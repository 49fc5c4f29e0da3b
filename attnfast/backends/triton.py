"""The Triton kernels: what they refuse, and their operators, imported when called.

Triton is not imported to tell whether it is there, and which version: that is read from its files.
Where there is a GPU it is, at the first call, to tell whether it can start.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..call import OPERATORS
from . import FUSED_DTYPES, Backend, Problem, gpus, other_dtype, too_wide

OLDEST = (3, 6)
BUILDS_ONCE = (3, 7)  # since it, Triton compiles C for its driver alone, not for each kernel
MAX_HEAD_DIM = 512
OLDEST_CAPABILITY = (8, 0)
OPS = ops.define("triton")
_LIBRARY = torch.library.Library(ops.NAMESPACE, "IMPL")


def implementation(kind: str) -> Any:
    """An operator's implementation, which imports the kernels and Triton when it is called."""

    def run(*args: Any) -> Any:
        return getattr(import_module("..kernels.backend", __package__), kind)(*args)

    return run


for _kind in OPERATORS:
    for _key in ("CPU", "CUDA", "XPU"):
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
    if older_than(OLDEST):
        return f"Triton {VERSION} is too old: pip install 'triton>={oldest}'"
    return None


def older_than(release: tuple[int, int]) -> bool:
    """Whether the installed Triton is; one whose version cannot be told is not."""
    numbers = re.match(r"(\d+)\.(\d+)", VERSION or "")
    return numbers is not None and tuple(map(int, numbers.groups())) < release


def no_compiler() -> str | None:
    """Triton compiles a little C for every GPU."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    if any(map(shutil.which, names)):  # Triton takes CC as one word
        return None
    return f"Triton finds no C compiler ({', '.join(names)}): install gcc, or name one in CC"


def no_headers() -> str | None:
    """That C is written against Python's headers."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's, as Triton has it
    folder = sysconfig.get_paths(scheme=scheme)["include"]
    if Path(folder, "Python.h").exists():
        return None
    return f"Triton finds no Python.h in {folder}: install python3-dev, or what has it here"


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


_unusable: dict[str, str | None] = {}  # by device type, what will stay so


def unusable(device: str) -> str | None:
    """Why Triton cannot start for a type of device, or None; asked of Triton itself, once.

    What may pass, as a full disk, is asked again at the next call.
    """
    if device in _unusable or not torch.get_device_module(device).is_available():
        return _unusable.get(device)
    reason, lasts = None, True
    try:
        start()
    except Exception as error:
        reason, lasts = why_not(error), not may_pass(error)
    if lasts:
        _unusable[device] = reason
    return reason


# As torch.compiler.assume_constant_result does, which would import the compiler with this package.
unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def start() -> None:
    """Do what Triton does before its first kernel: it writes to its cache and builds its driver.

    Raises:
        Exception: Whatever Triton raises, or what writing raises.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.cache.manager_class is None:  # not a cache of the user's own
        try:
            Path(knobs.cache.dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=knobs.cache.dir):
                pass
        except OSError as error:
            error.strerror = (
                f"Triton cannot write to its cache {knobs.cache.dir} ({error.strerror}): name"
                " another folder in TRITON_CACHE_DIR"
            )
            raise
    if older_than(BUILDS_ONCE) and (reason := no_headers()) is not None:
        raise RuntimeError(reason)  # it compiles C for each kernel
    driver.active.get_current_target()


def why_not(error: Exception) -> str:
    """One line for an error of `start`."""
    if isinstance(error, subprocess.CalledProcessError):
        reason = no_compiler() or no_headers()
        ended = f"{Path(error.cmd[0]).name} ended with {error.returncode}"
        return reason or f"Triton cannot build its driver: {ended}, and says why above"
    strerror = getattr(error, "strerror", None) or ""
    text = strerror if strerror.startswith("Triton ") else " ".join(str(error).split())
    return text if text.startswith("Triton ") else f"Triton cannot start: {text or repr(error)}"


def may_pass(error: Exception) -> bool:
    """Whether an error of `start` is one that the next call may not meet."""
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode < 0  # killed
    full = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in full)


def unsupported(problem: Problem) -> str | None:
    """Why Triton refuses a problem, or None."""
    reason = other_dtype(problem, FUSED_DTYPES) or too_wide(problem, MAX_HEAD_DIM) or MISSING
    if reason is not None:
        return reason
    if problem.device.type == "cpu" and not gpus.PTX:
        if not interpreted():
            return "takes CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1"
        if imported_without_interpreter():
            return (
                "Triton was imported before TRITON_INTERPRET=1 was set: set it before Python starts"
            )
        return None
    if NO_COMPILER is not None and not interpreted():
        return NO_COMPILER
    found = gpus.too_old(gpus.capability(problem.device.index or 0), OLDEST_CAPABILITY)
    return found or (None if interpreted() else unusable(problem.device.type))


def details() -> str:
    """Triton's version and how it runs."""
    how = f", its PTX for sm_{gpus.PTX} executed" if gpus.PTX else ""
    return f"Triton {VERSION}" + (", interpreted" if interpreted() else how)


ROW = Backend("triton", unsupported, OPS, implementation("workspace"), details)
