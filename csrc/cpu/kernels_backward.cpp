// Attention backward (FlashAttention-2, Algorithm 2, with the queries in lanes and no atomics).
//
//   row = dlse - delta - dentropy * (entropy - lse)     delta = rowsum(p * dp) = rowsum(do * o) +
//   ... dv = (p * keep)^T do        dq = scale * ds k        dk = scale * ds^T q
//
// Work:    first `row` for every query; then one item per (batch entry, key head), which owns its
//          dk and dv and all dq of its query heads. With too few heads for the threads, dq and
//          dk/dv are computed apart instead, one item per block of queries or range of keys: 7
//          products instead of 5, the same sums in the same order.
// Memory:  per query one float; per thread tiles, and fp32 dk and dv and what has to be packed of k
//          and v, of one head
// Pairs:   where the processor multiplies pairs of bf16, all five products of bf16 inputs do, p and
//          ds rounded to bf16; with AMX those of fp32 inputs too, in three planes (pairs.h)
// Threads: results do not depend on their number
#include <memory>
#include <type_traits>

#include "backward_pairs.h"
#include "kernels.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

template <class Element, int kPlanes>
using Parts = std::conditional_t<kPlanes != 0, BackwardPairs<Element, kPlanes ? kPlanes : 1>,
                                 BackwardTiles<Element>>;

