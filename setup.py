"""Builds attnfast/_native.so, the native kernels, with ninja rules of our own.

torch.utils.cpp_extension is not used: it ties the library to one Python and one torch. This one
holds no Python API and only torch's stable C++ ABI, so that one file serves every Python and every
torch from 2.10 on.

    python setup.py build_ext --inplace     an incremental build into attnfast/
    pip install -e . --no-build-isolation   the same, and the package becomes importable
    python setup.py build_emulator          build/emulator/_emulator.so: the CUDA kernels on the CPU
    python setup.py build_cuda              build/native/_native_cuda.so: with the CUDA kernels

Environment: MAX_JOBS, CXX and ATTNFAST_CXXFLAGS (appended; both are words for a shell),
ATTNFAST_ISAS ("all", "native" for those that this machine runs, which compiles in a third of the
time, or their names), ATTNFAST_SANITIZE=1 (AddressSanitizer and UndefinedBehaviorSanitizer; that
library stays in build/native-asan, ATTNFAST_NATIVE loads it). ATTNFAST_CUDA=1 puts the CUDA kernels
into the library of build_ext and of wheels, where there is an nvcc; 0 leaves them out of all;
without it only build_cuda has them.
NVCC or CUDA_HOME say where nvcc is, ATTNFAST_CUDA_ARCHS for which architectures ("80 90").
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

if sys.hexversion < 0x030A0000:
    sys.exit(f"attnfast needs Python 3.10 or later, this is {platform.python_version()}")

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def words(name: str) -> list[str]:
    """The words of an environment variable, as a shell reads them."""
    text = os.environ.get(name, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        sys.exit(f"attnfast: {name} must be words for a shell, got {text} ({error})")


def switch(name: str) -> bool | None:
    """Whether an environment variable switches something on; None where it is not set."""
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        sys.exit(f"attnfast: {name} must be 0 or 1, got '{value}'")
    return value == "1" if value else None


SANITIZE = switch("ATTNFAST_SANITIZE")
BUILD = Path("build", "native-asan" if SANITIZE else "native")  # in the root
EMULATOR = Path("build", "emulator")

COMMON = (
    "-std=c++17 -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -fno-trapping-math"
    " -ffp-contract=fast -Wall -Wextra"
)
OPTIMISED = "-O3 -DNDEBUG"
SANITIZED = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10

# csrc/cpu/attention_*.cpp are compiled once per row, with ATTNFAST_ISA as the row's name. The order
# is that of linking, lowest first: an inline function that several objects define (std::min, say)
# is taken from the first, so no machine runs one compiled for instructions that it lacks.
MAYBE = "-Wno-unknown-warning-option -Wno-maybe-uninitialized"  # clang does not know the second
AVX512 = (
    "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    f" {MAYBE} -Wno-uninitialized"  # false alarms in the compiler's own headers
)
# What hardly any machine runs compiles in half the time; vectors filled in a loop are false alarms.
PORTABLE = f"-O2 {MAYBE}"
X86_ISAS = {
    "portable": PORTABLE,
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
# What each needs beyond the one before, by the names of /proc/cpuinfo.
X86_NEEDS = {
    "portable": "",
    "avx2": "avx2 fma f16c",
    "avx512": "avx512f avx512bw avx512dq avx512vl",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_tile amx_bf16",
}


def chosen_isas(asked: str) -> dict[str, str]:
    """The rows of X86_ISAS that ATTNFAST_ISAS asks for; portable is always among them."""
    names = list(X86_ISAS)
    if asked == "native":
        info = Path("/proc/cpuinfo")
        flags = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
        runs = [set(needs.split()) <= flags for needs in X86_NEEDS.values()]
        names = names[: runs.index(False) if False in runs else None] if flags else names
    elif asked != "all":
        names = ["portable", *asked.replace(",", " ").split()]
        if unknown := set(names) - set(X86_ISAS):
            sys.exit(
                "attnfast: ATTNFAST_ISAS must be all, native or names out of"
                f" {' '.join(X86_ISAS)}, got '{' '.join(sorted(unknown))}'"
            )
    return {name: flags for name, flags in X86_ISAS.items() if name in names}


ISAS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS = X86_ISAS if SANITIZE else chosen_isas(os.environ.get("ATTNFAST_ISAS") or "all")
if SANITIZE and "avx2" in ISAS:
    # In place of AVX-512 its shape, 16 lanes and 12 rows, and in place of AMX its tile registers in
    # plain C++: every access is checked, and every machine runs them.
    lanes16 = f"{ISAS['avx2']} -DATTNFAST_16_LANES -Wno-psabi"
    ISAS = {"portable": "", "avx2": ISAS["avx2"]}
    ISAS |= {"lanes16": lanes16, "tiles16": f"{lanes16} -DATTNFAST_EMULATED_TILES"}


CUDA_ARCHS = "80 90"  # sm_80's code also serves sm_86 and sm_89
CUDA_HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # csrc/cuda/attention_*.cu are compiled for each


def compiler() -> list[str]:
    """The C++ compiler's command, once it has read what asks most of it, with every flag."""
    command = words("CXX") or [next(filter(shutil.which, ("g++", "clang++", "c++")), "g++")]
    named = " ".join(command)
    needed = re.search(r'kernels need (.*)"', (CSRC / "cpu" / "simd.h").read_text())
    assert needed is not None
    install = f"install {needed[1]}, with OpenMP (Debian: apt install g++), or name one in CXX"
    if shutil.which(command[0]) is None:
        sys.exit(f"attnfast: no C++ compiler: {named} was not found; {install}")
    flags = [*COMMON.split(), *" ".join(ISAS.values()).split(), *words("ATTNFAST_CXXFLAGS")]
    probe = subprocess.run(
        [*command, *flags, "-Icsrc", "-DATTNFAST_ISA=probe", "-fsyntax-only", "-x", "c++", "-"],
        input='#include <omp.h>\n#include "cpu/simd.h"\n',
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    if probe.returncode:
        lines = probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        sys.exit(f"attnfast: {named} cannot compile the kernels ({reason}); {install}")
    return command


def torch_folder() -> Path:
    """Where torch's headers and libraries are; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "attnfast: torch is not installed, and its headers are needed to build:"
            " pip install torch, then pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def ninja() -> str:
    """The ninja executable: this Python's own, else the one on the PATH."""
    found = shutil.which(Path(sys.executable).with_name("ninja")) or shutil.which("ninja")
    if found is None:
        sys.exit("attnfast: ninja is not installed: pip install ninja")
    return found


def quoted(*command: str) -> str:
    """Words that may hold any character, for a command in build.ninja."""
    return shlex.join(command).replace("$", "$$")


class Ninja:
    """The text of a build.ninja under way: compilations, largest first, then what is linked.

    Ninja runs in the root, and all files of ours are named from there: what the folders above are
    called does not matter.
    """

    def __init__(self, folder: Path, cxxflags: str, ldflags: str) -> None:
        torch = torch_folder()
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.5",
            f"builddir = {folder}",
            f"cxx = {quoted(*compiler())}",
            f"cxxflags = {COMMON} {cxxflags} -Icsrc {quoted(*words('ATTNFAST_CXXFLAGS'))}",
            f"torchflags = {STABLE_ABI} {quoted('-isystem', str(torch / 'include'))}",
            f"ldflags = {ldflags} {quoted(f'-L{torch}/lib')} -Wl,--no-as-needed -ltorch -ltorch_cpu"
            " -Wl,--as-needed",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $cxxflags $extra -c $in -o $out",
            "  description = compile $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared $cxxflags $in -o $out $ldflags",
            "  description = link $out",
        ]
        self.compilations: list[tuple[int, str]] = []

    def compile(
        self, source: Path, suffix: str = "", extra: str = "", rule: str = "compile"
    ) -> str:
        """Have a source compiled; returns its object's name."""
        target = f"{self.folder / source.relative_to(CSRC).with_suffix('')}{suffix}.o"
        text = f"build {target}: {rule} {source.relative_to(ROOT)}\n  extra = {extra}"
        self.compilations.append((source.stat().st_size, text))
        return target

    def link(self, library: str, objects: list[str], ldflags: str = "") -> str:
        """The statement that links a library, with flags beside those of all."""
        line = f"build {self.folder / library}: link {' '.join(objects)}"
        return f"{line}\n  ldflags = $ldflags {ldflags}" if ldflags else line

    def text(self, *links: str) -> str:
        """The file, which ends with these link statements."""
        ordered = [text for _, text in sorted(self.compilations, reverse=True)]  # none ends late
        return "\n".join([*self.lines, *ordered, *links, ""])


