// Attention backward (FlashAttention-2, Algorithm 2, with the queries in lanes and no atomics).
//
//   row = dlse - delta - dentropy * (entropy - log l)      dv = (p * keep)^T do
//   delta = rowsum(p * dp) = rowsum(do * o) + ...          dq = scale * ds k, dk = scale * ds^T q
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
#include <algorithm>
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
      const float log2_l = p.norm[p.norm_plane + offset + i];
      if (!(out[i] - out[i] == 0.0f) && this->has_no_keys(head, t0 + i)) out[i] = 0.0f;
      if (log2_l == kInfinity) continue;
      if (p.grad_lse) out[i] += p.grad_lse[offset + i];
      if (p.grad_entropy)
        out[i] -= p.grad_entropy[offset + i] * (p.entropy[offset + i] - log2_l * kLn2);
    }
  }

  // m and log2 l of a block's queries found anew, into two planes of `norm`, where the scores are
  // so large that it matters how they are rounded, or in the units of the decoding kernel. Of an
  // lse alone (norm_plane 0) the others too.
  void find_norm(const Head<Element>& head, Index t0, Index n, float* norm, Index plane,
                 BackwardScratch& s) const {
    load_block(head, t0, n, s, false);
    for (Index c = 0; c < s.num_columns; ++c) {
      BackwardColumn& state = s.columns[c];
      Norm& found = state.norm;
      bool wanted = kOnPairs<Element> && p.T == 1;
      for (Index lane = 0; lane < kColumn; ++lane)
        wanted |= __builtin_fabsf(found.m[lane] * head.to_log2) > kRoundedAlike;
      const Column column = column_of(head, t0, n, c);
      const auto write = [&] {
        float* to = norm + row_offset(head, column.t0);
        memcpy(to, found.m, column.rows * sizeof(float));
        memcpy(to + plane, found.log_l, column.rows * sizeof(float));
      };
      if (!wanted) {
        if (p.norm_plane == 0) write();
        continue;
      }
      const auto each_tile = [&](float* column_max, auto body) {
        for (Index key = column.begin; key < column.end; key += kKeys) {
          const Index count = min_of(kKeys, column.end - key);
          if (s.worker->stops(column.rows * count)) return;
          Index k_row;
          const float* k =
              load_keys(head.k + key * p.k.t, p, count, Use::kAlongRows, s.k_tile, &k_row);
          DeadKeys dead;
          scores_of(head, column, key, count, k, k_row, state.q_t, state.p, nullptr, column_max,
                    &dead);
          body(count);
        }
      };
      alignas(64) float top[kColumn], sums[kColumn];
      for (Index lane = 0; lane < kColumn; ++lane) top[lane] = head.sink, sums[lane] = 0.0f;
      each_tile(top, [](Index) {});
      for (Index lane = 0; lane < kColumn; ++lane) {
        found.m[lane] = top[lane] == -kInfinity ? 0.0f : top[lane];
        found.log_l[lane] = 0.0f;
      }
      each_tile(nullptr, [&](Index count) {
        found.exponentiate(count, head.to_log2, state.p);
        for (Index i = 0; i < count * kColumn; i += kLanes)
          store(sums + i % kColumn, load(sums + i % kColumn) + load(state.p + i));
      });
      for (Index lane = 0; lane < kColumn; lane += kLanes) {
        const Vec base = load(found.m + lane), sink = broadcast(head.sink);
        const Vec l = load(sums + lane) + exp2((sink - base) * head.to_log2);
        store(found.log_l + lane, l == 0.0f ? broadcast(kInfinity) : log2(l));
      }
      write();
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
        if (s.worker->stops(column.rows * count)) return;
        Index k_row;
        const float* k =
            load_keys(head.k + key * p.k.t, p, count, Use::kAlongRows, s.k_tile, &k_row);
        DeadKeys dead;
        float* prob = s.columns[c].p;
        scores_of(head, column, key, count, k, k_row, s.columns[c].q_t, prob, nullptr, nullptr,
                  &dead);
        this->spread_nan(s.columns[c], count, prob);
        s.columns[c].norm.exponentiate(count, head.to_log2, prob);
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
      if (s.worker->stops(n * (stop - key))) return;
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
      const PairKeyLayout<Element, kPlanes> layout(p, first.S);
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
    const Blocks blocks(p.cu_seqlens_q, p.B, p.H, p.T, block_rows);
    parallel(blocks.count(), plan, [&](Index item, BackwardScratch& s) {
      const Block at = blocks[item];
      const Index t0 = (at.count - 1 - at.index) * block_rows;
      const Head<Element> head(p, at.b, at.h);
      body(head, t0, min_of(block_rows, head.T - t0), s);
    });
  }

  void find_norms(float* norm, Index plane) const {
    each_block(ScratchPlan{columns_per_block()},
               [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
                 find_norm(head, t0, n, norm, plane, s);
               });
  }

  // `row` of every query.
  void query_rows() const {
    each_block(ScratchPlan{columns_per_block()},
               [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
                 row_block(head, t0, n, s);
               });
  }

  // Whether key heads are too few, or one of them too long, to be shared out whole.
  bool few_heads() const {
    const Index heads = p.B * p.H_kv, threads = usable_threads(p.num_threads);
    if ((heads + threads - 1) / threads * 5 * threads > heads * 7 + 2) return true;
    if (!p.cu_seqlens_q || threads == 1) return false;
    double longest = 0.0, all = 0.0;
    for (Index b = 0; b < p.B; ++b) {
      const Head<Element> head(p, b, 0);
      const double pairs = static_cast<double>(head.T) * head.S;
      longest = pairs > longest ? pairs : longest, all += pairs;
    }
    return longest * 5 * threads > all * p.H_kv * 7;
  }

  // dq, dk and dv of the key heads (b * H_kv + h_kv) that `mine` holds; null: of all.
  void gradients(const bool* mine) const {
    ScratchPlan plan{columns_per_block()};
    plan.planes = kPlanes;
    const bool in_place = !kPlanes && !kPacks && p.D % kLanes == 0 && p.D_v % kLanes == 0;
    using Layout = PairKeyLayout<Element, kPlanes ? kPlanes : 1>;
    if (!few_heads()) {
      plan.packed_rows = kPacks && !kPlanes ? p.S : 0;
      plan.head_rows = in_place ? 0 : round_up(p.S, kTileSize);
      plan.keys = kPlanes ? Layout(p, p.S).floats() : 0;
      parallel(p.B * p.H_kv, plan, [&](Index item, BackwardScratch& s) {
        if (mine && !mine[item]) return;
        key_head(item / p.H_kv, item % p.H_kv, 0, p.S, true, nullptr, s);
      });
      return;
    }
    const Blocks ranges(p.cu_seqlens_k, p.B, p.H_kv, p.S, kKeysPerItem);
    const Blocks panels(p.cu_seqlens_k, p.B, p.H_kv, p.S, kPanel);
    const Index panel_floats = Layout(p, kPanel).floats();
    const Arena memory(kPlanes ? panels.count() * panel_floats * sizeof(float) : 0);
    auto* all = reinterpret_cast<float*>(memory.data());
    const auto packed_head = [&](Index index) {
      return all ? all + panels.first_of(index) * panel_floats : nullptr;
    };
    if constexpr (kPlanes > 0) {
      parallel(ranges.count(), ScratchPlan{0}, [&](Index item, BackwardScratch&) {
        const Block at = ranges[item];
        const Index index = at.b * p.H_kv + at.h, key = at.index * kKeysPerItem;
        if (mine && !mine[index]) return;
        const Head<Element> head(p, at.b, at.h * (p.H / p.H_kv));
        Layout(p, head.S).pack(head, key, min_of(kKeysPerItem, head.S - key), packed_head(index));
      });
    }
    each_block(plan, [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
      const Index index = head.b * p.H_kv + head.h / (p.H / p.H_kv);
      if (mine && !mine[index]) return;
      PairKeys keys;
      if constexpr (kPlanes > 0) keys = Layout(p, head.S).keys(head, packed_head(index));
      query_block(head, t0, n, 0, head.S, keys, Outputs{true, false, nullptr, nullptr, 0, 0}, s);
    });
    plan.head_rows = in_place ? 0 : kKeysPerItem;
    parallel(ranges.count(), plan, [&](Index item, BackwardScratch& s) {
      const Block at = ranges[item];
      const Index index = at.b * p.H_kv + at.h, key = at.index * kKeysPerItem;
      if (mine && !mine[index]) return;
      key_head(at.b, at.h, key, key + kKeysPerItem, false, packed_head(index), s);
    });
  }

  // Which key heads three planes serve for.
  void find_in_range(bool* in_range) const {
    parallel(p.B * p.H_kv, ScratchPlan{0}, [&](Index item, BackwardScratch&) {
      const Index group = p.H / p.H_kv;
      const Head<Element> first(p, item / p.H_kv, item % p.H_kv * group);
      Peak scores, values, upstream, norms;
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
        look(norms, p.norm + row_offset(head, 0), head.T, 1, head.T);
      }
      in_range[item] = norms.get() <= kRoundedAlike && Peak::in_range_of_products(scores.get()) &&
                       Peak::in_range_of_products(values.get()) &&
                       Peak::in_range_of_products(upstream.get()) &&
                       Peak::worth_summing(values.get()) && Peak::worth_summing(upstream.get());
    });
  }
};

}  // namespace

