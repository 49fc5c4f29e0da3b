// What the passes of the backward share: blocks of queries made ready, and tiles of p and ds.
//
//   p = exp(s - m - log l)                  dp = z * (do v^T + dw)
//   ds = p * (dp + row_term - dentropy * (s - m))
//
// row_term, one number per query, is worked out first (attention_bwd_rows.h).
#pragma once
#include "attention_bwd_scratch.h"
#include "dropout.h"
#include "segments.h"

namespace attnfast::cpu::ATTNFAST_ISA {

template <class Element>
struct BackwardTiles {
  const BackwardParams& p;
  float* row_terms;  // of every query, laid out like lse

  Index block_rows = queries_per_block(p);  // queries of a block
  static constexpr bool kPacks = RowsAsFloat<Element>::kPacks;

  Index row_offset(const Head<Element>& head, Index t) const {
    return (p.cu_seqlens_q ? 0 : head.b * p.lse_stride_b) + head.h * p.lse_stride_h + head.q_begin +
           t;
  }

  const Element* grad_out(const Head<Element>& head, Index t) const {
    return static_cast<const Element*>(p.grad_out.data) + head.b * p.grad_out.b +
           head.h * p.grad_out.h + (head.q_begin + t) * p.grad_out.t;
  }

  Column column_of(const Head<Element>& head, Index t0, Index rows_in_block, Index c,
                   const Segment& segment) const {
    return Column(head, t0 + c * kColumn, min_of(rows_in_block - c * kColumn, kColumn), segment);
  }

  // One number per query of a column.
  void load_rows(const Head<Element>& head, Index t, Index live, BackwardColumn& state) const {
    const Index offset = row_offset(head, t);
    Norm& norm = state.norm;
    norm.load_rows(p, head, t, live);
    for (Index lane = 0; lane < kColumn; ++lane) {
      state.nan[lane] = norm.log2_l[lane] == norm.log2_l[lane] ? 0.0f : norm.log2_l[lane];
      if (state.nan[lane] != 0.0f) norm.m[lane] = norm.log2_l[lane] = 0.0f;
      state.row_term[lane] = lane < live ? row_terms[offset + lane] : 0.0f;
      state.dentropy[lane] = lane < live && p.grad_entropy ? p.grad_entropy[offset + lane] : 0.0f;
    }
  }

  // Makes the scores of rows that are NaN so, but for those of keys that they do not attend.
  static void spread_nan(const BackwardColumn& state, Index n, float* s) {
    if (!state.norm.has_nan) return;
    for (Index i = 0; i < n * kColumn; i += kLanes) {
      const Vec x = load(s + i);
      store(s + i, x == -kInfinity ? x : x + load(state.nan + i % kColumn));
    }
  }

  // Everything of a block of queries that its tiles need.
  void load_block(const Head<Element>& head, Index t0, Index n, BackwardScratch& s,
                  bool row_major) const {
    s.num_columns = (n + kColumn - 1) / kColumn;
    for (Index c = 0; c < s.num_columns; ++c) {
      BackwardColumn& state = s.columns[c];
      const Index t = t0 + c * kColumn, live = min_of(n - c * kColumn, kColumn);
      load_queries(head, t, live, state.q_t);
      transpose_in(grad_out(head, t), p.grad_out.t, live, p.D_v, 1.0f, state.do_t);
      load_rows(head, t, live, state);
    }
    if (!row_major) return;
    const Index padded = s.num_columns * kColumn;
    pack_rows(head.q + t0 * p.q.t, p.q.t, n, p.D, s.D_pad, p.scale, s.q_rows);
    pack_rows(grad_out(head, t0), p.grad_out.t, n, p.D_v, s.D_v_pad, 1.0f, s.do_rows);
    if (head.units.after) {  // q * scale may be Inf, which 0 * q would carry into dk
      for (Index i = 0; i < n * s.D_pad; ++i) s.q_rows[i] = clamp_finite(s.q_rows[i]);
    }
    for (Index i = 0; i < n; ++i) {
      if (has_no_keys(head, t0 + i)) clear_unless_finite(s.do_rows + i * s.D_v_pad, p.D_v);
      if (is_out_of_use(head, t0 + i)) clear_unless_finite(s.q_rows + i * s.D_pad, p.D);
    }
    memset(s.q_rows + n * s.D_pad, 0, (padded - n) * s.D_pad * sizeof(float));
    memset(s.do_rows + n * s.D_v_pad, 0, (padded - n) * s.D_v_pad * sizeof(float));
  }

