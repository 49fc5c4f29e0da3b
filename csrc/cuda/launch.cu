// What is said when CUDA refuses to launch a kernel, and what it says of a GPU. Nothing else calls
// CUDA's runtime.
#include "launch_kernel.h"

#ifndef ATTNFAST_EMULATOR
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "memory_limits.h"

namespace attnfast::cuda {
namespace {

constexpr char kElse[] = "use backend=\"triton\" or \"reference\"";

// "13.0" for 13000, as CUDA counts.
std::string dotted(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The drivers that CUDA's runtime of this build, which is linked into it, can be used with.
std::string drivers() {
  const int major = CUDART_VERSION / 1000;
  if (major > 13) return "one for CUDA " + std::to_string(major) + " or later";
  return major == 13 ? "580 or later" : "525 or later";
}

// What a driver lacks, and whose CUDA it is.
std::string older_driver() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return "; the NVIDIA driver (CUDA " + dotted(version) + ") is older than this build's CUDA " +
         dotted(CUDART_VERSION) + ": ";
}

std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return std::string("; this build has code for " ATTNFAST_CUDA_ARCHS
                         ", and this GPU is none of them: ") +
             kElse;
    case cudaErrorInsufficientDriver:
      return older_driver() + "install " + drivers() + ", or " + kElse;
    case cudaErrorUnsupportedPtxVersion:
      return older_driver() + "update it, build with ATTNFAST_CUDA_ARCHS set to this GPU's, or " +
             kElse;
    case cudaErrorNoDevice:
    case cudaErrorInitializationError:
      return std::string("; no GPU can be used: see nvidia-smi, and CUDA_VISIBLE_DEVICES");
    case cudaErrorInvalidConfiguration:
      return "; the call is too large for one launch: split it along B or H";
    case cudaErrorMemoryAllocation:
    case cudaErrorLaunchOutOfResources:
      return "; free memory on this GPU, or split the call along B or H";
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
      return "; kernels may have to be loaded before a graph is captured: call attnfast.warm_up"
             " with the arguments of the calls in it";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
      return "; a kernel that ran before has broken this process's GPU context: restart it, and run"
             " under CUDA_LAUNCH_BLOCKING=1 to see which";
    default:
      return "";
  }
}

std::string said_of(cudaError_t error) {
  cudaGetLastError();  // so that the next call is not blamed for this one
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")" +
         advice(error);
}

constexpr char kAsking[] = "attention: asking what a GPU can run failed: ";

// Whether a GPU that gives this answer once always will: others, as of a lack of memory, pass.
bool lasts(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion ||
         error == cudaErrorInvalidPtx || error == cudaErrorJitCompilerNotFound ||
         error == cudaErrorInvalidKernelImage;
}

// The current GPU, 80 for sm_80, and for which architecture the code that it runs was compiled:
// where a driver has made it of PTX, for an earlier one.
struct Gpu {
  int arch, shared_bytes, code;
};

// Asks once; only what CUDA has answered is kept.
cudaError_t ask_gpu(Gpu* gpu) {
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error == cudaSuccess && known.count(index)) {
    *gpu = known[index];
    return error;
  }
  const auto ask = [&](int* value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, index);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor), ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&gpu->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  cudaFuncAttributes of{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&of, any_kernel());
  gpu->arch = 10 * major + minor, gpu->code = of.ptxVersion;
  if (error == cudaSuccess) known[index] = *gpu;
  return error;
}

}  // namespace

void launch_kernel(const void* kernel, const Configuration& with, void* stream, void** arguments) {
  if (!with.blocks) return;
  cudaError_t error = with.blocks > INT32_MAX ? cudaErrorInvalidConfiguration : cudaSuccess;
  if (error == cudaSuccess && with.shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 with.shared_bytes);
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(with.blocks)), dim3(with.threads),
                             arguments, with.shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return;
  throw std::runtime_error(
      "attention: launching " + with.name + " (" + std::to_string(with.blocks) + " blocks of " +
      std::to_string(with.threads) + " threads, " + std::to_string(with.shared_bytes) +
      " bytes of shared memory) failed: " + said_of(error));
}

std::string unusable() {
  Gpu gpu{};
  const cudaError_t error = ask_gpu(&gpu);
  if (error != cudaSuccess) {
    const std::string said = said_of(error);
    if (!lasts(error)) throw std::runtime_error(kAsking + said);
    return said;
  }
  if (gpu.code >= 80 || gpu.arch < 80) return "";
  const std::string arch = std::to_string(gpu.arch);
  return "this build has code for " ATTNFAST_CUDA_ARCHS ", and this GPU, an sm_" + arch +
         ", could run of it only what was made for sm_75: build with ATTNFAST_CUDA_ARCHS=" + arch +
         ", or " + kElse;
}

std::string built_for() {
  return ATTNFAST_CUDA_ARCHS ", by CUDA " + dotted(CUDART_VERSION) + ": NVIDIA driver " + drivers();
}

int shared_limit(void*) {
  Gpu gpu{};
  const cudaError_t error = ask_gpu(&gpu);
  if (error != cudaSuccess) throw std::runtime_error(kAsking + said_of(error));
  return std::min(gpu.shared_bytes, shared_of(gpu.code));
}

bool on_turing(void* stream) { return shared_limit(stream) < 99 << 10; }

}  // namespace attnfast::cuda

#endif
