// Attention probabilities and their column sums: second passes over the scores, after the forward.
//
//   p = exp(s - lse)
//   weights   p * keep / (1 - dropout_p), per head or the mean over the heads
//   received  sum over the queries of p
//
// Work:    weights: one item per (batch entry, head unless averaged, block of queries, range of
//          keys); received: one item per (batch entry, head, range of keys)
// Memory:  per thread one column's transposed q, one tile of scores, the item's sums, and for bf16
//          and fp16 a copy of the range's keys, in fp32 or on pairs (pairs.h)
// Threads: every item owns its part of the result and adds heads and queries in their order
#include <type_traits>

#include "arena.h"
#include "kernels.h"
#include "scores.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

constexpr Index kBlock = 64;            // queries of one item
constexpr Index kRange = 2 * kMaxKeys;  // keys of one item
constexpr Index kColumns = kBlock / kColumn;

// bf16 scores come from pairs; three planes of fp32 would not pay for one product.
template <class Element>
constexpr bool kPairs = kPlanesOf<Element> == 1;

struct Scratch {
  float *q_t, *s, *keep, *k;
  float* sum;  // weights: [kColumns][kRange][kColumn]; received: [kRange][kLanes]

  template <class Element>
  void take(Arena& arena, const Problem& p, Index sums) {
    const Index k_rows = kRange + kTileSize, D_pad = round_up(p.D, kPanel);
    const Index k_size = RowsAsFloat<Element>::kPacks ? k_rows * D_pad : 0;
    const Index tile = (kMaxKeys + kTileSize) * kColumn;
    arena.reset(Arena::bytes_for<float>(D_pad * kColumn) + 2 * Arena::bytes_for<float>(tile) +
                Arena::bytes_for<float>(k_size) + Arena::bytes_for<float>(sums));
    q_t = arena.take<float>(D_pad * kColumn);
    s = arena.take<float>(tile);
    keep = arena.take<float>(tile);
    k = arena.take<float>(k_size);
    sum = arena.take<float>(sums);
  }
};

// What is subtracted from a column's scores: lse in their units, +inf where there is no key.
struct Norms {
  alignas(64) float lse[kColumn];
  bool has_nan = false;

  template <class Element>
  Norms(const ForwardParams& p, const Head<Element>& head, const Column& column) {
    const float* row = p.lse + (p.cu_seqlens_q ? 0 : head.b * p.lse_stride_b) +
                       head.h * p.lse_stride_h + head.q_begin + column.t0;
    for (Index lane = 0; lane < kColumn; ++lane) {
      const float x = lane < column.rows ? row[lane] / head.to_natural() : kInfinity;
      lse[lane] = x == -kInfinity ? kInfinity : x;
      has_nan |= x != x;
    }
  }
};

template <class Element>
const float* load_keys(const Element* rows, const Problem& p, Index n, float* to, Index* k_row) {
  if constexpr (kPairs<Element>) {
    Peak unused;
    *k_row = round_up(p.D, kPanel) / 2;
    pack_rows_in_planes<1>(rows, p.k.t, n, p.D, n, to, *k_row, 0, &unused);
    return to;
  } else {
    return RowsAsFloat<Element>::get(rows, p.k.t, n, p.D, Use::kAlongRows, to, k_row);
  }
}

template <class Element>
void load_queries(const Head<Element>& head, const Column& column, float* to) {
  const Problem& p = head.problem;
  const Element* q = head.q + column.t0 * p.q.t;
  if constexpr (kPairs<Element>) {
    Peak unused;
    transpose_column_in_planes<1>(q, p.q.t, column.rows, p.D, 1.0f, to, 0, &unused);
  } else {
    transpose_in(q, p.q.t, column.rows, p.D, head.q_factor, to);
  }
}

