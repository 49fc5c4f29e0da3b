// From a call's sizes and options to the kernel that was built for them.
#include <stdexcept>

#include "arguments.h"
#include "kernels.h"

namespace attnfast::cuda {
namespace {

bool aligned(const void* data, int64_t b, int64_t h, int64_t t, int64_t columns) {
  constexpr int64_t kElements = 8;  // of 2 bytes: 16
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && b % kElements == 0 && h % kElements == 0 &&
         t % kElements == 0 && columns % kElements == 0;
}
template <class AnyView>
bool aligned(const AnyView& x, int64_t columns) {
  return aligned(x.data, x.b, x.h, x.t, columns);
}

}  // namespace

void attention_fwd(const ForwardParams& p, const DeviceSeed& dropout, int64_t rows_q,
                   int64_t rows_k, Stream stream) {
  ForwardArguments a{p, dropout, rows_q, rows_k};
  a.q_aligned = aligned(p.q, p.D), a.k_aligned = aligned(p.k, p.D);
  a.v_aligned = aligned(p.v, p.D_v), a.out_aligned = aligned(p.out, p.D_v);
  const bool plain = a.q_aligned && a.k_aligned && a.v_aligned && a.out_aligned && !p.mask.data &&
                     !p.bias.data && !p.alibi_slopes && !p.sinks && !(p.softcap > 0.0f) &&
                     !(p.dropout_p > 0.0) && !p.entropy && p.scale > 0.0f;
  const int64_t widest = p.D > p.D_v ? p.D : p.D_v;
  if (widest <= 32) return run_attention_fwd<32>(a, plain, stream);
  if (widest <= 64) return run_attention_fwd<64>(a, plain, stream);
  if (widest <= 96) return run_attention_fwd<96>(a, plain, stream);
  if (widest <= 128) return run_attention_fwd<128>(a, plain, stream);
  if (widest <= 192) return run_attention_fwd<192>(a, plain, stream);
  if (widest <= 256) return run_attention_fwd<256>(a, plain, stream);
  throw std::runtime_error("attention: the CUDA kernels take head dims up to 256, got " +
                           std::to_string(widest));
}

}  // namespace attnfast::cuda
