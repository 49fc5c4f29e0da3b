// Attention probabilities and their column sums: second passes over the scores, after the forward.
//
//   p = exp(s - m - log l)
//   weights   p * z, per head or the mean over the heads
//   received  sum over the queries of p
//
// Work:    weights: one item per (batch entry, head unless averaged, block of queries, range of
//          keys); received: one item per (batch entry, head, range of keys)
// Memory:  per thread one column's transposed q, one tile of scores, the item's sums, and for bf16
//          and fp16 a copy of the range's keys, in fp32 or on pairs (pairs.h)
// Threads: every item owns its part of the result and adds heads and queries in their order
#include <type_traits>

#include "blocks.h"
#include "dropout.h"
#include "kernels.h"
#include "probability_tiles.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

constexpr Index kBlock = 64;            // queries of one item
constexpr Index kRange = 2 * kMaxKeys;  // keys of one item
constexpr Index kColumns = kBlock / kColumn;

struct Scratch {
  float *q_t, *s, *z, *k;
  float* sum;  // weights: [kColumns][kRange][kColumn]; received: [kRange][kLanes]

  Worker* worker = nullptr;

  Scratch(Parts& parts, const AttentionParams& p, bool packs, Index sums) {
    const Index k_rows = kRange + kTileSize, D_pad = round_up(p.D, kPanel);
    const Index tile = (kMaxKeys + kTileSize) * kColumn;
    q_t = parts.take<float>(D_pad * kColumn);
    s = parts.take<float>(tile);
    z = parts.take<float>(tile);
    k = parts.take<float>(packs ? k_rows * D_pad : 0);
    sum = parts.take<float>(sums);
  }
};

// sum[key - key_begin][lane] += weights of one head's column over [key_begin, key_end).
template <class Element>
void add_weights(const ForwardParams& p, const Head<Element>& head, Index t, Index rows,
                 Index key_begin, Index key_end, const float* k, Index k_row,
                 const Scratch& scratch, float* sum) {
  Norm norm;
  norm.load_rows(p, head, t, rows);
  load_queries(head, t, rows, scratch.q_t);
  const float keep_scale = keep_scale_of(p);
  each_tile(head, t, rows, norm, key_begin, key_end, [&](const Column& column, Index key, Index n) {
    probability_tile(head, column, norm, key, n, k + (key - key_begin) * k_row, k_row, scratch.q_t,
                     scratch.s);
    if (p.dropout_p > 0.0) dropout_tile(head, column, key, n, keep_scale, scratch.z);
    float* out = sum + (key - key_begin) * kColumn;
    for (Index i = 0; i < n * kColumn; i += kLanes) {
      Vec weight = load(scratch.s + i);
      if (p.dropout_p > 0.0) {
        const Vec z = load(scratch.z + i);
        weight = z == 0.0f ? zeros() : weight * z;
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
      k = load_keys(head.k + key0 * p.k.t, p, key_end - key0, Use::kAlongRows, scratch.k, &k_row);
    }
    for (Index c = 0; c * kColumn < live; ++c) {
      if (scratch.worker->stops(kColumn * keys)) return;
      add_weights(p, head, t0 + c * kColumn, min_of(live - c * kColumn, kColumn), key0, key_end, k,
                  k_row, scratch, scratch.sum + c * kRange * kColumn);
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
  const auto prepare = [&](Parts& parts) {
    return Scratch(parts, p, RowsAsFloat<Element>::kPacks, kColumns * kRange * kColumn);
  };
  parallel(p, items, 1, prepare, [&](Index item, const Scratch& scratch) {
    const Index range = item % ranges, block = item / ranges % blocks;
    const Index output = item / ranges / blocks;
    const Index h = output % outputs;
    weights_item<Element>(p, output / outputs, h, h + heads, block * kBlock, range * kRange,
                          scratch);
  });
}

// The column sums of keys key0 .. of one head, query by query in their order.
template <class Element>
void received_item(const ForwardParams& p, const Head<Element>& head, Index key0,
                   const Scratch& scratch) {
  const Index keys = min_of(kRange, head.S - key0);
  memset(scratch.sum, 0, kRange * kLanes * sizeof(float));
  Index k_row;
  const float* k = load_keys(head.k + key0 * p.k.t, p, keys, Use::kAlongRows, scratch.k, &k_row);
  for (Index t = 0; t < head.T; t += kColumn) {
    const Index rows = min_of(head.T - t, kColumn);
    Norm norm;
    norm.load_rows(p, head, t, rows);
    if (scratch.worker->stops(kColumn * keys)) return;
    bool loaded = false;
    each_tile(head, t, rows, norm, key0, key0 + keys,
              [&](const Column& column, Index key, Index n) {
                if (!loaded) load_queries(head, t, rows, scratch.q_t);
                loaded = true;
                probability_tile(head, column, norm, key, n, k + (key - key0) * k_row, k_row,
                                 scratch.q_t, scratch.s);
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
  const Blocks ranges(p.cu_seqlens_k, p.B, p.H, p.S, kRange);
  const auto prepare = [&](Parts& parts) {
    return Scratch(parts, p, RowsAsFloat<Element>::kPacks, kRange * kLanes);
  };
  parallel(p, ranges.count(), 1, prepare, [&](Index item, const Scratch& scratch) {
    const Block at = ranges[item];
    received_item(p, Head<Element>(p, at.b, at.h), at.index * kRange, scratch);
  });
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
