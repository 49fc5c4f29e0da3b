// Which probabilities of a tile dropout keeps (docs/math.md, section 6).
#pragma once
#include "head.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// 1 / (1 - dropout_p), what is kept is multiplied with; 0 where nothing is.
inline float keep_scale_of(const AttentionParams& p) {
  return p.dropout_p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
}

// z[key][lane] = keep_scale where dropout keeps the probability of keys key .. key + n - 1, else 0.
template <class Element>
ATTNFAST_NOINLINE void dropout_tile(const Head<Element>& head, const Column& column, Index key,
                                    Index n, float keep_scale, float* z) {
  const AttentionParams& p = head.problem;
  const int32_t threshold = static_cast<int32_t>(__builtin_nearbyint(p.dropout_p * 65536.0));
  const auto stream = static_cast<uint32_t>(head.b * p.dropout_heads + p.dropout_head + head.h);
  const auto t0 = static_cast<int32_t>(p.dropout_query + column.t0);
  const Index first = p.dropout_key + key;
  const Vec kept = broadcast(keep_scale);
  for (Index group = first / 8; group * 8 < first + n; ++group) {
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      UVec words[4];
      const UVec t = bit_cast<UVec>(lane_numbers() + (t0 + static_cast<int32_t>(lane)));
      philox(static_cast<uint32_t>(group), t, stream, static_cast<uint32_t>(p.dropout_offset),
             p.dropout_seed, words);
      ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
        const Index j = group * 8 + i - first;
        const UVec draw = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
        if (j >= 0 && j < n) {
          store(z + j * kColumn + lane, bit_cast<IVec>(draw) >= threshold ? kept : zeros());
        }
      }
    }
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
