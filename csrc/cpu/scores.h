// Tiles of scores with every option applied: the one place where positions, masks, bias, ALiBi and
// softcap live.
//
// Queries lie in vector lanes. A column is kColumn consecutive queries of one head; a tile is
// S[key][lane]. Scores are in units of log2 (scale * log2 e folded into q) so that p = exp2(s - m);
// where Scaling says so in natural units; and products on pairs that nothing edits stay what they
// are, so that a row's maximum is rounded as its scores: exp2((s - m) * to_log2) is at most 1.
#pragma once
#include "arena.h"
#include "elements.h"
#include "gemm.h"
#include "math.h"
#include "pairs.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kMaxKeys = 96;  // keys of one tile

constexpr float kMaxFloat = 3.4028234663852886e38f;

ATTNFAST_INLINE float clamp_finite(float x) {
  return x > kMaxFloat ? kMaxFloat : x < -kMaxFloat ? -kMaxFloat : x;
}

// How products become scores: times `factor`, then the cap. Whatever the scale and the cap are, no
// intermediate overflows where the score does not.
struct Scaling {
  static constexpr float kHuge = 0x1p60f;

  float unit;    // log2 e, or 1: natural, with a bias or where log2 e times a score might overflow
  float factor;  // of the products; without the cap's share where the cap divides
  float cap;     // softcap in units; 0: none
  bool after;    // the products are multiplied, and clamped, since q would overflow
  bool divides;  // tanh(score / cap), since 1 / cap would under- or overflow

  template <class Params>
  explicit Scaling(const Params& p) {
    const float size = __builtin_fabsf(p.scale);
    unit = p.bias.data || size > kHuge || p.softcap > kHuge ? 1.0f : kLog2E;
    cap = p.softcap * unit;
    divides = p.softcap > 0.0f && (p.softcap > kHuge || size > kHuge * p.softcap);
    factor = p.softcap > 0.0f && !divides ? p.scale / p.softcap : p.scale * unit;
    after = __builtin_fabsf(factor) > kHuge;
  }

  float folded() const { return after ? 1.0f : factor; }  // into q

  // Scores of n vectors from their products; slope_of_cap: null, or d capped / d uncapped.
  void finish(Index n, float* s, float* slope_of_cap) const {
    if (after) {
      for (Index i = 0; i < n * kLanes; i += kLanes) {
        const Vec x = load(s + i) * factor, most = broadcast(kMaxFloat);
        store(s + i, x > most ? most : x < -most ? -most : x);
      }
    }
    if (cap == 0.0f) return;
    for (Index i = 0; i < n * kLanes; i += kLanes) {
      const Vec x = load(s + i), y = divides ? x / cap : x, u = tanh(y);
      store(s + i, divides ? abs(y) < 0x1p-12f ? x : u * cap : u * cap);
      if (slope_of_cap) store(slope_of_cap + i, 1.0f - u * u);
    }
  }
};

// One (batch entry or sequence, head): where its rows lie and which keys a query may attend to.
template <class Element>
struct Head {
  const Problem& problem;
  Index b, h;
  Index T, S;                  // of this sequence
  Index q_begin, k_begin;      // first row of this sequence (varlen), else 0
  Index shift;                 // t' = t + shift
  Index live_begin, live_end;  // keys outside are padding for every query
  const Element *q, *k, *v;
  const char *mask, *bias;  // at (b, h, 0, 0)
  Scaling scaling;
  float slope;       // ALiBi's, in units of scaling; 0: none
  float q_factor;    // folded into q when it is transposed, or into products on pairs
  float to_log2;     // makes a difference of scores one of powers of two,
  float to_natural;  // or natural
  float sink;        // in the scores' units; -inf: none