  // Whether a query attends to nothing, but maybe the sink: p is 0, and what it or its gradient
  // hold of NaN and Inf must not reach dk and dv as 0 * q.
  bool has_no_keys(const Head<Element>& head, Index t) const {
    const Index at = row_offset(head, t);
    const float m = p.norm[at], log2_l = p.norm[p.norm_plane + at];
    return log2_l == kInfinity || (p.sinks && log2_l == 0.0f && m == head.sink);
  }

  // Whether q is of no use in dk: the same, or ds is NaN already at the keys that it attends.
  bool is_out_of_use(const Head<Element>& head, Index t) const {
    const float log2_l = p.norm[p.norm_plane + row_offset(head, t)];
    return log2_l != log2_l || has_no_keys(head, t);
  }

  static void clear_unless_finite(float* row, Index D) {
    bool finite = true;
    for (Index d = 0; d < D; ++d) finite &= row[d] - row[d] == 0.0f;
    if (!finite) memset(row, 0, D * sizeof(float));
  }

  bool is_plain() const {
    return p.dropout_p == 0.0 && !p.grad_weights.data && !p.grad_entropy && p.softcap == 0.0f;
  }

  // dw[key][lane], the gradient of the returned weights.
  void weights_gradient_tile(const Head<Element>& head, const Column& column, Index key, Index n,
                             float* dw) const {
    const View& view = p.grad_weights;
    const char* at_head =
        static_cast<const char*>(view.data) + (head.b * view.b + head.h * view.h) * sizeof(Element);
    const float factor = p.weights_mode == Weights::kMean ? 1.0f / static_cast<float>(p.H) : 1.0f;
    memset(dw, 0, n * kColumn * sizeof(float));
    fold_view(view, at_head, column.t0, column.rows, key, n, dw,
              [=](Vec, Vec x) { return x * factor; });
  }

