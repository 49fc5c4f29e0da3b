// What the forward's tiles share, and those whose products are in fp32.
//
// ForwardTiles<Element, kPlanes>, here for 0 planes and in attention_fwd_pairs.h for pairs of bf16:
//
//   load_queries   a column's q, transposed
//   scores         q k^T with every option, and each query's largest
//   probabilities  s -> p z with p = exp(s - m), folded into l and the statistics
//   add_values     o += p z v
//
// kUnit, kPanelKeys: parts of a tile, and tiles, begin at multiples of so many keys.
#pragma once
#include "dropout.h"
#include "keys.h"

namespace attnfast::cpu::ATTNFAST_ISA {

struct ForwardColumn {
  float m[kColumn], l[kColumn];  // running maximum, in the scores' units, and sum
  float depth_sum[kColumn], distance_sum[kColumn];  // of p (s - m), of p |j - t'|
  float* q_t;                                       // [D][kColumn], or pairs of D
  float* o_t;                                       // [D_v][kColumn]
  Start start;                                      // whether o_t holds anything yet
};

constexpr Index kPairKeys = 64;                         // of one tile on pairs
constexpr Index kPairsPlane = kPairKeys / 2 * kColumn;  // of p in pairs of keys

struct ForwardScratch {
  float *s, *z;
  float *k, *v;              // a packed tile
  float *p_pairs, *v_clean;  // [planes][kMaxKeys / 2][kColumn]; a tile of v
  ForwardColumn* columns;
  Prefetcher next_item, next_tile;
  Index next_tile_lines = 0;  // asked for with kTileRows keys of a column
  Worker* worker = nullptr;

  template <class Element, int kPlanes>
  ForwardScratch(Parts& parts, const AttentionParams& p, Index num_columns,
                 const PackedHeads<Element, kPlanes>& packed) {
    const auto floats = [&](Index n) { return parts.take<float>(n); };
    s = floats((kMaxKeys + kTileSize) * kColumn);
    z = floats(p.dropout_p > 0.0 ? kMaxKeys * kColumn : 0);
    columns = parts.take<ForwardColumn>(num_columns);
    constexpr Index kPlaneCount = kPlanes ? kPlanes : 1;
    for (Index c = 0; c < num_columns; ++c) {
      float* q_t = floats(kPlaneCount * round_up(p.D, kPanel) * kColumn);
      float* o_t = floats(round_up(p.D_v, kTileSize) * kColumn);
      if (columns) columns[c].q_t = q_t, columns[c].o_t = o_t;
    }
    p_pairs = floats(kPlanes * kPairsPlane);
    v_clean = floats(kPlanes ? packed.layout.v_floats(kMaxKeys) : 0);
    const bool packs_tiles = kPlanes < 2 && !packed.by_team();
    Index k_tile = packs_tiles ? packed.layout.k_floats(kMaxKeys) : 0;
    Index v_tile = packs_tiles ? packed.layout.v_floats(kMaxKeys) : 0;
    if (kPlanes > 1) {  // out of range: in fp32
      const KeyLayout<Element, 0> in_fp32(p);
      k_tile = in_fp32.k_floats(kMaxKeys), v_tile = in_fp32.v_floats(kMaxKeys);
    }
    k = floats(k_tile);
    v = floats(v_tile);
  }
};

// The tile of keys key .. key + n - 1, packed by the team or into scratch.
template <class Element, int kPlanes>
KeyTile load_keys(const Head<Element>& head, Index key, Index n,
                  const PackedHeads<Element, kPlanes>& packed, ForwardScratch& scratch) {
  const AttentionParams& p = head.problem;
  const KeyLayout<Element, kPlanes>& layout = packed.layout;
  if (packed.by_team()) {
    const Index index = head.b * p.H_kv + head.h / (p.H / p.H_kv);
    return layout.tile(head, key, packed.k(index), packed.v(index), packed.capacity(index));
  }
  Peaks peaks;
  layout.pack(head, key, n, scratch.k, scratch.v, kMaxKeys, &peaks);
  return layout.tile(head, key, scratch.k ? scratch.k - key * layout.k_row : nullptr,
                     scratch.v ? scratch.v - layout.v_offset(key) : nullptr, kMaxKeys);
}

// s -> p = exp2((s - m) * to_log2) in place, folded into l and the statistics. Unless kScaled,
// to_log2 is 1.
template <bool kStats, bool kScaled>
void exponentiate(ForwardColumn& state, const Column& column, Index shift, Index key, Index n,
                  float to_log2, float* s) {
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec m = load(state.m + lane);
    const Vec base = m == -kInfinity ? zeros() : m;
    const IVec t = positions(column, shift, lane);
    Vec l = zeros(), depth_sum = zeros(), distance_sum = zeros();
    for (Index j = 0; j < n; ++j) {
      float* x = s + j * kColumn + lane;
      const Vec depth = load(x) - base;
      const Vec p = exp2(kScaled ? depth * to_log2 : depth);
      l += p;
      if (kStats) {
        depth_sum += p > 0.0f ? p * depth : zeros();
        distance_sum += p * abs(__builtin_convertvector(t - static_cast<int32_t>(key + j), Vec));
      }
      store(x, p);
    }
    store(state.l + lane, load(state.l + lane) + l);
    if (kStats) {
      store(state.depth_sum + lane, load(state.depth_sum + lane) + depth_sum);
      store(state.distance_sum + lane, load(state.distance_sum + lane) + distance_sum);
    }
  }
}

