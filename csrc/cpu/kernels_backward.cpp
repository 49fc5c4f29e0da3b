// Attention backward (FlashAttention-2, Algorithm 2, with the queries in lanes and no atomics).
//
//   p = exp(s - lse)        dp = keep * (do v^T + dw)        ds = p * (dp + row - dentropy * s)
//   row = dlse - delta - dentropy * (entropy - lse)          delta = rowsum(p * dp) = rowsum(do *
//   o) + ... dv = (p * keep)^T do    dq = scale * ds k                dk = scale * ds^T q
//
// Work:    first `row` for every query; then one item per (batch entry, key head), which owns its
// dk and dv and all
//          dq of its query heads. With too few heads for the threads, dq and dk/dv are computed
//          apart instead, one item per block of queries or range of keys: 7 products instead of 5,
//          the same sums in the same order. The gradient of a bias has a pass of its own, one item
//          per block of dbias, so that reduced dimensions are summed without atomics.
// Memory:  per query one float; per thread tiles, and fp32 dk and dv (for bf16 and fp16 also k and
// v) of one head Threads: results do not depend on their number
#include <memory>
#include <type_traits>

#include "arena.h"
#include "kernels.h"
#include "scores.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

constexpr Index kKeys = 64;          // keys of one tile; ranges of keys begin at multiples of it
constexpr Index kKeysPerItem = 256;  // keys of one item where keys are shared out

// What is read once per column of queries.
struct ColumnState {
  float lse[kColumn];  // in the units of the scores; +inf where p must be 0
  float row[kColumn];
  float dentropy[kColumn];
  float* q_t;   // [D][kColumn], head.q_factor folded in
  float* do_t;  // [D_v][kColumn]
  float* dq_t;  // [D][kColumn]
  float* p;     // [kKeys][kColumn] kept probabilities of the current tile
  float* ds;    // [kKeys][kColumn]
  Start start;
};

struct Scratch {
  Index D_pad, D_v_pad;
  Index num_columns;
  ColumnState* columns;
  float *p_all, *ds_all;    // [num_columns][kKeys][kColumn]
  float *q_rows, *do_rows;  // [num_columns * kColumn][D_pad | D_v_pad], q times scale
  float *keep, *dw, *cap;   // [kKeys][kColumn]
  float *k_tile, *v_tile;   // [kKeys][D_pad | D_v_pad]
  float *k_head,
      *v_head;  // [S][D_pad | D_v_pad]: one head in fp32, null: read in place or tile by tile
  float *dk_head, *dv_head;  // [S][D_pad | D_v_pad], null: accumulated in place
  float* sums;               // a block of dbias
};

// How large each part is; the same list sizes the arena and hands out its memory.
struct ScratchPlan {
  Index num_columns;
  Index head_rows = 0;    // rows of dk_head and dv_head
  Index packed_rows = 0;  // rows of k_head and v_head
  Index sums = 0;
};

size_t take_scratch(const Problem& p, const ScratchPlan& plan, Arena* arena, Scratch* s) {
  size_t bytes = 0;
  const auto floats = [&](Index n) {
    bytes += Arena::bytes_for<float>(n);
    return arena && n ? arena->take<float>(n) : nullptr;
  };
  const Index tile = kKeys * kColumn, n = plan.num_columns;
  const Index D_pad = round_up(p.D, kLanes), D_v_pad = round_up(p.D_v, kLanes);
  bytes += Arena::bytes_for<ColumnState>(n);
  ColumnState* columns = arena ? arena->take<ColumnState>(n) : nullptr;
  Scratch scratch{D_pad,
                  D_v_pad,
                  n,
                  columns,
                  floats(n * tile),
                  floats(n * tile),
                  floats(n * kColumn * D_pad),
                  floats(n * kColumn * D_v_pad),
                  floats(tile),
                  floats(tile),
                  floats(tile),
                  floats(kKeys * D_pad),
                  floats(kKeys * D_v_pad),
                  floats(plan.packed_rows * D_pad),
                  floats(plan.packed_rows * D_v_pad),
                  floats(plan.head_rows * D_pad),
                  floats(plan.head_rows * D_v_pad),
                  floats(plan.sums)};
  for (Index c = 0; c < n; ++c) {
    float *q_t = floats(p.D * kColumn), *do_t = floats(p.D_v * kColumn),
          *dq_t = floats(p.D * kColumn);
    if (!arena) continue;
    columns[c].q_t = q_t, columns[c].do_t = do_t, columns[c].dq_t = dq_t;
    columns[c].p = scratch.p_all + c * tile, columns[c].ds = scratch.ds_all + c * tile;
  }
  if (s) *s = scratch;
  return bytes;
}