def native_file(nvcc: str | None = None) -> str:
    """How _native.so is built: what is compiled, with which flags, in which order it is linked.

    With nvcc, also how _native_cuda.so is: the same and the CUDA kernels.
    """
    mode = SANITIZED if SANITIZE else OPTIMISED
    build = Ninja(BUILD, mode, "" if SANITIZE else "-Wl,-z,defs")
    objects = [build.compile(CSRC / "bindings" / "cpu.cpp", extra="$torchflags")]
    cpu = sorted((CSRC / "cpu").glob("*.cpp"))
    kernels = [source for source in cpu if source.name.startswith("attention_")]
    present = " ".join(f"-DATTNFAST_WITH_{isa}" for isa in ISAS)
    objects += [build.compile(source, extra=present) for source in cpu if source not in kernels]
    for isa, flags in ISAS.items():
        extra = f"-DATTNFAST_ISA={isa} {flags}"
        objects += [build.compile(source, f".{isa}", extra) for source in kernels]
    links = [build.link("_native.so", objects)]
    if nvcc:
        objects += cuda_objects(build, nvcc)
        runtime = f"{quoted(f'-L{cuda_libraries(nvcc)}')} -lcudart_static -ldl -lrt -lpthread"
        links.append(build.link("_native_cuda.so", objects, runtime))
    return build.text(*links)


