// Attention backward (FlashAttention-2, Algorithm 2, with the queries in lanes and no atomics).
//
//   row = dlse - delta - dentropy * (entropy - lse)     delta = rowsum(p * dp) = rowsum(do * o) +
//   ... dv = (p * keep)^T do        dq = scale * ds k        dk = scale * ds^T q
//
// Work:    first `row` for every query; then one item per (batch entry, key head), which owns its
//          dk and dv and all dq of its query heads. With too few heads for the threads, dq and
//          dk/dv are computed apart instead, one item per block of queries or range of keys: 7
//          products instead of 5, the same sums in the same order.
// Memory:  per query one float; per thread tiles, and fp32 dk and dv (for bf16 and fp16 also k and
//          v) of one head
// Threads: results do not depend on their number
#include <memory>
#include <type_traits>

#include "backward.h"
#include "kernels.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

template <class Element>
struct Backward : BackwardTiles<Element> {
  using Tiles = BackwardTiles<Element>;
  using Tiles::column_of;
  using Tiles::columns_per_block;
  using Tiles::grad_out;
  using Tiles::gradient_tile;
  using Tiles::kBlock;
  using Tiles::kept;
  using Tiles::kPacks;
  using Tiles::load_block;
  using Tiles::p;
  using Tiles::parallel;
  using Tiles::probabilities;
  using Tiles::row_offset;
  using Tiles::rows;
  using Tiles::weights_gradient_tile;

  // `row` of a block of queries, from o, do and, with a gradient of the weights, their
  // probabilities.
  void row_block(const Head<Element>& head, Index t0, Index n, BackwardScratch& s) const {
    float* out = rows + row_offset(head, t0);
    const Element* o = static_cast<const Element*>(p.out.data) + head.b * p.out.b +
                       head.h * p.out.h + (head.q_begin + t0) * p.out.t;
    const Element* d_o = grad_out(head, t0);
    for (Index i = 0; i < n; ++i) {
      const Element *a = o + i * p.out.t, *b = d_o + i * p.grad_out.t;
      Vec sum = zeros();
      Index d = 0;
      for (; d + kLanes <= p.D_v; d += kLanes) sum += load(a + d) * load(b + d);
      if (d < p.D_v) sum += load_some(a + d, p.D_v - d) * load_some(b + d, p.D_v - d);
      out[i] = -sum_lanes(sum);
    }
    if (p.grad_weights.data) subtract_weights_term(head, t0, n, s, out);
    const Index offset = row_offset(head, t0);
    for (Index i = 0; i < n; ++i) {
      if (p.lse[offset + i] == -kInfinity) {
        out[i] = 0.0f;
        continue;
      }
      if (p.grad_lse) out[i] += p.grad_lse[offset + i];
      if (p.grad_entropy)
        out[i] -= p.grad_entropy[offset + i] * (p.entropy[offset + i] - p.lse[offset + i]);
    }
  }

  void subtract_weights_term(const Head<Element>& head, Index t0, Index n, BackwardScratch& s,
                             float* out) const {
    load_block(head, t0, n, s, false);
    for (Index c = 0; c < s.num_columns; ++c) {
      const Column column = column_of(head, t0, n, c);
      alignas(64) float sums[kColumn] = {};
      for (Index key = column.begin; key < column.end; key += kKeys) {
        const Index count = min_of(kKeys, column.end - key);
        Index k_row;
        const float* k = RowsAsFloat<Element>::get(head.k + key * p.k.t, p.k.t, count, p.D,
                                                   Use::kAcross, s.k_tile, &k_row);
        DeadKeys dead;
        float* prob = s.columns[c].p;
        score_tile(head, column, key, count, FloatScores{s.columns[c].q_t, k, k_row, p.D}, prob,
                   nullptr, nullptr, &dead);
        probabilities(head, s.columns[c], count, prob);
        weights_gradient_tile(head, column, key, count, s.dw);
        if (p.dropout_p > 0.0) dropout_tile(head, column, key, count, kept(), s.keep);
        for (Index j = 0; j < count; ++j) {
          for (Index lane = 0; lane < kColumn; lane += kLanes) {
            const Index i = j * kColumn + lane;
            Vec term = load(prob + i) * load(s.dw + i);
            if (p.dropout_p > 0.0) term *= load(s.keep + i);
            store(sums + lane, load(sums + lane) + term);
          }
        }
      }
      for (Index lane = 0; lane < column.rows; ++lane) out[c * kColumn + lane] -= sums[lane];
    }
  }

  struct Outputs {
    bool dq, dkv;
    float *dk, *dv;  // fp32 rows of the key head, accumulated; row 0 is key 0
    Index dk_row, dv_row;
  };

