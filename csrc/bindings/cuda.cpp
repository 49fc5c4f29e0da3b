// torch.ops.attnfast.cuda_*: tensors in, parameter structs with device pointers out, through
// torch's stable ABI (2.10 and later). Nothing here waits for the device.
//
// The schemas are defined in attnfast/ops.py, which also checks shapes and dtypes. Values inside
// tensors are not read on the host: the kernels clamp what indexes memory.
#include <tuple>

#include "../cuda/kernels.h"
#include "device.h"
#include "results.h"

namespace {

using namespace attnfast::bindings;
using attnfast::BackwardParams;
using attnfast::DecodeParams;
using attnfast::ForwardParams;
using attnfast::PooledParams;
using attnfast::cuda::DeviceSeed;

DeviceSeed seed_of(const OptionalTensor& dropout_seed, DeviceCall* call) {
  DeviceSeed seed;
  if (dropout_seed) {
    call->reads(dropout_seed, "dropout_seed");
    seed.seed = data_of<int64_t>(*dropout_seed, "dropout_seed");
    seed.stride = dropout_seed->stride(0);
  }
  return seed;
}

ForwardTensors cuda_fwd(ATTNFAST_INPUTS) {
  ForwardParams p;
  DeviceCall call(q);
  Kept kept(&call);
  fill_params(&p, &kept, false, ATTNFAST_INPUT_NAMES);
  const DeviceSeed seed = seed_of(dropout_seed, &call);
  const bool slack = p.cu_seqlens_q;  // perhaps: where sequences end is not known here
  ForwardTensors results = forward_results(&p, &call, slack, ATTNFAST_INPUT_NAMES);
  attnfast::cuda::attention_fwd(p, seed, q.size(2), k.size(2), call.stream());
  return results;
}

BackwardTensors cuda_bwd(ATTNFAST_UPSTREAM, ATTNFAST_INPUTS) {
  BackwardParams p;
  DeviceCall call(q);
  Kept kept(&call);
  fill_params(&p, &kept, false, ATTNFAST_INPUT_NAMES);
  const DeviceSeed seed = seed_of(dropout_seed, &call);
  STD_TORCH_CHECK(norm.dim() == 4 && (norm.size(0) == 2 || norm.size(0) == 3),
                  "attention: norm must be what the forward returned");
  BackwardTensors results =
      backward_results(&p, &kept, p.cu_seqlens_q, ATTNFAST_UPSTREAM_NAMES, ATTNFAST_INPUT_NAMES);
  int64_t bias_sizes[4] = {1, 1, 1, 1};
  for (int64_t d = 0; need_dbias && d < 4; ++d) bias_sizes[d] = bias->size(d);
  Tensor scratch =
      empty(q, ScalarType::Float, {attnfast::cuda::backward_scratch(p, call.stream())});
  call.writes(scratch, "scratch");
  attnfast::cuda::attention_bwd(p, seed, q.size(2), k.size(2), bias_sizes, floats(scratch),
                                call.stream());
  if (need_dsinks) std::get<4>(results) = converted(std::get<4>(results), sinks->scalar_type());
  return results;
}

Tensor cuda_pooled(ATTNFAST_INPUTS, ATTNFAST_POOLING) {
  PooledParams p;
  DeviceCall call(q);
  Kept kept(&call);
  fill_params(&p, &kept, false, ATTNFAST_INPUT_NAMES);
  Tensor result = pooled_result(&p, &kept, ATTNFAST_POOLING_NAMES, ATTNFAST_INPUT_NAMES);
  attnfast::cuda::attention_pooled(p, q.size(2), k.size(2), call.stream());
  return result;
}

// The scratch of a call's forward and backward, in bytes, as the launches take it.
std::tuple<int64_t, int64_t> cuda_workspace(ATTNFAST_INPUTS, bool) {
  BackwardParams p;
  DeviceCall call(q);
  Kept kept(&call);
  fill_params(&p, &kept, false, ATTNFAST_INPUT_NAMES);
  const int64_t floats = attnfast::cuda::backward_scratch(p, call.stream());
  return {0, floats * static_cast<int64_t>(sizeof(float))};
}

DecodeTensors cuda_decode(ATTNFAST_DECODE_INPUTS) {
  DecodeParams p;
  DeviceCall call(q);
  Kept kept(&call);
  fill_decode(&p, &kept, ATTNFAST_DECODE_INPUT_NAMES);
  DecodeTensors results = decode_results(&p, &call, q, received);
  Tensor scratch = empty(q, ScalarType::Float, {attnfast::cuda::decode_scratch(p)});
  call.writes(scratch, "scratch");
  attnfast::cuda::attention_decode(p, floats(scratch), call.stream());
  return results;
}

int64_t cuda_decode_workspace(ATTNFAST_DECODE_INPUTS) {
  DecodeParams p;
  DeviceCall call(q);
  Kept kept(&call);
  fill_decode(&p, &kept, ATTNFAST_DECODE_INPUT_NAMES);
  return attnfast::cuda::decode_scratch(p) * static_cast<int64_t>(sizeof(float));
}

#ifndef ATTNFAST_EMULATOR
// Why the GPU of that index cannot run the kernels, or "".
std::string cuda_unusable(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return attnfast::cuda::unusable();
}

std::string cuda_build() { return attnfast::cuda::built_for(); }
#endif

}  // namespace

#ifdef ATTNFAST_EMULATOR
STABLE_TORCH_LIBRARY_IMPL(ATTNFAST_OPERATORS, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ATTNFAST_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("cuda_unusable", ATTNFAST_BOX(cuda_unusable));
  m.impl("cuda_build", ATTNFAST_BOX(cuda_build));
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFAST_OPERATORS, CUDA, m) {
#endif
  m.impl("cuda_fwd", ATTNFAST_BOX(cuda_fwd));
  m.impl("cuda_bwd", ATTNFAST_BOX(cuda_bwd));
  m.impl("cuda_decode", ATTNFAST_BOX(cuda_decode));
  m.impl("cuda_pooled", ATTNFAST_BOX(cuda_pooled));
  m.impl("cuda_workspace", ATTNFAST_BOX(cuda_workspace));
  m.impl("cuda_decode_workspace", ATTNFAST_BOX(cuda_decode_workspace));
}
