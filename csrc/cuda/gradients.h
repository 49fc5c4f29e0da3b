// What the backward kernels share: tile sizes, and the step from scores and dP to ds (docs/math.md,
// section 4).
//   p = exp(s - m) / l
//   ds = p (Z (dP + dw) + row - dH (s - m))    row = -delta + dlse + dH (log l - H), for each query
#pragma once
#include "arguments.h"
#include "head.h"
#include "launch.h"
#include "scores.h"
#include "tile.h"

namespace attnfast::cuda {

// Rows that stay (kKeys: keys with their dk and dv, else queries with their dq), and those that
// move past them. kSmall: fewer of either, for the shared memory of sm_75.
template <int kD, bool kPlain, bool kKeys, bool kSmall>
struct BackwardShape {
  static constexpr int kWarps = kD > 128 || kSmall || (kPlain && kD <= 64) ? 4 : 8;
  static constexpr int kRowTiles = kPlain && kD <= 64 ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStay = kWarps * kRowTiles * 16;
  static constexpr int kMove = kKeys && !kPlain && kD == 128 ? 16 : 32;  // 32 would spill
  // Of moving rows, so that all fits into 99 KB, or 64.
  static constexpr int kStages = kD > (kSmall ? 96 : 192) ? 1 : 2;
  static constexpr int kStayBytes = kStay * kD * 2;  // of one of two tiles
  static constexpr int kMoveBytes = kMove * kD * 2;
  // With the queries' row terms, where it is they that move.
  static constexpr int kTermBytes = kMove * 4;
  static constexpr int kStageBytes = 2 * kMoveBytes + 4 * kTermBytes;
  static constexpr int kSharedBytes = 2 * kStayBytes + kStages * kStageBytes;
  static constexpr bool kOnTuring = kSharedBytes <= kTuringShared;
  static_assert(kSmall ? kOnTuring : kSharedBytes <= kSharedLimit);
};

// Calls run(std::bool_constant), true on sm_75 where only small shapes fit. Head dims that not even
// these fit are refused there, by dispatch.cu.
template <class Element, int kD, bool kPlain, bool kKeys, class Run>
void with_shape(Stream stream, Run run) {
  constexpr bool kFits = BackwardShape<kD, kPlain, kKeys, false>::kOnTuring;
  if constexpr (!kFits && kD <= 128 && std::is_same_v<Element, Float16>) {
    if (on_turing(stream)) return run(std::true_type());
  }
  run(std::false_type());
}

// Of one query: its norm as forward left it, the `row` above, and dH for scores in units.
struct RowTerms {
  float m = 0.0f, log2_l = kInfinity;  // those of a query without keys
  float row = 0.0f, spread = 0.0f;
};

// s - m where it is multiplied with p: it ends where p is 0, before dH times it is infinite.
ATTNFAST_DEVICE float depth_of(float x, float m, const Units& units) {
  return fmaxf(x - m, units.deepest);
}

// A head's queries; those whose softmax is NaN read as zero. Their row terms make NaN of what they
// attend to, and q would make it of other keys as well.
template <class Element>
struct KnownQueries : Rows<Element> {
  const float* log2_l;  // of the head's queries; null: all known, or attending to all keys at hand

  ATTNFAST_DEVICE bool has(int r) const {
    if (!Rows<Element>::has(r)) return false;
    if (!log2_l) return true;
    const float x = load_global(log2_l + r);
    return x == x;
  }
};
template <class Element>
ATTNFAST_DEVICE KnownQueries<Element> known_queries(const BackwardParams& p, const Head& head,
                                                    bool aligned, bool all) {
  return {head.queries_of<Element>(p.q, p.D, aligned),
          all ? nullptr : p.norm + p.norm_plane + head.row_number(p, 0)};
}

// The gradient of the returned weights: of the mean, each head's share.
struct WeightGradient {
  View of;
  int64_t at;
  float share;

  ATTNFAST_DEVICE WeightGradient(const BackwardParams& p, const Head& head) : of(p.grad_weights) {
    at = head.b * of.b + head.h * of.h;
    share = p.weights_mode == Weights::kMean ? 1.0f / static_cast<float>(p.H) : 1.0f;
  }
  ATTNFAST_DEVICE float operator()(Position x, const Head& head) const {
    if (x.t >= head.T || x.key >= head.S) return 0.0f;
    return share * load_addend(of, at + x.t * of.t + x.key * of.d);
  }

  // Adds it to a tile of dP.
  template <bool kTransposed, int kM, int kN>
  ATTNFAST_DEVICE void add_to(float (&dp)[kM][kN][4], const Head& head, int t0, int s0,
                              int lane) const {
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
          dp[m][n][e] += (*this)(position_of<kTransposed>(t0, s0, m, n, e, lane), head);
        }
      }
    }
  }
};