template <class Element, int kPlanes>
struct Backward : Parts<Element, kPlanes> {
  using Tiles = Parts<Element, kPlanes>;
  using Tiles::block_rows;
  using Tiles::column_of;
  using Tiles::columns_per_block;
  using Tiles::grad_out;
  using Tiles::gradient_tile;
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
                   const PairKeys& keys, const Outputs& to, BackwardScratch& s) const {
    if constexpr (kPlanes > 0) {
      this->load_pairs(head, t0, n, s, to.dkv);
    } else {
      load_block(head, t0, n, s, to.dkv);
    }
    Index begin = head.S, end = 0;
    for (Index c = 0; c < s.num_columns; ++c) {
      const Column column = column_of(head, t0, n, c);
      if (column.begin == column.end) continue;
      begin = min_of(begin, column.begin), end = max_of(end, column.end);
    }
    if (kPlanes) begin -= begin % kPanel;
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
      if constexpr (kPlanes > 0) {
        pairs_key_tile(head, t0, n, key, stop - key, keys, to, s);
      } else {
        key_tile(head, t0, n, key, stop - key, end, to, s);
      }
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

  // The last tile of the block ends with key key_end - 1.
  void key_tile(const Head<Element>& head, Index t0, Index rows_in_block, Index key, Index n,
                Index key_end, const Outputs& to, BackwardScratch& s) const {
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
    s.next_tile.clear();
    if (outgrows_cache(p, head.S)) {
      const Index next = min_of(kKeys, key_end - key - n);
      if (k != s.k_tile) s.next_tile.add(k + n * k_row, k_row, next, p.D);
      if (v != s.v_tile) s.next_tile.add(v + n * v_row, v_row, next, p.D_v);
      if (to.dkv) {
        s.next_tile.add(to.dk + (key + n) * to.dk_row, to.dk_row, next, p.D);
        s.next_tile.add(to.dv + (key + n) * to.dv_row, to.dv_row, next, p.D_v);
      }
      s.next_tile_lines = (s.next_tile.lines() + s.num_columns - 1) / s.num_columns;
    }
    Index first = s.num_columns, last = 0;  // columns that see a key of the tile
    for (Index c = 0; c < s.num_columns; ++c) {
      s.next_tile.advance(s.next_tile_lines);
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

  // The same on pairs.
  void pairs_key_tile(const Head<Element>& head, Index t0, Index rows_in_block, Index key, Index n,
                      const PairKeys& keys, const Outputs& to, BackwardScratch& s) const {
    constexpr Index kUnit = kHasTiles ? kTileSize : 2;
    Index first = s.num_columns, last = 0;  // columns that see a key of the tile
    for (Index c = 0; c < s.num_columns; ++c) {
      const Column column = column_of(head, t0, rows_in_block, c);
      Index begin = max_of(key, column.begin), end = min_of(key + n, column.end);
      if (begin >= end) continue;
      begin -= (begin - key) % kUnit;  // keys too many are masked by their position
      for (; last < c && last > first; ++last) this->clear_rows(s, last, 0, 0, n);
      first = min_of(first, c), last = c + 1;
      DeadKeys dead;
      this->pairs_tile(head, column, c, key, begin, end - begin, keys, s, &dead);
      if (to.dq) this->add_dq(column, c, key, begin - key, end - key, keys, dead, s);
      this->clear_rows(s, c, begin - key, end - key, n);
    }
    if (!to.dkv || first >= last) return;
    this->add_dkv(first, last, n, to.dk + key * to.dk_row, to.dv + key * to.dv_row, s);
  }

  // Zeroes the rows of a tile that are not in first .. last - 1.
  static void clear_outside(float* tile, Index first, Index last, Index n) {
    memset(tile, 0, first * kColumn * sizeof(float));
    memset(tile + last * kColumn, 0, (n - last) * kColumn * sizeof(float));
  }

  // dk and dv (and dq, if asked) of one key head, for the keys key_begin .. key_end - 1. `packed`:
  // the key head on pairs; null: packed here.
  void key_head(Index b, Index h_kv, Index key_begin, Index key_end, bool with_dq,
                const float* packed, BackwardScratch& s) const {
    const Index group = p.H / p.H_kv;
    const Head<Element> first(p, b, h_kv * group);
    key_end = min_of(key_end, first.S);
    if (key_begin >= key_end) {
      if (with_dq)
        each_query_block(b, h_kv, 0, 0, {}, Outputs{true, false, nullptr, nullptr, 0, 0}, s);
      return;
    }
    const Index keys = key_end - key_begin;
    Element* dk = static_cast<Element*>(p.dk.data) + b * p.dk.b + h_kv * p.dk.h +
                  (first.k_begin + key_begin) * p.dk.t;
    Element* dv = static_cast<Element*>(p.dv.data) + b * p.dv.b + h_kv * p.dv.h +
                  (first.k_begin + key_begin) * p.dv.t;
    PairKeys pairs;
    Outputs to{with_dq, true, s.dk_head, s.dv_head, s.D_pad, s.D_v_pad};
    if constexpr (kPlanes > 0) {
      const PairKeyLayout<Element, kPlanes> layout(p);
      if (!packed) {
        layout.pack(first, 0, first.S, s.keys);
        packed = s.keys;
      }
      pairs = layout.keys(first, packed);
      const Index rows = round_up(keys, kTileSize);
      memset(to.dk, 0, rows * to.dk_row * sizeof(float));
      memset(to.dv, 0, rows * to.dv_row * sizeof(float));
    } else {
      if (kPacks && s.k_head) {
        pack_rows(first.k, p.k.t, first.S, p.D, s.D_pad, 1.0f, s.k_head);
        pack_rows(first.v, p.v.t, first.S, p.D_v, s.D_v_pad, 1.0f, s.v_head);
      }
      if constexpr (!kPacks) {
        if (!s.dk_head) to = Outputs{with_dq, true, dk, dv, p.dk.t, p.dv.t};
      }
      for (Index i = 0; i < keys; ++i) {
        memset(to.dk + i * to.dk_row, 0, p.D * sizeof(float));
        memset(to.dv + i * to.dv_row, 0, p.D_v * sizeof(float));
      }
    }
    to.dk -= key_begin * to.dk_row, to.dv -= key_begin * to.dv_row;  // row 0 is key 0
    each_query_block(b, h_kv, key_begin, key_end, pairs, to, s);
    if (!s.dk_head) return;
    copy_rows(s.dk_head, s.D_pad, keys, p.D, kPlanes ? p.scale : 1.0f, dk, p.dk.t);
    copy_rows(s.dv_head, s.D_v_pad, keys, p.D_v, 1.0f, dv, p.dv.t);
  }

  static void copy_rows(const float* from, Index from_row, Index n, Index D, float factor,
                        Element* to, Index to_row) {
    for (Index i = 0; i < n; ++i) {
      Index d = 0;
      for (; d + kLanes <= D; d += kLanes)
        store(to + i * to_row + d, load(from + i * from_row + d) * factor);
      if (d < D) store_some(to + i * to_row + d, load(from + i * from_row + d) * factor, D - d);
    }
  }

  void each_query_block(Index b, Index h_kv, Index key_begin, Index key_end, const PairKeys& keys,
                        const Outputs& to, BackwardScratch& s) const {
    const Index group = p.H / p.H_kv;
    for (Index g = 0; g < group; ++g) {
      const Head<Element> head(p, b, h_kv * group + g);
      for (Index t0 = 0; t0 < head.T; t0 += block_rows) {
        query_block(head, t0, min_of(block_rows, head.T - t0), key_begin, key_end, keys, to, s);
      }
    }
  }

  template <class Body>
  void each_block(const ScratchPlan& plan, Body body) const {
    const Index blocks = (p.T + block_rows - 1) / block_rows;
    parallel(p.B * p.H * blocks, plan, [&](Index item, BackwardScratch& s) {
      const Index head_index = item / blocks, t0 = (blocks - 1 - item % blocks) * block_rows;
      const Head<Element> head(p, head_index / p.H, head_index % p.H);
      if (t0 < head.T) body(head, t0, min_of(block_rows, head.T - t0), s);
    });
  }

  // `row` of every query.
  void query_rows() const {
    each_block(ScratchPlan{columns_per_block()},
               [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
                 row_block(head, t0, n, s);
               });
  }

  // dq, dk and dv of the key heads (b * H_kv + h_kv) that `mine` holds; null: of all.
  void gradients(const bool* mine) const {
    const Index key_ranges = (p.S + kKeysPerItem - 1) / kKeysPerItem;
    ScratchPlan plan{columns_per_block()};
    plan.planes = kPlanes;
    const bool in_place = !kPlanes && !kPacks && p.D % kLanes == 0 && p.D_v % kLanes == 0;
    const Index heads = p.B * p.H_kv, threads = usable_threads(p.num_threads);
    const bool few_heads = (heads + threads - 1) / threads * 5 * threads > heads * 7 + 2;
    const PairKeyLayout<Element, kPlanes ? kPlanes : 1> layout(p);
    if (!few_heads) {
      plan.packed_rows = kPacks && !kPlanes ? p.S : 0;
      plan.head_rows = in_place ? 0 : round_up(p.S, kTileSize);
      plan.keys = kPlanes ? layout.floats() : 0;
      parallel(heads, plan, [&](Index item, BackwardScratch& s) {
        if (mine && !mine[item]) return;
        key_head(item / p.H_kv, item % p.H_kv, 0, p.S, true, nullptr, s);
      });
      return;
    }
    const float* packed = pack_heads(layout, heads, key_ranges, mine);
    const auto packed_head = [&](Index index) {
      return packed ? packed + index * layout.floats() : nullptr;
    };
    each_block(plan, [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
      const Index index = head.b * p.H_kv + head.h / (p.H / p.H_kv);
      if (mine && !mine[index]) return;
      PairKeys keys;
      if constexpr (kPlanes > 0) keys = layout.keys(head, packed_head(index));
      query_block(head, t0, n, 0, head.S, keys, Outputs{true, false, nullptr, nullptr, 0, 0}, s);
    });
    plan.head_rows = in_place ? 0 : kKeysPerItem;
    parallel(heads * key_ranges, plan, [&](Index item, BackwardScratch& s) {
      const Index index = item / key_ranges, key = item % key_ranges * kKeysPerItem;
      if (mine && !mine[index]) return;
      key_head(index / p.H_kv, index % p.H_kv, key, key + kKeysPerItem, false, packed_head(index),
               s);
    });
    if (packed) team_arena().release();
  }

  // All key heads on pairs, in the team's arena; null where they are not needed.
  template <class Layout>
  const float* pack_heads(const Layout& layout, Index heads, Index parts, const bool* mine) const {
    if constexpr (kPlanes == 0) {
      return nullptr;
    } else {
      Arena& arena = team_arena();
      arena.reset(Arena::bytes_for<float>(max_of(heads * layout.floats(), 1)));
      float* data = arena.take<float>(max_of(heads * layout.floats(), 1));
      parallel(heads * parts, ScratchPlan{0}, [&](Index item, BackwardScratch&) {
        const Index index = item / parts, key = item % parts * kKeysPerItem;
        if (mine && !mine[index]) return;
        const Head<Element> head(p, index / p.H_kv, index % p.H_kv * (p.H / p.H_kv));
        if (key >= head.S) return;
        layout.pack(head, key, min_of(kKeysPerItem, head.S - key), data + index * layout.floats());
      });
      return data;
    }
  }

  // Which key heads three planes serve for.
  void find_in_range(bool* in_range) const {
    parallel(p.B * p.H_kv, ScratchPlan{0}, [&](Index item, BackwardScratch&) {
      const Index group = p.H / p.H_kv;
      const Head<Element> first(p, item / p.H_kv, item % p.H_kv * group);
      Peak scores, values, upstream;
      const auto look = [](Peak& peak, const Element* rows, Index stride, Index n, Index D) {
        for (Index i = 0; i < n; ++i)
          for (Index d = 0; d < D; d += kLanes) peak.add(load_part(rows + i * stride + d, D - d));
      };
      look(scores, first.k, p.k.t, first.S, p.D);
      look(values, first.v, p.v.t, first.S, p.D_v);
      for (Index g = 0; g < group; ++g) {
        const Head<Element> head(p, first.b, first.h + g);
        look(scores, head.q, p.q.t, head.T, p.D);
        look(upstream, grad_out(head, 0), p.grad_out.t, head.T, p.D_v);
      }
      in_range[item] = Peak::in_range_of_products(scores.get()) &&
                       Peak::in_range_of_products(values.get()) &&
                       Peak::in_range_of_products(upstream.get()) &&
                       Peak::worth_summing(values.get()) && Peak::worth_summing(upstream.get());
    });
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
  with_element(p.q.dtype, [&]([[maybe_unused]] auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    constexpr int kPlanes = kPlanesOf<Element>;
    const Backward<Element, 0> in_fp32{{p, buffer.get()}};
    in_fp32.query_rows();
    const Index heads = p.B * p.H_kv;
    if constexpr (kPlanes == 0) {
      in_fp32.gradients(nullptr);
    } else if constexpr (kPlanes == 1) {
      Backward<Element, kPlanes>{{{p, buffer.get(), kTallBlock}}}.gradients(nullptr);
    } else if (p.T * (p.H / p.H_kv) < kFewestQueries) {
      in_fp32.gradients(nullptr);
    } else {
      const std::unique_ptr<bool[]> in_range(new bool[heads]), out_of_range(new bool[heads]);
      const Backward<Element, kPlanes> in_planes{{{p, buffer.get(), kTallBlock}}};
      in_planes.find_in_range(in_range.get());
      bool all = true;
      for (Index i = 0; i < heads; ++i) all &= in_range[i], out_of_range[i] = !in_range[i];
      in_planes.gradients(all ? nullptr : in_range.get());
      if (!all) in_fp32.gradients(out_of_range.get());
    }
    bias_gradient(p, buffer.get());
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
