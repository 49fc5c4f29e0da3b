// What a row's sums become once its last key is in: the factor of o, lse, norm and statistics.
#pragma once
#include "head.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// Of one vector of rows; m and depth_sum are in the scores' units.
struct RowSums {
  Vec m, l;                     // the largest score, and the sum of exp(s - m)
  Vec depth_sum, distance_sum;  // of p (s - m), of p |j - t'|
};

struct RowResults {
  Vec o_scale;  // what the sums of p v are multiplied with
  Vec lse, m, log2_l, max_logit, entropy, reach, focus;
};

// `sink` in units; `sinks` as they were given, null where there are none.
ATTNFAST_INLINE RowResults finish_rows(const RowSums& sums, Vec sink, const Vec* sinks,
                                       const Units& units) {
  const float to_log2 = units.to_log2, to_natural = units.to_natural;
  const Vec m = sums.m;
  Vec top = m, top_natural = m * to_natural, l = sums.l;
  Vec depth_sum = sums.depth_sum, rescale = broadcast(1.0f);
  // Sinks
  if (sinks) {
    top = max(sink, m);
    top_natural = sink >= m ? *sinks : top_natural;
    const Vec base = top == -kInfinity ? zeros() : top;
    const Vec drop = l == 0.0f ? zeros() : m - base;
    rescale = l == 0.0f ? broadcast(1.0f) : exp2(drop * to_log2);
    const Vec l_sink = exp2((sink - base) * to_log2);
    depth_sum = (rescale == 0.0f ? zeros() : (depth_sum + l * drop) * rescale) +
                (l_sink > 0.0f ? l_sink * (sink - base) : zeros());
    l = l * rescale + l_sink;
  }

  // Statistics
  const Vec log2_l = log2(l), log_l = log2_l * kLn2;
  const IVec empty = l == 0.0f;
  const Vec inverse = empty ? zeros() : 1.0f / l;
  RowResults to;
  to.o_scale = inverse * rescale;
  to.lse = empty ? broadcast(-kInfinity) : top_natural + log_l;
  to.m = empty ? zeros() : top;
  to.log2_l = empty ? broadcast(kInfinity) : log2_l;
  to.max_logit = m * to_natural;
  to.entropy = empty ? zeros() : log_l - depth_sum * inverse * to_natural;
  to.reach = sums.distance_sum * rescale * inverse;
  to.focus = m == -kInfinity ? zeros() : rescale * inverse;
  return to;
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
