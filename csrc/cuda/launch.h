// Launching kernels: what CUDA returns is checked here, and becomes an exception that says which
// kernel, how configured, and why not.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"
#include "prims/prims.h"

#ifdef ATTNFAST_EMULATOR
#include "../emulator/launch.h"
#endif

namespace attnfast::cuda {

template <class Params>
using Kernel = void (*)(Params);

// "attention_fwd<bf16, 64, plain>"
template <class Element, int kD, bool kPlain>
std::string kernel_name(const char* name) {
  const char* dtype = std::is_same_v<Element, Float16> ? "<fp16, " : "<bf16, ";
  return std::string(name) + dtype + std::to_string(kD) + (kPlain ? ", plain>" : ", options>");
}

// What every architecture from sm_80 on gives a block; sm_86, sm_89 and sm_120 give no more.
constexpr int kSharedLimit = 99 << 10;

#ifdef ATTNFAST_EMULATOR

template <class Params>
void launch(const std::string& name, Kernel<const Params> kernel, int64_t blocks, int threads,
            int shared_bytes, Stream stream, const Params& params) {
  if (!blocks) return;
  emulator::launch(name, kernel, blocks, threads, shared_bytes,
                   *static_cast<const emulator::Session*>(stream), params);
}

#else

[[noreturn]] void launch_failed(const std::string& name, int64_t blocks, int threads,
                                int shared_bytes, cudaError_t error);

template <class Params>
void launch(const std::string& name, Kernel<const Params> kernel, int64_t blocks, int threads,
            int shared_bytes, Stream stream, const Params& params) {
  if (!blocks) return;
  cudaError_t error = blocks > INT32_MAX ? cudaErrorInvalidConfiguration : cudaSuccess;
  if (error == cudaSuccess && shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) launch_failed(name, blocks, threads, shared_bytes, error);
}

#endif

}  // namespace attnfast::cuda
