// Scores and probabilities once more, for the passes after the forward.
//
//   p = exp2((s - m) * to_log2 - log2 l)
//
// m and log2 l are the forward's, apart: beside a large m their sum would lose log2 l, and with it
// a factor of up to S (docs/math.md, section 5). And scores are rounded as the forward's were;
// where large ones are not, the backward finds m and l anew (find_norm in attention_bwd.cpp).
#pragma once
#include "rows.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// Scores of this size, in powers of two, are the last that may be rounded otherwise than the
// forward's were: p is then right to about 1e-4.
constexpr float kRoundedAlike = 256.0f;

// bf16 scores come from pairs; planes of fp16 and fp32 would not pay for one product.
template <class Element>
constexpr bool kOnPairs = kPlanesOf<Element> == 1;

// Keys of a tile, for scores_of: in place, or in `to`.
template <class Element>
const float* load_keys(const Element* rows, const AttentionParams& p, Index n, Use use, float* to,
                       Index* k_row) {
  if constexpr (kOnPairs<Element>) {
    Peak unused;
    *k_row = round_up(p.D, kPanel) / 2;
    pack_rows_in_planes<1>(rows, p.k.t, n, p.D, n, to, *k_row, 0, &unused);
    return to;
  } else {
    return RowsAsFloat<Element>::get(rows, p.k.t, n, p.D, use, to, k_row);
  }
}

// Floats that load_queries fills.
inline Index query_floats(const AttentionParams& p) {
  return max_of(p.D, round_up(p.D, kPanel) / 2) * kColumn;
}

template <class Element>
void load_queries(const Head<Element>& head, Index t, Index rows, float* to) {
  const AttentionParams& p = head.problem;
  const Element* q = head.q + t * p.q.t;
  if constexpr (kOnPairs<Element>) {
    Peak unused;
    transpose_column_in_planes<1>(q, p.q.t, rows, p.D, 1.0f, to, 0, &unused);
  } else {
    transpose_in(q, p.q.t, rows, p.D, head.units.factor, to);
  }
}

// s[key][lane] of keys key .. key + n - 1, see score_tile.
template <class Element>
void scores_of(const Head<Element>& head, const Column& column, Index key, Index n, const float* k,
               Index k_row, const float* q_t, float* s, float* dcapped, float* column_max,
               DeadKeys* dead) {
  const Index D = head.problem.D;
  if constexpr (kOnPairs<Element>) {
    const PairScores<1> scores{{q_t, kColumn, 0},
                               {k, k_row, kPanelPairs, 0},
                               (D + kPanel - 1) / kPanel,
                               head.units.factor};
    score_tile(head, column, key, n, scores, s, dcapped, column_max, dead);
  } else {
    score_tile(head, column, key, n, FloatScores{q_t, k, k_row, D}, s, dcapped, column_max, dead);
  }
}

// What makes probabilities of a column's scores.
struct Norm {
  alignas(64) float m[kColumn];       // in the scores' units
  alignas(64) float log2_l[kColumn];  // +inf where there is no key, so that p is 0
  bool has_nan;

  // Of `rows` queries from t on; p: ForwardParams or BackwardParams.
  template <class Params, class Element>
  void load_rows(const Params& p, const Head<Element>& head, Index t, Index rows) {
    const float* from = p.norm + (p.cu_seqlens_q ? 0 : head.b * p.lse_stride_b) +
                        head.h * p.lse_stride_h + head.q_begin + t;
    has_nan = false;
    for (Index lane = 0; lane < kColumn; ++lane) {
      m[lane] = lane < rows ? from[lane] : 0.0f;
      log2_l[lane] = lane < rows ? from[p.norm_plane + lane] : kInfinity;
      if (p.norm_plane == 0 && lane < rows) {                                  // the lse alone
        log2_l[lane] = m[lane] == -kInfinity ? kInfinity : m[lane] - m[lane];  // else 0, or NaN
        m[lane] = m[lane] == -kInfinity ? 0.0f : m[lane] / head.units.to_natural;
      }
      has_nan |= log2_l[lane] != log2_l[lane];
    }
  }

  static ATTNFAST_INLINE Vec probability(Vec s, Vec m, Vec log2_l, float to_log2) {
    return exp2((s - m) * to_log2 - log2_l);
  }

  // s -> p, in place. A row that is NaN anywhere is NaN at all keys, as softmax would have it.
  void exponentiate(Index n, float to_log2, float* s) const {
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const Vec base = load(m + lane), row_log2_l = load(log2_l + lane);
      for (Index j = 0; j < n; ++j) {
        float* x = s + j * kColumn + lane;
        store(x, probability(load(x), base, row_log2_l, to_log2));
      }
    }
  }
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
