"""What every CUDA kernel needs on every architecture, as the compiler said when it was built.

    python tools/cuda_resources.py            print the table
    python tools/cuda_resources.py --write    write docs/cuda-resources.csv and into docs/cuda.md

Reads the logs and objects that `make cuda` leaves in build/native/cuda. Registers and spills are
ptxas's words; instructions are counted in the code that cuobjdump shows, which comes with the CUDA
toolkit and with Triton, also those of a tile of scores (device_loops.py); shared memory is what
kernels are launched with (cuda_shared.cpp). Fails if a kernel of head dims up to 128 spills more
than SPILLS says, exceeds an architecture's shared memory, lacks the tensor cores' instructions, or
has no code where it should; and, compiled by the toolkit that the table is of, if a tile takes over
2% more instructions than in the table.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from csrc import build  # noqa: E402
from tools import device_loops  # noqa: E402

OBJECTS = ROOT / "build" / "native" / "cuda"
PAGE = ROOT / "docs" / "cuda.md"
TABLE = ROOT / "docs" / "cuda-resources.csv"
BEGIN, END = "<!-- resources:begin -->", "<!-- resources:end -->"
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS", "STG")  # tensor cores, ldmatrix, cp.async, any output
TURING = "sm_75"  # no bf16, no cp.async; it alone has the small forms
WITHOUT_SPILLS = 128  # head dims up to here, but for
# what takes fewer instructions so: bytes stored and loaded, at most on any architecture.
SPILLS = {
    "attention_fwd<64, plain>": 552,  # on sm_75; later, 152
    "attention_fwd<64, masked>": 140,
    "attention_fwd<128, plain>": 60,
    "attention_fwd<128, options>": 64,
    "attention_bwd_fused<128>": 60,
    "attention_bwd_keys<64, plain>": 48,
}
TOOLKIT = "13.0"  # whose ptxas the table is of
COUNTED = ("sm_80", "sm_90")  # the architectures whose loops are counted
GROWTH = 1.02  # of a loop's instructions
# The most shared memory of a block, in KB.
SHARED_KB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}
LEAST_SHARED_KB = 99  # of all later ones, sm_120 among them
# An SM's shared memory in KB, of which a block takes 1 for itself, and its warps; registers are
# shared out to warps by 256.
SM_SHARED_KB = {"sm_75": 64, "sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}
SM_WARPS = {"sm_75": 32, "sm_80": 64, "sm_89": 48, "sm_90": 64, "sm_100": 64, "sm_120": 48}
SM_REGISTERS = 64 << 10

ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill"
    r" loads.*?Used (\d+) registers",
    re.DOTALL,
)
SASS_FUNCTION = re.compile(r"Function : (\S+)|arch = (sm_\d+)")
# What a kernel's template arguments after the head dim mean.
FORM_NAMES = ("plain", "masked", "options", "blocks", "plain blocks")
FORM = {f"(Form){i}": name for i, name in enumerate(FORM_NAMES)}
SMALL = {"true": "small", "false": ""}
KEYS, VALUES = {"true": "", "false": "dv"}, {"true": "", "false": "dk"}  # those that are wanted
FORMS = {
    "attention_fwd": [FORM],
    "attention_bwd_keys": [FORM, KEYS, VALUES, SMALL],
    "attention_bwd_queries": [FORM, SMALL],
    "attention_decode": [SMALL],
    "attention_decode_received": [SMALL],
}
ORDER = (*FORM_NAMES, "small", "dk", "dv")


class Kernel(NamedTuple):
    """One kernel's name, as `attention_fwd<bf16, 64, plain>`, and its head dim, 0 for any."""

    name: str
    head_dim: int

    def without_dtype(self) -> str:
        """The name that both dtypes share, as `attention_fwd<64, plain>`."""
        return re.sub(r"(bf16|fp16)(, )?", "", self.name).replace("<>", "")


class Usage(NamedTuple):
    """What a kernel needs on one architecture."""

    registers: int
    spills: int  # bytes stored and loaded
    instructions: tuple[int, ...] = ()
    shared: int = 0  # bytes
    blocks: int = 0  # that an SM can have at a time; 0: not known
    tile: tuple[int, ...] = ()  # instructions for 64 x 64 scores, as device_loops.NAMES

    @property
    def empty(self) -> bool:
        """Whether the architecture has no code for the kernel: it stores nothing."""
        return not self.instructions[-1]


