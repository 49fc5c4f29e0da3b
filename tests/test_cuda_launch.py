"""What is said where CUDA refuses: its return codes through stand-ins for its library, on the CPU.

csrc/cuda/launch.cu, which holds every call of CUDA's runtime, is compiled against a header whose
functions return what a test asks for.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from csrc import build

LAUNCH = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "launch.cu"

# The names that launch.cu uses, with CUDA's numbers.
CODES = {
    "cudaSuccess": 0,
    "cudaErrorInvalidValue": 1,
    "cudaErrorMemoryAllocation": 2,
    "cudaErrorInitializationError": 3,
    "cudaErrorInvalidConfiguration": 9,
    "cudaErrorInsufficientDriver": 35,
    "cudaErrorInvalidDeviceFunction": 98,
    "cudaErrorNoDevice": 100,
    "cudaErrorInvalidKernelImage": 200,
    "cudaErrorNoKernelImageForDevice": 209,
    "cudaErrorInvalidPtx": 218,
    "cudaErrorJitCompilerNotFound": 221,
    "cudaErrorUnsupportedPtxVersion": 222,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorLaunchOutOfResources": 701,
    "cudaErrorAssert": 710,
    "cudaErrorMisalignedAddress": 716,
    "cudaErrorIllegalInstruction": 715,
    "cudaErrorLaunchFailure": 719,
    "cudaErrorStreamCaptureUnsupported": 900,
    "cudaErrorStreamCaptureInvalidated": 901,
    "cudaErrorStreamCaptureImplicit": 906,
}
TYPES = (
    """
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
enum cudaError_t {"""
    + ", ".join(f"{name} = {code}" for name, code in CODES.items())
    + """};
typedef void* cudaStream_t;
struct dim3 { unsigned x; explicit dim3(unsigned n) : x(n) {} };
#define CUDART_VERSION 13000
struct cudaFuncAttributes { int ptxVersion; };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
// Of a GPU: 80 for sm_80, 64 KB for sm_75.
inline int capability(int arch, int what) { return what ? arch % 10 : arch / 10; }
inline const char* cudaGetErrorString(cudaError_t) { return "words"; }
inline const char* cudaGetErrorName(cudaError_t) { return "name"; }
"""
)
HEADER = (
    TYPES
    + """
