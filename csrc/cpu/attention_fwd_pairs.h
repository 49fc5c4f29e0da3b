// The forward's tiles with both products on pairs of bf16 (pairs.h).
#pragma once
#include "attention_fwd_tiles.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// exponentiate without statistics, p leaving as pairs of keys.
template <bool kScaled, int kPlanes>
void exponentiate_pairs(ForwardColumn& state, Index n, float to_log2, const float* s, float* pairs,
                        Index plane) {
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec m = load(state.m + lane);
    const Vec base = m == -kInfinity ? zeros() : m;
    const auto p_of = [&](Index j) {
      const Vec depth = load(s + j * kColumn + lane) - base;
      return exp2(kScaled ? depth * to_log2 : depth);
    };
    Vec l_even = zeros(), l_odd = zeros();
    Index j = 0;
    for (; j + 1 < n; j += 2) {
      const Vec even = p_of(j), odd = p_of(j + 1);
      l_even += even, l_odd += odd;
      store_pairs<kPlanes>(even, odd, pairs + j / 2 * kColumn + lane, plane);
    }
    if (j < n) {
      const Vec even = p_of(j);
      l_even += even;
      store_pairs<kPlanes>(even, zeros(), pairs + j / 2 * kColumn + lane, plane);
    }
    store(state.l + lane, load(state.l + lane) + (l_even + l_odd));
  }
}

template <class Element, int kPlanes>
struct ForwardTiles {
  // Parts begin with a tile register's rows, or with a pair; keys too many are masked by position.
  static constexpr Index kUnit = kHasTiles ? kTileSize : 2, kPanelKeys = kPanel, kStepKeys = kPanel;

  // Tile registers take what the second-level cache holds.
  static Index keys_per_tile(const AttentionParams&) { return kPairKeys; }

  // False where a query is out of the range of planes.
  static ATTNFAST_INLINE bool load_queries(const Head<Element>& head, const Column& column,
                                           ForwardColumn& state) {
    const AttentionParams& p = head.problem;
    Peak peak;
    transpose_column_in_planes<kPlanes>(head.q + column.t0 * p.q.t, p.q.t, column.rows, p.D,
                                        kScalesProducts<kPlanes> ? 1.0f : head.units.factor,
                                        state.q_t, round_up(p.D, kPanel) / 2 * kColumn, &peak);
    return kPlanes == 1 || Peak::in_range(peak.get());
  }

  static ATTNFAST_INLINE void scores(const Head<Element>& head, const Column& column,
                                     const ForwardColumn& state, const TilePart& part,
                                     const KeyTile& tile, ForwardScratch& scratch, float* tile_max,
                                     DeadKeys* dead) {
    const Index panels = (head.problem.D + kPanel - 1) / kPanel;
    const PairScores<kPlanes> products{
        {state.q_t, kColumn, panels * kPanelPairs * kColumn},
        {tile.k + part.skip * tile.k_row, tile.k_row, kPanelPairs, tile.k_plane},
        panels,
        kScalesProducts<kPlanes> ? head.units.factor : 1.0f};
    score_tile(head, column, part.first, part.n, products, scratch.s, nullptr, tile_max, dead);
  }

  // Leaves p z in pairs of keys, whole panels.
  template <bool kStats, bool kScaled>
  static ATTNFAST_INLINE void probabilities(const ForwardParams& p, const Head<Element>& head,
                                            const Column& column, ForwardColumn& state,
                                            const TilePart& part, ForwardScratch& scratch) {
    const Index n = part.n, lead = lead_of(part);
    float* pairs = scratch.p_pairs + lead / 2 * kColumn;
    if (!kStats && p.dropout_p == 0.0) {
      exponentiate_pairs<kScaled, kPlanes>(state, n, head.units.to_log2, scratch.s, pairs,
                                           kPairsPlane);
    } else {
      exponentiate<kStats, kScaled>(state, column, head.shift, part.first, n, head.units.to_log2,
                                    scratch.s);
      drop_probabilities(p, head, column, part, scratch);
      pack_row_pairs_in_planes<kPlanes>(scratch.s, kColumn, n, kColumn, n + n % 2, 1.0f, pairs,
                                        kColumn, kPairsPlane);
    }
    const Index end = (lead + n + 1) / 2;
    for (int plane = 0; plane < kPlanes; ++plane) {
      float* all = scratch.p_pairs + plane * kPairsPlane;
      memset(all, 0, lead / 2 * kColumn * sizeof(float));
      memset(all + end * kColumn, 0,
             (panels_of(part) * kPanelPairs - end) * kColumn * sizeof(float));
    }
  }

  static ATTNFAST_INLINE void add_values(const ForwardParams& p, const Column& column,
                                         ForwardColumn& state, const TilePart& part,
                                         const KeyTile& tile, ForwardScratch& scratch,
                                         const DeadKeys& dead) {
    const Index lead = lead_of(part), panels = panels_of(part);
    const Index D_v_pad = round_up(p.D_v, kTileSize), panel_floats = D_v_pad * kPanelPairs;
    const LiveKeys live{lead, lead + part.n, column.begin - part.first + lead,
                        column.end - part.first + lead, dead};
    Index v_plane = tile.v_plane;
    const float* v = without_poison<kPlanes>(tile.v + part.skip / kPanel * panel_floats, D_v_pad,
                                             tile.v_plane, panels, live, scratch.v_clean, &v_plane);
    multiply_pairs<kPlanes>(p.D_v, kColumn, panels, PairsA{v, kPanelPairs, panel_floats, v_plane},
                            PairsB{scratch.p_pairs, kColumn, kPairsPlane},
                            MatrixC{state.o_t, kColumn}, state.start);
    state.start = Start::kAccumulate;
  }

 private:
  // Keys of the part's first panel that come before it, and its panels.
  static Index lead_of(const TilePart& part) { return part.skip % kPanel; }
  static Index panels_of(const TilePart& part) {
    return (lead_of(part) + part.n + kPanel - 1) / kPanel;
  }
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