Usages = dict[Kernel, dict[str, Usage]]
# By mangled name and architecture: INSTRUCTIONS, and those of a tile.
Counts = dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} and {PAGE.name}")
    try:
        write = parser.parse_args(arguments).write
        usages = measured()
        before = {} if write or nvcc_release() != TOOLKIT else committed()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if write:
        TABLE.write_text(csv_of(usages))
        head, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{table(usages)}\n{END}{rest.split(END)[1]}")
    else:
        print(table(usages))
    faults = [*wrong(usages), *grown(usages, before)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def measured() -> Usages:
    """Every kernel's usage by architecture.

    Raises:
        ValueError: Nothing was built, or there is no cuobjdump.
    """
    logs = sorted(OBJECTS.glob("*.o.log"))
    if not logs:
        raise ValueError(f"cuda resources: no {OBJECTS}/*.o.log: run `make cuda` first")
    usages: Usages = {}
    launches = launched()
    entries = {log: ENTRY.findall(log.read_text()) for log in logs}
    names = demangled([entry for found in entries.values() for entry, *_ in found])
    kernels = {entry: kernel(name) for entry, name in names.items()}
    binaries = [log.with_suffix("") for log, found in entries.items() if found]
    code: Counts = {}
    with ThreadPoolExecutor() as pool:
        for counts in pool.map(lambda binary: counted(binary, kernels), binaries):
            code |= counts
    for found in entries.values():
        for entry, arch, stores, loads, registers in found:
            each = kernels[entry]
            if each.head_dim and each.without_dtype() not in launches:
                raise ValueError(f"cuda resources: cuda_shared.cpp does not know {each.name}")
            threads, shared = launches.get(each.without_dtype(), (0, 0))
            usages.setdefault(each, {})[arch] = Usage(
                int(registers),
                int(stores) + int(loads),
                code[entry, arch][0],
                shared,
                blocks_of_sm(arch, int(registers), threads, shared),
                code[entry, arch][1],
            )
    return usages


def launched() -> dict[str, tuple[int, int]]:
    """The threads and the shared memory of a block, by kernels' names without a dtype."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    source = Path(__file__).with_name("cuda_shared.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/cuda_shared"
        flags = ["-std=c++17", "-DATTNFAST_EMULATOR", f"-I{ROOT / 'csrc'}", "-o", program]
        subprocess.run([*compiler, *flags, str(source)], check=True)
        said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    lines = [line.rsplit(" ", 2) for line in said.splitlines()]
    return {name: (int(threads), int(shared)) for name, threads, shared in lines}


def blocks_of_sm(arch: str, registers: int, threads: int, shared: int) -> int:
    """How many blocks an SM can have at a time; 0 where that is not known."""
    if not threads or arch not in SM_SHARED_KB:
        return 0
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = SM_REGISTERS // (of_warp * threads // 32)
    by_shared = (SM_SHARED_KB[arch] << 10) // (shared + 1024)
    return min(by_registers, by_shared, SM_WARPS[arch] * 32 // threads)


def counted(binary: Path, kernels: dict[str, Kernel]) -> Counts:
    """The counts of an object's functions; cuobjdump takes seconds, so they are kept beside it."""
    sources = (binary, Path(__file__), Path(device_loops.__file__))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    kept = binary.with_suffix(".counts.json")
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["key"] == key:
            return {(e, arch): (tuple(n), tuple(loop)) for e, arch, n, loop in found["counts"]}
    counts = {
        (entry, arch): (instructions(listing), tile(kernels[entry], arch, listing))
        for (entry, arch), listing in listings(binary).items()
        if entry in kernels
    }
    rows = [(*function, *count) for function, count in counts.items()]
    kept.write_text(json.dumps({"key": key, "counts": rows}))
    return counts


def listings(binary: Path) -> dict[tuple[str, str], list[str]]:
    """The lines of an object's functions, by mangled name and architecture."""
    done = subprocess.run(
        [cuobjdump(), "-sass", str(binary)], capture_output=True, text=True, check=True
    )
    found: dict[tuple[str, str], list[str]] = {}
    arch, current = "", []
    for line in done.stdout.splitlines():
        match = SASS_FUNCTION.search(line)
        if match and match[2]:
            arch = match[2]
        elif match:
            current = found.setdefault((match[1], arch), [])
        else:
            current.append(line)
    return found


def instructions(listing: list[str]) -> tuple[int, ...]:
    """How many of INSTRUCTIONS a function has."""
    return tuple(sum(f" {name}." in line for line in listing) for name in INSTRUCTIONS)


def tile(each: Kernel, arch: str, listing: list[str]) -> tuple[int, ...]:
    """Instructions for 64 x 64 scores, where they are counted."""
    name, forms = each.name.partition("<")[0], each.name.rstrip(">").split(", ")
    part = f"{name}, {forms[-1]}"
    products = device_loops.PRODUCTS.get(part, device_loops.PRODUCTS.get(name))
    if arch not in COUNTED or products is None:
        return ()
    return device_loops.per_tile(device_loops.parsed(listing), products, each.head_dim)


def committed() -> dict[tuple[str, str], int]:
    """The instructions of a tile in the table, by kernel and architecture."""
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    return {(row["kernel"], row["architecture"]): int(row["total"]) for row in rows if row["total"]}


def nvcc_release() -> str:
    """The version of the toolkit that compiled, as `13.0`; "" where there is none."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", said)
    return match[1] if match else ""


def cuobjdump() -> str:
    """The cuobjdump of the toolkit, or Triton's."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None:
        raise ValueError("cuda resources: no cuobjdump: install the CUDA toolkit's, or triton")
    return found


def demangled(names: list[str]) -> dict[str, str]:
    """C++ names as they are written."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernel(signature: str) -> Kernel:
    """The kernel of a signature with its template arguments."""
    signature = signature.replace("attnfast::cuda::", "").replace("(anonymous namespace)::", "")
    match = re.search(r"(\w+)_kernel(?:<([^>]*)>)?", signature)
    if match is None:
        raise ValueError(f"cuda resources: {signature} is not a kernel of ours")
    name, dtype, *rest = match[1], *(match[2] or "").split(", ")
    head_dim, *flags = rest or ["0"]
    forms = [of[flag] for of, flag in zip(FORMS.get(name, []), flags, strict=True)]
    forms = sorted(filter(None, forms), key=ORDER.index)
    words = [{"BFloat16": "bf16", "Float16": "fp16", "": ""}[dtype], head_dim if rest else ""]
    inside = ", ".join(word for word in (*words, *forms) if word)
    return Kernel(f"{name}<{inside}>" if inside else name, int(head_dim))


def by_kernel(usages: Usages) -> list[tuple[Kernel, dict[str, Usage]]]:
    """The kernels by head dim and name."""
    return sorted(usages.items(), key=lambda item: (item[0].head_dim, item[0].name))


def architectures(usages: Usages) -> list[str]:
    """Those that were compiled for, the lowest first."""
    found = {arch for by_arch in usages.values() for arch in by_arch}
    return sorted(found, key=lambda arch: int(arch.removeprefix("sm_")))


def csv_of(usages: Usages) -> str:
    """One line for every kernel and every architecture that has code for it."""
    columns = ("kernel,architecture,shared,registers,spilled,blocks", *INSTRUCTIONS[:-1])
    lines = [",".join((*columns, *device_loops.NAMES))]
    for each, by_arch in by_kernel(usages):
        for arch in architectures(usages):
            usage = by_arch.get(arch)
            if usage is None or usage.empty:
                continue
            numbers: list[int | str] = [usage.shared, usage.registers, usage.spills, usage.blocks]
            numbers += usage.instructions[:-1]
            numbers += usage.tile or [""] * len(device_loops.NAMES)
            lines.append(f'"{each.name}",{arch},' + ",".join(map(str, numbers)))
    return "\n".join([*lines, ""])


def table(usages: Usages) -> str:
    """The usages as Markdown, one row a kernel; bf16 alone where fp16 needs the same or less."""
    archs = architectures(usages)
    lines = [f"| kernel | shared KB | {' | '.join(archs)} |", "| --- |" + " --- |" * len(archs)]
    lines[1] += " --- |"
    for each, by_arch in by_kernel(usages):
        cells = [cell(by_arch.get(arch)) for arch in archs]
        shared = max(usage.shared for usage in by_arch.values()) / 1024
        lines.append(f"| `{each.name}` | {shared:.4g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(usage: Usage | None) -> str:
    """One usage's registers, and spilled bytes where there are any; a dash where it has no code."""
    if usage is None or usage.empty:
        return "-"
    return f"{usage.registers}, spills {usage.spills}" if usage.spills else str(usage.registers)


def wrong(usages: Usages) -> Iterator[str]:
    """What breaks the rules."""
    for each, by_arch in usages.items():
        small = "small" in each.name
        for arch, usage in by_arch.items():
            turing = arch == TURING
            at = f"{each.name} on {arch}"
            limit = SHARED_KB.get(arch, LEAST_SHARED_KB)
            too_large = usage.shared > limit << 10
            if usage.empty:  # rightly: what host code never launches there
                never = ("bf16" in each.name or each.head_dim) and not small if turing else small
                if not (never or too_large):
                    yield f"{at} has no code"
                continue
            if (turing and "bf16" in each.name) or (small and not turing):
                yield f"{at} has code that is never run"
            allowed = SPILLS.get(each.without_dtype(), 0)
            if usage.spills > allowed and each.head_dim <= WITHOUT_SPILLS:
                yield f"{at} spills {usage.spills} bytes"
            if too_large:
                yield f"{at} needs {usage.shared} bytes of shared memory, of {limit} KB"
            mma, ldmatrix, copies, _ = usage.instructions
            if each.head_dim and not (mma and ldmatrix and bool(copies) != turing):
                yield f"{at} has {dict(zip(INSTRUCTIONS, usage.instructions, strict=True))}"


def grown(usages: Usages, before: dict[tuple[str, str], int]) -> Iterator[str]:
    """The loops that take more instructions than the table says."""
    for each, by_arch in usages.items():
        for arch, usage in by_arch.items():
            was = before.get((each.name, arch), 0)
            now = usage.tile[-1] if usage.tile else 0
            if was and (not now or now > GROWTH * was):
                yield f"{each.name} on {arch} takes {now} instructions for a tile, not {was}"


if __name__ == "__main__":
    sys.exit(main())
