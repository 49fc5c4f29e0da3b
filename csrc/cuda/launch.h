// Launching kernels, on a GPU or on the emulator.
#pragma once
#include <string>
#include <type_traits>

#include "kernels.h"
#include "launch_kernel.h"
#include "prims/prims.h"

#ifdef ATTNFAST_EMULATOR
#include "../emulator/launch.h"
#endif

namespace attnfast::cuda {

template <class Params>
using Kernel = void (*)(Params);

// "attention_fwd<bf16, 64, plain>"
template <class Element, int kD>
std::string kernel_name(const std::string& name, const std::string& form) {
  const char* dtype = std::is_same_v<Element, Float16> ? "<fp16, " : "<bf16, ";
  return name + dtype + std::to_string(kD) + ", " + form + ">";
}
template <class Element, int kD, bool kPlain>
std::string kernel_name(const char* name) {
  return kernel_name<Element, kD>(name, kPlain ? "plain" : "options");
}

#ifdef ATTNFAST_EMULATOR

template <class Params>
void launch(const std::string& name, Kernel<const Params> kernel, int64_t blocks, int threads,
            int shared_bytes, Stream stream, const Params& params) {
  if (!blocks) return;
  emulator::launch(name, kernel, blocks, threads, shared_bytes,
                   *static_cast<const emulator::Session*>(stream), params);
}

#else

template <class Params>
void launch(const std::string& name, Kernel<const Params> kernel, int64_t blocks, int threads,
            int shared_bytes, Stream stream, const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  launch_kernel(reinterpret_cast<const void*>(kernel), {name, blocks, threads, shared_bytes},
                stream, arguments);
}

#endif

}  // namespace attnfast::cuda
