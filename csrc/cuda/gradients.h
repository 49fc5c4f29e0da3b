// What the backward kernels share: tile sizes, and the step from scores and dP to ds (docs/math.md,
// section 4).
//   ds = p (Z (dP + dw) + row - dH s)    row = -delta + dlse + dH (lse - H), one number per query
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
  // With the queries' norm, row and spread, where it is they that move.
  static constexpr int kTermBytes = kMove * 4;
  static constexpr int kStageBytes = 2 * kMoveBytes + 3 * kTermBytes;
  static constexpr int kSharedBytes = 2 * kStayBytes + kStages * kStageBytes;
  static constexpr bool kOnTuring = kSharedBytes <= kTuringShared;
  static_assert(kSmall ? kOnTuring : kSharedBytes <= kSharedLimit);
};

// Calls run(std::bool_constant), true on sm_75 where only small shapes fit. Head dims that not even
// these fit are refused there, by dispatch.cpp.
template <class Element, int kD, bool kPlain, bool kKeys, class Run>
void with_shape(Stream stream, Run run) {
  constexpr bool kFits = BackwardShape<kD, kPlain, kKeys, false>::kOnTuring;
  if constexpr (!kFits && kD <= 128 && std::is_same_v<Element, Float16>) {
    if (on_turing(stream)) return run(std::true_type());
  }
  run(std::false_type());
}

// Of one query: what is subtracted from its scores, lse in their units, +inf where it has no key;
// the `row` above; and dH for scores in units.
struct RowTerms {
  float norm, row, spread;
};

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

// Scores to p Z, and dP to dx, the gradient of scale * q k^T.
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
          const float p = exp2_fast(fmaf(x, options.factor, -of.norm));
          s[m][n][e] = p;
          dp[m][n][e] = x == -kInfinity ? 0.0f : p * (dp[m][n][e] + of.row);
        } else {
          const float p = exp2_fast((x - of.norm) * options.to_log2());
          const float z = kept[m] >> (n * 4 + e) & 1 ? keep : 0.0f;
          const float ds = p * (z * dp[m][n][e] + of.row - of.spread * x);
          s[m][n][e] = p * z;
          dp[m][n][e] = x == -kInfinity ? 0.0f : ds * (capped ? capped[m][n][e] : 1.0f);
        }
      }
    }
  }
}

// The row terms of a head's queries; `spread` is zero without a gradient of the entropy.
struct TermRows {
  const float *norm, *row, *spread;

  ATTNFAST_DEVICE TermRows(const BackwardArguments& a, int64_t b, int64_t h) {
    const int64_t at = (b * a.p.H + h) * a.padded, all = a.p.B * a.p.H * a.padded;
    norm = a.terms + at, row = norm + all, spread = a.p.grad_entropy ? row + all : nullptr;
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
  RowTerms terms{kInfinity, 0.0f, 0.0f};
  if (t >= head.T) return terms;
  const int64_t at = head.row_number(p, t);
  const float lse = load_global(p.lse + at);
  if (lse == -kInfinity) return terms;
  terms.norm = p.bias.data ? lse : lse * kLog2E;
  terms.row = -dot + (p.grad_lse ? load_global(p.grad_lse + at) : 0.0f);
  if (p.grad_entropy) {
    const float grad = load_global(p.grad_entropy + at);
    terms.row += grad * (lse - load_global(p.entropy + at));
    terms.spread = grad * (p.bias.data ? 1.0f : kLn2);
  }
  return terms;
}

}  // namespace attnfast::cuda