// Scores to p Z, and dP to dx, the gradient of scale * q k^T. Plain calls mask both afterwards.
//   terms            terms.of_columns(n), then terms(m, e): the RowTerms of an element's query
//   kept, keep       dropout's bits as kept_by_dropout has them, and 1 / (1 - dropout_p)
//   capped           d capped / d uncapped; null: 1
template <bool kPlain, int kM, int kN, class Terms>
ATTNFAST_DEVICE void score_gradients(float (&s)[kM][kN][4], float (&dp)[kM][kN][4],
                                     const ScoreOptions& options, const uint32_t (&kept)[kM],
                                     float keep, const float (*capped)[kN][4], Terms terms) {
  ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
    terms.of_columns(n);
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
      ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
        const RowTerms of = terms(m, e);
        const float x = s[m][n][e];
        if constexpr (kPlain) {
          const float p = exp2_fast(fmaf(x - of.m, options.units.to_log2, -of.log2_l));
          s[m][n][e] = p;
          dp[m][n][e] = p * (dp[m][n][e] + of.row);
        } else {
          const bool masked = x == -kInfinity;
          const float depth = depth_of(x, of.m, options.units);
          const float p = exp2_fast(fmaf(depth, options.units.to_log2, -of.log2_l));
          const float z = kept[m] >> (n * 4 + e) & 1 ? keep : 0.0f;
          const float ds = p * (z * dp[m][n][e] + of.row - of.spread * depth);
          s[m][n][e] = masked ? 0.0f : p * z;
          dp[m][n][e] = masked ? 0.0f : ds * (capped ? capped[m][n][e] : 1.0f);
        }
      }
    }
  }
}

// The row terms of a head's queries, as many planes as there are: without a gradient of the entropy
// no spread.
struct TermRows {
  float* m;
  int64_t plane;
  int planes;

  ATTNFAST_DEVICE TermRows(const BackwardArguments& a, int64_t b, int64_t h)
      : m(a.terms + (b * a.p.H + h) * a.padded),
        plane(a.p.B * a.p.H * a.padded),
        planes(a.p.grad_entropy ? 4 : 3) {}

  ATTNFAST_DEVICE float* row(int64_t t) const { return m + 2 * plane + t; }
  ATTNFAST_DEVICE RowTerms load(int64_t t) const {
    return {load_global(m + t), load_global(m + plane + t), load_global(row(t)),
            planes > 3 ? load_global(m + 3 * plane + t) : 0.0f};
  }
};

// The dot product of eight elements of do and of o.
template <class Element>
ATTNFAST_DEVICE float dot_of_chunk(const Words4& x, const Words4& y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    const auto low = [](uint32_t w) { return to_float(Element{static_cast<uint16_t>(w)}); };
    const auto high = [](uint32_t w) { return to_float(Element{static_cast<uint16_t>(w >> 16)}); };
    sum += low(xs[i]) * low(ys[i]) + high(xs[i]) * high(ys[i]);
  }
  return sum;
}

// Query t's row terms, by eight lanes together: `lane` of eight. The same bits in every kernel.
constexpr int kLanesPerRow = 8;

template <class Element>
ATTNFAST_DEVICE RowTerms row_terms(const BackwardArguments& a, const Head& head, int t, int lane) {
  const BackwardParams& p = a.p;
  const int D_v = static_cast<int>(p.D_v);
  float dot = 0.0f;
  for (int column = lane * 8; t < head.T && column < D_v; column += kLanesPerRow * 8) {
    const auto* o = head.rows_of<Element>(p.out, head.h, head.q_begin) + t * p.out.t;
    const auto* d_o = head.rows_of<Element>(p.grad_out, head.h, head.q_begin) + t * p.grad_out.t;
    if (a.out_aligned && a.grad_out_aligned) {
      dot += dot_of_chunk<Element>(load_global(reinterpret_cast<const Words4*>(o + column)),
                                   load_global(reinterpret_cast<const Words4*>(d_o + column)));
    } else {
      dot += dot_of_chunk<Element>(gather_chunk(o, column, D_v), gather_chunk(d_o, column, D_v));
    }
  }
  for (int lanes = 1; lanes < kLanesPerRow; lanes *= 2) dot += shuffle_xor(dot, lanes);
  RowTerms terms;
  if (t >= head.T) return terms;
  const int64_t at = head.row_number(p, t);
  const float log2_l = load_global(p.norm + p.norm_plane + at);
  if (log2_l == kInfinity) return terms;
  terms.m = load_global(p.norm + at), terms.log2_l = log2_l;
  // Nothing but the sink: o is zero, whatever do is.
  if (dot != dot && p.sinks && log2_l == 0.0f &&
      terms.m == load_global(p.sinks + head.h) * a.units.natural) {
    dot = 0.0f;
  }
  terms.row = -dot + (p.grad_lse ? load_global(p.grad_lse + at) : 0.0f);
  if (p.grad_entropy) {
    const float grad = load_global(p.grad_entropy + at);
    terms.row += grad * (log2_l * kLn2 - load_global(p.entropy + at));
    terms.spread = grad * a.units.to_natural;
  }
  return terms;
}

}  // namespace attnfast::cuda