Scratch make_scratch(const Problem& p, const ScratchPlan& plan) {
  Arena& arena = thread_arena();
  arena.reset(take_scratch(p, plan, nullptr, nullptr));
  Scratch s;
  take_scratch(p, plan, &arena, &s);
  return s;
}

template <class Element>
struct Backward {
  const BackwardParams& p;
  float* rows;  // `row` of every query, laid out like lse

  static constexpr Index kBlock = RowsAsFloat<Element>::kPacks ? 128 : 64;  // queries of a block
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

  // Everything of a block of queries that its tiles need.
  void load_block(const Head<Element>& head, Index t0, Index n, Scratch& s, bool row_major) const {
    s.num_columns = (n + kColumn - 1) / kColumn;
    for (Index c = 0; c < s.num_columns; ++c) {
      ColumnState& state = s.columns[c];
      const Index t = t0 + c * kColumn, live = min_of(n - c * kColumn, kColumn);
      transpose_in(head.q + t * p.q.t, p.q.t, live, p.D, head.q_factor, state.q_t);
      transpose_in(grad_out(head, t), p.grad_out.t, live, p.D_v, 1.0f, state.do_t);
      const Index offset = row_offset(head, t);
      for (Index lane = 0; lane < kColumn; ++lane) {
        const float lse = lane < live ? p.lse[offset + lane] : -kInfinity;
        state.lse[lane] = lse == -kInfinity ? kInfinity : lse / head.to_natural();
        state.row[lane] = lane < live ? rows[offset + lane] : 0.0f;
        state.dentropy[lane] = lane < live && p.grad_entropy ? p.grad_entropy[offset + lane] : 0.0f;
      }
      state.start = Start::kZero;
    }
    if (!row_major) return;
    const Index padded = s.num_columns * kColumn;
    pack_rows(head.q + t0 * p.q.t, p.q.t, n, p.D, s.D_pad, p.scale, s.q_rows);
    pack_rows(grad_out(head, t0), p.grad_out.t, n, p.D_v, s.D_v_pad, 1.0f, s.do_rows);
    memset(s.q_rows + n * s.D_pad, 0, (padded - n) * s.D_pad * sizeof(float));
    memset(s.do_rows + n * s.D_v_pad, 0, (padded - n) * s.D_v_pad * sizeof(float));
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

  // Probabilities in `prob`: before dropout, from the scores that are in it.
  static void probabilities(const Head<Element>& head, const ColumnState& state, Index n,
                            float* prob) {
    const float to_log2 = head.to_log2();
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const Vec lse = load(state.lse + lane);
      for (Index j = 0; j < n; ++j) {
        float* x = prob + j * kColumn + lane;
        store(x, exp2((load(x) - lse) * to_log2));
      }
    }
  }

  float kept() const {
    return p.dropout_p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
  }

