"""Building the CUDA kernels: what is said where they are left out, and the table of resources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import cuda_resources
from tools.cuda_resources import Kernel, Usage

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_cuda` in a folder that has the sources' tree but nothing built."""
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "NVCC")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_cuda"],
        cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_left_out_on_request(tmp_path: Path) -> None:
    done = build(tmp_path, ATTNFAST_CUDA="0")
    assert done.returncode == 0
    assert done.stderr == "attnfast: CUDA kernels left out, as ATTNFAST_CUDA=0 asks\n"


def test_left_out_without_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, NVCC="/nonexistent/nvcc")
    assert done.returncode == 0
    assert done.stderr.startswith("attnfast: no nvcc, so no CUDA kernels; install the CUDA toolkit")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("archs", ["70", "sm_90", "80 x"])
def test_architectures(tmp_path: Path, archs: str) -> None:
    done = build(tmp_path, NVCC=sys.executable, ATTNFAST_CUDA_ARCHS=archs)
    assert done.returncode == 1
    assert done.stderr.startswith("attnfast: ATTNFAST_CUDA_ARCHS must be numbers from 75 on")
    assert done.stderr.endswith(f"got '{archs}'\n")


def test_kernels_are_named_by_their_templates() -> None:
    keys = "void attnfast::cuda::attention_bwd_keys_kernel<attnfast::cuda::Float16, 256, false, "
    assert cuda_resources.kernel(
        keys + "true, false>(attnfast::cuda::BackwardArguments)"
    ) == Kernel("attention_bwd_keys<fp16, 256, options, dk>", 256)
    forward = "void attnfast::cuda::attention_fwd_kernel<attnfast::cuda::BFloat16, 64, true>(...)"
    assert cuda_resources.kernel(forward) == Kernel("attention_fwd<bf16, 64, plain>", 64)
    sinks = "attnfast::cuda::(anonymous namespace)::attention_bwd_sinks_kernel(...)"
    assert cuda_resources.kernel(sinks) == Kernel("attention_bwd_sinks", 0)


def test_spills_and_missing_instructions_are_faults() -> None:
    sound, spilling = Usage(200, 0, (8, 8, 8)), Usage(255, 16, (8, 8, 8))
    usages = {
        Kernel("a<bf16, 128>", 128): {"sm_80": sound, "sm_90": spilling},
        Kernel("b<bf16, 256>", 256): {"sm_80": spilling},
        Kernel("c<bf16, 64>", 64): {"sm_80": Usage(100, 0, (8, 8, 0))},
        Kernel("rows", 0): {"sm_80": Usage(50, 0, (0, 0, 0))},
    }
    assert list(cuda_resources.wrong(usages)) == [
        "a<bf16, 128> on sm_90 spills 16 bytes",
        "c<bf16, 64> on sm_80 lacks one of ('HMMA', 'LDSM', 'LDGSTS'): (8, 8, 0)",
    ]


def test_the_library_with_cuda_loads_without_it() -> None:
    library = ROOT / "build" / "native" / "_native_cuda.so"
    if not library.exists():
        pytest.skip("the library with the CUDA kernels is not built: make cuda")
    code = (
        "import torch; from attnfast import dispatch, ops; assert dispatch.NATIVE_MISSING is None;"
        "print([row.name for row in dispatch.rows(torch.device('cuda'))], ops.cpu_isa())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ATTNFAST_NATIVE": str(library)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("['triton', 'cuda', 'reference']"), done.stderr
