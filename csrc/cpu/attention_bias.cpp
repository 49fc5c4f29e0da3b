// The gradients of a bias and of the sinks: sums of ds over whatever the bias was broadcast over.
//
//   dbias = sum of ds        dsink = sum over rows of p_sink * (row_term - dentropy * (sink - m))
//
// Work:    one item per block of dbias, which walks through all that is summed into it: no atomics
// Memory:  per thread tiles, and the block of dbias in fp32
// Threads: results do not depend on their number
#include <type_traits>

#include "attention_bwd_tiles.h"
#include "kernels.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

template <class Element>
struct BiasGradient : BackwardTiles<Element> {
  using Tiles = BackwardTiles<Element>;
  using Tiles::block_rows;
  using Tiles::column_of;
  using Tiles::columns_per_block;
  using Tiles::gradient_tile;
  using Tiles::load_block;
  using Tiles::p;
  using Tiles::parallel;
  using Tiles::row_offset;
  using Tiles::row_terms;

  // dbias: each item owns a block of it and walks through all that is summed into that block.
  void bias() const {
    const MutableView& to = p.dbias;
    const bool per_b = to.b != 0, per_h = to.h != 0, per_t = to.t != 0, per_s = to.d != 0;
    const Index batches = per_b ? p.B : 1, heads = per_h ? p.H : 1;
    const Index blocks = per_t ? (p.T + block_rows - 1) / block_rows : 1;
    const Index ranges = per_s ? (p.S + kKeysPerItem - 1) / kKeysPerItem : 1;
    const Index key_rows = per_s ? kKeysPerItem : 1;
    ScratchPlan plan{columns_per_block()};
    plan.sums = plan.num_columns * key_rows * kColumn;
    parallel(batches * heads * blocks * ranges, plan, [&](Index item, BackwardScratch& s) {
      const Index range = item % ranges, block = item / ranges % blocks;
      const Index h0 = item / ranges / blocks % heads, b0 = item / ranges / blocks / heads;
      const Index key_begin = per_s ? range * kKeysPerItem : 0;
      const Index key_end = per_s ? min_of(key_begin + kKeysPerItem, p.S) : p.S;
      memset(s.sums, 0, plan.sums * sizeof(float));
      for (Index b = per_b ? b0 : 0; b < (per_b ? b0 + 1 : p.B); ++b) {
        for (Index h = per_h ? h0 : 0; h < (per_h ? h0 + 1 : p.H); ++h) {
          const Head<Element> head(p, b, h);
          if (key_begin >= head.S) continue;
          const Index t_begin = per_t ? block * block_rows : 0;
          const Index t_end = per_t ? min_of(t_begin + block_rows, head.T) : head.T;
          for (Index t0 = t_begin; t0 < t_end; t0 += block_rows) {
            sum_bias_block(head, t0, min_of(block_rows, t_end - t0), key_begin,
                           min_of(key_end, head.S), per_s, s);
          }
        }
      }
      write_bias_block(b0, h0, block * block_rows, key_begin, key_end - key_begin, per_t, per_s, s);
    });
  }

  // sums[column][key][lane] += ds; one row for all keys unless per_s.
  void sum_bias_block(const Head<Element>& head, Index t0, Index n, Index key_begin, Index key_end,
                      bool per_s, BackwardScratch& s) const {
    load_block(head, t0, n, s, false);
    const Index rows_per_column = per_s ? kKeysPerItem : 1;
    for (Index c = 0; c < s.num_columns; ++c) {
      Segments segments(head, t0, key_begin, key_end);
      for (Segment segment; segments.next(&segment);) {
        const Column column = column_of(head, t0, n, c, segment);
        const Index end = min_of(column.end, key_end);
        for (Index key = max_of(column.begin, key_begin); key < end; key += kKeys) {
          const Index count = min_of(kKeys, end - key);
          if (s.worker->stops(column.rows * count)) return;
          float* sum = s.sums + (c * rows_per_column + (per_s ? key - key_begin : 0)) * kColumn;
          sum_bias_tile(head, column, key, count, per_s ? kColumn : 0, s.columns[c], sum, s);
        }
      }
    }
  }