void attention_bwd(const BackwardParams& given) {
  BackwardParams p = given;
  const Index size = p.cu_seqlens_q ? p.H * p.lse_stride_h : p.B * p.lse_stride_b;
  const Arena memory(size * sizeof(float));
  auto* rows = reinterpret_cast<float*>(memory.data());
  Arena norm;
  with_element(p.q.dtype, [&]([[maybe_unused]] auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    constexpr int kPlanes = kPlanesOf<Element>;
    const Backward<Element, 0> in_fp32{{p, rows}};
    // The forward was the decoding kernel's, or in planes; or torch has kept no more than the lse.
    if (p.T == 1 || kPlanes > 1 || p.norm_plane == 0) {
      norm = Arena(2 * size * sizeof(float));
      auto* planes = reinterpret_cast<float*>(norm.data());
      std::copy_n(p.norm, size, planes);  // of no rows too, where there is no norm
      std::copy_n(p.norm + p.norm_plane, size, planes + size);
      in_fp32.find_norms(planes, size);
      p.norm = planes, p.norm_plane = size;
    }
    in_fp32.query_rows();
    const Index heads = p.B * p.H_kv;
    if constexpr (kPlanes == 0) {
      in_fp32.gradients(nullptr);
    } else if constexpr (kPlanes == 1) {
      Backward<Element, kPlanes>{{{p, rows, kTallBlock}}}.gradients(nullptr);
    } else if (p.T * (p.H / p.H_kv) < kFewestQueries) {
      in_fp32.gradients(nullptr);
    } else {
      const Arena flags(2 * heads);
      auto *in_range = reinterpret_cast<bool*>(flags.data()), *out_of_range = in_range + heads;
      const Backward<Element, kPlanes> in_planes{{{p, rows, kTallBlock}}};
      in_planes.find_in_range(in_range);
      bool all = true;
      for (Index i = 0; i < heads; ++i) all &= in_range[i], out_of_range[i] = !in_range[i];
      in_planes.gradients(all ? nullptr : in_range);
      if (!all) in_fp32.gradients(out_of_range);
    }
    bias_gradient(p, rows);
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
