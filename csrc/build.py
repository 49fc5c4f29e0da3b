"""How the native libraries are built: ninja rules of our own, which setup.py runs.

torch.utils.cpp_extension is not used: it ties a library to one Python and one torch. These hold no
Python API and only torch's stable C++ ABI, so that one file serves every Python and every torch
from 2.10 on. CONTRIBUTING.md says why it is not CMake.

Each folder under build/ also has a compile_commands.json, for editors.
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
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
EMULATOR = Path("build", "emulator")  # in the root, as build_folder()
PTX = Path("build", "ptx")

OLDEST_TORCH = (2, 10)
COMMON = (
    "-std=c++17 -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -fno-trapping-math"
    " -ffp-contract=fast -Wall -Wextra"
)
OPTIMISED = "-O3 -DNDEBUG"
SANITIZED = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)
# Where bindings/old_libc.cpp finds what it asks for: glibc's own libraries until 2.34, empty since.
OLD_LIBC = (
    "-Wl,--gc-sections,--no-as-needed -l:libpthread.so.0 -l:libdl.so.2 -l:librt.so.1"
    " -Wl,--as-needed"
)


class Isa(NamedTuple):
    """What an instruction set needs beyond the one before, by /proc/cpuinfo, and its flags."""

    needs: str
    flags: str


# csrc/cpu/attention_*.cpp are compiled once per row, with ATTNFAST_ISA as the row's name, and
# dispatch.cpp is told all names. The order is that of linking, lowest first: an inline function
# that several objects define (std::min, say) is taken from the first, so no machine runs one
# compiled for instructions that it lacks.
MAYBE = "-Wno-unknown-warning-option -Wno-maybe-uninitialized"  # clang does not know the second
# What hardly any machine runs compiles in half the time; vectors filled in a loop are false alarms.
PORTABLE = f"-O2 {MAYBE}"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = (
    "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    f" {MAYBE} -Wno-uninitialized"  # false alarms in the compiler's own headers
)
X86_ISAS = {
    "portable": Isa("", PORTABLE),
    "avx2": Isa("avx2 fma f16c", AVX2),
    "avx512": Isa("avx512f avx512bw avx512dq avx512vl", AVX512),
    "avx512_bf16": Isa("avx512_bf16", f"{AVX512} -mavx512bf16"),
    "amx": Isa("amx_tile amx_bf16", f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"),
}
AARCH64_ISAS = {
    "neon": Isa("", MAYBE),
    "neon_bf16": Isa("bf16", f"-march=armv8.2-a+bf16 {MAYBE}"),
    # Vectors of 256 bits, and no others: of Neoverse V1.
    "sve": Isa("sve svebf16", f"-march=armv8.2-a+sve+bf16 -msve-vector-bits=256 {MAYBE}"),
}
ISAS = {"x86_64": X86_ISAS, "aarch64": AARCH64_ISAS}  # by what the compiler's code runs on
# With sanitizers, in place of AVX-512 its shape, 16 lanes and 12 rows, and in place of AMX its tile
# registers in plain C++: every access is checked, and every machine runs them.
LANES16 = f"{AVX2} -DATTNFAST_16_LANES -Wno-psabi"
SANITIZED_ISAS = {
    "portable": "",
    "avx2": AVX2,
    "lanes16": LANES16,
    "tiles16": f"{LANES16} -DATTNFAST_EMULATED_TILES",
}

# Registers are bytes that an instruction takes for what it likes, and no product is fused unasked.
PTX_MACHINE = "-O3 -ffp-contract=off -fno-strict-aliasing"

CUDA_ARCHS = (75, 80, 90, 100, 120)  # of the wheel; sm_80's code also serves sm_86 and sm_89
USUAL_CUDA_ARCHS = (80, 90)


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


def sanitized() -> bool:
    """Whether the library is for AddressSanitizer and UndefinedBehaviorSanitizer."""
    return bool(switch("ATTNFAST_SANITIZE"))


def build_folder() -> Path:
    """The native library's folder in the root: one for sanitizers, one for each other machine."""
    if sanitized():
        return Path("build", "native-asan")
    return Path("build", "native" if target() == platform.machine() else target())


def on_x86() -> bool:
    """Whether this machine runs the emulator."""
    return platform.machine() in ("x86_64", "AMD64")


def target() -> str:
    """The machine that the compiler's code runs on: x86_64, aarch64."""
    try:
        done = subprocess.run([*compiler(), "-dumpmachine"], capture_output=True, text=True)
    except OSError:
        return platform.machine()
    return done.stdout.partition("-")[0] or platform.machine()