// scratch.s[key][lane] = p before dropout, for keys key .. key + n - 1.
template <class Element>
void probability_tile(const Head<Element>& head, const Column& column, const Norms& norms,
                      Index key, Index n, const float* k, Index k_row, const Scratch& scratch) {
  DeadKeys dead;
  if constexpr (kPairs<Element>) {
    const Index panels = (head.problem.D + kPanel - 1) / kPanel;
    const PairScores<1> scores{
        {scratch.q_t, kColumn, 0}, {k, k_row, kPanelPairs, 0}, panels, head.q_factor};
    score_tile(head, column, key, n, scores, scratch.s, nullptr, nullptr, &dead);
  } else {
    score_tile(head, column, key, n, FloatScores{scratch.q_t, k, k_row, head.problem.D}, scratch.s,
               nullptr, nullptr, &dead);
  }
  const float to_log2 = head.to_log2();
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec lse = load(norms.lse + lane);
    for (Index j = 0; j < n; ++j) {
      float* s = scratch.s + j * kColumn + lane;
      store(s, exp2((load(s) - lse) * to_log2));
    }
  }
}

// Calls f(key, n) for the tiles of [begin, end).
template <class Function>
void for_each_tile(Index begin, Index end, Function f) {
  for (Index key = begin; key < end; key += kMaxKeys) f(key, min_of(kMaxKeys, end - key));
}

// sum[key - key_begin][lane] += weights of one head's column over [key_begin, key_end).
template <class Element>
void add_weights(const ForwardParams& p, const Head<Element>& head, const Column& column,
                 Index key_begin, Index key_end, const float* k, Index k_row,
                 const Scratch& scratch, float* sum) {
  const Norms norms(p, head, column);
  load_queries(head, column, scratch.q_t);
  const float kept = p.dropout_p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
  // A row that is NaN anywhere is NaN at all of its keys, as softmax would have it.
  const Index begin = norms.has_nan ? key_begin : max_of(key_begin, column.begin);
  const Index end = norms.has_nan ? key_end : min_of(key_end, column.end);
  for_each_tile(begin, end, [&](Index key, Index n) {
    probability_tile(head, column, norms, key, n, k + (key - key_begin) * k_row, k_row, scratch);
    if (p.dropout_p > 0.0) dropout_tile(head, column, key, n, kept, scratch.keep);
    float* out = sum + (key - key_begin) * kColumn;
    for (Index i = 0; i < n * kColumn; i += kLanes) {
      Vec weight = load(scratch.s + i);
      if (p.dropout_p > 0.0) {
        const Vec keep = load(scratch.keep + i);
        weight = keep == 0.0f ? zeros() : weight * keep;
      }
      store(out + i, load(out + i) + weight);
    }
  });
}

// The weights of queries t0 .. and keys key0 .. of batch entry b, of the heads that share an
// output.
template <class Element>
void weights_item(const ForwardParams& p, Index b, Index head_begin, Index head_end, Index t0,
                  Index key0, const Scratch& scratch) {
  const Index rows = min_of(kBlock, p.T - t0), keys = min_of(kRange, p.S - key0);
  for (Index c = 0; c * kColumn < rows; ++c)
    memset(scratch.sum + c * kRange * kColumn, 0, keys * kColumn * sizeof(float));
  const float* k = nullptr;
  Index k_row = 0;
  for (Index h = head_begin; h < head_end; ++h) {
    const Head<Element> head(p, b, h);
    const Index key_end = min_of(key0 + keys, head.S), live = min_of(rows, head.T - t0);
    if (key0 >= key_end || live <= 0) break;  // past the end of this sequence
    if (!k || h % (p.H / p.H_kv) == 0) {
      k = load_keys(head.k + key0 * p.k.t, p, key_end - key0, scratch.k, &k_row);
    }
    for (Index c = 0; c * kColumn < live; ++c) {
      const Column column(head, t0 + c * kColumn, min_of(live - c * kColumn, kColumn));
      add_weights(p, head, column, key0, key_end, k, k_row, scratch,
                  scratch.sum + c * kRange * kColumn);
    }
  }
  alignas(64) float factor[kColumn];
  for (float& x : factor) x = 1.0f / static_cast<float>(head_end - head_begin);
  Element* out = static_cast<Element*>(p.weights.data) + b * p.weights.b +
                 head_begin * p.weights.h + t0 * p.weights.t + key0;
  for (Index c = 0; c * kColumn < rows; ++c) {
    transpose_out(scratch.sum + c * kRange * kColumn, min_of(rows - c * kColumn, kColumn), keys,
                  factor, out + c * kColumn * p.weights.t, p.weights.t);
  }
}

