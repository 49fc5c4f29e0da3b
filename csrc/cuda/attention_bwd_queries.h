// Attention backward for queries, one warp per 16 or 32 of them: dk and dv's counterpart, so that
// neither needs atomics and both repeat bit for bit.
//   s = q k^T    dP = do v^T    dq += scale dx k
// Grid:   (batch entry, head, block of kStay queries); the last ones, with causal longest, first
// Memory: the queries' q and do in shared memory, and a ring of k and v; s, dP, dq in registers
// Limits: D and D_v up to kD; bf16, fp16
#pragma once
#include "gradients.h"
#include "launch.h"

namespace attnfast::cuda {

template <class Element, int kD, Form kForm, bool kSmall>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((BackwardShape<kD, kForm, false, kSmall>::kThreads), 1)
    attention_bwd_queries_kernel(ATTNFAST_PARAMS BackwardArguments arguments) {
  using Shape = BackwardShape<kD, kForm, false, kSmall>;
  constexpr bool kPlain = Shape::kPlain, kBlocks = Shape::kBlocks;
  constexpr int kStay = Shape::kStay, kMove = Shape::kMove, kThreads = Shape::kThreads;
  constexpr int kRowTiles = Shape::kRowTiles;
  if (!has_code<Element, Shape::kOnTuring, !kSmall>()) return;
  const BackwardParams& p = arguments.p;

  // Setup
  const int64_t blocks = arguments.blocks, bh = block_index() / blocks;
  const int t_block = static_cast<int>(blocks - 1 - block_index() % blocks) * kStay;
  const Head head(p, arguments.rows_q, arguments.rows_k, bh / p.H, bh % p.H);
  if (t_block >= head.T) return;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int t0 = t_block + warp * kRowTiles * 16;  // the warp's first query
  const int t_last = min_of(t_block + kStay, head.T) - 1;
  const int key_begin = head.first_key(t_block) / kMove * kMove, key_end = head.end_key(t_last);
  const ScoreEdits edits(arguments, head);
  const Philox philox(p, arguments.dropout, head.b, head.h);
  const float keep_scale = arguments.dropout.keep_scale;
  const OwnTerms<kRowTiles> terms(TermPlanes(arguments, head.b, head.h), t0, head.T, lane);

  const uint32_t q_tile = shared_memory(), do_tile = q_tile + Shape::kStayBytes;
  const uint32_t ring = do_tile + Shape::kStayBytes;
  const uint32_t own = warp * kRowTiles * 16 * kD * 2;  // the warp's rows of q_tile and do_tile
  const auto stage_of = [&](int s0, int turn) {
    const int tile = kBlocks ? turn : s0 / kMove;
    return ring + static_cast<uint32_t>(tile % Shape::kStages) * Shape::kStageBytes;
  };
  const auto fetch = [&](uint32_t stage, int s0) {
    load_tile<kD, kMove, kThreads, !kPlain>(
        stage, head.keys_of<Element>(p.k, p.D, arguments.k_aligned), s0);
    load_tile<kD, kMove, kThreads, !kPlain>(
        stage + Shape::kMoveBytes, head.keys_of<Element>(p.v, p.D_v, arguments.v_aligned), s0);
  };

  float dq[kRowTiles][kD / 8][4] = {};

  // Load
  TilesOf<kForm, kMove, false> tiles(p.blocks, head, t_block, key_begin, key_end);
  const int first = tiles.first();
  if (first < key_end) {
    load_tile<kD, kStay, kThreads, !kPlain>(
        q_tile, head.queries_of<Element>(p.q, p.D, arguments.q_aligned), t_block);
    load_tile<kD, kStay, kThreads, !kPlain>(
        do_tile, head.queries_of<Element>(p.grad_out, p.D_v, arguments.grad_out_aligned), t_block);
    fetch(stage_of(first, 0), first);
  }
  commit_copies();

  // Keys, tile by tile
  for (int s0 = first, next, turn = 0; s0 < key_end; s0 = next, ++turn) {
    const int slot = tiles.slot();
    wait_copies<0>();
    sync_block();  // these keys are here, and no warp reads the last ones any more
    if constexpr (Shape::kStages == 2) {
      next = tiles.after(s0);
      if (next < key_end) fetch(stage_of(next, turn + 1), next);
      commit_copies();
    }

    if (t0 < head.T) {
      const uint32_t k_rows = stage_of(s0, turn), v_rows = k_rows + Shape::kMoveBytes;
      const bool edge = crosses_edge(head, t0, kRowTiles * 16, s0, kMove);
      float s[kRowTiles][kMove / 8][4] = {}, dp[kRowTiles][kMove / 8][4] = {};
      float dcapped[kPlain ? 1 : kRowTiles][kMove / 8][4];
      uint32_t live = ~0u, kept[kRowTiles];
      ATTNFAST_UNROLL for (int m = 0; m < kRowTiles; ++m) kept[m] = ~0u;
      // Scores
      const BlockBits<kBlocks, false, kRowTiles, kMove / 8> bits(p.blocks, slot, t0, s0, lane);
      multiply_rows_by_rows<Element, kD>(s, q_tile + own, k_rows, lane);
      if constexpr (!kPlain) {
        const bool leaves_out = edits.apply<false>(s, head, t0, s0, lane, edge, dcapped);
        if (bits.mask(s) || leaves_out) live = live_columns(s);
        if (philox.threshold) {
          kept_by_dropout<false, kRowTiles, kMove / 8>(kept, philox, t0, s0, lane);
        }
      } else if (bits.mask(s)) {
        live = live_columns(s);
      }
      // dP
      multiply_rows_by_rows<Element, kD>(dp, do_tile + own, v_rows, lane);
      if constexpr (!kPlain) {
        if (p.grad_weights.data) {
          WeightGradient(p, head).template add_to<false>(dp, head, t0, s0, lane);
        }
      }
      // Probabilities, ds
      score_gradients<kPlain>(s, dp, edits, kept, keep_scale, kPlain ? nullptr : dcapped, terms);
      if (kPlain && edge) edits.mask_positions<false>(dp, head, t0, s0, lane, 0.0f);
      if constexpr (kPlain) bits.mask(dp, 0.0f);
      // dq
      add_registers_times_rows<Element, kD, !kPlain || kBlocks>(dq, dp, k_rows, live, lane);
    }
    if constexpr (Shape::kStages == 1) {
      next = tiles.after(s0);
      if (next < key_end) {
        sync_block();  // no warp reads these keys any more
        fetch(ring, next);
        commit_copies();
      }
    }
  }
  if (t0 >= head.T) return;

  // Store
  float scale[2 * kRowTiles];
  ATTNFAST_UNROLL for (int r = 0; r < 2 * kRowTiles; ++r) scale[r] = p.scale;
  auto* out = head.rows_to<Element>(p.dq, head.h, head.q_begin);
  store_rows<kD, !kPlain>(dq, scale, q_tile + own, out + t0 * p.dq.t, p.dq.t, head.T - t0,
                          static_cast<int>(p.D), arguments.dq_aligned, lane);
}

template <class Element, int kD, Form kForm>
void launch_attention_bwd_queries(const BackwardArguments& arguments, Stream stream) {
  with_shape<Element, kD, kForm, false>(stream, [&](auto small) {
    constexpr bool kSmall = decltype(small)::value;
    using Shape = BackwardShape<kD, kForm, false, kSmall>;
    BackwardArguments a = arguments;
    a.blocks = (a.p.T + Shape::kStay - 1) / Shape::kStay;
    launch<BackwardArguments>(
        kernel_name<Element, kD>("attention_bwd_queries", kForms[static_cast<int>(kForm)]),
        attention_bwd_queries_kernel<Element, kD, kForm, kSmall>, a.p.B * a.p.H * a.blocks,
        Shape::kThreads, Shape::kSharedBytes, stream, a);
  });
}

}  // namespace attnfast::cuda
