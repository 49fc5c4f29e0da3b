"""The tree that Hugging Face's `kernels` library loads: build/hub, which `make hub` makes.

It holds the package twice, each time under a name and an operators' namespace of this build alone,
so that several builds, and an installed attnfast, live in one process:

    build/torch-stable-abi210-cpu-x86_64-linux/   with the native library of the CPU's kernels
    build/torch-universal/                        without: Triton's kernels, and the reference

A namespace ends in a digest of all that the build is made of.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import shutil
import sys
from pathlib import Path

from elftools.elf.elffile import ELFFile

from attnfast._version import __version__
from csrc import build

ROOT = Path(__file__).resolve().parent.parent
NAME = "attnfast"
VERSION = 1  # of what a kernel offers: the one that transformers asks for
KERNELS_VERSION = "0.17.2"  # of the library, with which the tree is tested
ABI = "".join(map(str, build.OLDEST_TORCH))
NATIVE = f"torch-stable-abi{ABI}-cpu-{platform.machine()}-linux"
UNIVERSAL = "torch-universal"
SUFFIXES = {".py", ".cpp", ".h", ".html"}
OFFERED = (
    "\nfrom .integrations.flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401\n"
)
MANYLINUX = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools.hub", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "hub", help="the tree's folder"
    )
    out: Path = parser.parse_args(arguments).out
    shutil.rmtree(out, ignore_errors=True)
    unique = digest()
    write(out, UNIVERSAL, f"_{NAME}_universal_{unique}", "cuda")
    namespace = f"_{NAME}_cpu_{unique}"
    library = build.hub(namespace)
    write(out, NATIVE, namespace, "cpu", library)
    needs = needed(library)
    (out / "README.md").write_text(card(needs))
    shutil.copy2(ROOT / "LICENSE", out)
    print(f"{out}: {NATIVE} needs {shown(needs)}, {manylinux(needs)}", file=sys.stderr)


def digest() -> str:
    """Eight digits of the sources' SHA-256."""
    folders = (ROOT / NAME, ROOT / "kernels", ROOT / "csrc")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES]
    found = hashlib.sha256()
    for path in (*sorted(files), Path(__file__)):
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


def write(
    out: Path, variant: str, namespace: str, backend: str, library: Path | None = None
) -> None:
    """Write one variant: the package, its library and what `kernels` reads about them."""
    folder = out / "build" / variant
    for source in (ROOT / NAME, ROOT / "kernels"):
        for path in source.rglob("*.py"):
            inside = path.relative_to(ROOT / NAME if source.name == NAME else ROOT)
            if inside.name != "__main__.py":
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(rewritten(inside, path.read_text(), namespace))
    for path in (ROOT / NAME).rglob("*.html"):
        shutil.copy2(path, folder / path.relative_to(ROOT / NAME))
    if library:
        shutil.copy2(library, folder / "_native.so")
    metadata = {
        "name": NAME,
        "id": namespace,
        "version": VERSION,
        "kernels-minver": KERNELS_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def rewritten(inside: Path, text: str, namespace: str) -> str:
    """A module of ours as one of a package of any name, with a namespace for its operators."""
    up = "." * len(inside.parts)
    ours = rf"^( *from ){NAME}(?:\.([\w.]+))? import\b"
    text = re.sub(ours, rf"\1{up}\2 import", text, flags=re.M)
    if inside == Path("ops.py"):
        text, count = re.subn(
            rf'^NAMESPACE = "{NAME}"', f'NAMESPACE = "{namespace}"', text, flags=re.M
        )
        assert count == 1, "attnfast/ops.py must say NAMESPACE once"
    if inside == Path("__init__.py"):
        text += OFFERED
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        absolute = {name for name in names if name.partition(".")[0] in (NAME, "kernels")}
        assert not absolute, f"{inside} must import ours relatively, got {absolute}"
    return text


def needed(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest version that a library wants of every family: {"GLIBC": (2, 28), ...}."""
    newest: dict[str, tuple[int, ...]] = {}
    with library.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".gnu.version_r")
        versions = [x.name for _, wanted in section.iter_versions() for x in wanted]
    for version in versions:
        family, _, numbers = version.rpartition("_")
        newest[family] = max(newest.get(family, ()), tuple(map(int, numbers.split("."))))
    return newest


def shown(needs: dict[str, tuple[int, ...]]) -> str:
    """Versions as they are written."""
    families = [name for name in needs if name in MANYLINUX]
    return ", ".join(f"{name} {'.'.join(map(str, needs[name]))}" for name in sorted(families))


def manylinux(needs: dict[str, tuple[int, ...]]) -> str:
    """Whether that is manylinux_2_28, as the Hub wants it."""
    newer = [name for name, most in MANYLINUX.items() if needs.get(name, ()) > most]
    return f"newer than manylinux_2_28 in {', '.join(newer)}" if newer else "manylinux_2_28"


def card(needs: dict[str, tuple[int, ...]]) -> str:
    """The repository's README."""
    return f"""---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# attnfast

Exact softmax attention, forward and backward, in memory linear in sequence length: attnfast
{__version__} as a kernel. `attention`, `varlen_attention`, `decode_attention`, `MultiheadAttention`
and all else that the package has; `flash_attn_func` and `flash_attn_varlen_func` for transformers.

| variant | kernels | needs |
| --- | --- | --- |
| `{NATIVE}` | C++ for this CPU, fp32, bf16 and fp16 | {shown(needs)} ({manylinux(needs)}) |
| `{UNIVERSAL}` | Triton for GPUs, and a reference in PyTorch for the rest | Triton 3.6 or later |

Both need Python 3.10 and torch {".".join(map(str, build.OLDEST_TORCH))}, or later.
"""


if __name__ == "__main__":
    main()
