// The backward kernels of one head dim, ATTNFAST_HEAD_DIM.
#include "attention_bwd_fused.h"
#include "attention_bwd_keys.h"
#include "attention_bwd_queries.h"
#include "attention_bwd_short.h"
#include "attention_bwd_weights.h"

namespace attnfast::cuda {
namespace {

template <class Element, Form kForm>
void run(const BackwardArguments& a, Stream stream) {
  constexpr bool kPlain = kIsPlain<kForm>;
  if constexpr (kForm == Form::kPlain && ATTNFAST_HEAD_DIM <= 128) {
    constexpr int kBytes = ShortShape<ATTNFAST_HEAD_DIM>::kSharedBytes;
    const auto fits = [&] { return kBytes <= kTuringShared || kBytes <= shared_limit(stream); };
    if (a.p.T <= kShort && a.p.S <= kShort && fits()) {
      return launch_attention_bwd_short<Element, ATTNFAST_HEAD_DIM>(a, stream);
    }
  }
  run_attention_bwd_rows(a, stream);
  if constexpr (!kPlain) {
    if (a.p.grad_weights.data) launch_attention_weight_rows<Element, ATTNFAST_HEAD_DIM>(a, stream);
  }
  if constexpr (kForm == Form::kPlain && (ATTNFAST_HEAD_DIM == 64 || ATTNFAST_HEAD_DIM == 128)) {
    if (a.sums) return launch_attention_bwd_fused<Element, ATTNFAST_HEAD_DIM>(a, stream);
  }
  launch_attention_bwd_keys<Element, ATTNFAST_HEAD_DIM, kForm>(a, stream);
  launch_attention_bwd_queries<Element, ATTNFAST_HEAD_DIM, kForm>(a, stream);
  if constexpr (!kPlain) {
    if (a.p.dbias.data) run_attention_bias<ATTNFAST_HEAD_DIM>(a, stream);
  }
}

template <class Element>
void run(const BackwardArguments& a, Form form, Stream stream) {
  if (form == Form::kPlain) return run<Element, Form::kPlain>(a, stream);
  if (form == Form::kPlainBlocks) return run<Element, Form::kPlainBlocks>(a, stream);
  if (form == Form::kBlocks) return run<Element, Form::kBlocks>(a, stream);
  run<Element, Form::kOptions>(a, stream);
}

}  // namespace

template <>
void run_attention_bwd<ATTNFAST_HEAD_DIM>(const BackwardArguments& a, Form form, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run<Float16>(a, form, stream) : run<BFloat16>(a, form, stream);
}

}  // namespace attnfast::cuda
