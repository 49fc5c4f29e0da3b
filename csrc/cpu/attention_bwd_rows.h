// What the backward needs of each query before its tiles: row_term, and m and log2 l where the
// forward's do not serve.
//
//   row_term = dlse - delta - dentropy * (entropy - log l)
//   delta = rowsum(p * dp) = rowsum(do * o) + rowsum(p * z * dw)
//
// All in fp32, or on pairs in one plane, as scores_of has it.
#pragma once
#include "attention_bwd_tiles.h"

namespace attnfast::cpu::ATTNFAST_ISA {

template <class Element>
struct BackwardRows : BackwardTiles<Element> {
  using Tiles = BackwardTiles<Element>;
  using Tiles::column_of;
  using Tiles::columns_per_block;
  using Tiles::grad_out;
  using Tiles::load_block;
  using Tiles::p;
  using Tiles::row_offset;
  using Tiles::row_terms;
  using Tiles::weights_gradient_tile;

  // row_term of every query.
  void find_row_terms() const {
    this->each_block(ScratchPlan{columns_per_block()},
                     [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
                       row_terms_of(head, t0, n, s);
                     });
  }

  // m and log2 l of every query, see find_norm.
  void find_norms(float* norm, Index plane) const {
    this->each_block(ScratchPlan{columns_per_block()},
                     [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
                       find_norm(head, t0, n, norm, plane, s);
                     });
  }

  // Of a block of queries, from o, do and, with a gradient of the weights, their probabilities.
  void row_terms_of(const Head<Element>& head, Index t0, Index n, BackwardScratch& s) const {
    float* out = row_terms + row_offset(head, t0);
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
    if (p.grad_weights.data) subtract_weights_terms(head, t0, n, s, out);
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
  // so large that it matters how they are rounded, or on pairs the decoding kernel's. Of an lse alone
  // (norm_plane 0) the others too.
  void find_norm(const Head<Element>& head, Index t0, Index n, float* norm, Index plane,
                 BackwardScratch& s) const {
    load_block(head, t0, n, s, false);
    for (Index c = 0; c < s.num_columns; ++c) {
      BackwardColumn& state = s.columns[c];
      Norm& found = state.norm;
      bool wanted = kOnPairs<Element> && p.T == 1;
      for (Index lane = 0; lane < kColumn; ++lane)
        wanted |= __builtin_fabsf(found.m[lane] * head.units.to_log2) > kRoundedAlike;
      const Index t = t0 + c * kColumn, rows = min_of(n - c * kColumn, kColumn);
      const auto write = [&] {
        float* to = norm + row_offset(head, t);
        memcpy(to, found.m, rows * sizeof(float));
        memcpy(to + plane, found.log2_l, rows * sizeof(float));
      };
      if (!wanted) {
        if (p.norm_plane == 0) write();
        continue;
      }
      alignas(64) float top[kColumn], sums[kColumn];
      for (Index lane = 0; lane < kColumn; ++lane) top[lane] = head.sink, sums[lane] = 0.0f;
      each_tile(head, t0, n, c, top, s, [](const Column&, Index, Index) {});
      for (Index lane = 0; lane < kColumn; ++lane) {
        found.m[lane] = top[lane] == -kInfinity ? 0.0f : top[lane];
        found.log2_l[lane] = 0.0f;
      }
      each_tile(head, t0, n, c, nullptr, s, [&](const Column&, Index, Index n) {
        found.exponentiate(n, head.units.to_log2, state.p);
        for (Index i = 0; i < n * kColumn; i += kLanes)
          store(sums + i % kColumn, load(sums + i % kColumn) + load(state.p + i));
      });
      for (Index lane = 0; lane < kColumn; lane += kLanes) {
        const Vec base = load(found.m + lane), sink = broadcast(head.sink);
        const Vec l_sink = exp2((sink - base) * head.units.to_log2), l = load(sums + lane) + l_sink;
        store(found.log2_l + lane, l == 0.0f ? broadcast(kInfinity) : log2(l));
      }
      write();
    }
  }

  // out -= sum over the keys of p z dw, of a block of queries.
  void subtract_weights_terms(const Head<Element>& head, Index t0, Index n, BackwardScratch& s,
                              float* out) const {
    load_block(head, t0, n, s, false);
    const float keep_scale = keep_scale_of(p);
    for (Index c = 0; c < s.num_columns; ++c) {
      BackwardColumn& state = s.columns[c];
      alignas(64) float sums[kColumn] = {};
      each_tile(head, t0, n, c, nullptr, s, [&](const Column& column, Index key, Index n) {
        float* prob = state.p;
        this->spread_nan(state, n, prob);
        state.norm.exponentiate(n, head.units.to_log2, prob);
        weights_gradient_tile(head, column, key, n, s.dw);
        if (p.dropout_p > 0.0) dropout_tile(head, column, key, n, keep_scale, s.z);
        for (Index j = 0; j < n; ++j) {
          for (Index lane = 0; lane < kColumn; lane += kLanes) {
            const Index i = j * kColumn + lane;
            Vec term = load(prob + i) * load(s.dw + i);
            if (p.dropout_p > 0.0) term *= load(s.z + i);
            store(sums + lane, load(sums + lane) + term);
          }
        }
      });
      for (Index lane = 0; lane < min_of(n - c * kColumn, kColumn); ++lane)
        out[c * kColumn + lane] -= sums[lane];
    }
  }

 private:
  // Calls body(column, key, n) for the tiles of a block's column c, once their scores are in its p.
  template <class Body>
  void each_tile(const Head<Element>& head, Index t0, Index rows_in_block, Index c,
                 float* column_max, BackwardScratch& s, const Body& body) const {
    const BackwardColumn& state = s.columns[c];
    Segments segments(head, t0, 0, head.S);
    for (Segment segment; segments.next(&segment);) {
      const Column column = column_of(head, t0, rows_in_block, c, segment);
      for (Index key = column.begin; key < column.end; key += kKeys) {
        const Index n = min_of(kKeys, column.end - key);
        if (s.worker->stops(column.rows * n)) return;
        Index k_row;
        const float* k = load_keys(head.k + key * p.k.t, p, n, Use::kAlongRows, s.k_tile, &k_row);
        DeadKeys dead;
        scores_of(head, column, key, n, k, k_row, state.q_t, state.p, nullptr, column_max, &dead);
        body(column, key, n);
      }
    }
  }
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