  // prob: p * keep; ds: the gradient of the scores (after the cap), times the cap's slope if
  // `through_cap`.
  void gradient_tile(const Head<Element>& head, const Column& column, const ColumnState& state,
                     Index key, Index n, const float* k, Index k_row, const float* v, Index v_row,
                     Scratch& s, float* prob, float* ds, bool through_cap, DeadKeys* dead) const {
    score_tile(head, column, key, n, state.q_t, k, k_row, prob, s.cap, nullptr, dead);
    gemm<kTileVecs>(n, p.D_v, MatrixA{v, v_row, 1}, MatrixB{state.do_t, kColumn},
                    MatrixC{ds, kColumn}, Start::kZero);
    const float to_log2 = head.to_log2(), to_natural = head.to_natural();
    if (is_plain()) {
      for (Index lane = 0; lane < kColumn; lane += kLanes) {
        const Vec lse = load(state.lse + lane), row = load(state.row + lane);
        for (Index j = 0; j < n; ++j) {
          float *x = prob + j * kColumn + lane, *dp = ds + j * kColumn + lane;
          const Vec probability = exp2((load(x) - lse) * to_log2);
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
      const Vec lse = load(state.lse + lane), row = load(state.row + lane),
                dh = load(state.dentropy + lane);
      for (Index j = 0; j < n; ++j) {
        const Index i = j * kColumn + lane;
        const Vec score = load(prob + i);
        const Vec probability = exp2((score - lse) * to_log2);
        Vec dp = load(ds + i), keep = broadcast(1.0f);
        if (weighs) dp += load(s.dw + i);
        if (drops) keep = load(s.keep + i);
        Vec d = probability * (dp * keep + row - dh * (score * to_natural));
        if (through_cap && p.softcap > 0.0f) d *= load(s.cap + i);
        store(prob + i, probability * keep);
        store(ds + i, probability == 0.0f ? zeros() : d);
      }
    }
  }

  // `row` of a block of queries, from o, do and, with a gradient of the weights, their
  // probabilities.
  void row_block(const Head<Element>& head, Index t0, Index n, Scratch& s) const {
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

  void subtract_weights_term(const Head<Element>& head, Index t0, Index n, Scratch& s,
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
        score_tile(head, column, key, count, s.columns[c].q_t, k, k_row, prob, nullptr, nullptr,
                   &dead);
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
                   const Outputs& to, Scratch& s) const {
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
      ColumnState& state = s.columns[c];
      if (state.start == Start::kZero) memset(state.dq_t, 0, p.D * kColumn * sizeof(float));
      transpose_out(state.dq_t, min_of(n - c * kColumn, kColumn), p.D, factor,
                    dq + c * kColumn * p.dq.t, p.dq.t);
    }
  }

  void key_tile(const Head<Element>& head, Index t0, Index rows_in_block, Index key, Index n,
                const Outputs& to, Scratch& s) const {
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
      ColumnState& state = s.columns[c];
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
                Scratch& s) const {
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
                        Scratch& s) const {
    const Index group = p.H / p.H_kv;
    for (Index g = 0; g < group; ++g) {
      const Head<Element> head(p, b, h_kv * group + g);
      for (Index t0 = 0; t0 < head.T; t0 += kBlock) {
        query_block(head, t0, min_of(kBlock, head.T - t0), key_begin, key_end, to, s);
      }
    }
  }

  Index columns_per_block() const {
    return (min_of(kBlock, max_of(p.T, 1)) + kColumn - 1) / kColumn;
  }

  // Calls body(item, scratch) for every item, in parallel.
  template <class Body>
  void parallel(Index items, const ScratchPlan& plan, Body body) const {
    const int threads = usable_threads(p.num_threads);
#pragma omp parallel num_threads(threads) if (items > 1 && threads > 1)
    {
      Scratch s = make_scratch(p, plan);
#pragma omp for schedule(dynamic, 1)
      for (Index item = 0; item < items; ++item) body(item, s);
      thread_arena().release();
    }
  }

  void run() const {
    const Index blocks = (p.T + kBlock - 1) / kBlock,
                key_ranges = (p.S + kKeysPerItem - 1) / kKeysPerItem;
    ScratchPlan plan{columns_per_block()};
    const auto each_block = [&](auto body) {
      parallel(p.B * p.H * blocks, plan, [&](Index item, Scratch& s) {
        const Index head_index = item / blocks, t0 = (blocks - 1 - item % blocks) * kBlock;
        const Head<Element> head(p, head_index / p.H, head_index % p.H);
        if (t0 < head.T) body(head, t0, min_of(kBlock, head.T - t0), s);
      });
    };
    each_block([&](const Head<Element>& head, Index t0, Index n, Scratch& s) {
      row_block(head, t0, n, s);
    });

    const bool in_place = !kPacks && p.D % kLanes == 0 && p.D_v % kLanes == 0;
    const Index heads = p.B * p.H_kv, threads = usable_threads(p.num_threads);
    const bool few_heads = (heads + threads - 1) / threads * 5 * threads > heads * 7 + 2;
    if (!few_heads) {
      plan.packed_rows = kPacks ? p.S : 0;
      plan.head_rows = in_place ? 0 : p.S;
      parallel(heads, plan, [&](Index item, Scratch& s) {
        key_head(item / p.H_kv, item % p.H_kv, 0, p.S, true, s);
      });
    } else {
      each_block([&](const Head<Element>& head, Index t0, Index n, Scratch& s) {
        query_block(head, t0, n, 0, head.S, Outputs{true, false, nullptr, nullptr, 0, 0}, s);
      });
      plan.head_rows = in_place ? 0 : kKeysPerItem;
      parallel(heads * key_ranges, plan, [&](Index item, Scratch& s) {
        const Index head_index = item / key_ranges, key = item % key_ranges * kKeysPerItem;
        key_head(head_index / p.H_kv, head_index % p.H_kv, key, key + kKeysPerItem, false, s);
      });
    }
    if (p.dbias.data) bias_gradient();
    if (p.dsinks) sinks_gradient();
  }

  // dbias: each item owns a block of it and walks through all that is summed into that block.
  void bias_gradient() const {
    const MutableView& to = p.dbias;
    const bool per_b = to.b != 0, per_h = to.h != 0, per_t = to.t != 0, per_s = to.d != 0;
    const Index batches = per_b ? p.B : 1, heads = per_h ? p.H : 1;
    const Index blocks = per_t ? (p.T + kBlock - 1) / kBlock : 1;
    const Index ranges = per_s ? (p.S + kKeysPerItem - 1) / kKeysPerItem : 1;
    const Index key_rows = per_s ? kKeysPerItem : 1;
    ScratchPlan plan{columns_per_block()};
    plan.sums = plan.num_columns * key_rows * kColumn;
    parallel(batches * heads * blocks * ranges, plan, [&](Index item, Scratch& s) {
      const Index range = item % ranges, block = item / ranges % blocks;
      const Index h0 = item / ranges / blocks % heads, b0 = item / ranges / blocks / heads;
      const Index key_begin = per_s ? range * kKeysPerItem : 0;
      const Index key_end = per_s ? min_of(key_begin + kKeysPerItem, p.S) : p.S;
      memset(s.sums, 0, plan.sums * sizeof(float));
      for (Index b = per_b ? b0 : 0; b < (per_b ? b0 + 1 : p.B); ++b) {
        for (Index h = per_h ? h0 : 0; h < (per_h ? h0 + 1 : p.H); ++h) {
          const Head<Element> head(p, b, h);
          const Index t_begin = per_t ? block * kBlock : 0;
          const Index t_end = per_t ? min_of(t_begin + kBlock, head.T) : head.T;
          for (Index t0 = t_begin; t0 < t_end; t0 += kBlock) {
            sum_bias_block(head, t0, min_of(kBlock, t_end - t0), key_begin, min_of(key_end, head.S),
                           per_s, s);
          }
        }
      }
      write_bias_block(b0, h0, block * kBlock, key_begin, key_end - key_begin, per_t, per_s, s);
    });
  }

  // sums[column][key][lane] += ds; one row for all keys unless per_s.
  void sum_bias_block(const Head<Element>& head, Index t0, Index n, Index key_begin, Index key_end,
                      bool per_s, Scratch& s) const {
    load_block(head, t0, n, s, false);
    const Index rows_per_column = per_s ? kKeysPerItem : 1;
    for (Index c = 0; c < s.num_columns; ++c) {
      const Column column = column_of(head, t0, n, c);
      const Index end = min_of(column.end, key_end);
      for (Index key = max_of(column.begin, key_begin); key < end; key += kKeys) {
        const Index count = min_of(kKeys, end - key);
        Index k_row, v_row;
        const float* k = RowsAsFloat<Element>::get(head.k + key * p.k.t, p.k.t, count, p.D,
                                                   Use::kAcross, s.k_tile, &k_row);
        const float* v = RowsAsFloat<Element>::get(head.v + key * p.v.t, p.v.t, count, p.D_v,
                                                   Use::kAlongRows, s.v_tile, &v_row);
        ColumnState& state = s.columns[c];
        DeadKeys dead;
        gradient_tile(head, column, state, key, count, k, k_row, v, v_row, s, state.p, state.ds,
                      false, &dead);
        for (Index j = 0; j < count; ++j) {
          float* sum = s.sums + (c * rows_per_column + (per_s ? key - key_begin + j : 0)) * kColumn;
          for (Index lane = 0; lane < kColumn; lane += kLanes) {
            store(sum + lane, load(sum + lane) + load(state.ds + j * kColumn + lane));
          }
        }
      }
    }
  }

  void write_bias_block(Index b, Index h, Index t0, Index key, Index keys, bool per_t, bool per_s,
                        Scratch& s) const {
    const MutableView& to = p.dbias;
    const Index rows_per_column = per_s ? kKeysPerItem : 1, columns = columns_per_block();
    const Index count = per_s ? keys : 1, queries = per_t ? min_of(kBlock, p.T - t0) : 1;
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

  // dsink = sum over rows of p_sink * (row - dentropy * sink)
  void sinks_gradient() const {
    for (Index h = 0; h < p.H; ++h) {
      const float sink = p.sinks[h];
      double total = 0.0;
      for (Index b = 0; b < p.B; ++b) {
        const Head<Element> head(p, b, h);
        for (Index t = 0; t < head.T; t += kLanes) {
          const Index n = min_of(kLanes, head.T - t), at = row_offset(head, t);
          const Vec lse = load_some(p.lse + at, n);
          Vec term = load_some(rows + at, n);
          if (p.grad_entropy) term -= load_some(p.grad_entropy + at, n) * sink;
          term *= sink == -kInfinity ? zeros() : exp2((sink - lse) * kLog2E);
          for (Index i = 0; i < n; ++i) total += static_cast<double>(term[i]);
        }
      }
      p.dsinks[h] = static_cast<float>(total);
    }
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
    Backward<std::remove_pointer_t<decltype(element)>>{p, buffer.get()}.run();
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
