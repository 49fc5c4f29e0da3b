// What the backward kernels share: tile sizes, and the step from scores and dP to ds (docs/math.md,
// section 4).
//   p = exp(s - m) / l    dP = Z (do v^T + dw)    ds = p (dP + row_term - dH (s - m))
#pragma once
#include "arguments.h"
#include "blocks.h"
#include "dropout.h"
#include "head.h"
#include "launch.h"
#include "row_terms.h"
#include "scores.h"
#include "tile.h"

namespace attnfast::cuda {

// Rows that stay (kKeys: keys with their dk and dv, else queries with their dq), and those that
// move past them. kSmall: fewer of either, for the shared memory of sm_75.
template <int kD, Form kForm, bool kKeys, bool kSmall>
struct BackwardShape {
  static constexpr bool kPlain = kIsPlain<kForm>, kBlocks = kHasBlocks<kForm>;
  static constexpr int kWarps = kD > 128 || kSmall || kBlocks || (kPlain && kD <= 64) ? 4 : 8;
  static constexpr int kRowTiles = kPlain && !kBlocks && kD <= 64 ? 2 : 1;  // of 16 rows, per warp
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
  // Keys at 128 not, where dk and dv together exceed the registers.
  static constexpr bool kOnTuring =
      kSharedBytes <= kTuringShared && (kSmall || !kKeys || kD != 128);
  static_assert(kSmall ? kOnTuring : kSharedBytes <= kSharedLimit);
};

// Calls run(std::bool_constant), true on sm_75 where only small shapes fit. Head dims that not even
// these fit are refused there, by dispatch.cu.
template <class Element, int kD, Form kForm, bool kKeys, class Run>
void with_shape(Stream stream, Run run) {
  constexpr bool kFits = BackwardShape<kD, kForm, kKeys, false>::kOnTuring;
  if constexpr (!kFits && kD <= 128 && std::is_same_v<Element, Float16>) {
    if (on_turing(stream)) return run(std::true_type());
  }
  run(std::false_type());
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

// Probabilities and ds, in one pass over a tile of scores and one of dP: scores to p Z, and dP to dx,
// the gradient of scale * q k^T. Plain calls mask both afterwards.
//   terms            terms.of_columns(n), then terms(m, e): the RowTerms of an element's query
//   kept, keep_scale dropout's bits as kept_by_dropout has them, and 1 / (1 - dropout_p)
//   dcapped          d capped / d uncapped; null: 1
template <bool kPlain, int kM, int kN, class Terms>
ATTNFAST_DEVICE void score_gradients(float (&s)[kM][kN][4], float (&dp)[kM][kN][4],
                                     const ScoreEdits& edits, const uint32_t (&kept)[kM],
                                     float keep_scale, const float (*dcapped)[kN][4], Terms terms) {
  ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
    terms.of_columns(n);
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
      ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
        const RowTerms of = terms(m, e);
        const float x = s[m][n][e];
        if constexpr (kPlain) {
          const float p = exp2_fast(fmaf(x - of.m, edits.units.to_log2, -of.log2_l));
          s[m][n][e] = p;
          dp[m][n][e] = p * (dp[m][n][e] + of.row_term);
        } else {
          const bool masked = x == -kInfinity;
          const float depth = depth_of(x, of.m, edits.units);
          const float p = exp2_fast(fmaf(depth, edits.units.to_log2, -of.log2_l));
          const float z = kept[m] >> (n * 4 + e) & 1 ? keep_scale : 0.0f;
          const float ds = p * (z * dp[m][n][e] + of.row_term - of.dentropy * depth);
          s[m][n][e] = masked ? 0.0f : p * z;
          dp[m][n][e] = masked ? 0.0f : ds * (dcapped ? dcapped[m][n][e] : 1.0f);
        }
      }
    }
  }
}

// Writes a warp's 16 rows of sums times `factor`, rounded to Element, and past shared memory, which
// other warps still read: the four lanes of a row hand each other the words of four chunks.
template <int kD, class Element>
ATTNFAST_DEVICE void store_by_quads(const float (&sum)[1][kD / 8][4], float factor, Element* out,
                                    int64_t stride, int rows, int columns, int lane) {
  ATTNFAST_UNROLL for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    ATTNFAST_UNROLL for (int n = 0; n < kD / 8; n += 4) {
      uint32_t words[4];  // lane % 4 of chunks n .. n + 3, then all of chunk n + lane % 4
      ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
        const float (&x)[4] = sum[0][n + i];
        words[i] = pack<Element>(x[half * 2] * factor, x[half * 2 + 1] * factor);
      }
      transpose_in_quads(words, lane);
      const int column = (n + lane % 4) * 8;
      if (row >= rows || column >= columns) continue;
      store_global(reinterpret_cast<Words4*>(out + row * stride + column),
                   Words4{words[0], words[1], words[2], words[3]});
    }
  }
}

}  // namespace attnfast::cuda