def instruction_sets() -> dict[str, str]:
    """The flags of each set that ATTNFAST_ISAS asks for; the lowest is always among them."""
    isas = ISAS.get(target(), {"portable": Isa("", "")})
    names = list(isas)
    if sanitized():
        return SANITIZED_ISAS if isas is X86_ISAS else {names[0]: ""}
    asked = os.environ.get("ATTNFAST_ISAS") or "all"
    if asked == "native":
        info = Path("/proc/cpuinfo")
        has = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
        runs = [set(isa.needs.split()) <= has for isa in isas.values()]
        names = names[: runs.index(False) if False in runs else None] if has else names
    elif asked != "all":
        names = [names[0], *asked.replace(",", " ").split()]
        if unknown := set(names) - set(isas):
            sys.exit(
                "attnfast: ATTNFAST_ISAS must be all, native or names out of"
                f" {' '.join(isas)}, got '{' '.join(sorted(unknown))}'"
            )
    return {name: isa.flags for name, isa in isas.items() if name in names}


def compiler() -> list[str]:
    """The C++ compiler's command."""
    return words("CXX") or [next(filter(shutil.which, ("g++", "clang++", "c++")), "g++")]


def check_compiler() -> None:
    """Have the compiler read what asks most of it, with every flag."""
    command = compiler()
    named = " ".join(command)
    needed = re.search(r'kernels need (.*)"', (CSRC / "cpu" / "simd.h").read_text())
    assert needed is not None
    install = f"install {needed[1]}, with OpenMP (Debian: apt install g++), or name one in CXX"
    if shutil.which(command[0]) is None:
        sys.exit(f"attnfast: no C++ compiler: {named} was not found; {install}")
    isas = " ".join(instruction_sets().values())
    flags = [*COMMON.split(), *isas.split(), *words("ATTNFAST_CXXFLAGS")]
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


def torch_folder() -> Path | None:
    """Where a torch is that is new enough, for its headers and libraries; nothing is imported.

    A build that pip isolates does not see what is installed: the same Python is then asked without
    the variables that isolate it.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if origin is None:
        ask = (
            "import importlib.util as u, os, sys; spec = u.find_spec('torch');"
            " sys.stdout.buffer.write(os.fsencode(spec and spec.origin or ''))"
        )
        done = subprocess.run([sys.executable, "-E", "-c", ask], cwd=CSRC, capture_output=True)
        origin = os.fsdecode(done.stdout)
    version = Path(origin).parent / "version.py"
    if not (origin and version.exists()):
        return None
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
    return version.parent if found and (int(found[1]), int(found[2])) >= OLDEST_TORCH else None


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
        oldest = ".".join(map(str, OLDEST_TORCH))
        if torch is None:
            sys.exit(
                f"attnfast: torch {oldest} or later is not installed, and its headers are needed to"
                f" build: pip install 'torch>={oldest}'"
            )
        target = f"-DTORCH_TARGET_VERSION=0x{bytes(OLDEST_TORCH).hex()}{0:012x}"  # the stable ABI's
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.5",
            f"builddir = {folder}",
            f"cxx = {quoted(*compiler())}",
            f"cxxflags = {COMMON} {cxxflags} -Icsrc {quoted(*words('ATTNFAST_CXXFLAGS'))}",
            f"torchflags = {target} {quoted('-isystem', str(torch / 'include'))}",
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


def native_file(nvcc: str | None = None, operators: str | None = None) -> str:
    """How _native.so is built: what is compiled, with which flags, in which order it is linked.

    With nvcc, also how _native_cuda.so is: the same and the CUDA kernels. With another namespace
    for the operators, how _native_hub.so is instead.
    """
    mode, ldflags = (SANITIZED, "") if sanitized() else (OPTIMISED, "-Wl,-z,defs")
    build = Ninja(build_folder(), mode, f"{ldflags} {OLD_LIBC}")
    bindings = CSRC / "bindings" / "cpu.cpp"
    if operators:
        objects = [build.compile(bindings, ".hub", f"$torchflags -DATTNFAST_OPERATORS={operators}")]
    else:
        objects = [build.compile(bindings, extra="$torchflags")]
    objects.append(build.compile(CSRC / "bindings" / "old_libc.cpp"))
    objects += cpu_objects(build)
    links = [build.link("_native_hub.so" if operators else "_native.so", objects)]
    if nvcc:
        objects += cuda_objects(build, nvcc)
        runtime = f"{quoted(f'-L{cuda_libraries(nvcc)}')} -lcudart_static"
        links.append(build.link("_native_cuda.so", objects, runtime))
    return build.text(*links)


def cpu_objects(build: Ninja) -> list[str]:
    """Have the CPU kernels compiled."""
    isas = instruction_sets()
    cpu = sorted((CSRC / "cpu").glob("*.cpp"))
    kernels = [source for source in cpu if source.name.startswith("attention_")]
    best_first = " ".join(f"X({isa})" for isa in reversed(isas))
    present = quoted(f"-DATTNFAST_ISAS(X)={best_first}")
    objects = [build.compile(source, extra=present) for source in cpu if source not in kernels]
    for isa, flags in isas.items():
        extra = f"-DATTNFAST_ISA={isa} {flags}"
        objects += [build.compile(source, f".{isa}", extra) for source in kernels]
    return objects


def recorded_file(folder: Path) -> str:
    """How recorded_cases is built: the CPU kernels and their bindings, without torch's library."""
    build = Ninja(folder, OPTIMISED, "")
    build.lines += [
        "rule program",
        "  command = $cxx $cxxflags $in -o $out -ldl",
        "  description = link $out",
    ]
    objects = [build.compile(CSRC / "bindings" / "recorded_cases.cpp", extra="$torchflags")]
    objects += cpu_objects(build)
    return build.text(f"build {folder / 'recorded_cases'}: program {' '.join(objects)}")


