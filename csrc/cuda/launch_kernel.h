// The host's side of a launch, without a kernel in it: what CUDA returns becomes an exception that
// says which kernel, how configured, why not, and what to do.
#pragma once
#include <cstdint>
#include <string>

namespace attnfast::cuda {

struct Configuration {
  std::string name;  // "attention_fwd<bf16, 64, plain>"
  int64_t blocks;
  int threads, shared_bytes;
};

// Launches a kernel on the current device, unless there are no blocks; `arguments` are pointers to
// its parameters.
//   Raises std::runtime_error where CUDA refuses.
void launch_kernel(const void* kernel, const Configuration& with, void* stream, void** arguments);

// One of this build's kernels, by which CUDA is asked about all of them.
const void* any_kernel();

// The most shared memory that a block can have on the stream's GPU, in bytes, by the code that runs
// there too: of kernels that need more than its architecture has, there is none.
//   Raises std::runtime_error where CUDA does not say.
int shared_limit(void* stream);
// Whether that GPU runs the code for sm_75, which gives a block 64 KB.
bool on_turing(void* stream);

}  // namespace attnfast::cuda