  // prob: p * z; ds: the gradient of the scores (after the cap), times dcapped if `through_cap`.
  void gradient_tile(const Head<Element>& head, const Column& column, const BackwardColumn& state,
                     Index key, Index n, const float* k, Index k_row, const float* v, Index v_row,
                     BackwardScratch& s, float* prob, float* ds, bool through_cap,
                     DeadKeys* dead) const {
    // Scores
    scores_of(head, column, key, n, k, k_row, state.q_t, prob, s.dcapped, nullptr, dead);
    spread_nan(state, n, prob);

    // dP
    gemm<kTileVecs>(n, p.D_v, MatrixA{v, v_row, 1}, MatrixB{state.do_t, kColumn},
                    MatrixC{ds, kColumn}, Start::kZero);

    // Probabilities and ds
    const float to_log2 = head.units.to_log2, to_natural = head.units.to_natural;
    if (is_plain()) {
      for (Index lane = 0; lane < kColumn; lane += kLanes) {
        const Vec m = load(state.norm.m + lane), log2_l = load(state.norm.log2_l + lane),
                  row_term = load(state.row_term + lane);
        for (Index j = 0; j < n; ++j) {
          float *x = prob + j * kColumn + lane, *dp = ds + j * kColumn + lane;
          const Vec probability = Norm::probability(load(x), m, log2_l, to_log2);
          store(x, probability);
          store(dp, probability == 0.0f ? zeros() : probability * (load(dp) + row_term));
        }
      }
      return;
    }
    const bool drops = p.dropout_p > 0.0, weighs = p.grad_weights.data != nullptr;
    if (drops) dropout_tile(head, column, key, n, keep_scale_of(p), s.z);
    if (weighs) weights_gradient_tile(head, column, key, n, s.dw);
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const Vec m = load(state.norm.m + lane), log2_l = load(state.norm.log2_l + lane),
                row_term = load(state.row_term + lane), dentropy = load(state.dentropy + lane);
      for (Index j = 0; j < n; ++j) {
        const Index i = j * kColumn + lane;
        const Vec score = load(prob + i), depth = score - m;
        const Vec probability = Norm::probability(score, m, log2_l, to_log2);
        Vec dp = load(ds + i), z = broadcast(1.0f);
        if (weighs) dp += load(s.dw + i);
        if (drops) z = load(s.z + i);
        Vec d = probability * (dp * z + row_term - dentropy * (depth * to_natural));
        if (through_cap && p.softcap > 0.0f) d *= load(s.dcapped + i);
        store(prob + i, probability * z);
        store(ds + i, probability == 0.0f ? zeros() : d);
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

  Index columns_per_block() const {
    return (min_of(block_rows, max_of(p.T, 1)) + kColumn - 1) / kColumn;
  }

  // Calls body(item, scratch) for every item, in parallel.
  template <class Body>
  void parallel(Index items, const ScratchPlan& plan, const Body& body) const {
    const auto prepare = [&](Parts& parts) { return make_scratch(p, plan, parts); };
    ATTNFAST_ISA::parallel(p, items, 1, prepare, body);
  }
};

// Where a key head's gradients go.
struct KeyGradients {
  bool dq, dkv;
  float *dk, *dv;  // fp32 rows, accumulated; row 0 is key 0
  Index dk_row, dv_row;
};

// Blocks of queries against tiles of keys, here with products in fp32 and in attention_bwd_pairs.h
// on pairs of bf16:
//
//   load_block  q and do of a block of queries, transposed, and with dk and dv also in rows
//   load_keys   a key head made ready, and its gradients zeroed
//   key_tile    s, p, dp and ds of a tile; dq += ds k, dv += (p z)^T do, dk += ds^T q
//
// kFirstKey: tiles begin at multiples of so many keys.
template <class Element, int kPlanes>
struct GradientTiles;

template <class Element>
struct GradientTiles<Element, 0> : BackwardTiles<Element> {
  using Tiles = BackwardTiles<Element>;
  using Tiles::column_of;
  using Tiles::gradient_tile;
  using Tiles::kPacks;
  using Tiles::p;

  struct Keys {};
  static constexpr Index kFirstKey = 1;
  float dk_scale() const { return 1.0f; }  // of rows of q, which are scaled already

  Keys load_keys(const Head<Element>& head, Index keys, const float*, Element* dk, Element* dv,
                 KeyGradients& to, BackwardScratch& s) const {
    if (kPacks && s.k_head) {
      pack_rows(head.k, p.k.t, head.S, p.D, s.D_pad, 1.0f, s.k_head);
      pack_rows(head.v, p.v.t, head.S, p.D_v, s.D_v_pad, 1.0f, s.v_head);
    }
    if constexpr (!kPacks) {
      if (!s.dk_head) to = KeyGradients{to.dq, true, dk, dv, p.dk.t, p.dv.t};
    }
    for (Index i = 0; i < keys; ++i) {
      memset(to.dk + i * to.dk_row, 0, p.D * sizeof(float));
      memset(to.dv + i * to.dv_row, 0, p.D_v * sizeof(float));
    }
    return {};
  }

  // The last tile of the block ends with key key_end - 1.
  void key_tile(const Head<Element>& head, Index t0, Index rows_in_block, const Segment& segment,
                Index key, Index n, Index key_end, const Keys&, const KeyGradients& to,
                BackwardScratch& s) const {
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
      const Column column = column_of(head, t0, rows_in_block, c, segment);
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

    // dv, dk
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

 private:
  // Zeroes the rows of a tile that are not in first .. last - 1.
  static void clear_outside(float* tile, Index first, Index last, Index n) {
    memset(tile, 0, first * kColumn * sizeof(float));
    memset(tile + last * kColumn, 0, (n - last) * kColumn * sizeof(float));
  }
};

// The passes after the first: dbias, where it is wanted, and dsinks.
void bias_gradient(const BackwardParams& p, float* row_terms);

}  // namespace attnfast::cpu::ATTNFAST_ISA