def cuda_objects(build: Ninja, nvcc: str) -> list[str]:
    """Have the CUDA kernels compiled; the compiler's word on each one's resources is in *.o.log."""
    archs = cuda_archs()
    code = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    general = min((arch for arch in archs if arch >= 80), default=archs[-1])
    code += f" -gencode=arch=compute_{general},code=compute_{general}"  # PTX for all others
    names = ", ".join(f"sm_{arch}" for arch in archs)
    build.lines += [
        f"nvcc = {quoted(nvcc)}",
        "nvccflags = -std=c++17 -O3 -DNDEBUG -Werror=all-warnings -Xptxas=-v --compress-mode=size"
        f" -Xcompiler=-fPIC,-fvisibility=hidden,-Wall {code} -Icsrc",
        "rule nvcc",
        "  command = $nvcc -MMD -MF $out.d $nvccflags $extra -c $in -o $out > $out.log 2>&1"
        " || (cat $out.log && exit 1)",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = [build.compile(CSRC / "bindings" / "cuda.cpp", extra="$torchflags")]
    objects += [build.compile(source) for source in sorted((CSRC / "cuda").glob("*.cpp"))]
    for source, suffix, flags in cuda_sources():
        flags += f""" -DATTNFAST_CUDA_ARCHS='"{names}"'"""
        objects.append(build.compile(source, suffix, flags, "nvcc"))
    return objects


def cuda_libraries(nvcc: str) -> Path:
    """The folder of libcudart_static.a, beside the nvcc that may be a script elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", said)
    folder = Path(top[1] if top else nvcc).resolve() / "lib64"
    if not (folder / "libcudart_static.a").exists():
        sys.exit(f"attnfast: no libcudart_static.a in {folder}: install the whole CUDA toolkit")
    return folder


def cuda_archs() -> list[int]:
    """The architectures that CUDA code is compiled for, the lowest first: ATTNFAST_CUDA_ARCHS."""
    asked = os.environ.get("ATTNFAST_CUDA_ARCHS") or CUDA_ARCHS
    try:
        archs = sorted({int(arch) for arch in asked.replace(",", " ").split()})
    except ValueError:
        archs = []
    if not archs or archs[0] < 75:
        sys.exit(
            f"attnfast: ATTNFAST_CUDA_ARCHS must be numbers from 75 on ('80 90'), got '{asked}'"
        )
    return archs


def find_nvcc() -> str | None:
    """The nvcc executable: NVCC, of CUDA_HOME, or on the PATH; None where there is none."""
    if switch("ATTNFAST_CUDA") is False:
        print("attnfast: CUDA kernels left out, as ATTNFAST_CUDA=0 asks", file=sys.stderr)
        return None
    home = os.environ.get("CUDA_HOME")
    asked = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else None)
    places = (asked,) if asked else ("nvcc", "/usr/local/cuda/bin/nvcc")
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        print(
            "attnfast: no nvcc, so no CUDA kernels; install the CUDA toolkit (12.8 or later), or"
            " name its folder in CUDA_HOME",
            file=sys.stderr,
        )
    return found


def cuda_sources() -> list[tuple[Path, str, str]]:
    """The CUDA sources, each with the suffix and the flags of every time it is compiled."""
    compilations = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        if source.name.startswith("attention_"):
            compilations += [
                (source, f".{head_dim}", f"-DATTNFAST_HEAD_DIM={head_dim}")
                for head_dim in CUDA_HEAD_DIMS
            ]
        else:
            compilations.append((source, "", ""))
    return compilations


def emulator_file() -> str:
    """How _emulator.so is built: the CUDA kernels compiled for the CPU, and what runs them."""
    build = Ninja(EMULATOR, "-O2 -DATTNFAST_EMULATOR -pthread", "-Wl,-z,defs")
    objects = [
        build.compile(CSRC / "bindings" / name, extra="$torchflags")
        for name in ("cuda.cpp", "emulator.cpp")
    ]
    objects += [build.compile(source) for source in sorted((CSRC / "emulator").glob("*.cpp"))]
    objects += [build.compile(source) for source in sorted((CSRC / "cuda").glob("*.cpp"))]
    for source, suffix, extra in cuda_sources():
        objects.append(build.compile(source, suffix, f"-x c++ {extra}"))
    return build.text(build.link("_emulator.so", objects))


def run_ninja(library: Path, text: str, what: str) -> Path:
    """Bring a library up to date, as this text of a build.ninja says, and say where it is."""
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch(r"0*[1-9]\d*", jobs, re.ASCII):
        sys.exit(f"attnfast: MAX_JOBS must be a number from 1 on, got '{jobs}'")
    file = library.with_name("build.ninja")
    (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / file).write_bytes(os.fsencode(text))
    command = [ninja(), "-f", str(file), *([f"-j{jobs}"] if jobs else []), str(library)]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        sys.exit(f"attnfast: {what} did not compile; the compiler's messages are above")
    return ROOT / library


def build_native() -> Path:
    """Bring the library up to date and say where it is; with CUDA's kernels if so asked."""
    nvcc = None if switch("ATTNFAST_CUDA") is None else find_nvcc()
    library = BUILD / ("_native_cuda.so" if nvcc else "_native.so")
    return run_ninja(library, native_file(nvcc), "the native library")


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
        if "avx2" not in ISAS:
            print("attnfast: the emulator runs on x86-64 only: left out", file=sys.stderr)
            return
        run_ninja(EMULATOR / "_emulator.so", emulator_file(), "the emulator")


class BuildCuda(Build):
    """Builds build/native/_native_cuda.so: the CPU's kernels and CUDA's, for ATTNFAST_NATIVE."""

    description = "build the native library with the CUDA kernels, where nvcc is"

    def run(self) -> None:
        """Build, or say why not."""
        nvcc = find_nvcc()
        if nvcc:
            run_ninja(BUILD / "_native_cuda.so", native_file(nvcc), "the CUDA kernels")


class BuildNative(build_ext):
    """Has ninja build the one library and puts it where setuptools expects an extension."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without a Python version in the name: the library serves them all."""
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        """Build; then replace the file in one step, so that a running process keeps the old one."""
        library = build_native()
        if SANITIZE:
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
            "bdist_wheel": NativeWheel,
        },
    )
else:
    setup()  # elsewhere the package holds no native kernels, and says so when asked for one