  Head(const Problem& p, Index b_, Index h_) : problem(p), b(b_), h(h_), scaling(p) {
    q_begin = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
    k_begin = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
    T = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - q_begin : p.T;
    S = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - k_begin : p.S;
    shift = p.align_offset + (p.align_per_batch ? p.align_per_batch[b] : 0);
    if (p.align_bottom_right) shift += S - T;
    const Index h_kv = h / (p.H / p.H_kv);
    q = static_cast<const Element*>(p.q.data) + b * p.q.b + h * p.q.h + q_begin * p.q.t;
    k = static_cast<const Element*>(p.k.data) + b * p.k.b + h_kv * p.k.h + k_begin * p.k.t;
    v = static_cast<const Element*>(p.v.data) + b * p.v.b + h_kv * p.v.h + k_begin * p.v.t;
    mask = at_head(p.mask);
    bias = at_head(p.bias);
    const float unit = scaling.unit;
    slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride_b + h] * unit : 0.0f;
    to_log2 = kLog2E / unit, to_natural = 1.0f / unit;
    q_factor = scaling.folded();
    if (kPlanesOf<Element> == 1 && !edits_scores() && q_factor > 1.0f / Scaling::kHuge) {
      to_log2 *= q_factor, to_natural *= q_factor;  // products stay what they are
      q_factor = 1.0f;
    }
    sink = p.sinks ? p.sinks[h] : -kInfinity;
    if (sink > -kInfinity) sink = clamp_finite(sink / to_natural);
    live_begin = 0, live_end = S;
    if (mask && p.mask.t == 0) {  // key padding: nothing to do for the keys at either end
      while (live_end > 0 && !mask[(live_end - 1) * p.mask.d]) --live_end;
      while (live_begin < live_end && !mask[live_begin * p.mask.d]) ++live_begin;
    }
  }

  const char* at_head(const View& view) const {
    if (!view.data) return nullptr;
    return static_cast<const char*>(view.data) + (b * view.b + h * view.h) * size_of(view.dtype);
  }

  static Index size_of(DType dtype) {
    switch (dtype) {
      case DType::kBool:
        return 1;
      case DType::kFloat32:
        return 4;
      case DType::kFloat64:
        return 8;
      default:
        return 2;
    }
  }

  // The keys that query t may attend to by position: key_begin(t) <= s < key_end(t).
  Index key_begin(Index t) const {
    const Index left = problem.window_left;
    return left < 0 ? live_begin : min_of(max_of(t + shift - left, live_begin), live_end);
  }
  Index key_end(Index t) const {
    Index last = live_end - 1;
    if (problem.causal) last = min_of(last, t + shift);
    if (problem.window_right >= 0) last = min_of(last, t + shift + problem.window_right);
    return max_of(last + 1, live_begin);
  }

  // Whether scores are changed after the products, but by position.
  bool edits_scores() const {
    return problem.softcap > 0.0f || scaling.after || slope != 0.0f || mask != nullptr ||
           bias != nullptr;
  }
};

struct Column {
  Index t0, rows;                // the queries t0 .. t0 + rows - 1; lanes past them are idle
  Index begin, end;              // keys that at least one lane may attend to, by position
  Index inner_begin, inner_end;  // keys that every lane may attend to

  template <class Element>
  Column(const Head<Element>& head, Index t, Index n) : t0(t), rows(n) {
    begin = head.key_begin(t0), end = head.key_end(t0 + rows - 1);
    inner_begin = head.key_begin(t0 + rows - 1), inner_end = head.key_end(t0);
    if (begin >= end) begin = end = inner_begin = inner_end = 0;
  }
};

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

// Query positions t' of one vector of lanes.
ATTNFAST_INLINE IVec positions(const Column& column, Index shift, Index lane) {
  return lane_numbers() + static_cast<int32_t>(column.t0 + shift + lane);
}

// Products of the tile's key rows with the transposed queries, in fp32 ...
struct FloatScores {
  const float* q_t;  // [D][kColumn], head.q_factor folded in
  const float* k;    // the tile's first key row
  Index k_row, D;

