// The CUDA kernels' entry points. They take the parameter structs of params.h with device pointers,
// and a stream; they check nothing but what CUDA returns, and wait for nothing.
#pragma once
#include <string>

#include "../params.h"

namespace attnfast::cuda {

// A cudaStream_t; for the emulator, its Session.
using Stream = void*;

// Where the dropout seed lies on the device: two int64, seed and offset.
struct DeviceSeed {
  const int64_t* seed = nullptr;
  int64_t stride = 1;
};

// Why the current device cannot run the kernels of this build, and never will; or "".
//   Raises std::runtime_error where CUDA cannot tell now, for a lack of memory for example.
std::string unusable();
// "sm_80, sm_90, by CUDA 13.0: NVIDIA driver 580 or later"
std::string built_for();

// out, lse and, where wanted, max_logit, entropy, reach, received and weights. D and D_v up to 256;
// the tensors have rows_q and rows_k rows, with varlen of all sequences together.
void attention_fwd(const ForwardParams& p, const DeviceSeed& dropout, int64_t rows_q,
                   int64_t rows_k, Stream stream);

// Probabilities, of the forward's norm, in cells or by distance.
void attention_pooled(const PooledParams& p, int64_t rows_q, int64_t rows_k, Stream stream);

// dq, dk, dv and, where wanted, dbias of these sizes (1 where it broadcasts) and dsinks. `scratch`
// holds backward_scratch(p, stream) floats.
void attention_bwd(const BackwardParams& p, const DeviceSeed& dropout, int64_t rows_q,
                   int64_t rows_k, const int64_t (&bias_sizes)[4], float* scratch, Stream stream);
int64_t backward_scratch(const BackwardParams& p, Stream stream);

// out, lse and, where wanted, received of a few queries over a cache. `scratch` holds
// decode_scratch(p) floats.
void attention_decode(const DecodeParams& p, float* scratch, Stream stream);
int64_t decode_scratch(const DecodeParams& p);

}  // namespace attnfast::cuda