// Which keys of a tile: n from `first` on, `skip` after the tile's first.
struct TilePart {
  Index first, skip, n;
};

// s *= z, where dropout is on. What is kept is scaled with o, at the end.
template <class Element>
ATTNFAST_INLINE void drop_probabilities(const ForwardParams& p, const Head<Element>& head,
                                        const Column& column, const TilePart& part,
                                        ForwardScratch& scratch) {
  if (p.dropout_p == 0.0) return;
  dropout_tile(head, column, part.first, part.n, 1.0f, scratch.z);
  for (Index i = 0; i < part.n * kColumn; i += kLanes) {
    store(scratch.s + i, load(scratch.s + i) * load(scratch.z + i));
  }
}

template <class Element, int kPlanes>
struct ForwardTiles;

template <class Element>
struct ForwardTiles<Element, 0> {
  static constexpr Index kUnit = 1, kPanelKeys = 1, kStepKeys = kTileRows;

  // About what the first-level cache holds of k or v.
  static Index keys_per_tile(const AttentionParams& p) {
    const Index fits = (36 << 10) / (sizeof(float) * max_of(max_of(p.D, p.D_v), 1));
    return min_of(max_of(fits / kTileRows * kTileRows, 4 * kTileRows), kMaxKeys);
  }

  static ATTNFAST_INLINE bool load_queries(const Head<Element>& head, const Column& column,
                                           ForwardColumn& state) {
    const AttentionParams& p = head.problem;
    transpose_in(head.q + column.t0 * p.q.t, p.q.t, column.rows, p.D, head.units.factor, state.q_t);
    return true;
  }

  static ATTNFAST_INLINE void scores(const Head<Element>& head, const Column& column,
                                     const ForwardColumn& state, const TilePart& part,
                                     const KeyTile& tile, ForwardScratch& scratch, float* tile_max,
                                     DeadKeys* dead) {
    const FloatScores products{state.q_t,          tile.k + part.skip * tile.k_row,
                               tile.k_row,         head.problem.D,
                               &scratch.next_tile, scratch.next_tile_lines};
    score_tile(head, column, part.first, part.n, products, scratch.s, nullptr, tile_max, dead);
  }

  template <bool kStats, bool kScaled>
  static ATTNFAST_INLINE void probabilities(const ForwardParams& p, const Head<Element>& head,
                                            const Column& column, ForwardColumn& state,
                                            const TilePart& part, ForwardScratch& scratch) {
    exponentiate<kStats, kScaled>(state, column, head.shift, part.first, part.n, head.units.to_log2,
                                  scratch.s);
    drop_probabilities(p, head, column, part, scratch);
  }

  static ATTNFAST_INLINE void add_values(const ForwardParams& p, const Column&,
                                         ForwardColumn& state, const TilePart& part,
                                         const KeyTile& tile, ForwardScratch& scratch,
                                         const DeadKeys& dead) {
    state.start = gather_keys(tile.v + part.skip * tile.v_row, tile.v_row, part.n, p.D_v, scratch.s,
                              state.o_t, state.start, dead);
  }
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
