// What the passes of the backward share: blocks of queries made ready, and tiles of p and ds.
//
//   p = exp(s - m - log l)                  dp = keep * (do v^T + dw)
//   ds = p * (dp + row - dentropy * (s - m))
//
// `row`, one number per query, is worked out first (kernels_backward.cpp).
#pragma once
#include "keys.h"
#include "probabilities.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kKeys = 64;          // keys of one tile; ranges of keys begin at multiples of it
constexpr Index kKeysPerItem = 256;  // keys of one item where keys are shared out

// What is read once per column of queries.
struct BackwardColumn {
  Norm norm;
  float nan[kColumn];  // with norm.has_nan: NaN where its row was, else 0
  float row[kColumn];
  float dentropy[kColumn];
  float* q_t;   // as load_queries has them
  float* do_t;  // [D_v][kColumn]
  float* dq_t;  // [D][kColumn]
  float* p;     // [kKeys][kColumn] kept probabilities of the current tile
  float* ds;    // [kKeys][kColumn]
  Start start;
};

struct BackwardScratch {
  Index D_pad, D_v_pad;
  Index num_columns;
  BackwardColumn* columns;
  float *p_all, *ds_all;     // [num_columns][kKeys][kColumn]
  float *q_rows, *do_rows;   // [num_columns * kColumn][D_pad | D_v_pad], q times scale
  float *keep, *dw, *cap;    // [kKeys][kColumn]
  float *k_tile, *v_tile;    // [kKeys][D_pad | D_v_pad]
  float *k_head, *v_head;    // [S][D_pad | D_v_pad]: one head in fp32; null: read tile by tile
  float *dk_head, *dv_head;  // [S][D_pad | D_v_pad], null: accumulated in place
  float* sums;               // a block of dbias

  // On pairs (pairs.h), in planes; p_all and ds_all are rows of keys [num_columns][kKeys][16
  // pairs], q_rows and do_rows pairs of queries [num_columns * 16][D_pad | D_v_pad].
  float *p_tile, *ds_tile;  // [kKeys + 16][kColumn], fp32
  float* ds_pairs;          // [kKeys / 2][kColumn], pairs of keys
  float* k_clean;           // [kKeys / 2][D_pad], transposed
  float* keys;              // a packed head

  Prefetcher next_tile = {};  // of k, v, dk and dv
  Index next_tile_lines = 0;  // asked for with each column
  Worker* worker = nullptr;
};

// How large each part is.
struct ScratchPlan {
  Index num_columns;
  Index head_rows = 0;    // rows of dk_head and dv_head
  Index packed_rows = 0;  // rows of k_head and v_head
  Index sums = 0;
  int planes = 0;  // 0: in fp32
  Index keys = 0;  // floats of a packed head, on pairs
};

inline BackwardScratch make_scratch(const Problem& p, const ScratchPlan& plan, Parts& parts) {
  const auto floats = [&](Index n) { return parts.take<float>(n); };
  const Index n = plan.num_columns, planes = plan.planes;
  const Index tile = kKeys * (planes ? planes * kPanelPairs : kColumn);
  const Index tiles = planes ? 0 : kKeys * kColumn;  // fp32 tiles that pairs do without
  const Index block_rows = planes ? planes * n * kPanelPairs : n * kColumn;
  const Index options = kKeys + (planes ? kTileSize : 0);
  const Index D_pad = round_up(p.D, kLanes), D_v_pad = round_up(p.D_v, kLanes);
  BackwardColumn* columns = parts.take<BackwardColumn>(n);
  BackwardScratch scratch{D_pad,
                          D_v_pad,
                          n,
                          columns,
                          floats(n * tile),
                          floats(n * tile),
                          floats(block_rows * D_pad),
                          floats(block_rows * D_v_pad),
                          floats(options * kColumn),
                          floats(options * kColumn),
                          floats(options * kColumn),
                          floats(tiles ? kKeys * D_pad : 0),
                          floats(tiles ? kKeys * D_v_pad : 0),
                          floats(plan.packed_rows * D_pad),
                          floats(plan.packed_rows * D_v_pad),
                          floats(plan.head_rows * D_pad),
                          floats(plan.head_rows * D_v_pad),
                          floats(plan.sums),
                          floats(planes ? options * kColumn : 0),
                          floats(planes ? options * kColumn : 0),
                          floats(planes * kKeys / 2 * kColumn),
                          floats(planes * kKeys / 2 * round_up(p.D, kTileSize)),
                          floats(plan.keys)};
  for (Index c = 0; c < n; ++c) {
    const Index q_floats = planes ? planes * round_up(p.D, kPanel) / 2 * kColumn : query_floats(p);
    const Index do_floats = planes ? planes * round_up(p.D_v, kPanel) / 2 : p.D_v;
    float *q_t = floats(q_floats), *do_t = floats(do_floats * kColumn),
          *dq_t = floats(round_up(p.D, kTileSize) * kColumn);
    if (!columns) continue;
    columns[c].q_t = q_t, columns[c].do_t = do_t, columns[c].dq_t = dq_t;
    if (planes) continue;
    columns[c].p = scratch.p_all + c * tile, columns[c].ds = scratch.ds_all + c * tile;
  }
  return scratch;
}

