"""Building the CUDA kernels: what is said where they are left out, and the table of resources."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnfast.backends import cuda
from csrc import build
from tools import cuda_resources, device_loops
from tools.cuda_resources import Kernel, Usage

ROOT = Path(__file__).resolve().parent.parent


def build_cuda(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_cuda` in a folder that has the sources' tree but nothing built."""
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "NVCC")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_cuda"],
        cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_left_out_on_request(tmp_path: Path) -> None:
    done = build_cuda(tmp_path, ATTNFAST_CUDA="0")
    assert done.returncode == 0
    assert done.stderr == "attnfast: CUDA kernels left out, as ATTNFAST_CUDA=0 asks\n"


def test_left_out_without_nvcc(tmp_path: Path) -> None:
    done = build_cuda(tmp_path, NVCC="/nonexistent/nvcc")
    assert done.returncode == 0
    assert done.stderr.startswith("attnfast: no nvcc, so no CUDA kernels; install the CUDA toolkit")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("archs", ["70", "sm_90", "80 x"])
def test_architectures(tmp_path: Path, archs: str) -> None:
    done = build_cuda(tmp_path, NVCC=sys.executable, ATTNFAST_CUDA_ARCHS=archs)
    assert done.returncode == 1
    assert done.stderr.startswith("attnfast: ATTNFAST_CUDA_ARCHS must be all or numbers from 75 on")
    assert done.stderr.endswith(f"got '{archs}'\n")


def test_architectures_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, archs in (("all", [75, 80, 90, 100, 120]), ("", [80, 90]), ("90,80", [80, 90])):
        monkeypatch.setenv("ATTNFAST_CUDA_ARCHS", asked)
        assert build.cuda_archs() == archs


def test_the_backend_takes_the_head_dims_that_are_compiled() -> None:
    assert max(build.cuda_head_dims()) == cuda.MAX_HEAD_DIM


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("attention_fwd_kernel<BFloat16, 64, (Form)0>", "attention_fwd<bf16, 64, plain>"),
        ("attention_fwd_kernel<Float16, 64, (Form)1>", "attention_fwd<fp16, 64, masked>"),
        (
            "attention_bwd_keys_kernel<Float16, 256, (Form)2, true, false, false>",
            "attention_bwd_keys<fp16, 256, options, dk>",
        ),
        (
            "attention_bwd_keys_kernel<Float16, 128, (Form)0, false, true, true>",
            "attention_bwd_keys<fp16, 128, plain, small, dv>",
        ),
        (
            "attention_bwd_keys_kernel<Float16, 64, (Form)0, true, true, false>",
            "attention_bwd_keys<fp16, 64, plain>",
        ),
        (
            "attention_bwd_queries_kernel<BFloat16, 64, (Form)3, false>",
            "attention_bwd_queries<bf16, 64, blocks>",
        ),
        ("attention_fwd_kernel<BFloat16, 64, (Form)4>", "attention_fwd<bf16, 64, plain blocks>"),
        ("attention_decode_kernel<Float16, 256, true>", "attention_decode<fp16, 256, small>"),
        ("attention_bwd_short_kernel<BFloat16, 64>", "attention_bwd_short<bf16, 64>"),
        ("attention_bwd_fused_kernel<BFloat16, 64>", "attention_bwd_fused<bf16, 64>"),
        ("attention_bwd_rows_kernel<Float16>", "attention_bwd_rows<fp16>"),
        ("attention_bwd_sinks_kernel", "attention_bwd_sinks"),
    ],
)
def test_kernels_are_named_by_their_templates(template: str, name: str) -> None:
    qualified = re.sub(r"(BFloat16|Float16|Form)", r"attnfast::cuda::\1", template)
    signature = f"void attnfast::cuda::(anonymous namespace)::{qualified}(attnfast::cuda::X)"
    head_dim = re.search(r", (\d+)", template)
    found = cuda_resources.kernel(signature)
    assert found == Kernel(name, int(head_dim[1]) if head_dim else 0)


