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
    "cudaErrorNoKernelImageForDevice": 209,
    "cudaErrorUnsupportedPtxVersion": 222,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorLaunchOutOfResources": 701,
    "cudaErrorAssert": 710,
    "cudaErrorMisalignedAddress": 716,
    "cudaErrorIllegalInstruction": 715,
    "cudaErrorLaunchFailure": 719,
    "cudaErrorStreamCaptureUnsupported": 900,
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
struct cudaFuncAttributes {};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline const char* cudaGetErrorString(cudaError_t) { return "words"; }
inline const char* cudaGetErrorName(cudaError_t) { return "name"; }
"""
)
HEADER = (
    TYPES
    + """
inline int last = 0;
inline cudaError_t say(const char* function) {
  const std::string failing = std::getenv("FAILING");
  const int code = failing == function ? std::atoi(std::getenv("CODE")) : 0;
  if (code) last = code;
  return static_cast<cudaError_t>(code);
}
inline cudaError_t cudaGetLastError() { const int x = last; last = 0; return cudaError_t(x); }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return say("attribute"); }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return say("any"); }
inline cudaError_t cudaGetDevice(int* x) { *x = 0; return say("device"); }
inline cudaError_t cudaDeviceGetAttribute(int* x, int, int) {
  *x = std::atoi(std::getenv("SHARED"));
  return say("limit");
}
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return say("launch");
}
"""
)
MAIN = """
#include <cstdio>
#include <stdexcept>
#include "cuda/launch_kernel.h"
#include "cuda_runtime_api.h"
int main(int, char** argv) {
  using namespace attnfast::cuda;
  const int64_t blocks = std::atoll(argv[1]);
  const int shared = std::atoi(argv[2]);
  try {
    launch_kernel(nullptr, {"attention_fwd<bf16, 64, plain>", blocks, 128, shared}, nullptr,
                  nullptr);
    std::printf("usable: %s; shared: %d; turing: %d", unusable(nullptr).c_str(),
                shared_limit(nullptr), on_turing(nullptr));
  } catch (const std::runtime_error& error) {
    std::printf("raised: %s", error.what());
  }
  std::printf("; left: %d", cudaGetLastError());
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
    failing: str = "",
    code: str = "cudaSuccess",
    blocks: int = 6,
    shared: int = 50000,
    limit: int = 166912,
) -> str:
    """What a launch says, and which code it leaves for the next call to stumble over."""
    environment = {"FAILING": failing, "CODE": str(CODES[code]), "SHARED": str(limit)}
    done = subprocess.run(
        [program, str(blocks), str(shared)], env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_said_where_cuda_is_content(program: Path) -> None:
    assert run(program) == "usable: ; shared: 166912; turing: 0; left: 0"
    assert run(program, limit=65536) == "usable: ; shared: 65536; turing: 1; left: 0"


def test_no_blocks_are_no_launch(program: Path) -> None:
    assert run(program, "launch", "cudaErrorInvalidConfiguration", blocks=0).startswith("usable")


ADVICE = {
    "cudaErrorNoKernelImageForDevice": "this build has code for sm_75, sm_80, and this GPU is none"
    ' of them: use backend="triton" or "reference"',
    "cudaErrorInvalidDeviceFunction": "this build has code for sm_75, sm_80",
    "cudaErrorInsufficientDriver": "the NVIDIA driver is older than this build's CUDA: update it,"
    ' or use backend="triton" or "reference"',
    "cudaErrorUnsupportedPtxVersion": "the NVIDIA driver is older",
    "cudaErrorNoDevice": "no GPU can be used: see nvidia-smi, and CUDA_VISIBLE_DEVICES",
    "cudaErrorInitializationError": "no GPU can be used",
    "cudaErrorInvalidConfiguration": "the call is too large for one launch: split it along B or H",
    "cudaErrorMemoryAllocation": "free memory on this GPU, or split the call along B or H",
    "cudaErrorLaunchOutOfResources": "free memory on this GPU",
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
    said = run(program, failing, code)
    assert said.startswith(
        "raised: attention: launching attention_fwd<bf16, 64, plain> (6 blocks of 128 threads,"
        " 50000 bytes of shared memory) failed: words (name); " + ADVICE[code]
    )
    assert said.endswith("; left: 0")


def test_other_codes_are_said_as_they_are(program: Path) -> None:
    said = run(program, "launch", "cudaErrorStreamCaptureUnsupported")
    assert said.endswith("failed: words (name); left: 0")


def test_more_blocks_than_a_grid_has(program: Path) -> None:
    said = run(program, blocks=1 << 31)
    assert "(2147483648 blocks of 128 threads" in said
    assert "the call is too large for one launch: split it along B or H" in said


def test_little_shared_memory_needs_no_attribute(program: Path) -> None:
    assert run(program, "attribute", "cudaErrorInvalidValue", shared=48 << 10).startswith("usable")


@pytest.mark.parametrize("code", ["cudaErrorInsufficientDriver", "cudaErrorNoKernelImageForDevice"])
def test_a_gpu_that_cannot_run_the_kernels_is_a_reason(program: Path, code: str) -> None:
    said = run(program, "any", code)
    assert said.startswith(f"usable: words (name); {ADVICE[code]}")
    assert said.endswith("left: 0")


@pytest.mark.parametrize("failing", ["device", "limit"])
def test_a_gpu_that_does_not_answer(program: Path, failing: str) -> None:
    said = run(program, failing, "cudaErrorNoDevice")
    assert said.startswith("raised: attention: asking for a GPU's shared memory failed: words")
