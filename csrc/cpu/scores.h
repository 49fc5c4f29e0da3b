// Tiles of scores with every option applied: the one place where positions, masks, bias, ALiBi and
// softcap live.
//
// A tile is S[key][lane] of one column of queries. Scores are in units of log2 (scale * log2 e
// folded into q) so that p = exp2(s - m); where Scaling says so in natural units; and products on
// pairs that nothing edits stay what they are, so that a row's maximum is rounded as its scores:
// exp2((s - m) * to_log2) is at most 1.
#pragma once
#include "gemm.h"
#include "head.h"
#include "prefetcher.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kMaxKeys = 96;  // keys of one tile

// Keys of a tile that no lane attends to although their scores were computed.
struct DeadKeys {
  bool any = false;
  bool key[kMaxKeys];
};

// A bool mask as what is added to the scores: 0 where true, -inf where false.
struct MaskByte {
  uint8_t value;
};
ATTNFAST_INLINE float to_float(MaskByte x) { return x.value ? 0.0f : -kInfinity; }
ATTNFAST_INLINE Vec load(const MaskByte* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  const UVec wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), UVec);
  return wide != 0u ? zeros() : broadcast(-kInfinity);
}
ATTNFAST_INLINE Vec load(const double* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}

// Calls f(value, address) for the tile's elements: tile[key][lane] = f(tile[key][lane], view[t0 +
// lane, key]).
template <class Element, class Function>
inline void fold_rows(const char* at_head, Index t_stride, Index s_stride, Index t0, Index rows,
                      Index key, Index n, float* tile, Function f) {
  const Element* base = reinterpret_cast<const Element*>(at_head) + t0 * t_stride + key * s_stride;
  if (t_stride == 0) {
    for (Index j = 0; j < n; ++j) {
      const Vec x = broadcast(to_float(base[j * s_stride]));
      for (Index lane = 0; lane < kColumn; lane += kLanes) {
        float* out = tile + j * kColumn + lane;
        store(out, f(load(out), x));
      }
    }
    return;
  }
  for (Index lane = 0; lane < rows; lane += kLanes) {
    const Index live = min_of(rows - lane, kLanes);
    const Element* row = base + lane * t_stride;
    if (t_stride == 1) {  // transposed already
      for (Index j = 0; j < n; ++j) {
        Vec x = zeros();
        if (live == kLanes) {
          x = load(row + j * s_stride);
        } else {
          for (Index i = 0; i < live; ++i) x[i] = to_float(row[i + j * s_stride]);
        }
        float* out = tile + j * kColumn + lane;
        store(out, f(load(out), x));
      }
      continue;
    }
    for (Index j = 0; j < n; j += kLanes) {
      const Index width = min_of(n - j, kLanes);
      Vec r[kLanes];
      if (s_stride == 1 && width == kLanes) {
        ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) {
          r[i] = i < live ? load(row + i * t_stride + j) : zeros();
        }
      } else {
        for (Index i = 0; i < kLanes; ++i) {
          r[i] = zeros();
          if (i >= live) continue;
          for (Index x = 0; x < width; ++x)
            r[i][x] = to_float(row[i * t_stride + (j + x) * s_stride]);
        }
      }
      transpose_tile(r);
      for (Index x = 0; x < width; ++x) {
        float* out = tile + (j + x) * kColumn + lane;
        store(out, f(load(out), r[x]));
      }
    }
  }
}

template <class Function>
inline void fold_view(const View& view, const char* at_head, Index t0, Index rows, Index key,
                      Index n, float* tile, Function f) {
  switch (view.dtype) {
    case DType::kBool:
      return fold_rows<MaskByte>(at_head, view.t, view.d, t0, rows, key, n, tile, f);
    case DType::kFloat32:
      return fold_rows<float>(at_head, view.t, view.d, t0, rows, key, n, tile, f);
    case DType::kFloat64:
      return fold_rows<double>(at_head, view.t, view.d, t0, rows, key, n, tile, f);
    case DType::kBFloat16:
      return fold_rows<BFloat16>(at_head, view.t, view.d, t0, rows, key, n, tile, f);
    case DType::kFloat16:
      return fold_rows<Float16>(at_head, view.t, view.d, t0, rows, key, n, tile, f);
  }
}

// Products of the tile's key rows with the transposed queries, in fp32 ...
struct FloatScores {
  const float* q_t;  // [D][kColumn], head.units.factor folded in
  const float* k;    // the tile's first key row
  Index k_row, D;
  Prefetcher* ahead = nullptr;  // advanced by `lines` after each kTileRows keys
  Index lines = 0;

  template <bool kMax>
  void run(Index n, float* s, float* column_max) const {
    const Index rows = ahead ? kTileRows : n;
    for (Index j = 0; j < n; j += rows) {
      gemm<kTileVecs, kMax>(min_of(n - j, rows), D, MatrixA{k + j * k_row, k_row, 1},
                            MatrixB{q_t, kColumn}, MatrixC{s + j * kColumn, kColumn}, Start::kZero,
                            column_max);
      if (ahead) ahead->advance(lines);
    }
  }
};

