"""Stand-ins for the CUDA libraries, so that a CUDA build of torch can be imported without them.

torch's wheels for Linux on the registry are CUDA builds, whose libraries are several GB more and of
no use on a machine without a GPU. Each library that is named but absent is replaced by one that
defines what torch wants of it, under the same name and symbol versions. Every function returns 100,
in the CUDA runtime "no device"; nothing calls the others on such a machine.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

NVIDIA = re.compile(r"lib(cu|nv|nccl)")
SYMBOLS = re.compile(r"(cu|nv|nccl|__cuda)")
SOURCE = "int {name}(void) {{ return 100; }}"


class Library(NamedTuple):
    """What one shared library says of itself."""

    needed: set[str]  # the libraries it names
    defined: set[str]  # the symbols it exports
    wanted: dict[str, dict[str, set[str]]]  # library: symbol version: symbols
    unversioned: set[str]  # symbols wanted from whichever library has them


def read(path: Path) -> Library:
    """The dynamic section and dynamic symbols of a shared library."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        dynamic = elf.get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
        versions = dict(_versions(elf.get_section_by_name(".gnu.version_r")))
        indices = elf.get_section_by_name(".gnu.version")
        library = Library(needed, set(), defaultdict(lambda: defaultdict(set)), set())
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            if symbol["st_shndx"] != "SHN_UNDEF":
                library.defined.add(symbol.name)
                continue
            owner = versions.get(indices.get_symbol(i)["ndx"]) if indices else None
            if owner:
                library.wanted[owner[0]][owner[1]].add(symbol.name)
            else:
                library.unversioned.add(symbol.name)
        return library


def _versions(section: GNUVerNeedSection | None) -> Iterator[tuple[int, tuple[str, str]]]:
    """Version index: the library that defines it, and its name."""
    for need, versions in section.iter_versions() if section else ():
        for version in versions:
            yield version["vna_other"], (need.name, version.name)


def make(torch_lib: Path, folder: Path, compiler: str) -> list[str]:
    """Write a stub of every CUDA library that torch's libraries name and do not have.

    Args:
        torch_lib: the folder of torch's libraries.
        folder: where the stubs go, for LD_LIBRARY_PATH.
        compiler: the C compiler's command.

    Returns:
        The names of the libraries made.
    """
    paths = sorted(torch_lib.glob("*.so*"))
    libraries = [read(path) for path in paths]
    present = {path.name for path in paths}
    named = set().union(*(library.needed for library in libraries)) - present
    missing = sorted(name for name in named if NVIDIA.match(name))
    defined = set().union(*(library.defined for library in libraries))
    folder.mkdir(parents=True, exist_ok=True)
    for name in missing:
        versions: dict[str, set[str]] = defaultdict(set)
        users = [library for library in libraries if name in library.needed]
        for library in users:
            for version, symbols in library.wanted.get(name, {}).items():
                versions[version] |= symbols
        if not versions:  # then any symbol without a version may be its own
            loose = set().union(*(library.unversioned for library in users)) - defined
            versions[""] = {symbol for symbol in loose if SYMBOLS.match(symbol)}
        compile_stub(folder / name, versions, compiler)
    return missing


def compile_stub(target: Path, versions: dict[str, set[str]], compiler: str) -> None:
    """One stub: a function for every symbol, under its version where it has one."""
    source, script = target.with_suffix(".c"), target.with_suffix(".map")
    symbols = sorted(set().union(*versions.values()))
    source.write_text("\n".join(SOURCE.format(name=name) for name in symbols) + "\n")
    script.write_text(
        "".join(
            f"{version} {{ global: {'; '.join(sorted(names))}; }};\n"
            for version, names in versions.items()
            if version
        )
    )
    command = [compiler, "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{target.name}"]
    if any(versions):
        command.append(f"-Wl,--version-script={script}")
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    source.unlink()
    script.unlink()
