// The forward kernels of one head dim, ATTNFAST_HEAD_DIM.
#include "attention_fwd.h"

namespace attnfast::cuda {

template <>
void run_attention_fwd<ATTNFAST_HEAD_DIM>(const ForwardArguments& a, bool plain, Stream stream) {
  constexpr int kD = ATTNFAST_HEAD_DIM;
  const bool half = a.p.q.dtype == DType::kFloat16;
  if (half && plain) return launch_attention_fwd<Float16, kD, true>(a, stream);
  if (half) return launch_attention_fwd<Float16, kD, false>(a, stream);
  if (plain) return launch_attention_fwd<BFloat16, kD, true>(a, stream);
  return launch_attention_fwd<BFloat16, kD, false>(a, stream);
}

}  // namespace attnfast::cuda
