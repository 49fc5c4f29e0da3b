"""What every CUDA kernel needs on every architecture, as the compiler said when it was built.

    python tools/cuda_resources.py            print the table
    python tools/cuda_resources.py --write    write docs/cuda-resources.csv and into docs/cuda.md

Reads the logs and objects that `make cuda` leaves in build/native/cuda. Registers and spills are
ptxas's words; instructions are counted in the code that cuobjdump shows, which comes with the CUDA
toolkit and with Triton; shared memory is what kernels are launched with (cuda_shared.cpp). Fails if
a kernel of head dims up to 128 spills, exceeds an architecture's shared memory, lacks the tensor
cores' instructions, or has no code where it should.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "native" / "cuda"
PAGE = ROOT / "docs" / "cuda.md"
TABLE = ROOT / "docs" / "cuda-resources.csv"
BEGIN, END = "<!-- resources:begin -->", "<!-- resources:end -->"
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS", "STG")  # tensor cores, ldmatrix, cp.async, any output
TURING = "sm_75"  # no bf16, no cp.async; it alone has the small forms
WITHOUT_SPILLS = 128  # head dims up to here
# The most shared memory of a block, in KB.
SHARED_KB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}
LEAST_SHARED_KB = 99  # of all later ones, sm_120 among them

ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill"
    r" loads.*?Used (\d+) registers",
    re.DOTALL,
)
SASS_FUNCTION = re.compile(r"Function : (\S+)|arch = (sm_\d+)")
# What a kernel's boolean template arguments mean, where they are true and where they are false.
FORMS = {
    "attention_fwd": [("plain", "options")],
    "attention_bwd_keys": [("plain", "options"), ("", "dv"), ("", "dk"), ("small", "")],
    "attention_bwd_queries": [("plain", "options"), ("small", "")],
    "attention_decode": [("small", "")],
}
ORDER = ("plain", "options", "small", "dk", "dv")


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

    @property
    def empty(self) -> bool:
        """Whether the architecture has no code for the kernel: it stores nothing."""
        return not self.instructions[-1]


Usages = dict[Kernel, dict[str, Usage]]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} and {PAGE.name}")
    try:
        write = parser.parse_args(arguments).write
        usages = measured()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if write:
        TABLE.write_text(csv_of(usages))
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(usages)}\n{END}{rest.split(END)[1]}")
    else:
        print(table(usages))
    faults = list(wrong(usages))
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
    shared = shared_bytes()
    for log in logs:
        found = ENTRY.findall(log.read_text())
        if not found:
            continue
        counts = instructions(log.with_suffix(""))
        names = demangled([entry for entry, *_ in found])
        for entry, arch, stores, loads, registers in found:
            each = kernel(names[entry])
            if each.head_dim and each.without_dtype() not in shared:
                raise ValueError(f"cuda resources: cuda_shared.cpp does not know {each.name}")
            usages.setdefault(each, {})[arch] = Usage(
                int(registers),
                int(stores) + int(loads),
                counts[entry, arch],
                shared.get(each.without_dtype(), 0),
            )
    return usages


def shared_bytes() -> dict[str, int]:
    """The shared memory that kernels are launched with, by their names without a dtype."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    source = Path(__file__).with_name("cuda_shared.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/cuda_shared"
        flags = ["-std=c++17", "-DATTNFAST_EMULATOR", f"-I{ROOT / 'csrc'}", "-o", program]
        subprocess.run([*compiler, *flags, str(source)], check=True)
        said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    lines = [line.rsplit(" ", 2) for line in said.splitlines()]
    return {name: int(shared) for name, _, shared in lines}


def instructions(binary: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """How many of INSTRUCTIONS an object's functions have, by mangled name and architecture."""
    done = subprocess.run(
        [cuobjdump(), "-sass", str(binary)], capture_output=True, text=True, check=True
    )
    counts: dict[tuple[str, str], list[int]] = {}
    arch, current = "", [0] * len(INSTRUCTIONS)
    for line in done.stdout.splitlines():
        match = SASS_FUNCTION.search(line)
        if match and match[2]:
            arch = match[2]
        elif match:
            current = counts.setdefault((match[1], arch), [0] * len(INSTRUCTIONS))
        else:
            for i, name in enumerate(INSTRUCTIONS):
                current[i] += f" {name}." in line
    return {key: tuple(numbers) for key, numbers in counts.items()}


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
    forms = [
        yes if flag == "true" else no
        for (yes, no), flag in zip(FORMS.get(name, []), flags, strict=True)
    ]
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
    lines = ["kernel,architecture,shared,registers,spilled," + ",".join(INSTRUCTIONS[:-1])]
    for each, by_arch in by_kernel(usages):
        for arch in architectures(usages):
            usage = by_arch.get(arch)
            if usage is None or usage.empty:
                continue
            numbers = (usage.shared, usage.registers, usage.spills, *usage.instructions[:-1])
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
            if usage.spills and each.head_dim <= WITHOUT_SPILLS:
                yield f"{at} spills {usage.spills} bytes"
            if too_large:
                yield f"{at} needs {usage.shared} bytes of shared memory, of {limit} KB"
            mma, ldmatrix, copies, _ = usage.instructions
            if each.head_dim and not (mma and ldmatrix and bool(copies) != turing):
                yield f"{at} has {dict(zip(INSTRUCTIONS, usage.instructions, strict=True))}"


if __name__ == "__main__":
    sys.exit(main())