  template <bool kMax>
  void run(Index n, float* s, float* column_max) const {
    gemm<kTileVecs, kMax>(n, D, MatrixA{k, k_row, 1}, MatrixB{q_t, kColumn}, MatrixC{s, kColumn},
                          Start::kZero, column_max);
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
    multiply_pairs<kPlanes>(n, kColumn, panels, k, q_t, MatrixC{s, kColumn}, Start::kZero);
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

// S[key][lane] for keys key .. key + n - 1 of a column, all options applied.
//   scores   FloatScores or PairScores; with tiles, rows up to the next multiple of 16 are written
//   slope_of_cap  null, or [n][kColumn]: d capped / d uncapped = 1 - tanh^2, for the backward
//   column_max    raised to the largest score of each lane; null: not wanted
template <class Element, class Scores>
ATTNFAST_NOINLINE void score_tile(const Head<Element>& head, const Column& column, Index key,
                                  Index n, const Scores& scores, float* s, float* slope_of_cap,
                                  float* column_max, DeadKeys* dead) {
  const Problem& p = head.problem;
  const bool boundary = key < column.inner_begin || key + n > column.inner_end;
  dead->any = false;
  if (!boundary && !head.edits_scores()) {
    if (column_max) {
      scores.template run<true>(n, s, column_max);
    } else {
      scores.template run<false>(n, s, nullptr);
    }
    return;
  }
  scores.template run<false>(n, s, nullptr);

  if (p.softcap > 0.0f || head.scaling.after) head.scaling.finish(n * kTileVecs, s, slope_of_cap);
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
  if (boundary) {
    const Vec masked = broadcast(-kInfinity);
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const IVec t = positions(column, head.shift, lane);
      const int32_t left =
          p.window_left < 0 ? INT32_MAX : static_cast<int32_t>(min_of(p.window_left, 1 << 30));
      Index reach = p.window_right < 0 ? 1 << 30 : min_of(p.window_right, 1 << 30);
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
  if (head.mask || head.bias) {
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

// keep[key][lane] = factor where dropout keeps the probability of keys key .. key + n - 1, else 0.
template <class Element>
ATTNFAST_NOINLINE void dropout_tile(const Head<Element>& head, const Column& column, Index key,
                                    Index n, float factor, float* keep) {
  const Problem& p = head.problem;
  const int32_t threshold = static_cast<int32_t>(__builtin_nearbyint(p.dropout_p * 65536.0));
  const uint32_t stream = static_cast<uint32_t>(head.b * p.H + head.h);
  const Vec kept = broadcast(factor);
  for (Index group = key / 8; group * 8 < key + n; ++group) {
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      UVec words[4];
      const UVec t = bit_cast<UVec>(lane_numbers() + static_cast<int32_t>(column.t0 + lane));
      philox(static_cast<uint32_t>(group), t, stream, static_cast<uint32_t>(p.dropout_offset),
             p.dropout_seed, words);
      ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
        const Index j = group * 8 + i - key;
        const UVec draw = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
        if (j >= 0 && j < n) {
          store(keep + j * kColumn + lane, bit_cast<IVec>(draw) >= threshold ? kept : zeros());
        }
      }
    }
  }
}

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

// Asks for rows that are wanted soon a few cache lines at a time, between the products of those
// that are there.
class Prefetcher {
 public:
  void clear() { count_ = next_ = lines_ = 0; }

  template <class Element>
  void add(const Element* rows, Index stride, Index n, Index D) {
    if (n <= 0 || D <= 0) return;
    const Index bytes = D * Index(sizeof(Element));
    ranges_[count_++] = {
        reinterpret_cast<const char*>(rows), stride * Index(sizeof(Element)), n, bytes, 0, 0};
    lines_ += n * ((bytes + 63) / 64);
  }

  Index lines() const { return lines_; }

  void advance(Index lines) {
    for (; lines > 0 && next_ < count_; --lines) {
      Range& r = ranges_[next_];
      __builtin_prefetch(r.base + r.row * r.stride + r.byte, 0, 2);
      r.byte += 64;
      if (r.byte < r.bytes) continue;
      r.byte = 0;
      if (++r.row == r.rows) ++next_;
    }
  }

 private:
  struct Range {
    const char* base;
    Index stride, rows, bytes, row, byte;
  };
  Range ranges_[8];
  int count_ = 0, next_ = 0;
  Index lines_ = 0;
};

// Bytes of a key head that a second-level cache surely keeps; of larger ones the next tile is asked
// for ahead.
constexpr Index kCachedBytes = 256 << 10;

inline bool outgrows_cache(const Problem& p, Index S) {
  return (p.D + p.D_v) * S * Index(sizeof(float)) > kCachedBytes;
}

// Queries of a block: tall ones read k and v less often, low ones are more to share out. No bit of
// a result depends on it.
constexpr Index kTallBlock = 128, kLowBlock = 64;

inline Index queries_per_block(const Problem& p) {
  Index tall = p.B * ((p.T + kTallBlock - 1) / kTallBlock);
  if (p.cu_seqlens_q) tall = min_of(tall, p.B + p.cu_seqlens_q[p.B] / kTallBlock);
  return tall * p.H < 4 * usable_threads(p.num_threads) ? kLowBlock : kTallBlock;
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
