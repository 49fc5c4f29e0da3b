// Where a call of the CUDA backend runs: the tensors' device and its current stream; or, in the
// emulator's library, this process, in which kernels may touch the call's tensors and nothing else.
#pragma once
#include <string>
#include <vector>

#include "tensors.h"

#ifdef ATTNFAST_EMULATOR
#include <cstdlib>
#include <cstring>

#include "../emulator/launch.h"
#else
#include <torch/csrc/stable/accelerator.h>

// Of libtorch_cuda. Weak, so that one library loads beside a torch without CUDA as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace attnfast::bindings {

#ifdef ATTNFAST_EMULATOR

class DeviceCall {
 public:
  explicit DeviceCall(const Tensor&) {
    const char* threads = std::getenv("ATTNFAST_EMULATOR_THREADS");
    session_.host_threads =
        threads ? std::atoi(threads) : static_cast<int>(torch::stable::get_num_threads());
    session_.gpu = emulator::asked_for();
  }
  void* stream() { return &session_; }

  // Tells the emulator that kernels may read a tensor.
  void reads(const Tensor& x, const char* name) { allow(x, x.const_data_ptr(), false, name); }
  void reads(const OptionalTensor& x, const char* name) {
    if (x) reads(*x, name);
  }
  // And that they may write it; whatever they do not write is NaN.
  void writes(const Tensor& x, const char* name) {
    allow(x, x.mutable_data_ptr(), true, name);
    std::memset(x.mutable_data_ptr(), 0xFF, bytes_of(x));
  }

 private:
  static int64_t bytes_of(const Tensor& x) {
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (x.size(d) == 0) return 0;
      last += (x.size(d) - 1) * x.stride(d);
    }
    return (last + 1) * x.element_size();
  }
  void allow(const Tensor& x, const void* data, bool writable, const char* name) {
    session_.memory.allow(data, bytes_of(x), writable, name);
  }

  emulator::Session session_;
};

#else

class DeviceCall {
 public:
  explicit DeviceCall(const Tensor& q) : guard_(q.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream,
                    "attention: this torch has no CUDA streams; install a CUDA build of torch");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream_));
  }
  void* stream() { return stream_; }

  void reads(const Tensor&, const char*) {}
  void reads(const OptionalTensor&, const char*) {}
  void writes(const Tensor&, const char*) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

}  // namespace attnfast::bindings
