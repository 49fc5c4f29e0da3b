// Puts the splits of a decoded row together (docs/math.md, section 7), in their order.
//   m = max over splits and sink    l = sum of exp(m_i - m) l_i    out = sum of exp(m_i - m) acc_i
//   / l
// Grid:   (batch entry, head, query)
// Memory: registers; every thread has some of the row's columns
#include "arguments.h"
#include "launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

template <class Element>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(kThreads, 1)
    decode_combine_kernel(ATTNFAST_PARAMS DecodeArguments a) {
  if (!has_code<Element>()) return;
  const DecodeParams& p = a.p;

  // Setup
  const int64_t row = block_index(), rows = p.B * p.H * p.T;
  const int64_t b = row / p.T / p.H, h = row / p.T % p.H, t = row % p.T;
  const int length = min_of(max_of(load_global(p.cache_seqlens + b), 0), static_cast<int>(p.S));
  const int64_t splits = min_of(splits_of(length), a.splits);
  const float to_log2 = a.units.to_log2;

  // Sinks
  const float sink = p.sinks ? a.units.natural * load_global(p.sinks + h) : -kInfinity;
  float top = sink;
  for (int64_t i = 0; i < splits; ++i) top = fmaxf(top, load_global(a.softmax + i * rows + row).x);
  const float base = top == -kInfinity ? 0.0f : top;
  const float l_sink = p.sinks ? exp2_fast((sink - base) * to_log2) : 0.0f;

  // Statistics
  float l = l_sink;
  for (int64_t i = 0; i < splits; ++i) {
    const Floats2 of = load_global(a.softmax + i * rows + row);
    l += exp2_fast((of.x - base) * to_log2) * of.y;
  }

  // Output
  const float factor = l == 0.0f ? 0.0f : 1.0f / l;
  auto* out = static_cast<Element*>(p.out.data) + b * p.out.b + h * p.out.h + t * p.out.t;
  for (int64_t column = thread_index(); column < p.D_v; column += kThreads) {
    float sum = 0.0f;
    for (int64_t i = 0; i < splits; ++i) {
      const float m = load_global(a.softmax + i * rows + row).x;
      const float x = load_global(a.partial + (i * rows + row) * p.D_v + column);
      sum += exp2_fast((m - base) * to_log2) * x;
    }
    store_global(out + column, Element{static_cast<uint16_t>(pack<Element>(sum * factor, 0.0f))});
  }
  if (thread_index() == 0) {
    store_global(p.lse + row, l == 0.0f ? -kInfinity : top * a.units.to_natural + logf(l));
  }
}

const void* any_kernel() { return reinterpret_cast<const void*>(decode_combine_kernel<Float16>); }

void run_decode_combine(const DecodeArguments& a, Stream stream) {
  const bool half = a.p.q.dtype == DType::kFloat16;
  launch<DecodeArguments>(half ? "decode_combine<fp16>" : "decode_combine<bf16>",
                          half ? decode_combine_kernel<Float16> : decode_combine_kernel<BFloat16>,
                          a.p.B * a.p.H * a.p.T, kThreads, 0, stream, a);
}

}  // namespace attnfast::cuda