template <class Element>
void weights(const ForwardParams& p) {
  const bool mean = p.weights_mode == Weights::kMean;
  const Index outputs = mean ? 1 : p.H, heads = mean ? p.H : 1;  // per batch entry; per output
  const Index blocks = (p.T + kBlock - 1) / kBlock, ranges = (p.S + kRange - 1) / kRange;
  const Index items = p.B * outputs * blocks * ranges;
  const int threads = usable_threads(p.num_threads);
#pragma omp parallel num_threads(threads) if (items > 1 && threads > 1)
  {
    const TileRegisters registers;
    Arena& arena = thread_arena();
    Scratch scratch;
    scratch.take<Element>(arena, p, kColumns * kRange * kColumn);
#pragma omp for schedule(dynamic, 1) nowait
    for (Index item = 0; item < items; ++item) {
      const Index range = item % ranges, block = item / ranges % blocks;
      const Index output = item / ranges / blocks;
      const Index h = output % outputs;
      weights_item<Element>(p, output / outputs, h, h + heads, block * kBlock, range * kRange,
                            scratch);
    }
    arena.release();
  }
}

// The column sums of keys key0 .. of one head, query by query in their order.
template <class Element>
void received_item(const ForwardParams& p, const Head<Element>& head, Index key0,
                   const Scratch& scratch) {
  const Index keys = min_of(kRange, head.S - key0);
  memset(scratch.sum, 0, kRange * kLanes * sizeof(float));
  Index k_row;
  const float* k = load_keys(head.k + key0 * p.k.t, p, keys, scratch.k, &k_row);
  for (Index t = 0; t < head.T; t += kColumn) {
    const Column column(head, t, min_of(head.T - t, kColumn));
    const Norms norms(p, head, column);
    const Index begin = norms.has_nan ? key0 : max_of(key0, column.begin);
    const Index end = norms.has_nan ? key0 + keys : min_of(key0 + keys, column.end);
    if (begin >= end) continue;
    load_queries(head, column, scratch.q_t);
    for_each_tile(begin, end, [&](Index key, Index n) {
      probability_tile(head, column, norms, key, n, k + (key - key0) * k_row, k_row, scratch);
      for (Index j = 0; j < n; ++j) {
        float* sum = scratch.sum + (key - key0 + j) * kLanes;
        Vec total = load(sum);
        ATTNFAST_UNROLL for (Index lane = 0; lane < kColumn; lane += kLanes) {
          total += load(scratch.s + j * kColumn + lane);
        }
        store(sum, total);
      }
    });
  }
  float* out = p.received + (p.cu_seqlens_k ? 0 : head.b * p.received_stride_b) +
               head.h * p.received_stride_h + head.k_begin + key0;
  for (Index j = 0; j < keys; ++j) out[j] = sum_lanes(load(scratch.sum + j * kLanes));
}

template <class Element>
void received(const ForwardParams& p) {
  const Index ranges = (p.S + kRange - 1) / kRange;
  const Index items = p.B * p.H * ranges;
  const int threads = usable_threads(p.num_threads);
#pragma omp parallel num_threads(threads) if (items > 1 && threads > 1)
  {
    const TileRegisters registers;
    Arena& arena = thread_arena();
    Scratch scratch;
    scratch.take<Element>(arena, p, kRange * kLanes);
#pragma omp for schedule(dynamic, 1) nowait
    for (Index item = 0; item < items; ++item) {
      const Index head_index = item / ranges, key0 = item % ranges * kRange;
      const Head<Element> head(p, head_index / p.H, head_index % p.H);
      if (key0 < head.S) received_item(p, head, key0, scratch);
    }
    arena.release();
  }
}

}  // namespace

void weights_fwd(const ForwardParams& p) {
  with_element(p.q.dtype,
               [&](auto* element) { weights<std::remove_pointer_t<decltype(element)>>(p); });
}

void received_fwd(const ForwardParams& p) {
  with_element(p.q.dtype,
               [&](auto* element) { received<std::remove_pointer_t<decltype(element)>>(p); });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
