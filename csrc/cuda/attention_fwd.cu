// The forward kernels of one head dim, ATTNFAST_HEAD_DIM.
#include "attention_fwd.h"

namespace attnfast::cuda {
namespace {

template <class Element>
void run(const ForwardArguments& a, Form form, Stream stream) {
  constexpr int kD = ATTNFAST_HEAD_DIM;
  if (form == Form::kPlain) return launch_attention_fwd<Element, kD, Form::kPlain>(a, stream);
  // Beyond, two tiles of rows exceed a warp's registers: what it has of its own gains nothing.
  if constexpr (kD <= 64) {
    if (form == Form::kMasked) return launch_attention_fwd<Element, kD, Form::kMasked>(a, stream);
  }
  if (form == Form::kPlainBlocks) {
    return launch_attention_fwd<Element, kD, Form::kPlainBlocks>(a, stream);
  }
  if (form == Form::kBlocks) return launch_attention_fwd<Element, kD, Form::kBlocks>(a, stream);
  launch_attention_fwd<Element, kD, Form::kOptions>(a, stream);
}

}  // namespace

template <>
void run_attention_fwd<ATTNFAST_HEAD_DIM>(const ForwardArguments& a, Form form, Stream stream) {
  if (a.p.q.dtype == DType::kFloat16) return run<Float16>(a, form, stream);
  run<BFloat16>(a, form, stream);
}

}  // namespace attnfast::cuda