def test_shared_memory_is_known_without_the_dtype() -> None:
    known = cuda_resources.launched()
    assert known["attention_fwd<64, plain>"] == (128, (128 + 2 * 128) * 64 * 2)
    assert known["attention_bwd_keys<128, options, small, dk>"][1] <= 64 << 10
    assert known["attention_bwd_short<96>"][1] <= 99 << 10 < known["attention_bwd_short<128>"][1]
    assert known["attention_bwd_fused<64>"][1] <= 99 << 10 < known["attention_bwd_fused<128>"][1]
    assert Kernel("attention_fwd<bf16, 64, plain>", 64).without_dtype() in known


def test_what_breaks_the_rules_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    code, none = (8, 8, 8, 8), (0, 0, 0, 0)
    sound, spilling = Usage(200, 0, code, 9000), Usage(255, 16, code)
    monkeypatch.setattr(cuda_resources, "SPILLS", {"few<128>": 16, "many<128>": 15})
    usages = {
        Kernel("a<bf16, 128>", 128): {
            "sm_80": sound,
            "sm_90": spilling,
            "sm_75": Usage(8, 0, none),
        },
        Kernel("b<bf16, 256>", 256): {"sm_80": spilling},
        Kernel("few<bf16, 128>", 128): {"sm_80": spilling},
        Kernel("many<bf16, 128>", 128): {"sm_80": spilling},
        Kernel("c<bf16, 64>", 64): {"sm_80": Usage(100, 0, (8, 8, 0, 8))},
        Kernel("d<fp16, 64>", 64): {"sm_75": sound, "sm_120": Usage(99, 0, code, 100 << 10)},
        Kernel("e<fp16, 96, small>", 96): {"sm_75": Usage(8, 0, none), "sm_80": sound},
        Kernel("f<fp16, 96, small>", 96): {
            "sm_75": Usage(9, 0, (8, 8, 0, 8)),
            "sm_80": Usage(8, 0, none),
        },
        Kernel("short<bf16, 128>", 128): {
            "sm_80": Usage(200, 0, code, 129 << 10),
            "sm_86": Usage(200, 0, code, 129 << 10),
            "sm_120": Usage(8, 0, none, 129 << 10),
        },
        Kernel("rows", 0): {"sm_80": Usage(50, 0, (0, 0, 0, 8)), "sm_75": Usage(8, 0, none)},
        Kernel("g<bf16, 64>", 64): {"sm_80": Usage(8, 0, none), "sm_75": sound},
    }
    assert list(cuda_resources.wrong(usages)) == [
        "a<bf16, 128> on sm_90 spills 16 bytes",
        "many<bf16, 128> on sm_80 spills 16 bytes",
        "c<bf16, 64> on sm_80 has {'HMMA': 8, 'LDSM': 8, 'LDGSTS': 0, 'STG': 8}",
        "d<fp16, 64> on sm_75 has {'HMMA': 8, 'LDSM': 8, 'LDGSTS': 8, 'STG': 8}",
        f"d<fp16, 64> on sm_120 needs {100 << 10} bytes of shared memory, of 99 KB",
        "e<fp16, 96, small> on sm_75 has no code",
        "e<fp16, 96, small> on sm_80 has code that is never run",
        f"short<bf16, 128> on sm_86 needs {129 << 10} bytes of shared memory, of 99 KB",
        "rows on sm_75 has no code",
        "g<bf16, 64> on sm_80 has no code",
        "g<bf16, 64> on sm_75 has code that is never run",
        "g<bf16, 64> on sm_75 has {'HMMA': 8, 'LDSM': 8, 'LDGSTS': 8, 'STG': 8}",
    ]