// ... or on pairs.
template <int kPlanes>
struct PairScores {
  PairsB q_t;  // [panels * 16][kColumn]
  PairsA k;
  Index panels;
  float factor;  // what the products are multiplied with

  template <bool kMax>
  void run(Index n, float* s, float* column_max) const {
    constexpr int kOrder = kPlanes == 2 ? 3 : kPlanes;  // lse is an fp32 result
    multiply_pairs<kPlanes, kOrder>(n, kColumn, panels, k, q_t, MatrixC{s, kColumn}, Start::kZero);
    if (!kMax && factor == 1.0f) return;
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      Vec m = kMax ? load(column_max + lane) : zeros();
      for (Index j = 0; j < n; ++j) {
        float* x = s + j * kColumn + lane;
        if (factor != 1.0f) store(x, load(x) * factor);
        if (kMax) m = max(load(x), m);
      }
      if (kMax) store(column_max + lane, m);
    }
  }
};

// -inf where a block mask has no bit.
inline void mask_by_bits(const Column& column, Index key, Index n, float* s) {
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    for (Index j = 0; j < n;) {
      const Index at = key + j - column.block_key, bit = at % 32, count = min_of(32 - bit, n - j);
      UVec words;
      for (Index i = 0; i < kLanes; ++i)
        words[i] = static_cast<uint32_t>(column.bits[(lane + i) * column.words + at / 32]);
      words >>= static_cast<uint32_t>(bit);
      for (Index x = 0; x < count; ++x, ++j, words >>= 1u) {
        float* score = s + j * kColumn + lane;
        store(score, (words & 1u) != 0u ? load(score) : broadcast(-kInfinity));
      }
    }
  }
}

// S[key][lane] for keys key .. key + n - 1 of a column, all options applied.
//   scores   FloatScores or PairScores; with tiles, rows up to the next multiple of 16 are written
//   dcapped  null, or [n][kColumn]: d capped / d uncapped = 1 - tanh^2, for the backward
//   column_max    raised to the largest score of each lane; null: not wanted
template <class Element, class Scores>
ATTNFAST_NOINLINE void score_tile(const Head<Element>& head, const Column& column, Index key,
                                  Index n, const Scores& scores, float* s, float* dcapped,
                                  float* column_max, DeadKeys* dead) {
  const AttentionParams& p = head.problem;
  const bool boundary = key < column.inner_begin || key + n > column.inner_end;
  dead->any = false;
  if (!boundary && !column.bits && !head.edits_scores()) {
    if (column_max) {
      scores.template run<true>(n, s, column_max);
    } else {
      scores.template run<false>(n, s, nullptr);
    }
    return;
  }
  scores.template run<false>(n, s, nullptr);

  if (p.softcap > 0.0f || head.units.after) head.units.finish(n * kTileVecs, s, dcapped);
  if (head.slope != 0.0f) {
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const IVec t = positions(column, head.shift, lane);
      for (Index j = 0; j < n; ++j) {
        float* x = s + j * kColumn + lane;
        const Vec distance = abs(__builtin_convertvector(t - static_cast<int32_t>(key + j), Vec));
        store(x, load(x) - distance * head.slope);
      }
    }
  }
  if (head.bias) {
    fold_view(p.bias, head.bias, column.t0, column.rows, key, n, s,
              [](Vec score, Vec bias) { return bias == -kInfinity ? bias : score + bias; });
  }
  if (head.mask) {
    fold_view(p.mask, head.mask, column.t0, column.rows, key, n, s,
              [](Vec score, Vec mask) { return mask == -kInfinity ? mask : score; });
  }
  if (column.bits) mask_by_bits(column, key, n, s);
  if (boundary) {
    const Vec masked = broadcast(-kInfinity);
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const IVec t = positions(column, head.shift, lane);
      const int32_t left =
          head.left < 0 ? INT32_MAX : static_cast<int32_t>(min_of(head.left, 1 << 30));
      Index reach = head.right < 0 ? 1 << 30 : min_of(head.right, 1 << 30);
      if (p.causal) reach = 0;
      const int32_t right = static_cast<int32_t>(reach);
      for (Index j = 0; j < n; ++j) {
        if (key + j >= column.inner_begin && key + j < column.inner_end) continue;
        float* x = s + j * kColumn + lane;
        const IVec ahead = static_cast<int32_t>(key + j) - t;
        store(x, ((ahead <= right) & (ahead >= -left)) ? load(x) : masked);
      }
    }
  }
  for (Index lane = column.rows; lane < kColumn; ++lane) {
    for (Index j = 0; j < n; ++j) s[j * kColumn + lane] = -kInfinity;
  }
  if (head.mask || head.bias || column.bits) {
    for (Index j = 0; j < n; ++j) {
      IVec live{};
      for (Index lane = 0; lane < kColumn; lane += kLanes)
        live |= load(s + j * kColumn + lane) != -kInfinity;
      dead->key[j] = !any(live);
      dead->any |= dead->key[j];
    }
  }
  if (column_max) {
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      Vec m = load(column_max + lane);
      for (Index j = 0; j < n; ++j) m = max(load(s + j * kColumn + lane), m);
      store(column_max + lane, m);
    }
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
