"""What every CUDA kernel needs on every architecture, as the compiler said when it was built.

    python tools/cuda_resources.py            print the table
    python tools/cuda_resources.py --write    put it into docs/cuda.md

Reads the logs and objects that `make cuda` leaves in build/native/cuda. Registers and spills are
ptxas's words; instructions are counted in the code that cuobjdump shows, which comes with the CUDA
toolkit and with Triton. Fails if a kernel of head dims up to 128 spills, or a product kernel lacks
the tensor cores' instructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "native" / "cuda"
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- resources:begin -->", "<!-- resources:end -->"
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS")  # tensor cores, ldmatrix, cp.async
WITHOUT_SPILLS = 128  # head dims up to here

ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill"
    r" loads.*?Used (\d+) registers",
    re.DOTALL,
)
SASS_FUNCTION = re.compile(r"Function : (\S+)|arch = (sm_\d+)")


class Kernel(NamedTuple):
    """One kernel's name, as `attention_fwd<bf16, 64, plain>`, and its head dim, 0 for any."""

    name: str
    head_dim: int


class Usage(NamedTuple):
    """What a kernel needs on one architecture."""

    registers: int
    spills: int  # bytes stored and loaded
    instructions: tuple[int, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.name}")
    try:
        write = parser.parse_args(arguments).write
        usages = measured()
        text = table(usages)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    else:
        print(text)
    faults = list(wrong(usages))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def measured() -> dict[Kernel, dict[str, Usage]]:
    """Every kernel's usage by architecture.

    Raises:
        ValueError: Nothing was built, or there is no cuobjdump.
    """
    logs = sorted(OBJECTS.glob("*.o.log"))
    if not logs:
        raise ValueError(f"cuda resources: no {OBJECTS}/*.o.log: run `make cuda` first")
    usages: dict[Kernel, dict[str, Usage]] = {}
    for log in logs:
        found = ENTRY.findall(log.read_text())
        if not found:
            continue
        counts = instructions(log.with_suffix(""))
        names = demangled([entry for entry, *_ in found])
        for entry, arch, stores, loads, registers in found:
            usages.setdefault(kernel(names[entry]), {})[arch] = Usage(
                int(registers), int(stores) + int(loads), counts[entry, arch]
            )
    return usages


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
    name, *rest = match[1], *(match[2] or "").split(", ")
    dtype = {"BFloat16": "bf16", "Float16": "fp16", "": ""}[rest[0]]
    head_dim = int(rest[1]) if len(rest) > 1 else 0
    words = [dtype, str(head_dim) if head_dim else ""]
    if len(rest) > 2:
        words.append("plain" if rest[2] == "true" else "options")
    if len(rest) > 4 and rest[3:5] != ["true", "true"]:
        words.append("dk" if rest[3] == "true" else "dv")
    inside = ", ".join(word for word in words if word)
    return Kernel(f"{name}<{inside}>" if inside else name, head_dim)


def table(usages: dict[Kernel, dict[str, Usage]]) -> str:
    """The usages as Markdown, one row a kernel; bf16 alone where fp16 needs the same."""
    archs = sorted({arch for by_arch in usages.values() for arch in by_arch})
    heads = [f"{arch}: registers, spilled bytes, {', '.join(INSTRUCTIONS)}" for arch in archs]
    lines = [f"| kernel | {' | '.join(heads)} |", "| --- |" + " --- |" * len(archs)]
    for each, by_arch in sorted(usages.items(), key=lambda item: (item[0].head_dim, item[0].name)):
        twin = usages.get(Kernel(each.name.replace("fp16", "bf16"), each.head_dim))
        if "fp16" in each.name and twin == by_arch:
            continue
        cells = [cell(by_arch[arch]) if arch in by_arch else "" for arch in archs]
        lines.append(f"| `{each.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(usage: Usage) -> str:
    """One usage's numbers."""
    return ", ".join(map(str, (usage.registers, usage.spills, *usage.instructions)))


def wrong(usages: dict[Kernel, dict[str, Usage]]) -> Iterator[str]:
    """What breaks the rules."""
    for each, by_arch in usages.items():
        for arch, usage in by_arch.items():
            if usage.spills and each.head_dim <= WITHOUT_SPILLS:
                yield f"{each.name} on {arch} spills {usage.spills} bytes"
            if each.head_dim and not all(usage.instructions):
                yield f"{each.name} on {arch} lacks one of {INSTRUCTIONS}: {usage.instructions}"


if __name__ == "__main__":
    sys.exit(main())