  // One block of queries against the keys key_begin .. key_end - 1.
  void query_block(const Head<Element>& head, Index t0, Index n, Index key_begin, Index key_end,
                   const Outputs& to, BackwardScratch& s) const {
    load_block(head, t0, n, s, to.dkv);
    Index begin = head.S, end = 0;
    for (Index c = 0; c < s.num_columns; ++c) {
      const Column column = column_of(head, t0, n, c);
      if (column.begin == column.end) continue;
      begin = min_of(begin, column.begin), end = max_of(end, column.end);
    }
    begin = max_of(begin, key_begin), end = min_of(end, key_end);
    for (Index key = begin; key < end;) {
      Index stop = min_of((key / kKeys + 1) * kKeys, end);
      for (Index c = 0; c < s.num_columns; ++c) {
        // Where a column sees only some of the keys, thin slices waste less.
        const Column column = column_of(head, t0, n, c);
        const bool sees_none = column.end <= key || column.begin >= stop;
        const bool sees_all = column.begin <= key && column.end >= stop;
        if (!sees_none && !sees_all) stop = min_of(stop, (key / kColumn + 1) * kColumn);
      }
      key_tile(head, t0, n, key, stop - key, to, s);
      key = stop;
    }
    if (!to.dq) return;
    alignas(64) float factor[kColumn];
    for (Index lane = 0; lane < kColumn; ++lane) factor[lane] = p.scale;
    Element* dq = static_cast<Element*>(p.dq.data) + head.b * p.dq.b + head.h * p.dq.h +
                  (head.q_begin + t0) * p.dq.t;
    for (Index c = 0; c < s.num_columns; ++c) {
      BackwardColumn& state = s.columns[c];
      if (state.start == Start::kZero) memset(state.dq_t, 0, p.D * kColumn * sizeof(float));
      transpose_out(state.dq_t, min_of(n - c * kColumn, kColumn), p.D, factor,
                    dq + c * kColumn * p.dq.t, p.dq.t);
    }
  }

  void key_tile(const Head<Element>& head, Index t0, Index rows_in_block, Index key, Index n,
                const Outputs& to, BackwardScratch& s) const {
    Index k_row = s.D_pad, v_row = s.D_v_pad;
    const float *k, *v;
    if (kPacks && s.k_head) {
      k = s.k_head + key * k_row, v = s.v_head + key * v_row;
    } else {
      k = RowsAsFloat<Element>::get(head.k + key * p.k.t, p.k.t, n, p.D, Use::kAcross, s.k_tile,
                                    &k_row);
      v = RowsAsFloat<Element>::get(head.v + key * p.v.t, p.v.t, n, p.D_v, Use::kAlongRows,
                                    s.v_tile, &v_row);
    }
    Index first = s.num_columns, last = 0;  // columns that see a key of the tile
    for (Index c = 0; c < s.num_columns; ++c) {
      const Column column = column_of(head, t0, rows_in_block, c);
      const Index begin = max_of(key, column.begin), end = min_of(key + n, column.end);
      if (begin >= end) continue;
      first = min_of(first, c), last = c + 1;
      BackwardColumn& state = s.columns[c];
      float *prob = state.p + (begin - key) * kColumn, *ds = state.ds + (begin - key) * kColumn;
      const Index count = end - begin;
      DeadKeys dead;
      gradient_tile(head, column, state, begin, count, k + (begin - key) * k_row, k_row,
                    v + (begin - key) * v_row, v_row, s, prob, ds, true, &dead);
      if (to.dq)
        state.start = gather_keys(k + (begin - key) * k_row, k_row, count, p.D, ds, state.dq_t,
                                  state.start, dead);
      clear_outside(state.p, begin - key, end - key, n);
      clear_outside(state.ds, begin - key, end - key, n);
    }
    if (!to.dkv || first >= last) return;
    const Index tile = kKeys * kColumn;
    gemm_wide(n, s.D_v_pad, kColumn,
              MatrixA{s.p_all + first * tile, kColumn, 1, last - first, tile},
              MatrixB{s.do_rows + first * kColumn * s.D_v_pad, s.D_v_pad},
              MatrixC{to.dv + key * to.dv_row, to.dv_row}, Start::kAccumulate);
    gemm_wide(n, s.D_pad, kColumn, MatrixA{s.ds_all + first * tile, kColumn, 1, last - first, tile},
              MatrixB{s.q_rows + first * kColumn * s.D_pad, s.D_pad},
              MatrixC{to.dk + key * to.dk_row, to.dk_row}, Start::kAccumulate);
  }

  // Zeroes the rows of a tile that are not in first .. last - 1.
  static void clear_outside(float* tile, Index first, Index last, Index n) {
    memset(tile, 0, first * kColumn * sizeof(float));
    memset(tile + last * kColumn, 0, (n - last) * kColumn * sizeof(float));
  }

