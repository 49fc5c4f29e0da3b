// What is said when CUDA refuses to launch a kernel.
#include "launch.h"

#ifndef ATTNFAST_EMULATOR

namespace attnfast::cuda {
namespace {

std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "; this build has code for " ATTNFAST_CUDA_ARCHS
             ", and this GPU is none of them: use backend=\"triton\" or \"reference\"";
    case cudaErrorInsufficientDriver:
      return "; the NVIDIA driver is older than this build's CUDA: update it, or use"
             " backend=\"triton\" or \"reference\"";
    case cudaErrorInvalidConfiguration:
      return "; the call is too large for one launch: split it along B or H";
    default:
      return "";
  }
}

}  // namespace

void launch_failed(const std::string& name, int64_t blocks, int threads, int shared_bytes,
                   cudaError_t error) {
  cudaGetLastError();  // so that the next call is not blamed for this one
  throw std::runtime_error("attention: launching " + name + " (" + std::to_string(blocks) +
                           " blocks of " + std::to_string(threads) + " threads, " +
                           std::to_string(shared_bytes) +
                           " bytes of shared memory) failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")" + advice(error));
}

}  // namespace attnfast::cuda

#endif
