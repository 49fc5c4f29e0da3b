// The tiles of a column's probabilities, for the passes after the forward.
#pragma once
#include "probabilities.h"
#include "segments.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// s[key][lane] = p before dropout, for keys key .. key + n - 1, whose rows begin at k.
template <class Element>
void probability_tile(const Head<Element>& head, const Column& column, const Norm& norm, Index key,
                      Index n, const float* k, Index k_row, const float* q_t, float* s) {
  DeadKeys dead;
  scores_of(head, column, key, n, k, k_row, q_t, s, nullptr, nullptr, &dead);
  norm.exponentiate(n, head.units.to_log2, s);
}

// Calls f(column, key, n) for the tiles of [key_begin, key_end) that the queries from t on attend.
// A row that is NaN anywhere is NaN at all of its keys, as softmax would have it.
template <class Element, class Function>
void each_tile(const Head<Element>& head, Index t, Index rows, const Norm& norm, Index key_begin,
               Index key_end, Function f) {
  Segments segments(head, t, key_begin, key_end, norm.has_nan);
  for (Segment segment; segments.next(&segment);) {
    const Column column(head, t, rows, segment);
    const Index begin = max_of(key_begin, norm.has_nan ? segment.begin : column.begin);
    const Index end = min_of(key_end, norm.has_nan ? segment.end : column.end);
    for (Index key = begin; key < end; key += kMaxKeys) f(column, key, min_of(kMaxKeys, end - key));
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