  // dk and dv (and dq, if asked) of one key head, for the keys key_begin .. key_end - 1.
  void key_head(Index b, Index h_kv, Index key_begin, Index key_end, bool with_dq,
                BackwardScratch& s) const {
    const Index group = p.H / p.H_kv;
    const Head<Element> first(p, b, h_kv * group);
    key_end = min_of(key_end, first.S);
    if (key_begin >= key_end) {
      if (with_dq) each_query_block(b, h_kv, 0, 0, Outputs{true, false, nullptr, nullptr, 0, 0}, s);
      return;
    }
    const Index keys = key_end - key_begin;
    Element* dk = static_cast<Element*>(p.dk.data) + b * p.dk.b + h_kv * p.dk.h +
                  (first.k_begin + key_begin) * p.dk.t;
    Element* dv = static_cast<Element*>(p.dv.data) + b * p.dv.b + h_kv * p.dv.h +
                  (first.k_begin + key_begin) * p.dv.t;
    if (kPacks && s.k_head) {
      pack_rows(first.k, p.k.t, first.S, p.D, s.D_pad, 1.0f, s.k_head);
      pack_rows(first.v, p.v.t, first.S, p.D_v, s.D_v_pad, 1.0f, s.v_head);
    }
    Outputs to{with_dq, true, s.dk_head, s.dv_head, s.D_pad, s.D_v_pad};
    if constexpr (!kPacks) {
      if (!s.dk_head) to = Outputs{with_dq, true, dk, dv, p.dk.t, p.dv.t};
    }
    for (Index i = 0; i < keys; ++i) {
      memset(to.dk + i * to.dk_row, 0, p.D * sizeof(float));
      memset(to.dv + i * to.dv_row, 0, p.D_v * sizeof(float));
    }
    to.dk -= key_begin * to.dk_row, to.dv -= key_begin * to.dv_row;  // row 0 is key 0
    each_query_block(b, h_kv, key_begin, key_end, to, s);
    if (!s.dk_head) return;
    copy_rows(s.dk_head, s.D_pad, keys, p.D, dk, p.dk.t);
    copy_rows(s.dv_head, s.D_v_pad, keys, p.D_v, dv, p.dv.t);
  }

  static void copy_rows(const float* from, Index from_row, Index n, Index D, Element* to,
                        Index to_row) {
    for (Index i = 0; i < n; ++i) {
      Index d = 0;
      for (; d + kLanes <= D; d += kLanes)
        store(to + i * to_row + d, load(from + i * from_row + d));
      if (d < D) store_some(to + i * to_row + d, load(from + i * from_row + d), D - d);
    }
  }

  void each_query_block(Index b, Index h_kv, Index key_begin, Index key_end, const Outputs& to,
                        BackwardScratch& s) const {
    const Index group = p.H / p.H_kv;
    for (Index g = 0; g < group; ++g) {
      const Head<Element> head(p, b, h_kv * group + g);
      for (Index t0 = 0; t0 < head.T; t0 += kBlock) {
        query_block(head, t0, min_of(kBlock, head.T - t0), key_begin, key_end, to, s);
      }
    }
  }

  void run() const {
    const Index blocks = (p.T + kBlock - 1) / kBlock,
                key_ranges = (p.S + kKeysPerItem - 1) / kKeysPerItem;
    ScratchPlan plan{columns_per_block()};
    const auto each_block = [&](auto body) {
      parallel(p.B * p.H * blocks, plan, [&](Index item, BackwardScratch& s) {
        const Index head_index = item / blocks, t0 = (blocks - 1 - item % blocks) * kBlock;
        const Head<Element> head(p, head_index / p.H, head_index % p.H);
        if (t0 < head.T) body(head, t0, min_of(kBlock, head.T - t0), s);
      });
    };
    each_block([&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
      row_block(head, t0, n, s);
    });

    const bool in_place = !kPacks && p.D % kLanes == 0 && p.D_v % kLanes == 0;
    const Index heads = p.B * p.H_kv, threads = usable_threads(p.num_threads);
    const bool few_heads = (heads + threads - 1) / threads * 5 * threads > heads * 7 + 2;
    if (!few_heads) {
      plan.packed_rows = kPacks ? p.S : 0;
      plan.head_rows = in_place ? 0 : p.S;
      parallel(heads, plan, [&](Index item, BackwardScratch& s) {
        key_head(item / p.H_kv, item % p.H_kv, 0, p.S, true, s);
      });
    } else {
      each_block([&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
        query_block(head, t0, n, 0, head.S, Outputs{true, false, nullptr, nullptr, 0, 0}, s);
      });
      plan.head_rows = in_place ? 0 : kKeysPerItem;
      parallel(heads * key_ranges, plan, [&](Index item, BackwardScratch& s) {
        const Index head_index = item / key_ranges, key = item % key_ranges * kKeysPerItem;
        key_head(head_index / p.H_kv, head_index % p.H_kv, key, key + kKeysPerItem, false, s);
      });
    }
    bias_gradient(p, rows);
  }
};

}  // namespace

void attention_bwd(const BackwardParams& p) {
  const Index rows = p.cu_seqlens_q ? p.H * p.lse_stride_h : p.B * p.lse_stride_b;
  struct Free {
    void operator()(float* x) const { free(x); }
  };
  const std::unique_ptr<float, Free> buffer(
      static_cast<float*>(malloc(max_of(rows, 1) * sizeof(float))));
  if (!buffer) throw std::bad_alloc();
  with_element(p.q.dtype, [&](auto* element) {
    Backward<std::remove_pointer_t<decltype(element)>>{{p, buffer.get()}}.run();
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
