// From a call's sizes and options to the kernel that was built for them.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "arguments.h"
#include "fused_shape.h"
#include "kernels.h"
#include "launch_kernel.h"

namespace attnfast::cuda {
namespace {

// As Rows (rows.h) are.
bool aligned(const void* data, int64_t b, int64_t h, int64_t t, int64_t columns) {
  constexpr int64_t kElements = 8, kFarthestRow = 1 << 26;  // of 2 bytes: 16, and 2^32 for 32 rows
  return t < kFarthestRow && reinterpret_cast<uintptr_t>(data) % 16 == 0 && b % kElements == 0 &&
         h % kElements == 0 && t % kElements == 0 && columns % kElements == 0;
}
template <class AnyView>
bool aligned(const AnyView& x, int64_t columns) {
  return aligned(x.data, x.b, x.h, x.t, columns);
}

// Whether no option but positions is at work.
bool plain(const AttentionParams& p) {
  return has_raw_scores(p) && !p.mask.data && !(p.dropout_p > 0.0);
}

// What dispatch.py refuses with these reasons, before it comes to this.
template <class Params>
void refuse_on_turing(const Params& p, bool backward, Stream stream) {
  if (p.q.dtype != DType::kBFloat16 && !(backward && p.D > 128) && !(backward && p.D_v > 128)) {
    return;
  }
  if (!on_turing(stream)) return;
  throw std::runtime_error(p.q.dtype == DType::kBFloat16
                               ? "attention: GPUs of compute capability 7.5 take float16 only"
                               : "attention: gradients need D and D_v up to 128 on GPUs of"
                                 " compute capability 7.5");
}

// Calls run(std::integral_constant) with the smallest head dim that there is for D and D_v.
template <class Params, class Run>
void with_head_dim(const Params& p, Run run) {
  const int64_t widest = p.D > p.D_v ? p.D : p.D_v;
#define ATTNFAST_UP_TO(kHeadDim) \
  if (widest <= kHeadDim) return run(std::integral_constant<int, kHeadDim>());
  ATTNFAST_HEAD_DIMS(ATTNFAST_UP_TO)
#undef ATTNFAST_UP_TO
  throw std::runtime_error("attention: the CUDA kernels take head dims up to 256, got " +
                           std::to_string(widest));
}

}  // namespace

void attention_fwd(const ForwardParams& p, const DeviceSeed& dropout, int64_t rows_q,
                   int64_t rows_k, Stream stream) {
  refuse_on_turing(p, false, stream);
  ForwardArguments a{p, Scaling(p), Dropout(p, dropout), rows_q, rows_k};
  a.q_aligned = aligned(p.q, p.D), a.k_aligned = aligned(p.k, p.D);
  a.v_aligned = aligned(p.v, p.D_v), a.out_aligned = aligned(p.out, p.D_v);
  const bool aligned = a.q_aligned && a.k_aligned && a.v_aligned && a.out_aligned;
  const bool others = p.entropy || p.dropout_p > 0.0 || p.softcap > 0.0f || p.alibi_slopes;
  const bool simple = aligned && !others && plain(p);
  const Form form = p.blocks.starts      ? simple ? Form::kPlainBlocks : Form::kBlocks
                    : simple             ? Form::kPlain
                    : !aligned || others ? Form::kOptions
                                         : Form::kMasked;
  with_head_dim(p, [&](auto head_dim) {
    run_attention_fwd<head_dim()>(a, form, stream);
    if (p.weights.data || p.received) run_attention_weights<head_dim()>(a, stream);
  });
}

void attention_pooled(const PooledParams& p, int64_t rows_q, int64_t rows_k, Stream stream) {
  refuse_on_turing(p, false, stream);
  PooledArguments a{p, Scaling(p), rows_q, rows_k};
  a.q_aligned = aligned(p.q, p.D), a.k_aligned = aligned(p.k, p.D);
  with_head_dim(p, [&](auto head_dim) { run_attention_pooled<head_dim()>(a, stream); });
}

namespace {

bool aligned(const BackwardParams& p) {
  return aligned(p.q, p.D) && aligned(p.k, p.D) && aligned(p.v, p.D_v) && aligned(p.out, p.D_v) &&
         aligned(p.grad_out, p.D_v) && aligned(p.dq, p.D) && aligned(p.dk, p.D) &&
         aligned(p.dv, p.D_v);
}
bool simple(const BackwardParams& p) {
  return plain(p) && !p.windows && !p.grad_entropy && !p.grad_weights.data && aligned(p);
}

// What a backward's scratch holds, in this order; without parts, dk and dv are one kernel's and dq
// another's.
struct BackwardScratch {
  int64_t padded, terms, parts = 0, sums = 0;  // rows of a head, then floats, but for parts