def emulator_file() -> str:
    """How _emulator.so is built: the CUDA kernels compiled for the CPU, and what runs them.

    The PTX machine, which runs what the compilers emit instead, is part of it.
    """
    build = Ninja(EMULATOR, "-O2 -DATTNFAST_EMULATOR -pthread", "-Wl,-z,defs")
    objects = [
        build.compile(CSRC / "bindings" / name, extra="$torchflags")
        for name in ("cuda.cpp", "emulator.cpp")
    ]
    objects += [build.compile(source) for source in sorted((CSRC / "emulator").glob("*.cpp"))]
    machine = sorted((CSRC / "emulator" / "ptx").glob("*.cpp"))
    objects += [build.compile(source, extra=PTX_MACHINE) for source in machine]
    for source, suffix, extra in cuda_sources():
        # Visible, for the PTX machine to ask for a kernel's name.
        objects.append(build.compile(source, suffix, f"-x c++ -fvisibility=default {extra}"))
    return build.text(build.link("_emulator.so", objects))


def ptx_file(nvcc: str) -> str:
    """How the PTX of the CUDA kernels is made, in a folder for each architecture."""
    build = Ninja(PTX, "", "")
    build.lines += [
        f"nvcc = {quoted(nvcc)}",
        "rule nvcc",
        "  command = $nvcc -MMD -MF $out.d -std=c++17 -O3 -DNDEBUG -lineinfo $extra -Icsrc -ptx $in"
        " -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    made = []
    for arch in cuda_archs():
        for source, suffix, flags in cuda_sources():
            target = PTX / str(arch) / f"{source.stem}{suffix}.ptx"
            extra = f"""-arch=compute_{arch} {flags} -DATTNFAST_CUDA_ARCHS='"sm_{arch}"'"""
            text = f"build {target}: nvcc {source.relative_to(ROOT)}\n  extra = {extra}"
            build.compilations.append((source.stat().st_size, text))
            made.append(str(target))
    return build.text(f"build {PTX / 'all'}: phony {' '.join(made)}")


def cuda_objects(build: Ninja, nvcc: str) -> list[str]:
    """Have the CUDA kernels compiled; the compiler's word on each one's resources is in *.o.log."""
    archs = cuda_archs()
    code = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    general = ptx_arch(archs)
    code += f" -gencode=arch=compute_{general},code=compute_{general}"
    names = ", ".join(f"sm_{arch}" for arch in archs)
    build.lines += [
        f"nvcc = {quoted(nvcc)}",
        "nvccflags = -std=c++17 -O3 -DNDEBUG -Xptxas=-v --compress-mode=size"
        f" -Xcompiler=-fPIC,-fvisibility=hidden,-Wall {code} -Icsrc",
        "rule nvcc",
        "  command = $nvcc -MMD -MF $out.d $nvccflags $extra -c $in -o $out > $out.log 2>&1"
        " || (cat $out.log && exit 1)",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = [build.compile(CSRC / "bindings" / "cuda.cpp", extra="$torchflags")]
    for source, suffix, flags in cuda_sources():
        flags += f""" -DATTNFAST_CUDA_ARCHS='"{names}"'"""
        objects.append(build.compile(source, suffix, flags, "nvcc"))
    return objects


def cuda_sources() -> list[tuple[Path, str, str]]:
    """The CUDA sources, each with the suffix and the flags of every time it is compiled."""
    compilations = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        if source.name.startswith("attention_"):
            compilations += [
                (source, f".{head_dim}", f"-DATTNFAST_HEAD_DIM={head_dim}")
                for head_dim in cuda_head_dims()
            ]
        else:
            compilations.append((source, "", ""))
    return compilations


def cuda_head_dims() -> list[int]:
    """What csrc/cuda/attention_*.cu are compiled for; arguments.h has the list."""
    text = (CSRC / "cuda" / "arguments.h").read_text()
    listed = re.search(r"#define ATTNFAST_HEAD_DIMS\(X\)(.*)", text)
    assert listed is not None
    return [int(head_dim) for head_dim in re.findall(r"X\((\d+)\)", listed[1])]


def cuda_archs() -> list[int]:
    """The architectures that CUDA code is compiled for, the lowest first: ATTNFAST_CUDA_ARCHS."""
    asked = os.environ.get("ATTNFAST_CUDA_ARCHS")
    if not asked or asked == "all":
        return list(CUDA_ARCHS if asked else USUAL_CUDA_ARCHS)
    try:
        archs = sorted({int(arch) for arch in asked.replace(",", " ").split()})
    except ValueError:
        archs = []
    if not archs or archs[0] < CUDA_ARCHS[0]:
        sys.exit(
            f"attnfast: ATTNFAST_CUDA_ARCHS must be all or numbers from {CUDA_ARCHS[0]} on"
            f" ('80 90'), got '{asked}'"
        )
    return archs


def ptx_arch(archs: list[int]) -> int:
    """Whose PTX is added, of which drivers make code for later GPUs; launch.cu knows its limits."""
    return min((arch for arch in archs if arch >= 80), default=archs[-1])


def cuda_libraries(nvcc: str) -> Path:
    """The folder of libcudart_static.a, beside the nvcc that may be a script elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", said)
    folder = Path(top[1] if top else nvcc).resolve() / "lib64"
    if not (folder / "libcudart_static.a").exists():
        sys.exit(f"attnfast: no libcudart_static.a in {folder}: install the whole CUDA toolkit")
    return folder


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


def run_ninja(library: Path, text: str, what: str) -> Path:
    """Bring a library up to date, as this text of a build.ninja says, and say where it is."""
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch(r"0*[1-9]\d*", jobs, re.ASCII):
        sys.exit(f"attnfast: MAX_JOBS must be a number from 1 on, got '{jobs}'")
    file = library.with_name("build.ninja")
    command, content = [ninja(), "-f", str(file)], os.fsencode(text)
    if not (ROOT / file).exists() or (ROOT / file).read_bytes() != content:
        check_compiler()
        (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / file).write_bytes(content)
        with (ROOT / file).with_name("compile_commands.json").open("wb") as commands:
            subprocess.run([*command, "-t", "compdb", "compile", "nvcc"], cwd=ROOT, stdout=commands)
    command += [*([f"-j{jobs}"] if jobs else []), str(library)]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        sys.exit(f"attnfast: {what} did not compile; the compiler's messages are above")
    return ROOT / library


def native() -> Path:
    """Bring the native library up to date and say where it is; with CUDA's kernels if so asked."""
    nvcc = None if switch("ATTNFAST_CUDA") is None else find_nvcc()
    library = build_folder() / ("_native_cuda.so" if nvcc else "_native.so")
    return run_ninja(library, native_file(nvcc), "the native library")


def hub(operators: str) -> Path:
    """Bring the library of the Hub's tree up to date: the CPU's kernels, under a namespace."""
    library = build_folder() / "_native_hub.so"
    return run_ninja(library, native_file(operators=operators), "the native library")


def recorded() -> None:
    """Bring recorded_cases up to date, for the machine that the compiler compiles for."""
    folder = Path("build", target())
    run_ninja(folder / "recorded_cases", recorded_file(folder), "recorded_cases")


def cuda() -> None:
    """Bring the native library with CUDA's kernels up to date, where nvcc is."""
    if nvcc := find_nvcc():
        run_ninja(build_folder() / "_native_cuda.so", native_file(nvcc), "the CUDA kernels")


def ptx() -> None:
    """Bring the PTX of the CUDA kernels up to date, where nvcc is."""
    if nvcc := find_nvcc():
        run_ninja(PTX / "all", ptx_file(nvcc), "the PTX of the CUDA kernels")


def emulator() -> None:
    """Bring the emulator of the CUDA kernels up to date."""
    if on_x86():
        run_ninja(EMULATOR / "_emulator.so", emulator_file(), "the emulator")
    else:
        print("attnfast: the emulator runs on x86-64 only: left out", file=sys.stderr)
