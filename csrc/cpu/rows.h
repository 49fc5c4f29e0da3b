// Rows of keys and values as products over them read them.
#pragma once
#include "arena.h"
#include "scores.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// A tile's key or value rows in fp32: where they lie already, or copied to scratch.
//
// fp32 rows are copied only for products over the keys (`across`), and only where they lie far
// apart: those walk down columns, and rows of a packed projection would all fall into a few sets of
// the first-level cache.
enum class Use { kAlongRows, kAcross };

template <class Element>
struct RowsAsFloat {
  static constexpr bool kPacks = true;
  static const float* get(const Element* rows, Index stride, Index n, Index D, Use, float* scratch,
                          Index* out_stride) {
    *out_stride = round_up(D, kLanes);
    pack_rows(rows, stride, n, D, *out_stride, 1.0f, scratch);
    return scratch;
  }
};
template <>
struct RowsAsFloat<float> {
  static constexpr bool kPacks = false;
  static bool lies_well(Index stride, Index D) { return stride <= 2 * D; }
  static const float* get(const float* rows, Index stride, Index n, Index D, Use use,
                          float* scratch, Index* out_stride) {
    if (use == Use::kAlongRows || lies_well(stride, D)) {
      *out_stride = stride;
      return rows;
    }
    *out_stride = round_up(D, kLanes);
    pack_rows(rows, stride, n, D, *out_stride, 1.0f, scratch);
    return scratch;
  }
};

// Bytes of a key head that a second-level cache surely keeps; of larger ones the next tile is asked
// for ahead.
constexpr Index kCachedBytes = 256 << 10;

inline bool outgrows_cache(const AttentionParams& p, Index S) {
  return (p.D + p.D_v) * S * Index(sizeof(float)) > kCachedBytes;
}

// Whether a row that nobody attends to holds NaN or Inf, which 0 * x would let out.
inline bool has_poison(const float* rows, Index stride, Index n, Index D, const DeadKeys& dead) {
  if (!dead.any) return false;
  for (Index j = 0; j < n; ++j) {
    if (!dead.key[j]) continue;
    for (Index d = 0; d < D; ++d) {
      const float x = rows[j * stride + d];
      if (!(x - x == 0.0f)) return true;
    }
  }
  return false;
}

// C[D][kColumn] (+)= rows^T weights over the tile's keys: o += v^T p, or dq += k^T ds.
inline Start gather_keys(const float* rows, Index stride, Index n, Index D, const float* weights,
                         float* c, Start start, const DeadKeys& dead) {
  const auto run = [&](Index j, Index count) {
    gemm<kTileVecs>(D, count, MatrixA{rows + j * stride, 1, stride},
                    MatrixB{weights + j * kColumn, kColumn}, MatrixC{c, kColumn}, start);
    start = Start::kAccumulate;
  };
  if (!has_poison(rows, stride, n, D, dead)) {
    run(0, n);
    return start;
  }
  for (Index j = 0; j < n;) {
    Index end = j;
    while (end < n && !dead.key[end]) ++end;
    if (end > j) run(j, end - j);
    j = end + 1;
  }
  return start;
}

// Queries of a block: tall ones read k and v less often, low ones are more to share out. No bit of
// a result depends on it. A block lies within a row of a block mask's.
constexpr Index kTallBlock = 128, kLowBlock = 64;

inline Index most_queries_per_block(const AttentionParams& p) {
  return p.blocks.starts ? min_of(p.blocks.size, kTallBlock) : kTallBlock;
}

inline Index queries_per_block(const AttentionParams& p) {
  if (most_queries_per_block(p) == kLowBlock) return kLowBlock;
  Index tall = p.B * ((p.T + kTallBlock - 1) / kTallBlock);
  if (p.cu_seqlens_q) tall = min_of(tall, p.B + p.cu_seqlens_q[p.B] / kTallBlock);
  return tall * p.H < 4 * usable_threads(p.num_threads) ? kLowBlock : kTallBlock;
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