def test_the_committed_table_is_of_all_architectures_and_without_faults() -> None:
    """Read back from the file: the library of the wheel is built for these."""
    usages: cuda_resources.Usages = {}
    with cuda_resources.TABLE.open() as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        assert len({*columns}) == len(columns) > 0
        for row in rows:
            head_dim = re.search(r"(?<= )\d+", row["kernel"])
            each = Kernel(row["kernel"], int(head_dim[0]) if head_dim else 0)
            numbers = [int(row[name]) for name in cuda_resources.INSTRUCTIONS[:-1]]
            tile = tuple(int(row[name]) for name in device_loops.NAMES if row[name])
            usages.setdefault(each, {})[row["architecture"]] = Usage(
                int(row["registers"]), int(row["spilled"]), (*numbers, 1), int(row["shared"]),
                int(row["blocks"]), tile,
            )  # fmt: skip
    assert not list(cuda_resources.wrong(usages))
    assert cuda_resources.architectures(usages) == [f"sm_{arch}" for arch in build.CUDA_ARCHS]
    assert {each.head_dim for each in usages} == {0, *build.cuda_head_dims()}
    assert "ATTNFAST_CUDA_ARCHS ?= all" in (ROOT / "Makefile").read_text()
    known = cuda_resources.launched()
    for each, by_arch in usages.items():
        for arch, usage in by_arch.items():
            threads, shared = known[each.without_dtype()] if each.head_dim else (0, 0)
            assert usage.shared == shared
            fitting = cuda_resources.blocks_of_sm(arch, usage.registers, threads, shared)
            assert usage.blocks == fitting
            counted = each.name.startswith(tuple(device_loops.PRODUCTS))
            assert bool(usage.tile) == (counted and arch in cuda_resources.COUNTED), each.name
    assert cuda_resources.csv_of(usages) == cuda_resources.TABLE.read_text()
    page = cuda_resources.PAGE.read_text()
    assert cuda_resources.table(usages) in page


def test_warnings_are_errors_in_our_builds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another nvcc warns of other things, and a user could do nothing about them."""
    monkeypatch.setattr(build, "cuda_libraries", lambda nvcc: Path("lib64"))
    assert "Werror" not in build.native_file("nvcc")
    makefile = (ROOT / "Makefile").read_text()
    assert "\ncuda wheel: export NVCC_APPEND_FLAGS += -Werror=all-warnings\n" in makefile


# A turn of a loop as cuobjdump shows it, with the positions of an edge (0x70) and the copies of one
# (0x30), a loop of a few instructions after it, and a way to other blocks.
LOOP = """
        Function : made_up
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GT.AND P0, PT, R2, R3, PT ;
        /*0020*/               @P0 BRA 0x50 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], [R6.64], P1 ;
        /*0040*/                   IADD3 R8, R8, 0x1, RZ ;
        /*0048*/                   BRA 0x60 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R4], [R6.64] ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0068*/              @!P1 BRA 0x80 ;
        /*0070*/                   FSEL R8, R8, -INF , P2 ;
        /*0080*/                   BSSY B0, 0xd0 ;
        /*0090*/              @!P3 BRA 0xc0 ;
        /*00a0*/                   LDG.E.128.STRONG.GPU R20, [R22.64] ;
        /*00b0*/                   FADD R8, R8, R20 ;
        /*00c0*/                   BSYNC B0 ;
        /*00d0*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*00e0*/                   MUFU.EX2 R8, R8 ;
        /*00f0*/              @!P4 BRA 0x10 ;
        /*0100*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0110*/              @!P5 BRA 0x100 ;
        /*0120*/                   EXIT ;
