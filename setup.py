"""Builds attnfast/_native.so, the native kernels; csrc/build.py has the rules.

    python setup.py build_ext --inplace     an incremental build into attnfast/
    pip install -e . --no-build-isolation   the same, and the package becomes importable
    python setup.py build_emulator          build/emulator/_emulator.so: the CUDA kernels on the CPU
    python setup.py build_cuda              build/native/_native_cuda.so: with the CUDA kernels
    python setup.py build_ptx               build/ptx/: the CUDA kernels as nvcc compiles them
    python setup.py build_recorded          build/MACHINE/recorded_cases: the CPU kernels, no torch

Environment: MAX_JOBS, CXX and ATTNFAST_CXXFLAGS (appended; both are words for a shell),
ATTNFAST_ISAS ("all", "native" for those that this machine runs, which compiles in a third of the
time, or their names), ATTNFAST_SANITIZE=1 (AddressSanitizer and UndefinedBehaviorSanitizer; that
library stays in build/native-asan, ATTNFAST_NATIVE loads it). ATTNFAST_CUDA=1 puts the CUDA kernels
into the library of build_ext and of wheels, where there is an nvcc; 0 leaves them out of all;
without it only build_cuda has them.
NVCC or CUDA_HOME say where nvcc is (its CUDA decides which drivers will do: docs/wheel.md),
ATTNFAST_CUDA_ARCHS for which architectures ("all", those of the wheel, or their numbers: "80 90").
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import ClassVar

if sys.hexversion < 0x030A0000:
    sys.exit(f"attnfast needs Python 3.10 or later, this is {platform.python_version()}")

try:
    from setuptools import Command, Extension, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_ext import build_ext
except ImportError as error:
    sys.exit(f"attnfast needs setuptools 77 or later to be built ({error})")

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from csrc import build  # noqa: E402


class Build(Command):
    """A command without options."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """There are no options."""

    def finalize_options(self) -> None:
        """There are no options."""


class BuildEmulator(Build):
    """Builds build/emulator/_emulator.so, in which tests run the CUDA kernels on the CPU."""

    description = "build the emulator of the CUDA kernels, for tests"

    def run(self) -> None:
        """Build, or say why not."""
        build.emulator()


class BuildCuda(Build):
    """Builds build/native/_native_cuda.so: the CPU's kernels and CUDA's, for ATTNFAST_NATIVE."""

    description = "build the native library with the CUDA kernels, where nvcc is"

    def run(self) -> None:
        """Build, or say why not."""
        build.cuda()


class BuildPtx(Build):
    """Has nvcc emit the PTX of the CUDA kernels, which tests execute on the CPU."""

    description = "have nvcc emit the PTX of the CUDA kernels, where it is, for tests"

    def run(self) -> None:
        """Build, or say why not."""
        build.ptx()


class BuildRecorded(Build):
    """Builds recorded_cases: the CPU kernels for the compiler's machine, without torch."""

    description = "build the CPU kernels with what runs recorded cases, for tests"

    def run(self) -> None:
        """Build, or say why not."""
        build.recorded()


class BuildNative(build_ext):
    """Has the one library built and puts it where setuptools expects an extension."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without a Python version in the name: the library serves them all."""
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        """Build; then replace the file in one step, so that a running process keeps the old one."""
        library = build.native()
        if build.sanitized():
            return
        target = ROOT / "attnfast" / "_native.so"
        if not self.inplace and not self.editable_mode:
            target = Path(self.build_lib) / "attnfast" / "_native.so"
        if target.exists() and target.stat().st_mtime_ns == library.stat().st_mtime_ns:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"_native.so.{os.getpid()}")
        shutil.copy2(library, fresh)
        fresh.replace(target)


class NativeWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: any Python 3, this kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's Python, ABI and platform tags."""
        return "py3", "none", super().get_tag()[2]


if sys.platform == "linux":
    setup(
        ext_modules=[Extension("attnfast._native", sources=[])],
        cmdclass={
            "build_ext": BuildNative,
            "build_cuda": BuildCuda,
            "build_emulator": BuildEmulator,
            "build_ptx": BuildPtx,
            "build_recorded": BuildRecorded,
            "bdist_wheel": NativeWheel,
        },
    )
else:
    setup()  # elsewhere the package holds no native kernels, and says so when asked for one