inline int last = 0, asked = 0;
inline cudaError_t say(const char* function) {
  const std::string failing = std::getenv("FAILING");
  const int code = failing == function ? std::atoi(std::getenv("CODE")) : 0;
  if (code) last = code;
  return static_cast<cudaError_t>(code);
}
inline cudaError_t cudaGetLastError() { const int x = last; last = 0; return cudaError_t(x); }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return say("attribute"); }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  ++asked;
  of->ptxVersion = std::atoi(std::getenv("PTX"));
  return say("any");
}
inline cudaError_t cudaGetDevice(int* x) { *x = 0; return say("device"); }
inline cudaError_t cudaDeviceGetAttribute(int* x, cudaDeviceAttr what, int) {
  const bool shared = what == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *x = shared ? std::atoi(std::getenv("SHARED")) : capability(std::atoi(std::getenv("GPU")), what);
  return shared ? say("limit") : say("capability");
}
inline cudaError_t cudaDriverGetVersion(int* x) { *x = 12040; return cudaSuccess; }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return say("launch");
}
"""
)
MAIN = """
#include <cstdio>
#include <stdexcept>
#include "cuda/kernels.h"
#include "cuda/launch_kernel.h"
#include "cuda_runtime_api.h"
const void* attnfast::cuda::any_kernel() { return nullptr; }
int main(int, char** argv) {
  using namespace attnfast::cuda;
  const std::string what = argv[1];
  const int64_t blocks = std::atoll(argv[2]);
  const int shared = std::atoi(argv[3]);
  for (int twice = 0; twice < 2; ++twice) {
    try {
      if (what == "launch") {
        launch_kernel(nullptr, {"attention_fwd<bf16, 64, plain>", blocks, 128, shared}, nullptr,
                      nullptr);
        std::printf("launched");
      } else if (what == "limit") {
        std::printf("shared: %d; turing: %d", shared_limit(nullptr), on_turing(nullptr));
      } else {
        std::printf("unusable: %s", unusable().c_str());
      }
    } catch (const std::runtime_error& error) {
      std::printf("raised: %s", error.what());
    }
    std::printf("; left: %d; asked: %d\\n", cudaGetLastError(), asked);
  }
  std::printf("%s\\n", built_for().c_str());
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "cuda_runtime_api.h").write_text(HEADER)
    (folder / "main.cpp").write_text(MAIN)
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    flags = ["-std=c++17", "-Wall", f"-I{folder}", f"-I{LAUNCH.parent.parent}"]
    flags.append('-DATTNFAST_CUDA_ARCHS="sm_75, sm_80"')
    sources = [str(folder / "main.cpp"), "-x", "c++", str(LAUNCH)]
    command = [*compiler, *flags, *sources, "-o", str(folder / "launch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "launch"


def run(
    program: Path,
    what: str = "launch",
    failing: str = "",
    code: str = "cudaSuccess",
    blocks: int = 6,
    shared: int = 50000,
    limit: int = 166912,
    gpu: int = 80,
    ptx: int = 80,
) -> list[str]:
    """What is said, twice in a row, each time with the code left for the next to stumble over.

    ``gpu`` is the GPU's architecture, ``ptx`` that for which its code was compiled.
    """
    environment = {"FAILING": failing, "CODE": str(CODES[code]), "SHARED": str(limit)}
    environment |= {"GPU": str(gpu), "PTX": str(ptx)}
    done = subprocess.run(
        [program, what, str(blocks), str(shared)], env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, built = done.stdout.splitlines()
    assert built == "sm_75, sm_80, by CUDA 13.0: NVIDIA driver 580 or later"
    return said


def test_nothing_is_said_where_cuda_is_content(program: Path) -> None:
    assert run(program) == ["launched; left: 0; asked: 0"] * 2
    assert run(program, "unusable") == ["unusable: ; left: 0; asked: 1"] * 2
    assert run(program, "limit") == ["shared: 166912; turing: 0; left: 0; asked: 1"] * 2
    said = run(program, "limit", limit=64 << 10, gpu=75, ptx=75)
    assert said == ["shared: 65536; turing: 1; left: 0; asked: 1"] * 2


def test_no_blocks_are_no_launch(program: Path) -> None:
    said = run(program, failing="launch", code="cudaErrorInvalidConfiguration", blocks=0)
    assert said[0].startswith("launched")


LISTS = ["75", "80", "86", "89", "90", "100", "120", "75 86", "75 120", "80 90", "all"]
KILOBYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@pytest.mark.parametrize("gpu", KILOBYTES)
@pytest.mark.parametrize("archs", LISTS)
def test_code_that_is_not_for_a_gpu(
    program: Path, archs: str, gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATTNFAST_CUDA_ARCHS: where a driver compiles PTX for a later GPU, it leaves out as much."""
    monkeypatch.setenv("ATTNFAST_CUDA_ARCHS", archs)
    built = build.cuda_archs()
    runs = [arch for arch in built if arch // 10 == gpu // 10 and arch <= gpu]
    runs = runs[-1:] or [arch for arch in [build.ptx_arch(built)] if arch <= gpu]
    if not runs:
        said = run(program, "unusable", "any", "cudaErrorNoKernelImageForDevice")[0]
        assert "and this GPU is none of them" in said
        return
    how = {"gpu": gpu, "ptx": runs[0], "limit": KILOBYTES[gpu] << 10}
    said = run(program, "unusable", **how)[0]
    assert (f"and this GPU, an sm_{gpu}, could run of it only" in said) == (runs[0] < 80 <= gpu)
    assert said.startswith("unusable: ;") == (runs[0] >= 80 or gpu < 80)
    kilobytes = min(KILOBYTES[gpu], KILOBYTES[runs[0]])
    turing = int(runs[0] == 75)
    assert run(program, "limit", **how)[0].startswith(
        f"shared: {kilobytes << 10}; turing: {turing};"
    )


ADVICE = {
    "cudaErrorNoKernelImageForDevice": "this build has code for sm_75, sm_80, and this GPU is none"
    ' of them: use backend="triton" or "reference"',
    "cudaErrorInvalidDeviceFunction": "this build has code for sm_75, sm_80",
    "cudaErrorInsufficientDriver": "the NVIDIA driver (CUDA 12.4) is older than this build's CUDA"
    ' 13.0: install 580 or later, or use backend="triton" or "reference"',
    "cudaErrorUnsupportedPtxVersion": "the NVIDIA driver (CUDA 12.4) is older than this build's"
    " CUDA 13.0: update it, build with ATTNFAST_CUDA_ARCHS set to this GPU's, or use",
    "cudaErrorNoDevice": "no GPU can be used: see nvidia-smi, and CUDA_VISIBLE_DEVICES",
    "cudaErrorInitializationError": "no GPU can be used",
    "cudaErrorInvalidConfiguration": "the call is too large for one launch: split it along B or H",
    "cudaErrorMemoryAllocation": "free memory on this GPU, or split the call along B or H",
    "cudaErrorLaunchOutOfResources": "free memory on this GPU",
    "cudaErrorStreamCaptureUnsupported": "kernels may have to be loaded before a graph is captured:"
    " call attnfast.warm_up with the arguments of the calls in it",
    "cudaErrorStreamCaptureInvalidated": "kernels may have to be loaded before",
    **dict.fromkeys(
        (
            "cudaErrorIllegalAddress",
            "cudaErrorLaunchFailure",
            "cudaErrorAssert",
            "cudaErrorMisalignedAddress",
            "cudaErrorIllegalInstruction",
        ),
        "a kernel that ran before has broken this process's GPU context: restart it, and run under"
        " CUDA_LAUNCH_BLOCKING=1 to see which",
    ),
}


def test_every_code_that_is_named_has_advice_here() -> None:
    named = set(re.findall(r"case (cudaError\w+):", LAUNCH.read_text()))
    assert named == set(ADVICE)


@pytest.mark.parametrize("code", ADVICE)
@pytest.mark.parametrize("failing", ["launch", "attribute"])
def test_a_launch_that_fails_says_what_and_what_to_do(
    program: Path, failing: str, code: str
) -> None:
    said = run(program, "launch", failing, code)[0]
    assert said.startswith(
        "raised: attention: launching attention_fwd<bf16, 64, plain> (6 blocks of 128 threads,"
        " 50000 bytes of shared memory) failed: words (name); " + ADVICE[code]
    )
    assert said.endswith("; left: 0; asked: 0")


def test_other_codes_are_said_as_they_are(program: Path) -> None:
    said = run(program, "launch", "launch", "cudaErrorStreamCaptureImplicit")[0]
    assert said.endswith("failed: words (name); left: 0; asked: 0")


def test_more_blocks_than_a_grid_has(program: Path) -> None:
    said = run(program, blocks=1 << 31)[0]
    assert "(2147483648 blocks of 128 threads" in said
    assert "the call is too large for one launch: split it along B or H" in said


def test_little_shared_memory_needs_no_attribute(program: Path) -> None:
    said = run(program, "launch", "attribute", "cudaErrorInvalidValue", shared=48 << 10)
    assert said[0].startswith("launched")


LASTING = (
    "cudaErrorNoKernelImageForDevice",
    "cudaErrorInvalidDeviceFunction",
    "cudaErrorInsufficientDriver",
    "cudaErrorUnsupportedPtxVersion",
    "cudaErrorInvalidKernelImage",
    "cudaErrorInvalidPtx",
    "cudaErrorJitCompilerNotFound",
)


@pytest.mark.parametrize("code", LASTING)
def test_a_gpu_that_cannot_run_the_kernels_is_a_reason(program: Path, code: str) -> None:
    said = run(program, "unusable", "any", code)[0]
    advice = f"; {ADVICE[code]}" if code in ADVICE else ""
    assert said.startswith(f"unusable: words (name){advice}")
    assert said.endswith("left: 0; asked: 1")


@pytest.mark.parametrize("code", [code for code in CODES if code not in ("cudaSuccess", *LASTING)])
@pytest.mark.parametrize("failing", ["device", "capability", "limit", "any"])
@pytest.mark.parametrize("what", ["unusable", "limit"])
def test_what_passes_is_no_reason_and_is_asked_again(
    program: Path, what: str, failing: str, code: str
) -> None:
    """A lack of memory, or a capture: an error now, of which nothing is kept."""
    first, second = run(program, what, failing, code)
    for said in (first, second):
        assert said.startswith("raised: attention: asking what a GPU can run failed: words (name)")
        assert "; left: 0" in said
    if failing == "any":
        assert (first[-1], second[-1]) == ("1", "2")