  // sum[j * row][lane] += ds of a column's keys key .. key + n - 1.
  void sum_bias_tile(const Head<Element>& head, const Column& column, Index key, Index n, Index row,
                     BackwardColumn& state, float* sum, BackwardScratch& s) const {
    Index k_row, v_row;
    const float* k = load_keys(head.k + key * p.k.t, p, n, Use::kAlongRows, s.k_tile, &k_row);
    const float* v = RowsAsFloat<Element>::get(head.v + key * p.v.t, p.v.t, n, p.D_v,
                                               Use::kAlongRows, s.v_tile, &v_row);
    DeadKeys dead;
    gradient_tile(head, column, state, key, n, k, k_row, v, v_row, s, state.p, state.ds, false,
                  &dead);
    for (Index j = 0; j < n; ++j) {
      for (Index lane = 0; lane < kColumn; lane += kLanes) {
        float* to = sum + j * row + lane;
        store(to, load(to) + load(state.ds + j * kColumn + lane));
      }
    }
  }

  void write_bias_block(Index b, Index h, Index t0, Index key, Index keys, bool per_t, bool per_s,
                        BackwardScratch& s) const {
    const MutableView& to = p.dbias;
    const Index rows_per_column = per_s ? kKeysPerItem : 1, columns = columns_per_block();
    const Index count = per_s ? keys : 1, queries = per_t ? min_of(block_rows, p.T - t0) : 1;
    for (Index i = 0; i < queries; ++i) {
      for (Index j = 0; j < count; ++j) {
        float sum = 0.0f;
        if (per_t) {
          sum = s.sums[(i / kColumn * rows_per_column + j) * kColumn + i % kColumn];
        } else {
          for (Index c = 0; c < columns; ++c) {
            for (Index lane = 0; lane < kColumn; ++lane)
              sum += s.sums[(c * rows_per_column + j) * kColumn + lane];
          }
        }
        const Index at =
            b * to.b + h * to.h + (per_t ? t0 + i : 0) * to.t + (per_s ? key + j : 0) * to.d;
        write_scalar(to, at, sum);
      }
    }
  }

  static void write_scalar(const MutableView& to, Index at, float x) {
    switch (to.dtype) {
      case DType::kFloat64:
        static_cast<double*>(to.data)[at] = x;
        return;
      case DType::kBFloat16:
        return store_some(static_cast<BFloat16*>(to.data) + at, broadcast(x), 1);
      case DType::kFloat16:
        return store_some(static_cast<Float16*>(to.data) + at, broadcast(x), 1);
      default:
        static_cast<float*>(to.data)[at] = x;
    }
  }

  // dsink = sum over rows of p_sink * (row_term - dentropy * (sink - m))
  void sinks() const {
    for (Index h = 0; h < p.H; ++h) {
      double total = 0.0;
      for (Index b = 0; b < p.B; ++b) {
        const Head<Element> head(p, b, h);
        if (head.sink == -kInfinity) continue;
        for (Index t = 0; t < head.T; t += kLanes) {
          const Index n = min_of(kLanes, head.T - t), at = row_offset(head, t);
          const Vec m = load_some(p.norm + at, n),
                    log2_l = load_some(p.norm + p.norm_plane + at, n);
          const Vec sink = broadcast(head.sink),
                    p_sink = Norm::probability(sink, m, log2_l, head.units.to_log2);
          Vec term = load_some(row_terms + at, n);
          if (p.grad_entropy)
            term -= load_some(p.grad_entropy + at, n) * ((sink - m) * head.units.to_natural);
          term *= p_sink;
          for (Index i = 0; i < n; ++i) total += static_cast<double>(term[i]);
        }
      }
      p.dsinks[h] = static_cast<float>(total);
    }
  }
};

}  // namespace

void bias_gradient(const BackwardParams& p, float* row_terms) {
  if (!p.dbias.data && !p.dsinks) return;
  with_element(p.q.dtype, [&](auto* element) {
    const BiasGradient<std::remove_pointer_t<decltype(element)>> gradient{
        {p, row_terms, most_queries_per_block(p)}};
    if (p.dbias.data) gradient.bias();
    if (p.dsinks) gradient.sinks();
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
