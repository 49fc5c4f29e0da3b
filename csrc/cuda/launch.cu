// What is said when CUDA refuses to launch a kernel. Nothing else calls CUDA's runtime.
#include "launch_kernel.h"

#ifndef ATTNFAST_EMULATOR
#include <cuda_runtime_api.h>

#include <stdexcept>

namespace attnfast::cuda {
namespace {

constexpr char kElse[] = "use backend=\"triton\" or \"reference\"";

std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return std::string("; this build has code for " ATTNFAST_CUDA_ARCHS
                         ", and this GPU is none of them: ") +
             kElse;
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return std::string("; the NVIDIA driver is older than this build's CUDA: update it, or ") +
             kElse;
    case cudaErrorNoDevice:
    case cudaErrorInitializationError:
      return std::string("; no GPU can be used: see nvidia-smi, and CUDA_VISIBLE_DEVICES");
    case cudaErrorInvalidConfiguration:
      return "; the call is too large for one launch: split it along B or H";
    case cudaErrorMemoryAllocation:
    case cudaErrorLaunchOutOfResources:
      return "; free memory on this GPU, or split the call along B or H";
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

std::string unusable(const void* any) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any);
  return error == cudaSuccess ? "" : said_of(error);
}

int shared_limit(void*) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) {
    throw std::runtime_error("attention: asking for a GPU's shared memory failed: " +
                             said_of(error));
  }
  return bytes;
}

bool on_turing(void* stream) { return shared_limit(stream) < 99 << 10; }

}  // namespace attnfast::cuda

#endif