"""


def tile_of(listing: str, products: int = 2, head_dim: int = 16) -> dict[str, int]:
    code = device_loops.parsed(listing.splitlines())
    return dict(
        zip(device_loops.NAMES, device_loops.per_tile(code, products, head_dim), strict=True)
    )


def test_a_tile_s_instructions_are_those_of_a_turn_in_the_middle() -> None:
    """Two products a turn, of 64 that 64 x 64 scores take: 32 turns."""
    found = tile_of(LOOP)
    assert found == {
        "mma": 64, "ldmatrix": 0, "copies": 32, "exchange": 0, "global": 32, "mufu": 32,
        "float": 32, "control": 6 * 32, "integer": 32, "total": 13 * 32,
    }  # fmt: skip
    assert tile_of(LOOP, products=4)["total"] == 2 * found["total"]
    assert tile_of(LOOP, head_dim=32)["total"] == 2 * found["total"]

    more = "        /*00d8*/                   FMUL R8, R8, R9 ;\n        /*00e0*/"
    assert tile_of(LOOP.replace("        /*00e0*/", more))["float"] == 64
    at_edges = "        /*0078*/                   FMUL R8, R8, R9 ;\n        /*0080*/"
    assert tile_of(LOOP.replace("        /*0080*/", at_edges)) == found
    assert not device_loops.per_tile(device_loops.parsed(LOOP.splitlines()[:-6]), 2, 16)
    assert not device_loops.per_tile([], 2, 16)


def test_a_loop_that_grows_is_a_fault() -> None:
    def usages(total: int) -> cuda_resources.Usages:
        tile = (*[0] * (len(device_loops.NAMES) - 1), total)
        return {Kernel("a<bf16, 64>", 64): {"sm_80": Usage(9, 0, (), 0, 1, tile), "sm_90": BARE}}

    BARE = Usage(9, 0)
    before = {("a<bf16, 64>", "sm_80"): 1000}
    assert not list(cuda_resources.grown(usages(1020), before))
    assert not list(cuda_resources.grown(usages(500), before))
    assert not list(cuda_resources.grown(usages(5000), {}))
    said = "a<bf16, 64> on sm_80 takes {} instructions for a tile, not 1000"
    assert list(cuda_resources.grown(usages(1021), before)) == [said.format(1021)]
    assert list(cuda_resources.grown({Kernel("a<bf16, 64>", 64): {"sm_80": BARE}}, before)) == [
        said.format(0)
    ]


def test_how_many_blocks_an_sm_has() -> None:
    blocks = cuda_resources.blocks_of_sm
    assert blocks("sm_80", 255, 128, 48 << 10) == 2  # by registers
    assert blocks("sm_80", 64, 128, 48 << 10) == 3  # by shared memory
    assert blocks("sm_80", 32, 1024, 0) == 2  # by warps
    assert blocks("sm_75", 32, 1024, 0) == 1
    assert blocks("sm_80", 64, 0, 0) == 0


def test_the_library_with_cuda_loads_without_it() -> None:
    library = ROOT / "build" / "native" / "_native_cuda.so"
    if not library.exists():
        pytest.skip("the library with the CUDA kernels is not built: make cuda")
    code = (
        "import torch; from attnfast import dispatch, ops; assert ops.MISSING is None;"
        "print([row.name for row in dispatch.backends_of(torch.device('cuda'))], ops.cpu_isa())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ATTNFAST_NATIVE": str(library)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("['triton', 'cuda', 'reference', 'gluon']"), done.stderr


def test_an_object_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counts are kept until it changes."""
    listed = {("_Z1k", "sm_80"): [" HMMA.16816.F32 ", " STG.E "], ("_Z1f", "sm_80"): []}
    read: list[Path] = []
    monkeypatch.setattr(cuda_resources, "listings", lambda path: read.append(path) or listed)
    binary, kernels = tmp_path / "some.64.o", {"_Z1k": Kernel("row_terms<bf16>", 0)}
    for content, reads in ((b"old", 1), (b"old", 1), (b"new", 2), (b"new", 2)):
        binary.write_bytes(content)
        counts = cuda_resources.counted(binary, kernels)
        assert counts == {("_Z1k", "sm_80"): ((1, 0, 0, 1), ())}
        assert read == [binary] * reads
