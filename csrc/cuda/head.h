// One (batch entry or sequence, query head): where its rows lie, and which keys a query may attend
// to by position.
#pragma once
#include "../params.h"
#include "prims/prims.h"
#include "rows.h"

namespace attnfast::cuda {

constexpr int kFarthest = 1 << 30;  // what is added to it, up to 2^28 rows, leaves no overflow

ATTNFAST_DEVICE int saturate(int64_t x) {
  return static_cast<int>(min_of<int64_t>(max_of<int64_t>(x, INT32_MIN), INT32_MAX));
}

// A sequence's rows, [begin, begin + length), within a tensor of `total` rows, whatever cu_seqlens
// holds: at most `longest`, for which grids, scratch, masks and tiles were made.
struct Range {
  int begin, length;
  ATTNFAST_DEVICE Range(const int32_t* cu_seqlens, int64_t b, int64_t total, int64_t longest) {
    const int rows = static_cast<int>(total);
    begin = 0, length = static_cast<int>(longest);
    if (!cu_seqlens) return;
    begin = min_of(max_of(load_global(cu_seqlens + b), 0), rows);
    const int end = min_of(max_of(load_global(cu_seqlens + b + 1), begin), rows);
    length = min_of(end - begin, length);
  }
};

struct Head {
  int b, h, h_kv;
  int T, S;              // of this sequence
  int q_begin, k_begin;  // first row of this sequence (varlen), else 0
  int shift;             // t' = t + shift, from -kFarthest to kFarthest
  int low, high;         // query t may attend to key s if low <= s - t <= high

  // With windows = false, heads have none of their own.
  ATTNFAST_DEVICE Head(const AttentionParams& p, int64_t rows_q, int64_t rows_k, int64_t b_,
                       int64_t h_, bool windows = true)
      : b(static_cast<int>(b_)), h(static_cast<int>(h_)) {
    const Range q(p.cu_seqlens_q, b, rows_q, p.T), k(p.cu_seqlens_k, b, rows_k, p.S);
    h_kv = static_cast<int>(h_ / (p.H / p.H_kv));
    q_begin = q.begin, k_begin = k.begin, T = q.length, S = k.length;
    int64_t by = p.align_offset + (p.align_per_batch ? load_global(p.align_per_batch + b) : 0);
    if (p.align_bottom_right) by += S - T;
    shift = static_cast<int>(min_of<int64_t>(max_of<int64_t>(by, -kFarthest), kFarthest));
    int64_t left = p.window_left, right = p.window_right;
    if (windows && p.windows) {
      left = load_global(p.windows + 2 * h), right = load_global(p.windows + 2 * h + 1);
    }
    low = left < 0 ? INT32_MIN : saturate(by - left);
    high = right < 0 ? INT32_MAX : saturate(by + right);
    if (p.causal) high = min_of(high, saturate(by));
  }

  // As far as head h does, where each has its own window.
  ATTNFAST_DEVICE void look(const AttentionParams& p) {
    const int left = load_global(p.windows + 2 * h), right = load_global(p.windows + 2 * h + 1);
    low = left < 0 ? INT32_MIN : saturate(int64_t{shift} - left);
    high = right < 0 ? INT32_MAX : saturate(int64_t{shift} + right);
    if (p.causal) high = min_of(high, shift);
  }
  // As far as this head or any of the next `others` ones.
  ATTNFAST_DEVICE Head with_next(const AttentionParams& p, int others) const {
    Head all = *this, next = *this;
    for (; others > 0; --others) {
      ++next.h;
      next.look(p);
      all.low = min_of(all.low, next.low), all.high = max_of(all.high, next.high);
    }
    return all;
  }

  // Query t may attend to keys first_key(t) <= s < end_key(t), if that is a range at all.
  ATTNFAST_DEVICE int first_key(int t) const {
    return low == INT32_MIN ? 0 : saturate(max_of<int64_t>(int64_t{t} + low, 0));
  }
  ATTNFAST_DEVICE int end_key(int t) const {
    return saturate(high == INT32_MAX ? S : min_of<int64_t>(int64_t{t} + high + 1, S));
  }
  // Key s may be attended to by queries first_query(s) <= t < end_query(s), likewise.
  ATTNFAST_DEVICE int first_query(int s) const {
    return high == INT32_MAX ? 0 : saturate(max_of<int64_t>(int64_t{s} - high, 0));
  }
  ATTNFAST_DEVICE int end_query(int s) const {
    return saturate(low == INT32_MIN ? T : min_of<int64_t>(int64_t{s} - low + 1, T));
  }
  ATTNFAST_DEVICE bool in_reach(int t, int s) const { return s - t >= low && s - t <= high; }

  // What no query reaches, and what reaches no key, reads as zero, whatever it holds.
  template <class Element>
  ATTNFAST_DEVICE Rows<Element> keys_of(const View& x, int64_t columns, bool aligned) const {
    return {rows_of<Element>(x, h_kv, k_begin), x.t,    first_key(0), end_key(T - 1),
            static_cast<int>(columns),          aligned};
  }
  template <class Element>
  ATTNFAST_DEVICE Rows<Element> queries_of(const View& x, int64_t columns, bool aligned) const {
    return {rows_of<Element>(x, h, q_begin), x.t,    first_query(0), end_query(S - 1),
            static_cast<int>(columns),       aligned};
  }

  // Where a (B, H, rows, columns) tensor has a head's first row.
  template <class Element>
  ATTNFAST_DEVICE const Element* rows_of(const View& x, int64_t head, int first_row) const {
    return static_cast<const Element*>(x.data) + b * x.b + head * x.h + first_row * x.t;
  }
  template <class Element>
  ATTNFAST_DEVICE Element* rows_to(const MutableView& x, int64_t head, int first_row) const {
    return static_cast<Element*>(x.data) + b * x.b + head * x.h + first_row * x.t;
  }
  // Where lse and its like have query t.
  template <class Params>
  ATTNFAST_DEVICE int64_t row_number(const Params& p, int t) const {
    return (p.cu_seqlens_q ? 0 : b * p.lse_stride_b) + h * p.lse_stride_h + q_begin + t;
  }
};

}  // namespace attnfast::cuda
