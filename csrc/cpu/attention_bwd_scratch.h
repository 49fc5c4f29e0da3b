// One thread's memory in the passes of the backward.
#pragma once
#include "keys.h"
#include "probabilities.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kKeys = 64;          // keys of one tile; ranges of keys begin at multiples of it
constexpr Index kKeysPerItem = 256;  // keys of one item where keys are shared out

// Whether key heads are too few to be shared out whole: then dq is computed apart from dk and dv, 7
// products instead of 5.
inline bool are_few(Index heads, Index threads) {
  return (heads + threads - 1) / threads * 5 * threads > heads * 7 + 2;
}

// What is read once per column of queries.
struct BackwardColumn {
  Norm norm;
  float nan[kColumn];  // with norm.has_nan: NaN where its row was, else 0
  float row_term[kColumn];
  float dentropy[kColumn];
  float* q_t;   // as load_queries has them
  float* do_t;  // [D_v][kColumn]
  float* dq_t;  // [D][kColumn]
  float* p;     // [kKeys][kColumn] probabilities times z of the current tile
  float* ds;    // [kKeys][kColumn]
  Start start;
};

struct BackwardScratch {
  Index D_pad, D_v_pad;
  Index num_columns;
  BackwardColumn* columns;
  float *p_all, *ds_all;     // [num_columns][kKeys][kColumn]
  float *q_rows, *do_rows;   // [num_columns * kColumn][D_pad | D_v_pad], q times scale
  float *z, *dw, *dcapped;   // [kKeys][kColumn]
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

inline BackwardScratch make_scratch(const AttentionParams& p, const ScratchPlan& plan,
                                    Parts& parts) {
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

}  // namespace attnfast::cpu::ATTNFAST_ISA