  BackwardScratch(const BackwardParams& p, Stream stream) : padded(padded_rows(p.T)) {
    terms = 4 * p.B * p.H * padded;
    const auto fuse = [&](auto shape) {
      using Shape = decltype(shape);
      if (on_turing(stream) || Shape::kSharedBytes > shared_limit(stream)) return;
      parts = Shape::parts(p.B * p.H, padded), sums = parts * Shape::kPart;
    };
    if (!simple(p) || p.blocks.starts || (p.T <= kShort && p.S <= kShort)) return;
    with_head_dim(p, [&](auto head_dim) {
      if constexpr (head_dim() == 64 || head_dim() == 128) fuse(FusedShape<head_dim()>());
    });
  }
  int64_t turns() const { return parts ? parts + 1 : 0; }
  int64_t floats() const { return terms + sums + turns(); }
};

}  // namespace

int64_t backward_scratch(const BackwardParams& p, Stream stream) {
  return BackwardScratch(p, stream).floats();
}

void attention_bwd(const BackwardParams& p, const DeviceSeed& dropout, int64_t rows_q,
                   int64_t rows_k, const int64_t (&bias_sizes)[4], float* scratch, Stream stream) {
  refuse_on_turing(p, true, stream);
  const BackwardScratch plan(p, stream);
  BackwardArguments a{p, Scaling(p), Dropout(p, dropout), rows_q, rows_k, {}, scratch, plan.padded};
  if (plan.parts) {
    a.sums = scratch + plan.terms;
    a.turns = reinterpret_cast<int32_t*>(a.sums + plan.sums);
  }
  a.bias = {bias_sizes[0], bias_sizes[1], bias_sizes[2], bias_sizes[3]};
  a.q_aligned = aligned(p.q, p.D), a.k_aligned = aligned(p.k, p.D);
  a.v_aligned = aligned(p.v, p.D_v), a.out_aligned = aligned(p.out, p.D_v);
  a.grad_out_aligned = aligned(p.grad_out, p.D_v);
  a.dq_aligned = aligned(p.dq, p.D), a.dk_aligned = aligned(p.dk, p.D);
  a.dv_aligned = aligned(p.dv, p.D_v);
  const Form form = p.blocks.starts ? simple(p) ? Form::kPlainBlocks : Form::kBlocks
                    : simple(p)     ? Form::kPlain
                                    : Form::kOptions;

  with_head_dim(p, [&](auto head_dim) { run_attention_bwd<head_dim()>(a, form, stream); });
  if (p.dsinks) run_attention_bwd_sinks(a, stream);
}

int64_t decode_scratch(const DecodeParams& p) {
  return most_splits(p.S) * p.B * p.H * p.T * (p.D_v + 2);
}

void attention_decode(const DecodeParams& p, float* scratch, Stream stream) {
  refuse_on_turing(p, false, stream);
  const int64_t splits = most_splits(p.S), rows = p.B * p.H * p.T;
  auto* softmax = reinterpret_cast<Floats2*>(scratch);
  DecodeArguments a{p, Scaling(p), splits, 0, scratch + 2 * splits * rows, softmax};
  a.q_aligned = aligned(p.q, p.D), a.k_aligned = aligned(p.k, p.D);
  a.v_aligned = aligned(p.v, p.D_v);
  with_head_dim(p, [&](auto head_dim) {
    run_attention_decode<head_dim()>(a, stream);
    if (p.received && rows) run_attention_decode_received<head_dim()>(a, stream);
  });
  run_decode_combine(a, stream);
}

}  // namespace attnfast::cuda