template <class Element>
struct BackwardTiles {
  const BackwardParams& p;
  float* rows;  // `row` of every query, laid out like lse

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

  Column column_of(const Head<Element>& head, Index t0, Index rows_in_block, Index c) const {
    return Column(head, t0 + c * kColumn, min_of(rows_in_block - c * kColumn, kColumn));
  }

  // One number per query of a column.
  void load_rows(const Head<Element>& head, Index t, Index live, BackwardColumn& state) const {
    const Index offset = row_offset(head, t);
    Norm& norm = state.norm;
    norm.load_rows(p, head, t, live);
    for (Index lane = 0; lane < kColumn; ++lane) {
      state.nan[lane] = norm.log_l[lane] == norm.log_l[lane] ? 0.0f : norm.log_l[lane];
      if (state.nan[lane] != 0.0f) norm.m[lane] = norm.log_l[lane] = 0.0f;
      state.row[lane] = lane < live ? rows[offset + lane] : 0.0f;
      state.dentropy[lane] = lane < live && p.grad_entropy ? p.grad_entropy[offset + lane] : 0.0f;
    }
    state.start = Start::kZero;
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
    if (head.scaling.after) {  // q * scale may be Inf, which 0 * q would carry into dk
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
    const float m = p.norm[at], log_l = p.norm[p.norm_plane + at];
    return log_l == kInfinity || (p.sinks && log_l == 0.0f && m == head.sink);
  }

  // Whether q is of no use in dk: the same, or ds is NaN already at the keys that it attends.
  bool is_out_of_use(const Head<Element>& head, Index t) const {
    const float log_l = p.norm[p.norm_plane + row_offset(head, t)];
    return log_l != log_l || has_no_keys(head, t);
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

  float kept() const {
    return p.dropout_p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
  }

  // prob: p * keep; ds: the gradient of the scores (after the cap), times the cap's slope if
  // `through_cap`.
  void gradient_tile(const Head<Element>& head, const Column& column, const BackwardColumn& state,
                     Index key, Index n, const float* k, Index k_row, const float* v, Index v_row,
                     BackwardScratch& s, float* prob, float* ds, bool through_cap,
                     DeadKeys* dead) const {
    scores_of(head, column, key, n, k, k_row, state.q_t, prob, s.cap, nullptr, dead);
    spread_nan(state, n, prob);
    gemm<kTileVecs>(n, p.D_v, MatrixA{v, v_row, 1}, MatrixB{state.do_t, kColumn},
                    MatrixC{ds, kColumn}, Start::kZero);
    const float to_log2 = head.to_log2, to_natural = head.to_natural;
    if (is_plain()) {
      for (Index lane = 0; lane < kColumn; lane += kLanes) {
        const Vec m = load(state.norm.m + lane), log_l = load(state.norm.log_l + lane),
                  row = load(state.row + lane);
        for (Index j = 0; j < n; ++j) {
          float *x = prob + j * kColumn + lane, *dp = ds + j * kColumn + lane;
          const Vec probability = Norm::probability(load(x), m, log_l, to_log2);
          store(x, probability);
          store(dp, probability == 0.0f ? zeros() : probability * (load(dp) + row));
        }
      }
      return;
    }
    const bool drops = p.dropout_p > 0.0, weighs = p.grad_weights.data != nullptr;
    if (drops) dropout_tile(head, column, key, n, kept(), s.keep);
    if (weighs) weights_gradient_tile(head, column, key, n, s.dw);
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const Vec m = load(state.norm.m + lane), log_l = load(state.norm.log_l + lane),
                row = load(state.row + lane), dh = load(state.dentropy + lane);
      for (Index j = 0; j < n; ++j) {
        const Index i = j * kColumn + lane;
        const Vec score = load(prob + i);
        const Vec probability = Norm::probability(score, m, log_l, to_log2);
        Vec dp = load(ds + i), keep = broadcast(1.0f);
        if (weighs) dp += load(s.dw + i);
        if (drops) keep = load(s.keep + i);
        Vec d = probability * (dp * keep + row - dh * ((score - m) * to_natural));
        if (through_cap && p.softcap > 0.0f) d *= load(s.cap + i);
        store(prob + i, probability * keep);
        store(ds + i, probability == 0.0f ? zeros() : d);
      }
    }
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

// The passes after the first: dbias, where it is wanted, and dsinks.
void bias_gradient(const BackwardParams& p, float* rows);

}  // namespace attnfast::cpu::ATTNFAST_ISA
