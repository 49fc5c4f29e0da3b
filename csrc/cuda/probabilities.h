// Tiles of probabilities from the saved norm, for the passes that follow the forward.
//   p = exp(s - m) / l
#pragma once
#include "arguments.h"
#include "blocks.h"
#include "head.h"
#include "scores.h"

namespace attnfast::cuda {

template <int kD>
struct ProbabilityShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kM = kWarps * 16, kN = 32;
  static constexpr int kSharedBytes = (kM + kN) * kD * 2;
};

// The bias's gradient has a tile of do beside that of q, and of v beside that of k.
template <int kD>
struct BiasShape : ProbabilityShape<kD> {
  static constexpr int kSharedBytes = 2 * ProbabilityShape<kD>::kSharedBytes;
};

// Cells' sums lie where the tiles were, place by place, and behind them those of rows of cells.
template <int kD>
struct CellShape : ProbabilityShape<kD> {
  using Of = ProbabilityShape<kD>;
  static constexpr int kTotals = Of::kM * Of::kN * 4;
  static constexpr int kSharedBytes = max_of(Of::kSharedBytes, 2 * kTotals);
};

// Distances have sums of bins beside the tiles.
constexpr int kBins = 64, kDistances = 66;  // two columns follow the bins

template <int kD>
struct DistanceShape : ProbabilityShape<kD> {
  using Of = ProbabilityShape<kD>;
  static constexpr int kTiles = Of::kSharedBytes;
  static constexpr int kSharedBytes = kTiles + Of::kM * kBins * 4;
};

// The norm of a lane's two queries; 0 and inf where there is no key, or no query.
struct OwnNorms {
  float m[2] = {}, log2_l[2] = {kInfinity, kInfinity};

  template <class Params>
  ATTNFAST_DEVICE OwnNorms(const Params& p, const Head& head, int t0, int lane) {
    ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
      const int t = t0 + r * 8 + lane / 4;
      if (t >= head.T) continue;
      const float* at = p.norm + head.row_number(p, t);
      m[r] = load_global(at), log2_l[r] = load_global(at + p.norm_plane);
    }
  }
};

// p before dropout of the block's queries from t_block on and keys from s0 on, this warp's share;
// false, and p untouched, where no query reaches a key. All warps take part.
template <class Element, int kD, class Arguments, int kN>
ATTNFAST_DEVICE bool probability_tile(const Arguments& a, const Head& head, int t_block, int s0,
                                      float (&p)[1][kN][4], int warp, int lane) {
  using Shape = ProbabilityShape<kD>;
  static_assert(kN * 8 == Shape::kN);
  const int t0 = t_block + warp * 16, t_last = min_of(t_block + Shape::kM, head.T) - 1;
  if (t_block >= head.T || s0 >= head.end_key(t_last) ||
      s0 + Shape::kN <= head.first_key(t_block)) {
    return false;
  }
  const int slot = a.p.blocks.starts ? slot_at(a.p.blocks, head, t_block, s0) : kFull;
  if (slot == kEmpty) return false;
  const uint32_t q_tile = shared_memory(), k_tile = q_tile + Shape::kM * kD * 2;
  sync_block();  // no warp reads the last tiles any more
  load_tile<kD, Shape::kM, Shape::kThreads, true>(
      q_tile, head.queries_of<Element>(a.p.q, a.p.D, a.q_aligned), t_block);
  load_tile<kD, Shape::kN, Shape::kThreads, true>(
      k_tile, head.keys_of<Element>(a.p.k, a.p.D, a.k_aligned), s0);
  commit_copies();
  wait_copies<0>();
  sync_block();  // both are here
  const ScoreEdits edits(a, head);
  const OwnNorms norms(a.p, head, t0, lane);
  ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
    ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) p[0][n][e] = 0.0f;
  }
  multiply_rows_by_rows<Element, kD>(p, q_tile + warp * 16 * kD * 2, k_tile, lane);
  edits.apply<false>(p, head, t0, s0, lane, crosses_edge(head, t0, 16, s0, Shape::kN));
  BlockBits<true, false, 1, kN>(a.p.blocks, slot, t0, s0, lane).mask(p);
  ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
    ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
      const float depth = p[0][n][e] - norms.m[e / 2];
      p[0][n][e] = exp2_fast(fmaf(depth, a.units.to_log2, -norms.log2_l[e / 2]));
    }
  }
  return true;
}

// Sums down the block's 32 columns, of which each lane has what its rows add to [n][0, 1]: in warp
// 0, lane l gets column l. All warps take part.
template <int kWarps>
ATTNFAST_DEVICE float column_totals(const float (&column)[4][2], int warp, int lane) {
  sync_block();  // no warp reads the tiles any more
  ATTNFAST_UNROLL for (int n = 0; n < 4; ++n) {
    ATTNFAST_UNROLL for (int e = 0; e < 2; ++e) {
      float x = column[n][e];
      x += shuffle_xor(x, 4);
      x += shuffle_xor(x, 8);
      x += shuffle_xor(x, 16);
      if (lane < 4) store_shared(shared_memory() + (warp * 32 + n * 8 + lane * 2 + e) * 4, x);
    }
  }
  sync_block();
  float total = 0.0f;
  for (int w = 0; warp == 0 && w < kWarps; ++w) {
    total += load_shared<float>(shared_memory() + (w * 32 + lane) * 4);
  }
  return total;
}

}  // namespace attnfast::cuda
